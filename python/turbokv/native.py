"""Where the built llama.cpp lies, and the one way into it from Python.

The binaries stand in `turbokv/_native` of an installed wheel, or in `build/bin` of a checkout. The ctypes
bindings beside them are llama-cpp-python's, from the same release as the sources, without a library of
their own: exactly one libllama enters the process. (`llama_cpp._ggml` would load a second libggml: never
import it.)
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from turbokv.errors import TurbokvError

PACKAGE = Path(__file__).resolve().parent
LLAMA_BENCH_LOADS = re.compile(
    r"llama-bench(\.exe)?|(lib)?(ggml.*|llama|llama-common|llama-bench-impl)\.(so|dylib|dll).*"
)


@cache
def native_dir() -> Path:
    """The folder with the tools, the libraries and turbokv-build.json."""
    candidates = (PACKAGE / "_native", PACKAGE.parent.parent / "build" / "bin")
    for folder in candidates:
        if (folder / "turbokv-build.json").is_file():
            return folder
    looked = " and ".join(str(folder) for folder in candidates)
    raise TurbokvError(
        f"llama.cpp is not built: no turbokv-build.json in {looked}. Run scripts/demo.sh, or pip install ."
    )


@cache
def build_info() -> dict[str, Any]:
    """What was built: `upstream_commit`, `bindings` (bool), `hooks` (list), `compiler`, `build_type`, `version`,
    `cuda` (version of the toolkit, None without CUDA; not there in older builds)."""
    path = native_dir() / "turbokv-build.json"
    try:
        info: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise TurbokvError(f"{path} is damaged ({error}): run `cmake -S . -B build` again, or reinstall") from error
    return info


def tool(name: str) -> Path:
    """Path of a bundled tool such as llama-server."""
    path = native_dir() / (name + (".exe" if sys.platform == "win32" else ""))
    if not path.is_file():
        raise TurbokvError(f"{name} is missing from {native_dir()}: build it with `cmake --build build`")
    return path


def has_gpu() -> bool:
    """Whether this build has llama.cpp's CUDA backend, which is never built without our kernels in it."""
    return any(native_dir().glob("*ggml-cuda*"))


def driver_hint(reason: str) -> str:
    """What to do, as the end of a message, if `reason` says that NVIDIA's driver is missing; else nothing."""
    if "libcuda.so" not in reason:
        return ""
    return ". This build is for GPUs, and libcuda comes with NVIDIA's driver: install it, or build without TURBOKV_CUDA"


def build_id() -> str:
    """12 hex digits of the SHA-256 of llama-bench and the libraries that it loads: the overlay may change while the
    commit of llama.cpp stays."""
    bench = tool("llama-bench")
    paths = sorted(file for file in bench.parent.iterdir() if LLAMA_BENCH_LOADS.fullmatch(file.name))
    return _digest(tuple((path, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in paths))


@cache  # a CUDA backend has hundreds of MB, and this is asked after every measurement
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Of the content of files, given with their sizes and times."""
    digest = hashlib.sha256()
    for path, _, _ in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@cache
def llama() -> ModuleType:
    """The module `llama_cpp.llama_cpp`, bound to our libllama."""
    folder = native_dir()
    if not build_info()["bindings"]:
        raise TurbokvError(
            f"this build is on llama.cpp {build_info()['upstream_commit']}, whose llama.h is not the one that the "
            "Python bindings were written for, so ppl and kld cannot run in this process. "
            "Build with -DTURBOKV_LLAMA_SOURCE= (empty), or use the bundled llama-perplexity"
        )
    if "llama_cpp" in sys.modules:
        raise TurbokvError("another llama_cpp is already imported in this process; use turbokv in a process of its own")
    os.environ["LLAMA_CPP_LIB_PATH"] = str(folder)
    sys.path.insert(0, str(folder / "bindings"))
    try:
        import llama_cpp.llama_cpp as lib

        _declare(lib._lib)
    except (OSError, RuntimeError, ImportError, AttributeError) as error:
        fix = driver_hint(str(error)) or ". Build again with `cmake --build build`"
        raise TurbokvError(f"libllama in {folder} does not load: {error}{fix}") from error
    finally:
        sys.path.remove(str(folder / "bindings"))
    loaded: ModuleType = lib
    loaded.llama_backend_init()
    if lib._lib.ggml_backend_reg_count() == 0:  # GGML_BACKEND_DL: backends are libraries of their own
        lib._lib.ggml_backend_load_all_from_path(os.fsencode(folder))
    return loaded


def _declare(lib: ctypes.CDLL) -> None:
    """Signatures of the functions that the bindings do not know: ggml's type table and our own two."""
    lib.ggml_type_name.argtypes, lib.ggml_type_name.restype = [ctypes.c_int], ctypes.c_char_p
    lib.ggml_type_size.argtypes, lib.ggml_type_size.restype = [ctypes.c_int], ctypes.c_size_t
    lib.ggml_blck_size.argtypes, lib.ggml_blck_size.restype = [ctypes.c_int], ctypes.c_int64
    lib.ggml_backend_reg_count.argtypes, lib.ggml_backend_reg_count.restype = [], ctypes.c_size_t
    lib.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
    lib.ggml_backend_load_all_from_path.restype = None
    type_pointer = ctypes.POINTER(ctypes.c_int)
    lib.turbokv_resolve_cache_types.argtypes = [ctypes.c_void_p, type_pointer, type_pointer]
    lib.turbokv_resolve_cache_types.restype = ctypes.c_bool
    lib.turbokv_cache_bytes.argtypes, lib.turbokv_cache_bytes.restype = [ctypes.c_void_p], ctypes.c_size_t
