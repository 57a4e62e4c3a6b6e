"""`turbokv doctor`: what is built, where it lies, and whether it is sound; which hooks apply to another llama.cpp."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from turbokv import __version__, cache_type, data, decode_path, device, engine, native
from turbokv.cache_type import CachePair
from turbokv.errors import TurbokvError
from turbokv.spec import FAMILIES, TYPES

HEAD_DIMS = {data.MINI: 128, data.BIAS: 64}  # of the built-in models
CONTROLS = ("f16", "q8_0")  # llama.cpp's own types, whose decode path is not ours to judge
N_DECODE_FINDINGS = len(HEAD_DIMS) * len(CONTROLS + FAMILIES)


@dataclass(frozen=True)
class Finding:
    """One entry of the report, a line unless `value` has several; `ok` is None for plain facts."""

    name: str
    value: str
    ok: bool | None = None


def cpu_name() -> str:
    """The CPU's model name as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.is_file() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _tool_works(name: str) -> Finding:
    try:
        path = native.tool(name)
        # --help exits with 0 or 1 depending on the tool; only a tool that cannot start is a finding
        run = subprocess.run([path, "--help"], capture_output=True, timeout=60, check=False)
    except (TurbokvError, OSError, subprocess.TimeoutExpired) as error:
        return Finding(name, str(error), False)
    if run.returncode in (0, 1) and run.stdout + run.stderr:
        return Finding(name, str(path), True)
    hint = native.driver_hint(run.stderr.decode(errors="replace"))
    return Finding(name, f"{path} does not start (status {run.returncode}){hint}", False)


def _types_registered() -> Finding:
    found = cache_type.type_ids()
    wrong = [
        t.name for t in TYPES if found.get(t.name) != t.type_id or cache_type.bits_per_value(t.name) != t.bits_per_value
    ]
    return Finding(
        "types", f"wrong or missing: {', '.join(wrong)}" if wrong else ", ".join(t.name for t in TYPES), not wrong
    )


def _features() -> str:
    llama = native.llama()
    return str(llama.llama_print_system_info().decode().strip().rstrip("|").strip())


def findings() -> Iterator[Finding]:
    """All findings, cheap ones first. A broken build gives findings with ok=False, not an exception."""
    yield Finding("turbokv", __version__)
    try:
        info = native.build_info()
        yield Finding("native folder", str(native.native_dir()), True)
    except TurbokvError as error:
        yield Finding("native folder", str(error), False)
        return
    yield Finding("llama.cpp", f"{info['upstream_commit']} ({info['upstream_source']})")
    yield Finding("compiler", f"{info['compiler']}, {info['build_type']}")
    hooks = info["hooks"]
    lines, files = sum(hook["lines"] for hook in hooks), {hook["file"] for hook in hooks}
    yield Finding("hooks", f"{len(hooks)} hooks, {lines} inserted lines in {len(files)} files")
    for hook in hooks:
        yield Finding(f"  {hook['name']}", f"{hook['file']}: {hook['why']}")
    yield Finding("CPU", f"{cpu_name()}, {platform.machine()}")
    yield from _gpus(info)
    if info["bindings"]:
        yield from _library()
    else:
        yield Finding("bindings", "none: this llama.cpp has another llama.h, so ppl and kld refuse; the tools work")
    if "tools" not in info:
        fix = "run `cmake -S . -B build` again, or reinstall"
        yield Finding("tools", f"turbokv-build.json names none, it was written by an older turbokv: {fix}", False)
    for name in info.get("tools", ()):
        yield _tool_works(name)
    for path in (data.MINI, data.BIAS, data.SAMPLE):
        yield Finding(path.name, str(path), path.is_file())


def _gpus(info: dict[str, object]) -> Iterator[Finding]:
    """What the build can do with a GPU, and the GPUs that it sees."""
    if not native.has_gpu():
        yield Finding("GPU", "not used: this build is for the CPU alone; -DTURBOKV_CUDA=ON builds for NVIDIA GPUs")
        return
    version = f"CUDA {info['cuda']}, " if info.get("cuda") else ""
    yield Finding("GPU kernels", f"{version}llama.cpp's CUDA backend with our kernels")
    try:
        found = device.gpus()
    except TurbokvError as error:
        yield Finding("GPU", str(error), False)
        return
    for gpu in found:
        yield Finding(f"GPU {gpu.name}", f"{gpu.description}, {gpu.total} MiB, {gpu.free} MiB free", True)
    if not found:
        yield Finding("GPU", "none is visible (nvidia-smi, CUDA_VISIBLE_DEVICES): the CPU computes")


