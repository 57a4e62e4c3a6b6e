"""`turbokv kld` and `turbokv ppl` as users run them. What they refuse, and Ctrl-C, is in test_cli.py."""

from __future__ import annotations

import math
import re
import resource
from pathlib import Path
from typing import Any

import pytest
from test_cli import Run, cache_of_its_own, check_refused, strict_json, turbokv
from turbokv import data
from turbokv.record import KldResult

__all__ = ["cache_of_its_own"]  # a fixture that every test here uses, too


@pytest.fixture(scope="module")
def kld(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[dict[str, Any]]]:
    path = tmp_path_factory.mktemp("kld") / "kld.json"
    run = turbokv("kld", "-c", "256", "--chunks", "2", "--cache", "f16,q4_0,turbo4/turbo3", "--json", path)
    assert run.returncode == 0, run.stderr
    return run, strict_json(path)


KLD_KEYS = {"mean", "median", "trimmed_mean", "p99", "p999", "max"}
TYPES = {
    "cache": str, "bits_k": float, "bits_v": float, "kv_bytes": int, "ppl": float, "ppl_f16": float, "kld": dict,
    "same_top": float, "chunks": int, "ctx": int, "model": str, "upstream_commit": str, "seconds": float,
}  # fmt: skip


def test_json_has_every_key_with_its_type(kld: tuple[Run, list[dict[str, Any]]]) -> None:
    _, records = kld
    assert [record["cache"] for record in records] == ["f16/f16", "q4_0/q4_0", "turbo4/turbo3"]
    for record in records:
        assert {key: type(record.get(key)) for key in TYPES} == TYPES
        assert record["kld"].keys() == KLD_KEYS | {"ci95"}
        assert [*map(type, record["kld"]["ci95"])] == [float, float]
        assert {type(record["kld"][key]) for key in KLD_KEYS} == {float}


def test_json_values_belong_to_the_run(kld: tuple[Run, list[dict[str, Any]]]) -> None:
    _, records = kld
    f16 = records[0]
    assert [(record["bits_k"], record["bits_v"]) for record in records] == [(16, 16), (4.5, 4.5), (4.125, 3.125)]
    for record in records:
        assert (record["chunks"], record["ctx"], record["model"]) == (2, 256, "mini-q8_0.gguf")
        assert re.fullmatch(r"[0-9a-f]{40}", record["upstream_commit"])
        assert record["seconds"] > 0
        assert record["kv_bytes"] == f16["kv_bytes"] * (record["bits_k"] + record["bits_v"]) / 32
        assert record["ppl_f16"] == f16["ppl"]
        assert 0 <= record["kld"]["median"] <= record["kld"]["p99"] <= record["kld"]["p999"] <= record["kld"]["max"]
        assert record["kld"]["ci95"][0] <= record["kld"]["mean"] <= record["kld"]["ci95"][1]
    assert f16["kld"]["max"] == 0
    assert f16["same_top"] == 1
    assert all(record["kld"]["mean"] > 0 and 0.5 < record["same_top"] < 1 for record in records[1:])


def test_table_has_the_numbers_of_the_json(kld: tuple[Run, list[dict[str, Any]]]) -> None:
    run, records = kld
    for record in records:
        row = next(line.split() for line in run.stdout.splitlines() if line.strip().startswith(record["cache"]))
        assert f"{record['ppl']:.3f}" in row
        assert f"{record['kld']['mean']:.6f}" in row


def test_ppl_is_kld_without_the_comparison(kld: tuple[Run, list[dict[str, Any]]], tmp_path: Path) -> None:
    path = tmp_path / "ppl.json"
    run = turbokv("ppl", "-c", "256", "--chunks", "2", "--cache", "f16,q4_0,turbo4/turbo3", "--json", path)
    assert run.returncode == 0
    assert "KLD" not in run.stdout
    shared = TYPES.keys() - {"ppl_f16", "kld", "same_top", "seconds"}
    records = strict_json(path)
    assert [{key: record[key] for key in shared} for record in records] == [
        {key: record[key] for key in shared} for record in kld[1]
    ]
    assert all(record["kld"] is record["same_top"] is record["noise_floor"] is None for record in records)
    assert [record["delta_nll"] for record in records] == [record["delta_nll"] for record in kld[1]]


