"""Counters of energy, in a folder like that of Linux's powercap."""

from __future__ import annotations

from pathlib import Path

import pytest
from turbokv.energy import Counter, Meter, packages


def write_counter(powercap: Path, folder: str, name: str, microjoules: int, wrap: int = 1_000_000_000) -> Path:
    path = powercap / folder
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text(f"{wrap}\n")
    return path / "energy_uj"


def test_packages_are_added_and_their_parts_are_not(tmp_path: Path) -> None:
    first = write_counter(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    second = write_counter(tmp_path, "intel-rapl:1", "package-1", 0)
    part = write_counter(tmp_path, "intel-rapl:0:0", "core", 1_000_000)
    whole = write_counter(tmp_path, "intel-rapl:2", "psys", 1_000_000)  # the packages and more
    meter = Meter(with_gpus=False, powercap=tmp_path)
    assert meter.names == ["package-0", "package-1"]
    assert meter.joules() == 0
    for file, value in ((first, 7_500_000), (second, 1_000_000), (part, 9_000_000), (whole, 9_000_000)):
        file.write_text(str(value))
    assert meter.joules() == pytest.approx(2.5 + 1)
    assert meter.joules() == pytest.approx(2.5 + 1)


def test_counter_that_begins_again(tmp_path: Path) -> None:
    file = write_counter(tmp_path, "intel-rapl:0", "package-0", 990_000_000)
    meter = Meter(with_gpus=False, powercap=tmp_path)
    for value in (5_000_000, 995_000_000, 1_000_000):  # 15 J, 990 J, 6 J
        file.write_text(str(value))
        total = meter.joules()
    assert total == pytest.approx(15 + 990 + 6)


def test_platform_that_tells_nothing(tmp_path: Path) -> None:
    assert Meter(with_gpus=False, powercap=tmp_path / "absent").joules() is None
    (tmp_path / "intel-rapl:0").mkdir()  # without the files
    write_counter(tmp_path, "intel-rapl:1", "package-1", 0).write_text("no number")
    assert packages(tmp_path) == []


def test_reading_that_is_not_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """root may read everything, so that the refusal is made up."""
    file = write_counter(tmp_path, "intel-rapl:0", "package-0", 1)
    read_text = Path.read_text

    def refuse(path: Path) -> str:
        if path == file:
            raise PermissionError(13, "Permission denied")
        return read_text(path)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert Meter(with_gpus=False, powercap=tmp_path).joules() is None


def test_counter_that_goes_leaves_no_number(tmp_path: Path) -> None:
    file = write_counter(tmp_path, "intel-rapl:0", "package-0", 1)
    meter = Meter(with_gpus=False, powercap=tmp_path)
    file.unlink()
    assert meter.joules() is None
    assert meter.joules() is None


def test_counter_without_a_wrap_never_runs_backwards() -> None:
    values = iter([10.0, 12.0, 3.0, 4.0])  # a driver that was loaded again
    counter = Counter("GPU 0", lambda: next(values), None)
    assert [counter.update() for _ in range(3)] == [2, 2, 3]