def _library() -> Iterator[Finding]:
    try:
        yield Finding("libllama", str(Path(native.llama()._lib._name)), True)
        yield Finding("CPU features", _features())
        yield _types_registered()
    except TurbokvError as error:
        yield Finding("libllama", str(error), False)


def decode_findings() -> Iterator[Finding]:
    """N_DECODE_FINDINGS findings, some seconds each: do decoding and prefill agree, for every type as K and V?

    Raises TurbokvError if nothing can be measured, KeyboardInterrupt within engine.interrupts.deferred().
    """
    for path in HEAD_DIMS:
        with engine.Model(path) as model:
            tokens = decode_path.sample_window(model)
            for family in CONTROLS + FAMILIES:
                yield _decode_finding(model, family, tokens)


def _decode_finding(model: engine.Model, family: str, tokens: NDArray[np.int32]) -> Finding:
    name = f"{model.path.stem} {family}"
    head_dim, blocks = HEAD_DIMS[model.path], [t.block for t in TYPES if t.family == family]
    if blocks and all(head_dim % block for block in blocks):
        return Finding(
            name, f"skipped: {family} has blocks of {min(blocks)} values, this model has heads of {head_dim}"
        )
    pair, threads = CachePair(family, family), engine.default_threads()
    try:
        name = f"{model.path.stem} {model.effective(pair).k}"
        found = decode_path.measure(model, pair, tokens, threads)
        numbers = f"KLD {found.mean_kld:.1e}, same top {100 * found.same_top:.2f} % of {found.n_scored}"
        if family in CONTROLS:
            return Finding(name, f"{numbers} (llama.cpp's own type, for comparison)")
        if found.ok:
            return Finding(name, numbers, True)
        steps = decode_path.measure_steps(model, pair, tokens, threads)
    except TurbokvError as error:
        return Finding(name, str(error), False)
    bounds = f"must be below {decode_path.MAX_KLD:g} and above {100 * decode_path.MIN_SAME_TOP:g} %"
    cause = "rounding alone made the caches drift apart" if steps.ok else "the kernels of decoding and prefill disagree"
    return Finding(
        name, f"{numbers}, {bounds}. With one cache for both the KLD is {steps.mean_kld:.1e}: {cause}", False
    )


def hook_findings(source: Path) -> Iterator[Finding]:
    """Does each hook apply to the llama.cpp tree `source`, given the hooks before it that do? Last comes a summary.

    Only reads, and needs no build. Raises TurbokvError if `source` is no llama.cpp tree.
    """
    script = _apply_hooks()
    if not script.is_llama_cpp(source):
        raise TurbokvError(
            f"{source} is no llama.cpp tree, it has no ggml/include/ggml.h: give the folder of a checkout"
        )
    hooks = script.load_hooks()
    applied: list[object] = []
    for hook in hooks:
        try:
            script.hooked_files(source, [*applied, hook])
        except script.HookError as error:
            yield Finding(hook.name, str(error), False)
            continue
        applied.append(hook)
        yield Finding(hook.name, f"{hook.file}: {hook.why}", True)
    yield Finding("hooks", f"{len(applied)} of {len(hooks)} apply to {source}", len(applied) == len(hooks))


def _apply_hooks() -> ModuleType:
    """The script apply_hooks.py as a module: a wheel carries a copy, a checkout has it in ggml-ext."""
    folders = (native.PACKAGE / "_native" / "overlay", native.PACKAGE.parent.parent / "ggml-ext")
    path = next((file for folder in folders if (file := folder / "apply_hooks.py").is_file()), None)
    if path is None:
        raise TurbokvError(f"there is no apply_hooks.py in {' or '.join(map(str, folders))}: install turbokv again")
    spec = importlib.util.spec_from_file_location("turbokv_apply_hooks", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks the module up by name
    spec.loader.exec_module(module)
    return module