def test_json_is_what_the_schema_says(kld: tuple[Run, list[dict[str, Any]]]) -> None:
    for result in kld[1]:
        assert KldResult.model_validate(result).model_dump(mode="json") == result
        assert (
            result["kld"]["median"] < result["kld"]["trimmed_mean"] < result["kld"]["mean"]
            or result["ppl"] == result["ppl_f16"]
        )


def test_delta_nll_is_the_log_of_the_ppl_ratio(kld: tuple[Run, list[dict[str, Any]]]) -> None:
    f16, *others = kld[1]
    assert f16["delta_nll"] == {"mean": 0, "ci95": [0, 0]}
    for result in others:
        delta = result["delta_nll"]
        assert delta["mean"] == pytest.approx(math.log(result["ppl"] / result["ppl_f16"]), rel=1e-9)
        assert delta["ci95"][0] < delta["mean"] < delta["ci95"][1]


def test_noise_floor_stands_below_the_table_and_is_what_rounding_costs(kld: tuple[Run, list[dict[str, Any]]]) -> None:
    """Measured: .00028."""
    run, (f16, *_) = kld
    assert 0.0001 < f16["noise_floor"]["mean_kld"] < 0.0006
    assert f"noise floor, f16 in batches of 32: mean KLD {f16['noise_floor']['mean_kld']:.6f}" in run.stdout
    assert {result["noise_floor"]["mean_kld"] for result in kld[1]} == {f16["noise_floor"]["mean_kld"]}


SHORT = ("-c", "128", "--chunks", "2", "--cache", "q8_0,turbo3")


def statistics(path: Path) -> str:
    return re.sub(r'"seconds": .*', "", path.read_text())


def test_same_command_gives_the_same_bytes_with_and_without_the_reference_cache(tmp_path: Path) -> None:
    names = [tmp_path / f"{i}.json" for i in range(4)]
    kept, not_kept = f"--reference-cache={tmp_path / 'cache'}", "--no-reference-cache"
    places = [not_kept, kept, kept, not_kept]
    runs = [turbokv("kld", *SHORT, "--json", name, place) for name, place in zip(names, places, strict=True)]
    assert len({statistics(name) for name in names}) == 1
    assert len({run.stdout for run in runs}) == 1
    assert [str(tmp_path / "cache") in run.stderr for run in runs] == [False, False, True, False]
    assert len(list((tmp_path / "cache").glob("*/*.npz"))) == 4


def test_damaged_reference_file_is_named_and_computed_again(tmp_path: Path) -> None:
    arguments = ("kld", *SHORT, "--reference-cache", tmp_path)
    first = turbokv(*arguments)
    window = next(tmp_path.glob("*/window-00000.npz"))
    window.write_bytes(window.read_bytes()[:-1000])
    second = turbokv(*arguments)
    assert second.returncode == 0
    assert f"{window} cannot be used" in second.stderr
    assert second.stdout == first.stdout


@pytest.mark.parametrize("limit", [None, 1000], ids=["no folder", "disk full"])
def test_reference_that_cannot_be_kept_is_said_once_and_the_run_goes_on(tmp_path: Path, limit: int | None) -> None:
    folder = tmp_path / "cache"
    if not limit:
        folder.write_text("a file")
    before = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None
    run = turbokv("kld", *SHORT, "--reference-cache", folder, before=before)
    assert run.returncode == 0
    assert run.stderr.count("reference windows are not kept") == 1
    assert "Traceback" not in run.stderr
    assert "turbo3/turbo3" in run.stdout
    assert [path for path in tmp_path.rglob("*") if path.suffix in (".npz", ".tmp")] == []


