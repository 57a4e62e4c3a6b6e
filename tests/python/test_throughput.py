"""`turbokv speed --parallel`: llama-server under load, with the built one and a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_models import write_llama
from turbokv import throughput
from turbokv.cache_type import CachePair
from turbokv.cell import REQUESTS_PER_SLOT, Cell, CellFailed, Plan
from turbokv.memory import Sizes
from turbokv.record import ServerResult, SpeedResult
from turbokv.server import Server, first_error

SIZES = ("-p", "16", "-n", "4", "-t", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("throughput") / "tiny.gguf", head_dim=64)


def plan(model: Path, parallel: int = 2, **changes: object) -> Plan:
    values: dict[str, object] = {"n_prompt": 16, "n_gen": 4, "threads": 1, "rounds": 2, "seed": 0}
    return Plan(model, ("f16/f16", "turbo3/turbo3"), (), parallel=(parallel,), **values | changes)  # type: ignore[arg-type]


def speed(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "turbokv", "speed", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_every_cache_is_measured_beside_f16_and_what_is_refused_is_named(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    arguments = ("-m", model, "--depth", "none", "--parallel", "1,3", "--cache", "turbo3,tbq3", *SIZES, "--rounds", "2")
    run = speed(*arguments, "--json", path)
    assert run.returncode == 1
    assert "tbq3/tbq3 with 3 requests at a time failed, round 1: llama-server ended with status 1" in run.stderr
    assert "tbq3 needs heads of a multiple of 128" in run.stderr
    results = [ServerResult.model_validate_json(line) for line in path.read_text().splitlines()]
    assert [(r.requested, r.parallel) for r in results] == [
        (cache, parallel) for parallel in (1, 3) for cache in ("f16/f16", "turbo3/turbo3", "tbq3/tbq3")
    ]
    with Sizes(model) as sizes:
        for r in results:
            if r.requested == "tbq3/tbq3":
                assert (r.tokens_per_second, r.rounds, r.samples, r.kv_bytes) == (None, 0, [], None)
                assert r.error
                continue
            assert (r.error, r.rounds, r.requests) == (None, 2, r.parallel * REQUESTS_PER_SLOT)
            assert {len(sample.latencies) for sample in r.samples} == {r.requests}
            assert r.tokens_per_second and r.ratio_f16 and r.ci95 and r.latency_p50 and r.latency_p95
            assert r.ci95[0] < r.tokens_per_second < r.ci95[1]
            assert 0 < r.latency_p50 <= r.latency_p95
            assert r.cache == r.requested.replace("turbo3", "turbo3_64")  # heads of 64
            k, v = r.cache.split("/")
            assert r.kv_bytes == sizes.usage(CachePair(k, v), 256 * r.parallel, r.parallel).kv
            assert r.peak_bytes is None or r.peak_bytes > r.kv_bytes + sizes.weights // 2
    assert [r.ratio_f16 for r in results if r.cache == "f16/f16"] == [1, 1]
    assert "turbo3/turbo3" in run.stdout
    again = speed(*arguments, "--json", path)  # goes on: only what failed is tried again
    assert "8 measurements are in" in again.stderr


def test_both_kinds_of_measurement_in_one_run(model: Path, tmp_path: Path) -> None:
    path, sizes = tmp_path / "speed.json", ("-p", "512", "-n", "64", "-t", "1")
    run = speed(
        "-m", model, "--depth", "0", "--parallel", "2", "--cache", "turbo3", *sizes, "--rounds", "1", "--json", path
    )
    assert run.returncode == 0, run.stderr
    kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
    assert kinds == ["speed", "speed", "server", "server"]
    first = SpeedResult.model_validate_json(path.read_text().splitlines()[0])
    assert first.kv_bytes
    assert first.peak_bytes is None or first.peak_bytes > first.kv_bytes


def test_prompts_are_all_different_and_as_long_as_asked() -> None:
    text = list(range(1000))
    found = throughput.prompts(text, 300, 12, "0 1")
    assert {len(prompt) for prompt in found} == {300}
    assert len({prompt[0] for prompt in found}) == 12
    assert throughput.prompts(text, 300, 12, "0 1") == found != throughput.prompts(text, 300, 12, "0 2")
    (short,) = throughput.prompts([1, 2, 3], 7, 1, "0 1")
    assert short in [([1, 2, 3] * 4)[i : i + 7] for i in range(3)]


def test_requests_do_run_at_the_same_time(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All slots are used, and no request finds its prompt in a cache."""
    slots, cached = [], []
    post = Server.post

    def spy(server: Server, path: str, request: dict[str, object], timeout: float | None = None) -> dict[str, object]:
        reply = post(server, path, request, timeout)
        if path == "/completion":
            slots.append(reply["id_slot"])
            cached.append(reply["timings"]["cache_n"])
        return reply

    monkeypatch.setattr(Server, "post", spy)
    measured = throughput.serve(plan(model, parallel=3, n_gen=32), Cell("turbo3/turbo3", 0, 3), 1)
    assert measured.latencies and len(measured.latencies) == 9
    assert set(slots) == {0, 1, 2}
    assert set(cached) == {0}


