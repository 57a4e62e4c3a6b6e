"""A/A: the same thing under two names shows no difference, and the intervals cover what they promise."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_speed import Turbokv, turbokv
from turbokv import data, speed
from turbokv.cell import Plan
from turbokv.samples import Sample, SamplesFile
from turbokv.speed import Measurement

__all__ = ["turbokv"]  # a fixture

NAMES = ("f16/f16", "turbo3/turbo3", "turbo3_64/turbo3_64")  # the last two are one on heads of 64


def simulated(seed: int, rounds: int, true_ratio: float = 1.0) -> list[Any]:
    """Results of a run on a machine whose speed drifts (a wave of 10 % over about 40 cells and a slope of 6 % over the
    run), jumps from round to round (4 %) and scatters from cell to cell (3 %)."""
    rng = np.random.default_rng(seed)
    plan = Plan(Path("m.gguf"), NAMES, (0, 2048), 512, 32, 2, rounds, seed)
    file = SamplesFile(None, {})
    phase, total, done = rng.uniform(0, 2 * math.pi), rounds * len(plan.order(1)), 0
    for number in range(1, rounds + 1):
        level = rng.normal(0, 0.04)
        for cell in plan.order(number):
            drift = 0.1 * math.sin(phase + 2 * math.pi * done / 40) - 0.06 * done / total
            tg, pp = 100 * np.exp(level + drift + rng.normal(0, 0.03, 2))
            factor = 1.0 if cell.cache == "f16/f16" else true_ratio
            file.append(Sample(number, cell.cache, cell.depth, float(pp) * factor, float(tg) * factor, 1.0))
            done += 1
    settings: dict[str, Any] = defaultdict(str, seed=seed)
    return speed.records(Measurement(plan, file, settings))


@pytest.mark.parametrize("rounds", [3, 5, 8])
def test_interval_of_the_ratio_covers_1_in_about_95_of_100_runs(rounds: int) -> None:
    inside = [
        summary.ratio_ci95[0] <= 1 <= summary.ratio_ci95[1]
        for seed in range(250)
        for result in simulated(seed, rounds)
        if result.cache != "f16/f16"
        for summary in (result.tg, result.pp)
    ]
    assert len(inside) == 250 * 2 * 2 * 2
    assert 0.90 <= np.mean(inside) <= 0.98


def test_difference_of_a_tenth_is_found_in_spite_of_the_noise() -> None:
    found = [r.tg.ratio_ci95[0] > 1 for seed in range(100) for r in simulated(seed, 8, 1.1) if r.cache != "f16/f16"]
    assert np.mean(found) > 0.8


def test_ratios_are_steadier_than_speeds_on_a_machine_that_drifts() -> None:
    def width(ends: tuple[float, float]) -> float:
        return math.log(ends[1] / ends[0])

    results = [r for seed in range(50) for r in simulated(seed, 5) if r.cache != "f16/f16"]
    assert np.median([width(r.tg.ratio_ci95) for r in results]) < 0.7 * np.median([width(r.tg.ci95) for r in results])


def test_one_cache_under_two_names_is_measured_twice(tmp_path: Path, turbokv: Turbokv) -> None:
    """On heads of 64 both names give turbo3_64: two series with the same bytes, compared with f16 in the same rounds.
    How fast they are on a shared machine is no matter for a test; the statistics are tested above."""
    path = tmp_path / "aa.json"
    arguments = ("--depth", "0", "--cache", "turbo3,turbo3_64", "--rounds", "2", "-n", "4", "-p", "16", "-t", "1")
    assert turbokv("speed", "-m", data.BIAS, *arguments, "--json", path).returncode == 0
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["cache"] for record in records] == list(NAMES)
    assert records[1]["kv_bytes"] == records[2]["kv_bytes"] < records[0]["kv_bytes"]
    assert [len(record["samples"]) for record in records] == [2, 2, 2]