def test_two_opposite_options_are_refused(tmp_path: Path) -> None:
    check_refused(turbokv("kld", "--no-reference-cache", "--reference-cache", tmp_path), "give one of the two")


@pytest.mark.parametrize("command", ["kld", "ppl"])
def test_decode_path_runs_the_reference_token_by_token_too(command: str, tmp_path: Path) -> None:
    """Decoding differs from prefill by rounding; f16 decoded against f16 decoded does not differ at all."""
    arguments = (command, "-c", "512", "--chunks", "1", "--cache", "f16,turbo3")  # of 32 tokens ppl differs by 0.8 %
    prefill, decode = ([tmp_path / f"{path}.json", path] for path in ("prefill", "decode"))
    runs = [turbokv(*arguments, "--json", name, "--path", path) for name, path in (prefill, decode)]
    assert [run.returncode for run in runs] == [0, 0]
    assert ["token by token" in run.stdout for run in runs] == [False, True]
    (f16, turbo3), (f16_decoded, turbo3_decoded) = (strict_json(Path(name)) for name, _ in (prefill, decode))
    assert (f16["path"], f16_decoded["path"]) == ("prefill", "decode")
    assert f16_decoded["delta_nll"]["mean"] == 0
    assert f16_decoded["ppl"] != f16["ppl"]
    assert f16_decoded["ppl"] == pytest.approx(f16["ppl"], rel=0.005)
    if command == "kld":
        assert f16_decoded["kld"]["max"] == 0
        assert 0 < f16_decoded["noise_floor"]["mean_kld"] < 0.001
        assert turbo3_decoded["kld"]["mean"] == pytest.approx(turbo3["kld"]["mean"], rel=0.5)


def test_wide_table_has_the_rest_of_the_json(tmp_path: Path) -> None:
    path = tmp_path / "kld.json"
    run = turbokv("kld", "-m", data.BIAS, "-c", "256", "--chunks", "2", "--cache", "turbo3", "--wide", "--json", path)
    (result,) = strict_json(path)
    numbers = [result["kld"]["trimmed_mean"], result["last64"]["mean"]]
    assert [number for number in numbers if f"{number:.6f}" not in run.stdout] == []
    assert f"{result['kld']['max']:.4f}" in run.stdout
    assert "…" not in run.stdout
    assert "last 64" not in turbokv("kld", *SHORT).stdout


def test_same_cache_under_two_names_shows_no_difference(tmp_path: Path) -> None:
    path = tmp_path / "kld.json"
    turbokv("kld", "-m", data.BIAS, "-c", "256", "--chunks", "2", "--cache", "turbo3,turbo3_64", "--json", path)
    a, b = strict_json(path)
    assert (a.pop("requested"), b.pop("requested")) == ("turbo3/turbo3", "turbo3_64/turbo3_64")
    for result in (a, b):
        result.pop("seconds")
    assert a == b


def test_effective_types_are_named_in_note_table_and_json(tmp_path: Path) -> None:
    """The widest table there is: nothing of it may be cut off, also on a terminal of 80 columns."""
    path = tmp_path / "bias.json"
    arguments = ("-c", "256", "--chunks", "2", "--cache", "turbo3,turbo4/q8_0", "--json", path)
    run = turbokv("kld", "-m", data.BIAS, *arguments, COLUMNS="80")
    assert run.returncode == 0
    names = ["turbo3_64/turbo3_64", "turbo4_64/q8_0"]
    assert [record["cache"] for record in strict_json(path)] == names
    assert "turbo3/turbo3 -> turbo3_64/turbo3_64" in run.stderr
    assert "turbo4/q8_0 -> turbo4_64/q8_0" in run.stderr
    assert [name for name in names if name not in run.stdout] == []
    assert "…" not in run.stdout
