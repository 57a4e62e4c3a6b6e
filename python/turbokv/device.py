"""What the layers of a model are computed on: the GPUs that llama.cpp sees, and how many layers go there.

A build with -DTURBOKV_CUDA=ON puts all layers on its GPUs unless told otherwise; a build without it has only the CPU.
A number of layers counts from the end of the model, as llama.cpp does: the output first, then the last layer.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

from turbokv import native
from turbokv.errors import TurbokvError

ALL = -1  # layers: every one of the model, and the output
TIMEOUT = 120  # seconds; a driver that wakes eight GPUs up takes some
LINE = re.compile(r"^  (\S+): (.*) \((\d+) MiB, (\d+) MiB free\)$", re.MULTILINE)


@dataclass(frozen=True)
class Device:
    """A GPU; sizes in MiB."""

    name: str  # ggml's, such as CUDA0
    description: str  # such as NVIDIA H200
    total: int
    free: int


@dataclass(frozen=True)
class Placement:
    """Where the layers of a model go."""

    gpu_layers: int = 0  # ALL, or a number; the others stay on the CPU
    device: str = "CPU"  # or the GPUs, such as `NVIDIA H200` or `2 x NVIDIA H200`

    @property
    def on_gpu(self) -> bool:
        return self.gpu_layers != 0

    @property
    def label(self) -> str:
        """For titles, and to tell results apart: `CPU`, `NVIDIA H200`, `10 layers on NVIDIA H200`."""
        partly = self.on_gpu and self.gpu_layers != ALL
        return f"{self.gpu_layers} layer{'s' * (self.gpu_layers != 1)} on {self.device}" if partly else self.device

    @property
    def title(self) -> str:
        """Behind the title of a table: nothing for the CPU, which goes without saying."""
        return f", {'on ' * (self.gpu_layers == ALL)}{self.label}" if self.on_gpu else ""

    @property
    def option(self) -> str:
        """What --gpu-layers is given for this placement."""
        return "all" if self.gpu_layers == ALL else str(self.gpu_layers)

    def identity(self) -> dict[str, Any]:
        """What has to be the same for results to be comparable: nothing on a CPU, whose name others record."""
        return {"device": self.device, "gpu_layers": self.gpu_layers} if self.on_gpu else {}

    def bench_arguments(self) -> list[str]:
        """llama-bench's options. Without a layer on it a GPU would still multiply large batches: it is left out."""
        if self.on_gpu:
            return ["-ngl", str(self.gpu_layers)]
        return ["-dev", "none"] if native.has_gpu() else []

    def server_arguments(self) -> list[str]:
        """llama-server's options, likewise."""
        if self.on_gpu:
            return ["--gpu-layers", self.option]
        return ["--device", "none"] if native.has_gpu() else []


ON_CPU = Placement()


@cache
def gpus() -> tuple[Device, ...]:
    """The GPUs that this build can use, as its llama-bench sees them; none for a build without CUDA. Asked in a process
    of its own, so that no memory of a GPU is taken here. Raises TurbokvError if the CUDA backend does not load."""
    return listed() if native.has_gpu() else ()


def listed() -> tuple[Device, ...]:
    """What `llama-bench --list-devices` prints."""
    tool = native.tool("llama-bench")
    try:
        run = subprocess.run(
            [tool, "--list-devices"], capture_output=True, text=True, errors="replace", timeout=TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TurbokvError(f"{tool} --list-devices: {error}. Does the NVIDIA driver answer (nvidia-smi)?") from None
    if run.returncode:
        said = (run.stderr.strip() or run.stdout.strip()).splitlines()
        reason = said[-1] if said else f"status {run.returncode}"
        raise TurbokvError(f"{tool} --list-devices failed: {reason}{native.driver_hint(run.stderr)}")
    return tuple(Device(name, text, int(total), int(free)) for name, text, total, free in LINE.findall(run.stdout))


def placement(asked: str | int | None = None) -> Placement:
    """For what --gpu-layers says: `all`, a number, or None for all where there is a GPU, else none. Raises TurbokvError
    if GPUs are asked for and there are none."""
    text = "all" if asked is None else str(asked).strip()
    if not re.fullmatch("all|[0-9]{1,6}", text):
        raise TurbokvError(f"--gpu-layers {text} is no number of layers: write a number, 0 for the CPU alone, or all")
    if text != "all" and int(text) == 0:
        return ON_CPU
    if found := gpus():
        counts = Counter(device.description for device in found)
        names = ", ".join(f"{n} x {name}" if n > 1 else name for name, n in counts.items())
        return Placement(ALL if text == "all" else int(text), names)
    if asked is None:
        return ON_CPU
    if native.has_gpu():
        raise TurbokvError(
            f"--gpu-layers {text}: this build has CUDA kernels, but sees no GPU. Does nvidia-smi list one, and does "
            "CUDA_VISIBLE_DEVICES leave it visible? --gpu-layers 0 uses the CPU"
        )
    raise TurbokvError(
        f"--gpu-layers {text}: this build is for the CPU alone. Leave the option out, or build with "
        "`cmake -S . -B build -DTURBOKV_CUDA=ON`, which needs CUDA 12.4 or newer"
    )
