"""Layers on a GPU: what --gpu-layers means, what is recorded, and what is never mixed up. A list of devices plays the
GPUs: the results of a real one are tested where there is one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import example_records
import pytest
from sample_records import kld_result
from turbokv import (
    bench,
    cli,
    data,
    device,
    doctor,
    engine,
    findings,
    native,
    plan,
    reference,
    speed,
    store,
    sweep,
    throughput,
)
from turbokv.cell import Cell, Plan
from turbokv.device import ALL, ON_CPU, Device, Placement
from turbokv.errors import TurbokvError
from turbokv.record import KldResult, Record
from typer.testing import CliRunner

H200 = Device("CUDA0", "NVIDIA H200", 143771, 143000)
ALL_LAYERS, TEN_LAYERS = Placement(ALL, "NVIDIA H200"), Placement(10, "NVIDIA H200")
PLACES = (ON_CPU, ALL_LAYERS, TEN_LAYERS, Placement(ALL, "NVIDIA A10"))
RESULTS = Path(__file__).parents[2] / "results"


@pytest.fixture(autouse=True)
def cpu_build(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, built=False)


def with_gpus(monkeypatch: pytest.MonkeyPatch, *found: Device, built: bool = True) -> None:
    monkeypatch.setattr(native, "has_gpu", lambda: built)
    monkeypatch.setattr(device, "gpus", lambda: found)


def test_default_is_all_layers_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.placement() == ON_CPU
    with_gpus(monkeypatch)
    assert device.placement() == ON_CPU
    with_gpus(monkeypatch, H200)
    assert device.placement() == device.placement("all") == ALL_LAYERS
    assert device.placement("10") == TEN_LAYERS
    assert device.placement("0") == ON_CPU
    with_gpus(monkeypatch, H200, H200)
    assert device.placement().device == "2 x NVIDIA H200"


@pytest.mark.parametrize("built, reason", [(False, "-DTURBOKV_CUDA=ON"), (True, "sees no GPU")])
@pytest.mark.parametrize("asked", ["10", "all"])
def test_layers_on_a_gpu_that_is_not_there_are_refused(
    built: bool, reason: str, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus(monkeypatch, built=built)
    with pytest.raises(TurbokvError, match=f"--gpu-layers {asked}: .*{reason}"):
        device.placement(asked)
    for command in ("kld", "ppl", "needle", "speed", "serve"):
        result = CliRunner().invoke(cli.app, [command, "-ngl", asked])
        assert isinstance(result.exception, TurbokvError) and reason in str(result.exception)


@pytest.mark.parametrize("asked", ["-1", "ten", "", "1.5", "all,10"])
def test_what_is_no_number_of_layers_is_refused(asked: str) -> None:
    with pytest.raises(TurbokvError, match="is no number of layers"):
        device.placement(asked)


def fake_llama_bench(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = folder / "llama-bench"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(native, "tool", lambda _: tool)


def test_devices_are_what_llama_bench_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.listed() == ()  # the build that is tested has no GPU backend
    lines = "Available devices:\n  CUDA0: NVIDIA H200 (143771 MiB, 143000 MiB free)\n  CUDA1: A (B) (9 MiB, 8 MiB free)"
    fake_llama_bench(tmp_path, f"echo 'ggml_cuda_init: found 2' >&2; printf '{lines}\\n'", monkeypatch)
    assert device.listed() == (H200, Device("CUDA1", "A (B)", 9, 8))


def test_missing_driver_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = "error while loading shared libraries: libcuda.so.1: cannot open shared object file"
    fake_llama_bench(tmp_path, f"echo '{message}' >&2; exit 127", monkeypatch)
    with pytest.raises(TurbokvError, match=r"libcuda\.so\.1: cannot open.*NVIDIA's driver: install it"):
        device.listed()
    assert "NVIDIA's driver" in doctor._tool_works("llama-bench").value


@pytest.mark.parametrize(
    "built, gpus, expected",
    [
        (False, [], ["not used: this build is for the CPU alone"]),
        (True, [], ["our kernels", "none is visible"]),
        (True, [H200], ["our kernels", "NVIDIA H200, 143771 MiB"]),
    ],
)
def test_doctor_lists_gpus(
    built: bool, gpus: list[Device], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus(monkeypatch, *gpus, built=built)
    found = [f for f in doctor._gpus({"cuda": "13.0"}) if f.ok is not False]
    assert len(found) == len(expected)
    assert all(text in finding.value for text, finding in zip(expected, found, strict=True))


def test_doctor_says_why_the_backend_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise TurbokvError("libcuda.so.1")

    with_gpus(monkeypatch)
    monkeypatch.setattr(device, "gpus", fail)
    assert [f.value for f in doctor._gpus({}) if f.ok is False] == ["libcuda.so.1"]


@pytest.mark.parametrize(
    "built, placement, of_bench, of_server",
    [
        (False, ON_CPU, [], []),
        (True, ON_CPU, ["-dev", "none"], ["--device", "none"]),
        (True, ALL_LAYERS, ["-ngl", "-1"], ["--gpu-layers", "all"]),
        (True, TEN_LAYERS, ["-ngl", "10"], ["--gpu-layers", "10"]),
    ],
)
def test_tools_are_told(
    built: bool, placement: Placement, of_bench: list[str], of_server: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus(monkeypatch, built=built)
    plan = Plan(data.MINI, ("f16/f16",), (0,), 0, 0, 1, 1, 0, placement=placement)
    commands: list[list[str]] = []

    def run(command: list[str], *_: object) -> tuple[int, str, str, None]:
        commands.append(command)
        return 0, "", "", None

    monkeypatch.setattr(bench, "_run", run)
    bench.bench(plan, Cell("f16/f16", 0))
    start = commands[0].index("on") + 1  # behind -fa on
    assert commands[0][start : commands[0].index("-p")] == of_bench
    assert throughput.arguments(plan, Cell("f16/f16", 0, 1))[-2:] == (of_server or ["--cache-ram", "0"])


@pytest.mark.parametrize("placement", [ON_CPU, TEN_LAYERS])
def test_model_is_loaded_there(placement: Placement, monkeypatch: pytest.MonkeyPatch) -> None:
    lib = native.llama()
    load, seen = lib.llama_model_load_from_file, []

    def spy(path: bytes, params: Any) -> Any:
        seen.append((params.n_gpu_layers, bool(params.devices)))
        return load(path, params)

    monkeypatch.setattr(lib, "llama_model_load_from_file", spy)
    with engine.Model(data.MINI, no_alloc=True, placement=placement) as model:
        assert model.placement == placement
    assert seen == [(placement.gpu_layers, not placement.on_gpu)]  # an empty list of devices keeps GPUs out


def test_reference_of_a_cpu_never_serves_a_gpu() -> None:
    def key(**changes: Any) -> str:
        return reference.key(data.MINI, "text", n_ctx=512, path="prefill", n_threads=2, **changes)

    assert len({key(placement=place) for place in PLACES}) == len(PLACES)
    assert key() == key(placement=ON_CPU)


def test_samples_of_a_cpu_are_not_continued_on_a_gpu() -> None:
    def settings(place: Placement) -> str:
        return json.dumps(speed.settings(Plan(data.MINI, ("f16/f16",), (0,), 8, 8, 1, 1, 0, placement=place)))

    assert len({settings(place) for place in PLACES}) == len(PLACES)
    assert "device" not in settings(ON_CPU)  # or samples from before there was a choice would be refused


def cells(**changes: Any) -> list[sweep.Cell]:
    asked = {"models": ["mini"], "kld": {"ctx": [64]}, "speed": {"depths": [0]}, "caches": "turbo3"}
    return sweep.cells(plan.load(None, asked | changes))


def test_sweep_knows_cells_by_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cells()
    assert all("--gpu-layers" not in cell.arguments for cell in before)
    with_gpus(monkeypatch, H200)
    default, ten, none = cells(), cells(gpu_layers=10), cells(gpu_layers="0")
    assert [cell.id for cell in none] == [cell.id for cell in before]  # the same computation
    assert len({cell.id for found in (before, default, ten) for cell in found}) == 6
    assert [cell.arguments[-2:] for cell in default + ten + none] == [
        ("--gpu-layers", layers) for layers in ("all", "10", "0") for _ in before
    ]
    assert cells(gpu_layers="all") == default


def test_refusal_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, H200)
    refusal = sweep._result(cells()[0], 3, ["turbokv: no attention"], Path())
    assert refusal.placement == ALL_LAYERS


def test_device_survives_a_record_and_old_ones_are_of_the_cpu(tmp_path: Path) -> None:
    old = store.read(RESULTS)
    assert {record.result.placement for record in old} == {ON_CPU}
    new = old[0].model_copy(update={"result": old[0].result.model_copy(update=ALL_LAYERS.identity())})
    store.append(tmp_path, new)
    assert store.read(tmp_path) == [new]
    assert store.read(tmp_path)[0].result.placement == ALL_LAYERS


def test_report_compares_within_a_device() -> None:
    base = kld_result()
    assert isinstance(base, KldResult)
    records: list[Record] = [
        example_records.record(base.model_copy(update={"device": place.device, "gpu_layers": place.gpu_layers}), n=i)
        for i, place in enumerate(PLACES)
    ] + [example_records.record(base.model_copy(update={"device": None, "gpu_layers": None}), n=9)]
    found = findings.find(records)
    assert [len(group.results) for group in found.divergences] == [1] * len(PLACES)
    titles = [group.title for group in found.divergences]
    assert len(set(titles)) == len(PLACES)
    assert "NVIDIA" not in titles[0] and titles[1].endswith(", 10 layers on NVIDIA H200")


def test_cpu_results_say_so(tmp_path: Path) -> None:
    output = tmp_path / "kld.json"
    arguments = "kld -c 64 --chunks 1 --cache turbo3 --no-reference-cache --no-noise-floor -t 1 --json"
    for asked in ([], ["--gpu-layers", "0"]):
        assert CliRunner().invoke(cli.app, [*arguments.split(), str(output), *asked]).exit_code == 0
        (result,) = json.loads(output.read_text())
        assert (result["device"], result["gpu_layers"]) == ("CPU", 0)