@pytest.mark.parametrize(
    ("text", "item"), [("", ""), ("0", "0"), ("1,x", "x"), ("257", "257"), ("-1", "-1"), ("1.5", "1.5")]
)
def test_bad_number_of_requests_is_named(model: Path, text: str, item: str) -> None:
    run = speed("-m", model, f"--parallel={text}")
    assert run.returncode == 1
    assert f"'{item}' is not a number of requests: write numbers from 1 to 256" in run.stderr


def test_requests_that_measure_nothing_are_refused(model: Path) -> None:
    assert "--parallel needs prompts and answers" in speed("-m", model, "--parallel", "1", "-n", "0").stderr
    assert "--depth none without --parallel" in speed("-m", model, "--depth", "none").stderr


# --- what can go wrong


def test_server_that_dies_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    post = Server.post

    def kill(server: Server, path: str, request: dict[str, object], timeout: float | None = None) -> dict[str, object]:
        if request.get("n_predict") == 4:
            os.kill(server.pid, signal.SIGKILL)
            time.sleep(0.2)
        return post(server, path, request, timeout)

    monkeypatch.setattr(Server, "post", kill)
    with pytest.raises(CellFailed, match="llama-server ended by SIGKILL: "):
        throughput.serve(plan(model), Cell("f16/f16", 0, 2), 1)


def test_answer_of_another_length_and_an_error_are_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plan, "n_ctx", lambda self, cell: 256)  # two slots of 256 would be 512
    with pytest.raises(CellFailed, match=r"exceeds the available context size|read .* tokens and generated"):
        throughput.serve(plan(model, n_prompt=300), Cell("f16/f16", 0, 2), 1)


def test_timeout_is_that_of_the_whole_cell(model: Path) -> None:
    with pytest.raises(CellFailed, match=r"not finished within --timeout 1 seconds|did not answer within"):
        throughput.serve(plan(model, n_gen=1500, timeout=1), Cell("f16/f16", 0, 2), 1)


def test_first_error_of_a_log() -> None:
    log = "0.00.1 I srv x: fine\n0.00.2 E turbokv: no such heads\n0.00.3 E cmn  init: failed\n"
    assert first_error(log) == "turbokv: no such heads"
    assert first_error("0.1 E srv    load_model: failed to load\n") == "failed to load"
    assert first_error("a\nb\n\nc\nGGML_ASSERT(x)\n") == "b; c; GGML_ASSERT(x)"
    assert first_error("") == "it logged nothing"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupt_stops_the_server_and_delivers_what_there_is(model: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "speed.json"
    arguments = ["-m", model, "--depth", "none", "--parallel", "2", "--cache", "f16", "-p", "16", "-n", "64"]
    command = [sys.executable, "-m", "turbokv", "speed", *map(str, arguments), "--rounds", "500", "--json", str(path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    samples = path.with_name("speed.json.samples")
    while not samples.exists() or len(samples.read_text().splitlines()) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.Signals[name])
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted: only finished rounds are reported" in errors
    assert "Traceback" not in errors
    assert json.loads(path.read_text())["rounds"] >= 2
    with pytest.raises(ProcessLookupError):  # nobody is left in its group
        os.killpg(process.pid, 0)
