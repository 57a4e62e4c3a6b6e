"""Energy that the machine used, where it tells it: CPU packages by RAPL, NVIDIA GPUs by NVML.

Both count what the whole package or GPU took, other processes and idling included: on a busy machine the numbers are
too high. RAPL leaves out the memory modules. Since Linux 5.10 the counters can be read by root only, unless the
administrator allows it (`chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")


@dataclass
class Counter:
    """A counter of energy that only grows, but for its wrap-around: `read` gives joules, `wrap` is where it begins
    again, None for never."""

    name: str
    read: Callable[[], float]
    wrap: float | None
    last: float = 0.0
    total: float = 0.0  # since it was made

    def __post_init__(self) -> None:
        self.last = self.read()

    def update(self) -> float:
        now = self.read()
        step = now - self.last
        if step < 0:
            step += self.wrap or 0.0
        self.total += max(step, 0.0)
        self.last = now
        return self.total


def packages(powercap: Path = POWERCAP) -> list[Counter]:
    """One counter per CPU package. Empty where there is none or reading is not allowed.

    A package is a folder `intel-rapl:N` (AMD's too) with name package-N, energy_uj and max_energy_range_uj in
    microjoules; its parts, `intel-rapl:N:M`, are in it already.
    """
    found = []
    for folder in sorted(powercap.glob("intel-rapl:*")):
        try:
            name = (folder / "name").read_text().strip()
            if folder.name.count(":") != 1 or not name.startswith("package"):
                continue
            wrap = int((folder / "max_energy_range_uj").read_text()) / 1e6
            found.append(Counter(name, lambda file=folder / "energy_uj": int(file.read_text()) / 1e6, wrap))  # type: ignore[misc]
        except (OSError, ValueError):
            continue
    return found


def gpus() -> list[Counter]:
    """One counter per NVIDIA GPU that this process sees. Empty where there is none, or none that counts energy."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except Exception:  # no driver, no library, not allowed: all the same here
        return []
    found = []
    for i, handle in enumerate(handles):

        def read(device: Any = handle) -> float:
            return (
                float(pynvml.nvmlDeviceGetTotalEnergyConsumption(device)) / 1e3
            )  # millijoules since the driver loaded

        try:
            found.append(Counter(f"GPU {i}", read, None))
        except pynvml.NVMLError:  # before Volta
            continue
    return found


class Meter:
    """Joules since it was made, over all counters. Read it at least once a minute: a RAPL counter begins again after
    some minutes, and only one wrap between two readings can be seen."""

    def __init__(self, *, with_gpus: bool, powercap: Path = POWERCAP) -> None:
        self.counters = packages(powercap) + (gpus() if with_gpus else [])

    @property
    def names(self) -> list[str]:
        return [counter.name for counter in self.counters]

    def joules(self) -> float | None:
        """None where the platform tells nothing, or stopped telling it."""
        try:
            return sum(counter.update() for counter in self.counters) if self.counters else None
        except Exception:  # a GPU fell off, a file went: no number is better than a wrong one
            self.counters = []
            return None
