"""The circumstances of a measurement, for its record: model, machine, build."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from pathlib import Path

from turbokv import __version__, engine, native
from turbokv.doctor import cpu_name
from turbokv.errors import TurbokvError
from turbokv.fingerprint import model_fingerprint
from turbokv.record import Build, Environment, Model


@cache
def model(path: Path) -> Model:
    """What the file says of itself. Raises TurbokvError if it is no whole GGUF model."""
    import gguf  # slow to import

    fingerprint = model_fingerprint(path)
    try:
        reader = gguf.GGUFReader(path)
        architecture = str(reader.fields["general.architecture"].contents())
        n_ctx = reader.get_field(f"{architecture}.context_length")
        return Model(
            name=path.name,
            bytes=path.stat().st_size,
            fingerprint=fingerprint,
            architecture=architecture,
            parameters=sum(int(tensor.n_elements) for tensor in reader.tensors),
            n_ctx_train=int(n_ctx.contents()) if n_ctx else None,
        )
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise TurbokvError(f"{path} is no whole GGUF model ({error}). Is the download complete?") from None


@cache
def environment() -> Environment:
    gpu, driver = _gpu()
    return Environment(
        cpu=cpu_name(),
        cores=engine.default_threads(),
        gpu=gpu,
        gpu_driver=driver,
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        OMP_WAIT_POLICY=os.environ.get("OMP_WAIT_POLICY", ""),
    )


def _gpu() -> tuple[str | None, str | None]:
    """Number and name of the NVIDIA GPUs, and the version of their driver; None where the driver tells of none."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        names = [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles]
        driver = str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None, None
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or None, driver


@cache
def build() -> Build:
    commit, dirty = _checkout(native.PACKAGE.parent.parent)
    return Build(
        turbokv=__version__,
        commit=commit,
        dirty=dirty,
        upstream_commit=native.build_info()["upstream_commit"],
        build=native.build_id(),
        cuda=native.build_info().get("cuda"),
    )


def _checkout(root: Path) -> tuple[str | None, bool | None]:
    """Commit of turbokv's own checkout, and whether files differ from it; None twice where there is none."""
    if not (root / ".git").exists() or not (root / "ggml-ext").is_dir():
        return None, None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # results/ is where measurements are written to: that it changes says nothing about the code.
        changes = git("status", "--porcelain", "--", ".", ":(exclude)results")
        return git("rev-parse", "HEAD"), bool(changes)
    except (OSError, subprocess.CalledProcessError):
        return None, None
