"""`turbokv speed`: once with the built llama-bench, otherwise with a script in its place that answers at once."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy import stats
from tiny_models import write_llama
from turbokv import bench, cache_type, cli, data, native, speed
from turbokv.cell import Cell, CellFailed, Plan
from turbokv.errors import TurbokvError
from turbokv.samples import Sample

FAKE = """#!{python} -IS
import json, os, signal, sys, time
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
cache, depth = options["-ctk"] + "/" + options["-ctv"], int(options["-d"])
n_prompt, n_gen = int(options["-p"]), int(options["-n"])
with open({calls!r}, "a+") as file:
    file.write(f"{{cache}} {{depth}}\\n")
    file.seek(0)
    calls = file.read().splitlines()
nth = calls.count(f"{{cache}} {{depth}}")  # which time it is for this cell
pp, tg = 1000, 100
exec(open({behaviour!r}).read())
if n_prompt:
    print(json.dumps({{"n_prompt": n_prompt, "n_gen": 0, "avg_ns": int(1e9 * n_prompt / pp)}}))
if n_gen:
    print(json.dumps({{"n_prompt": 0, "n_gen": n_gen, "avg_ns": int(1e9 * n_gen / tg)}}))
"""

REAL_TOOL = native.tool

# The command with the fake in the place of llama-bench, for tests that send signals or set limits.
COMMAND = """
import sys
from pathlib import Path
from turbokv import cli, native
tool = Path(sys.argv.pop(1))
native.tool = lambda name: tool
cli.main()
"""


class Fake:
    """A folder with a model that is none, and a llama-bench that says what it is told to say."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.json = folder, folder / "speed.json"
        self.samples = folder / "speed.json.samples"
        self.model = folder / "model.gguf"
        self.model.write_bytes(b"GGUF and nothing else")
        self.tool = folder / "llama-bench"
        self._calls, self._behaviour = folder / "calls", folder / "behaviour.py"
        paths = {"calls": str(self._calls), "behaviour": str(self._behaviour)}
        self.tool.write_text(FAKE.format(python=sys.executable, **paths))
        self.tool.chmod(0o755)
        self.behaves("")

    def behaves(self, code: str) -> None:
        """Python that runs before the answer: it may set pp and tg, by cache, depth, nth and calls, or end it all."""
        self._behaviour.write_text(code)

    def calls(self) -> list[str]:
        """`cache depth` of all runs since the last call of this."""
        lines = self._calls.read_text().splitlines() if self._calls.exists() else []
        self._calls.unlink(missing_ok=True)
        return lines

    def arguments(self, *arguments: str | Path) -> list[str]:
        return [str(a) for a in ("speed", "-m", self.model, "--json", self.json, *arguments)]

    def records(self) -> dict[tuple[str, int], dict[str, Any]]:
        """What --json holds, by cache and depth."""
        records = [json.loads(line, parse_constant=pytest.fail) for line in self.json.read_text().splitlines()]
        return {(record["cache"], record["depth"]): record for record in records}

    def recorded(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.samples.read_text().splitlines()[1:]]

    def process(
        self, *arguments: str | Path, before: Callable[[], object] | None = None
    ) -> subprocess.CompletedProcess[str]:
        def prepare() -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
            if before:
                before()

        command = [sys.executable, "-c", COMMAND, str(self.tool), *self.arguments(*arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, preexec_fn=prepare)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake(tmp_path)
    monkeypatch.setattr(native, "tool", lambda _: made.tool)
    return made


class Run:
    """What the command gave."""

    def __init__(self, returncode: int, out: str, err: str) -> None:
        self.returncode, self.out, self.err = returncode, out, err

    def refused(self, *words: str) -> None:
        """One line that says what is wrong."""
        assert self.returncode == 1
        assert self.out == ""
        assert self.err.startswith("turbokv: ")
        assert len(self.err.splitlines()) == 1
        assert [word for word in words if word not in self.err] == []


Turbokv = Callable[..., Run]


@pytest.fixture
def turbokv(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Turbokv:
    """Runs the command in this process."""

    def run(*arguments: str | Path) -> Run:
        monkeypatch.setattr(sys, "argv", ["turbokv", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Run(int(ended.value.code or 0), *capfd.readouterr())

    return run


def plan(**changes: Any) -> Plan:
    caches, depths = ("f16/f16", "q8_0/q8_0", "turbo3/turbo3"), (0, 64, 128)
    defaults = {"n_prompt": 16, "n_gen": 4, "threads": 1, "rounds": 3, "seed": 0}
    return Plan(**{"model": Path("m.gguf"), "caches": caches, "depths": depths, **defaults, **changes})


# --- what is asked for


def test_f16_always_runs_and_nothing_twice() -> None:
    assert speed.with_f16(cache_type.parse_pairs("turbo3,q8_0/turbo3,turbo3/turbo3")) == (
        "f16/f16", "turbo3/turbo3", "q8_0/turbo3",
    )  # fmt: skip
    assert speed.with_f16(cache_type.parse_pairs("q8_0,f16")) == ("f16/f16", "q8_0/q8_0")


def test_depths() -> None:
    assert speed.parse_depths("0, 2048,512,0") == (0, 2048, 512)


@pytest.mark.parametrize(("text", "item"), [("", ""), ("8k", "8k"), ("0,-1", "-1"), ("1e3", "1e3"), ("0,,1", "")])
def test_bad_depth_is_named(text: str, item: str) -> None:
    with pytest.raises(TurbokvError, match=rf"'{item}' is not a depth: .*--depth 0,2048"):
        speed.parse_depths(text)


def test_impossible_requests_are_refused_before_anything_runs(fake: Fake, turbokv: Turbokv, tmp_path: Path) -> None:
    absent, text, comma = tmp_path / "absent.gguf", tmp_path / "text.gguf", tmp_path / "a,b.gguf"
    text.write_text("This is no model.")
    comma.write_bytes(fake.model.read_bytes())
    turbokv(*fake.arguments("-m", absent)).refused(f"no model at {absent}")
    turbokv(*fake.arguments("-m", text)).refused(str(text), "no GGUF model", "complete?")
    turbokv(*fake.arguments("-m", comma)).refused(str(comma), "comma", "rename")
    turbokv(*fake.arguments("--cache", "turbo9")).refused("'turbo9'", "turbo3")
    turbokv(*fake.arguments("--depth", "8k")).refused("'8k'", "--depth 0,2048")
    turbokv(*fake.arguments("--n-gen", "0", "--n-prompt", "0")).refused("--n-gen 0", "nothing")
    assert turbokv(*fake.arguments("--rounds", "0")).returncode == 2
    assert fake.calls() == []


@pytest.mark.parametrize("place", [".", "absent/speed.json", "/proc/speed.json"])
def test_unwritable_json_is_refused_before_anything_runs(
    fake: Fake, turbokv: Turbokv, tmp_path: Path, place: str
) -> None:
    turbokv(*fake.arguments("--json", tmp_path / place)).refused(str(tmp_path / place))
    assert fake.calls() == []


def test_missing_llama_bench_is_named(fake: Fake, turbokv: Turbokv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "tool", REAL_TOOL)
    monkeypatch.setattr(native, "native_dir", lambda: fake.folder / "empty")
    turbokv(*fake.arguments()).refused("llama-bench is missing", str(fake.folder / "empty"), "cmake --build build")


def test_context_longer_than_trained_is_only_a_note(fake: Fake, turbokv: Turbokv) -> None:
    write_llama(fake.model, head_dim=64)  # trained on 2048, says its header
    run = turbokv(*fake.arguments("--depth", "2040", "--cache", "f16", "--rounds", "2", "-p", "16"))
    assert run.returncode == 0
    assert "note: model.gguf was trained on contexts of 2048 tokens, not 2072" in run.err
    fits = turbokv(
        *fake.arguments("--depth", "2000", "--cache", "f16", "--rounds", "2", "-p", "16", "--json", "/dev/null")
    )
    assert "trained" not in fits.err


def test_help_teaches(turbokv: Turbokv) -> None:
    text = " ".join(turbokv("speed", "-h").out.split())
    assert "Example: turbokv speed -m model.gguf --depth" in text
    assert [word for word in ("x f16", "95% interval", "FILE.samples", "exit code is 1") if word not in text] == []


# --- order


def test_every_round_runs_every_cell_once() -> None:
    cells = {Cell(cache, depth) for cache in plan().caches for depth in plan().depths}
    for number in range(1, 20):
        order = plan().order(number)
        assert (len(order), set(order)) == (9, cells)


def test_order_is_that_of_the_seed_and_another_one_every_round() -> None:
    orders = [tuple(plan().order(number)) for number in range(1, 11)]
    assert orders == [tuple(plan().order(number)) for number in range(1, 11)]
    assert len(set(orders)) == 10
    assert orders != [tuple(plan(seed=1).order(number)) for number in range(1, 11)]


def test_caches_of_a_depth_run_side_by_side_and_none_always_first() -> None:
    orders = [plan().order(number) for number in range(1, 101)]
    for order in orders:
        depths = [cell.depth for cell in order]
        assert all(len(set(depths[i : i + 3])) == 1 for i in (0, 3, 6))
    for first in (Counter(order[0].cache for order in orders), Counter(order[0].depth for order in orders)):
        assert len(first) == 3
        assert min(first.values()) > 15


def test_cells_run_in_the_order_of_the_plan(fake: Fake, turbokv: Turbokv) -> None:
    turbokv(*fake.arguments("--depth", "0,64,128", "--cache", "q8_0,turbo3", "--rounds", "2", "--seed", "7"))
    expected = [cell for number in (1, 2) for cell in plan(seed=7).order(number)]
    assert fake.calls() == [f"{cell.cache} {cell.depth}" for cell in expected]


# --- statistics


def test_interval_is_students_on_logarithms() -> None:
    values = [0.5, 0.7, 0.6, 0.9]
    mean, interval = speed.geometric_mean_ci95(values)
    assert mean == pytest.approx(math.prod(values) ** 0.25)
    logs = [math.log(value) for value in values]
    expected = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert interval == pytest.approx((math.exp(expected.low), math.exp(expected.high)))


def test_one_value_has_no_interval() -> None:
    mean, interval = speed.geometric_mean_ci95([3.0])
    assert mean == pytest.approx(3)
    assert interval is None


DRIFT = "pp, tg = 1000 / 3**nth, 100 / 3**nth\nif cache != 'f16/f16': pp, tg = pp * .25, tg * .5"


def test_ratios_are_formed_within_a_round(fake: Fake, turbokv: Turbokv) -> None:
    """Every round is three times slower than the one before: speeds vary, ratios do not."""
    fake.behaves(DRIFT)
    assert turbokv(*fake.arguments("--depth", "0", "--cache", "turbo3", "--rounds", "4")).returncode == 0
    record = fake.records()["turbo3/turbo3", 0]
    for test, ratio in (("tg", 0.5), ("pp", 0.25)):
        assert record[test]["ratio_f16"] == pytest.approx(ratio, rel=1e-6)
        assert record[test]["ratio_ci95"] == pytest.approx([ratio, ratio], rel=1e-6)
        low, high = record[test]["ci95"]
        assert low < record[test]["mean"] / 2 < 2 * record[test]["mean"] < high
    assert record["tg"]["mean"] == pytest.approx(50 / 3**2.5, rel=1e-6)
    assert [sample["tg"] for sample in record["samples"]] == pytest.approx([50 / 3**n for n in (1, 2, 3, 4)], rel=1e-6)


def test_json_says_what_was_measured_and_where(fake: Fake, turbokv: Turbokv) -> None:
    fake.behaves("tg -= 10 * (cache != 'f16/f16') + depth / 8")
    arguments = (
        "--depth",
        "0,64",
        "--cache",
        "q8_0/turbo3",
        "--rounds",
        "2",
        "-t",
        "3",
        "-n",
        "5",
        "-p",
        "7",
        "--seed",
        "9",
    )
    run = turbokv(*fake.arguments(*arguments))
    assert run.returncode == 0
    records = fake.records()
    assert [*records] == [("f16/f16", 0), ("q8_0/turbo3", 0), ("f16/f16", 64), ("q8_0/turbo3", 64)]
    for (cache, depth), record in records.items():
        assert record["tg"]["mean"] == pytest.approx(100 - 10 * (cache != "f16/f16") - depth / 8, rel=1e-6)
        expected = {
            "n_gen": 5,
            "n_prompt": 7,
            "threads": 3,
            "rounds": 2,
            "seed": 9,
            "error": None,
            "model": "model.gguf",
        }
        assert expected.items() <= record.items()
        assert record["upstream_commit"] == native.build_info()["upstream_commit"]
        assert record["cpu"]
        assert len(record["build"]) == 12
        assert [sample["round"] for sample in record["samples"]] == [1, 2]
    assert records["f16/f16", 0]["pp"]["ratio_ci95"] == [1, 1]
    rows = [line.split() for line in run.out.splitlines() if line.strip().startswith("q8_0/turbo3")]
    assert [(row[1], row[3]) for row in rows] == [("90.00", "0.900"), ("82.00", "0.891")]


def test_one_round_has_null_for_an_interval(fake: Fake, turbokv: Turbokv) -> None:
    run = turbokv(*fake.arguments("--depth", "0", "--cache", "turbo3", "--rounds", "1"))
    assert run.returncode == 0
    assert "one round gives no interval" in run.err
    for record in fake.records().values():
        assert (record["tg"]["ci95"], record["tg"]["ratio_ci95"]) == (None, None)
        assert record["tg"]["ratio_f16"] == 1


def test_drift_of_f16_is_said(fake: Fake, turbokv: Turbokv) -> None:
    arguments = fake.arguments("--depth", "0", "--cache", "turbo3", "--rounds", "4", "--json", "/dev/null")
    assert "moved" not in turbokv(*arguments).err
    fake.behaves("tg = 100 * 1.001 ** len(calls)")  # less than 3 % in all eight
    assert "moved" not in turbokv(*arguments).err
    fake.calls()
    fake.behaves("pp = 1000 / 1.05 ** nth")
    assert (
        "note: f16 itself moved by more than 3 %, pp of f16 at depth 0: 16% between rounds, "
        "14% slower from the first round to the last. Trust ratios" in turbokv(*arguments).err
    )
    fake.calls()
    fake.behaves("tg = 110 if nth == 2 else 100")
    assert "tg of f16 at depth 0: 10% between rounds" in turbokv(*arguments).err
    fake.behaves("if cache != 'f16/f16': pp, tg = 1000 / nth, 100 * nth")  # another cache's own affair
    assert "moved" not in turbokv(*arguments).err


@pytest.mark.parametrize(("left_out", "option"), [("tg", "--n-gen"), ("pp", "--n-prompt")])
def test_zero_tokens_leave_a_test_out(fake: Fake, turbokv: Turbokv, left_out: str, option: str) -> None:
    run = turbokv(*fake.arguments("--depth", "0", "--cache", "turbo3", "--rounds", "2", option, "0"))
    assert run.returncode == 0
    assert f"{left_out} tokens/s" not in run.out
    for record in fake.records().values():
        assert record[left_out] is None
        assert record["pp" if left_out == "tg" else "tg"]["ratio_f16"] == 1


def test_seconds_left_go_by_the_cell_then_by_the_depth_then_by_tokens() -> None:
    own = [Sample(n, "f16/f16", 64, 1.0, 1.0, seconds) for n, seconds in ((1, 10.0), (2, 20.0))]
    assert speed.seconds_left(plan(), [], [Cell("f16/f16", 64)]) is None
    assert speed.seconds_left(plan(), own, [Cell("f16/f16", 64)]) == pytest.approx(15)
    others = [Sample(1, "turbo3/turbo3", 64, 1.0, 1.0, 60.0), Sample(1, "f16/f16", 0, 1.0, 1.0, 1.0)]
    assert speed.seconds_left(plan(), [*own, *others], [Cell("q8_0/q8_0", 64)] * 2) == pytest.approx(60)
    tokens = plan().n_tokens(Cell("f16/f16", 128)) / plan().n_tokens(Cell("f16/f16", 64))
    assert speed.seconds_left(plan(), own, [Cell("f16/f16", 128)]) == pytest.approx(15 * tokens)


def test_progress_names_the_round_and_the_cell_that_runs(fake: Fake, turbokv: Turbokv) -> None:
    run = turbokv(*fake.arguments("--depth", "64", "--cache", "turbo3", "--rounds", "2"))
    lines = [line for line in run.err.splitlines() if line.startswith("[")]
    cells = [
        (number, cell)
        for number in (1, 2)
        for cell in plan(caches=("f16/f16", "turbo3/turbo3"), depths=(64,)).order(number)
    ]
    starts = [f"[{i}/4] round {number} of 2, {cell}" for i, (number, cell) in enumerate(cells, 1)]
    assert [line.split(", about")[0] for line in lines] == starts
    assert all(", about" in line for line in lines[1:])


# --- llama-bench


def test_arguments_and_environment_of_llama_bench(
    fake: Fake, turbokv: Turbokv, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "as the user says")
    seen = fake.folder / "seen"
    fake.behaves(f"open({str(seen)!r}, 'w').write(json.dumps([options, os.environ['OMP_WAIT_POLICY']]))")
    turbokv(*fake.arguments("--depth", "64", "--cache", "f16", "--rounds", "1", "-n", "5", "-p", "7"))
    options, policy = json.loads(seen.read_text())
    assert policy == "as the user says"
    assert options == {
        "-m": str(fake.model), "-ctk": "f16", "-ctv": "f16", "-fa": "on", "-p": "7", "-n": "5", "-d": "64", "-r": "1",
        "-t": str(len(os.sched_getaffinity(0))), "-o": "jsonl",
    }  # fmt: skip


REFUSES = "if cache == 'turbo3/turbo3' and depth: sys.exit('turbokv: no such heads\\nllama_bench: error: no context')"


def test_refused_cache_is_named_with_the_reason_and_the_others_go_on(fake: Fake, turbokv: Turbokv) -> None:
    fake.behaves(REFUSES)
    run = turbokv(*fake.arguments("--depth", "0,64", "--cache", "q8_0,turbo3", "--rounds", "2"))
    assert run.returncode == 1
    assert (
        "turbo3/turbo3 at depth 64 failed, round 1: turbokv: no such heads; llama_bench: error: no context" in run.err
    )
    assert run.err.splitlines()[-1] == "turbokv: 1 of 6 failed; the reasons are above"
    assert Counter(fake.calls())["turbo3/turbo3 64"] == 1  # not again in round 2
    records = fake.records()
    failed = records.pop(("turbo3/turbo3", 64))
    assert failed["error"].startswith("round 1: turbokv: no such heads")
    assert (failed["tg"], failed["pp"], failed["rounds"], failed["samples"]) == (None, None, 0, [])
    assert "turbo3/turbo3 (failed)" in run.out
    assert len(records) == 5
    assert all(record["error"] is None and record["rounds"] == 2 for record in records.values())


def test_cell_that_fails_later_keeps_its_rounds(fake: Fake, turbokv: Turbokv) -> None:
    fake.behaves("if cache == 'turbo3/turbo3' and nth == 3: sys.exit('no memory')")
    turbokv(*fake.arguments("--depth", "0", "--cache", "turbo3", "--rounds", "4"))
    record = fake.records()["turbo3/turbo3", 0]
    assert (record["rounds"], record["error"]) == (2, "round 3: no memory")
    assert record["tg"]["ratio_ci95"] is not None
    assert fake.records()["f16/f16", 0]["rounds"] == 4


def test_without_f16_there_is_no_ratio(fake: Fake, turbokv: Turbokv) -> None:
    fake.behaves("if cache == 'f16/f16': sys.exit('no memory')")
    run = turbokv(*fake.arguments("--depth", "0", "--cache", "turbo3", "--rounds", "2"))
    assert run.returncode == 1
    tg = fake.records()["turbo3/turbo3", 0]["tg"]
    assert (tg["ratio_f16"], tg["ratio_ci95"]) == (None, None)
    assert tg["ci95"] is not None


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", ["killed by SIGKILL", "out of memory? A smaller --depth"]),
        ("print('GGML_ASSERT(x)', file=sys.stderr, flush=True); os.abort()", ["SIGABRT", "GGML_ASSERT(x)"]),
        ("os._exit(3)", ["status 3", "no reason"]),
        ("os._exit(0)", ["no result", "n_prompt 16"]),
        ("print('[]'); n_prompt = 0", ["no result", "n_prompt 16"]),
        ("print('warning'); n_prompt = 0", ["no result", "'warning"]),
        ("tg = 1e12", ["no result", "n_gen 4"]),
        ("time.sleep(600)", ["--timeout 0.2 seconds"]),
    ],
    ids=["killed", "abort", "silent", "empty", "list", "text", "zero-time", "timeout"],
)
def test_reason_of_a_failed_cell(fake: Fake, behaviour: str, words: list[str]) -> None:
    fake.behaves(behaviour)
    timeout = 0.2 if "sleep" in behaviour else None
    with pytest.raises(CellFailed) as failed:
        bench.bench(plan(model=fake.model, timeout=timeout), Cell("f16/f16", 0))
    assert [word for word in words if word not in str(failed.value)] == []


def test_model_that_does_not_load_stops_everything(fake: Fake, turbokv: Turbokv) -> None:
    fake.behaves("sys.exit(f'tensor is not within the file bounds\\nerror: failed to load model')")
    run = turbokv(*fake.arguments())
    assert run.returncode == 1
    assert run.out == ""
    assert f"turbokv: {fake.model} cannot be loaded: tensor is not within the file bounds" in run.err
    assert len(fake.calls()) == 1


def test_llama_bench_that_cannot_start_stops_and_keeps_what_there_is(fake: Fake, turbokv: Turbokv) -> None:
    fake.behaves("if len(calls) == 3: os.chmod(__file__, 0o644)")
    run = turbokv(*fake.arguments("--depth", "0", "--cache", "turbo3", "--rounds", "3"))
    assert run.returncode == 1
    assert f"turbokv: {fake.tool} cannot be started: Permission denied" in run.err
    assert fake.records()["turbo3/turbo3", 0]["rounds"] == 1
    assert len(fake.recorded()) == 3


# --- going on


SMALL = ("--depth", "0,64", "--cache", "turbo3")  # 4 measurements a round


STOP_AT_7 = "if len(calls) == 7: os.kill(os.getppid(), signal.SIGINT); time.sleep(600)"


def test_stopped_run_goes_on_where_it_was(fake: Fake, turbokv: Turbokv) -> None:
    fake.behaves(STOP_AT_7)
    first = fake.process(*SMALL, "--rounds", "3")
    assert first.returncode == 130
    assert f"the same command goes on, from {fake.samples}" in first.stderr
    before, ran = fake.recorded(), fake.calls()
    assert (len(before), len(ran)) == (6, 7)

    fake.behaves("tg = 50")
    second = turbokv(*fake.arguments(*SMALL, "--rounds", "3"))
    assert second.returncode == 0
    assert f"6 measurements are in {fake.samples}, 6 are left" in second.err
    after = fake.recorded()
    assert after[:6] == before
    assert [sample["tg"] for sample in after] == [100] * 6 + [50] * 6
    assert set(Counter(ran[:6] + fake.calls()).values()) == {3}
    assert {record["rounds"] for record in fake.records().values()} == {3}


def test_finished_run_measures_nothing_again_and_more_rounds_add_to_it(fake: Fake, turbokv: Turbokv) -> None:
    turbokv(*fake.arguments(*SMALL, "--rounds", "2"))
    before, table = fake.recorded(), fake.json.read_text()
    fake.calls()
    again = turbokv(*fake.arguments(*SMALL, "--rounds", "2"))
    assert again.returncode == 0
    assert "nothing is left to measure" in again.err
    assert (fake.calls(), fake.json.read_text()) == ([], table)
    turbokv(*fake.arguments(*SMALL, "--rounds", "3"))
    assert len(fake.calls()) == 4
    assert fake.recorded()[:8] == before
    assert {record["rounds"] for record in fake.records().values()} == {3}


def test_samples_of_older_versions_are_used(fake: Fake, turbokv: Turbokv) -> None:
    """They have neither memory nor energy."""
    turbokv(*fake.arguments(*SMALL, "--rounds", "1"))
    header, *samples = fake.samples.read_text().splitlines()
    old = [{k: v for k, v in json.loads(line).items() if k not in ("peak_bytes", "joules")} for line in samples]
    fake.samples.write_text("".join(f"{line}\n" for line in (header, *map(json.dumps, old))))
    run = turbokv(*fake.arguments(*SMALL, "--rounds", "2"))
    assert run.returncode == 0
    assert fake.recorded()[:4] == old
    assert {record["rounds"] for record in fake.records().values()} == {2}


def test_fewer_rounds_use_only_those(fake: Fake, turbokv: Turbokv) -> None:
    turbokv(*fake.arguments(*SMALL, "--rounds", "3"))
    turbokv(*fake.arguments(*SMALL, "--rounds", "2"))
    assert {record["rounds"] for record in fake.records().values()} == {2}
    assert len(fake.recorded()) == 12


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        (["-n", "5"], "n_gen 32 (now 5)"),
        (["-p", "5"], "n_prompt 512 (now 5)"),
        (["-t", "3"], "threads 1 (now 3)"),
        (["--seed", "3"], "seed 0 (now 3)"),
        (["--depth", "0"], "depths 0,64 (now 0)"),
        (["--cache", "f16"], "caches f16/f16,turbo3/turbo3 (now f16/f16)"),
    ],
)
def test_samples_of_other_arguments_are_not_mixed(
    fake: Fake, turbokv: Turbokv, arguments: list[str], difference: str
) -> None:
    turbokv(*fake.arguments(*SMALL, "-t", "1", "--rounds", "1"))
    before, _ = fake.samples.read_bytes(), fake.calls()
    refused = turbokv(*fake.arguments(*SMALL, "-t", "1", "--rounds", "1", *arguments))
    refused.refused(str(fake.samples), difference, "another --json", "delete")
    assert (fake.samples.read_bytes(), fake.calls()) == (before, [])


def test_samples_of_another_model_or_build_are_not_mixed(fake: Fake, turbokv: Turbokv) -> None:
    turbokv(*fake.arguments(*SMALL, "--rounds", "1"))
    fake.tool.write_text(fake.tool.read_text() + "# rebuilt\n")
    turbokv(*fake.arguments(*SMALL, "--rounds", "1")).refused(str(fake.samples), "build")
    fake.samples.unlink()
    turbokv(*fake.arguments(*SMALL, "--rounds", "1"))
    os.utime(fake.model, (1, 1))
    turbokv(*fake.arguments(*SMALL, "--rounds", "1")).refused(str(fake.samples), "model_mtime_ns")


def test_build_that_changes_meanwhile_stops_the_run(fake: Fake, turbokv: Turbokv) -> None:
    fake.behaves("if len(calls) == 3: open(__file__, 'a').write('# rebuilt')")
    run = turbokv(*fake.arguments("--depth", "0", "--cache", "turbo3", "--rounds", "3"))
    assert run.returncode == 1
    assert "turbokv: changed while it was measured: build" in run.err
    assert len(fake.recorded()) == 2
    assert fake.records()["f16/f16", 0]["rounds"] == 1


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda text: "", 1),
        (lambda text: text[:40], 1),
        (lambda text: text[:-40], 5),
        (lambda text: text.replace('"round"', '"turn"'), 2),
        (lambda text: text.replace("settings", "options"), 1),
    ],
    ids=["empty", "settings", "cut", "key", "header"],
)
def test_damaged_samples_are_neither_used_nor_overwritten(
    fake: Fake, turbokv: Turbokv, damage: Callable[[str], str], line: int
) -> None:
    turbokv(*fake.arguments(*SMALL, "--rounds", "1"))
    fake.samples.write_text(damage(fake.samples.read_text()))
    before, _ = fake.samples.read_text(), fake.calls()
    turbokv(*fake.arguments(*SMALL, "--rounds", "2")).refused(f"{fake.samples} is damaged in line {line}", "delete")
    assert (fake.samples.read_text(), fake.calls()) == (before, [])


def test_second_run_on_the_same_file_is_noticed(fake: Fake, turbokv: Turbokv) -> None:
    line = json.dumps({"round": 1})
    fake.behaves(f"if len(calls) == 3: open({str(fake.samples)!r}, 'a').write({line!r} + '\\n')")
    run = turbokv(*fake.arguments("--depth", "0", "--cache", "turbo3", "--rounds", "3"))
    assert run.returncode == 1
    assert "running twice?" in run.err
    assert fake.samples.read_text().splitlines()[-1] == line


def test_pipe_as_json_has_no_samples_beside_it(fake: Fake, turbokv: Turbokv) -> None:
    os.mkfifo(fake.json)
    pipe = os.open(fake.json, os.O_RDWR)
    run = turbokv(*fake.arguments("--depth", "0", "--cache", "f16", "--rounds", "2"))
    assert run.returncode == 0
    assert json.loads(os.read(pipe, 65536))["cache"] == "f16/f16"
    os.close(pipe)
    assert not fake.samples.exists()


# --- Ctrl-C, kill, full disk


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupt_delivers_the_finished_rounds(fake: Fake, name: str) -> None:
    fake.behaves(f"if len(calls) == 7: os.kill(os.getppid(), signal.{name}); time.sleep(600)")
    run = fake.process(*SMALL, "--rounds", "3")
    assert run.returncode == 130
    assert "Traceback" not in run.stderr
    assert "interrupted: only finished rounds are reported" in run.stderr
    # The seventh is the first or second of four at its depth: of the rounds 1 and 2, only one of the depths has both.
    rounds = {depth: {record["rounds"] for (_, d), record in fake.records().items() if d == depth} for depth in (0, 64)}
    first = plan(caches=("f16/f16", "turbo3/turbo3"), depths=(0, 64)).order(2)[0].depth
    assert rounds == {first: {2}, 64 - first: {1}}
    assert "turbo3/turbo3" in run.stdout


def test_interrupt_before_the_first_round_keeps_the_samples(fake: Fake) -> None:
    fake.behaves("if len(calls) == 2: os.kill(os.getppid(), signal.SIGINT); time.sleep(600)")
    run = fake.process(*SMALL, "--rounds", "3")
    assert (run.returncode, run.stdout) == (130, "")
    assert "no round was finished, nothing to report" in run.stderr
    assert not fake.json.exists()
    assert len(fake.recorded()) == 1


def test_full_disk_loses_nothing_that_was_recorded(fake: Fake, turbokv: Turbokv) -> None:
    limit = 1000  # bytes a file: the settings and a few samples
    run = fake.process(
        *SMALL, "--rounds", "5", before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    assert run.returncode == 1
    assert f"turbokv: cannot write {fake.samples}: File too large. Free some space" in run.stderr
    assert "turbo3/turbo3" in run.stdout
    assert "Traceback" not in run.stderr
    kept, ran = fake.recorded(), fake.calls()
    assert 2 <= len(kept) == len(ran) - 1
    assert {path.name for path in fake.folder.iterdir() if path.name.startswith(".")} == set()
    assert turbokv(*fake.arguments(*SMALL, "--rounds", "5")).returncode == 0
    assert (fake.recorded()[: len(kept)], len(fake.calls())) == (kept, 20 - len(kept))


# --- memory and energy


def test_peak_is_that_of_the_child_not_of_this_process(fake: Fake, turbokv: Turbokv) -> None:
    ballast = bytearray(300 << 20)
    ballast[:: 1 << 12] = b"x" * (300 << 8)  # resident here
    fake.behaves(
        "x = bytearray((64 if cache == 'f16/f16' else 128) << 20); x[::4096] = b'x' * (len(x) // 4096); time.sleep(.3)"
    )
    run = turbokv(*fake.arguments("--depth", "0", "--cache", "turbo3", "--rounds", "2"))
    assert run.returncode == 0
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc: there is no peak")
    for (cache, _), record in fake.records().items():
        own = (64 if cache == "f16/f16" else 128) << 20
        assert own <= record["peak_bytes"] < own + (60 << 20)
        assert record["peak_bytes"] == max(sample["peak_bytes"] for sample in record["samples"])
        assert f"{record['peak_bytes'] / 2**20:.2f}" in run.out


def test_energy_per_token_is_that_of_all_tokens_computed(
    fake: Fake, turbokv: Turbokv, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Meter:
        """10 J a reading: before, at every look at the process, behind; the fake ends before the second look."""

        counters = ("made up",)
        total = 0.0

        def __init__(self, **_: object) -> None:
            pass

        def joules(self) -> float:
            self.total += 10
            return self.total

    monkeypatch.setattr(speed, "Meter", Meter)
    run = turbokv(*fake.arguments("--depth", "64", "--cache", "turbo3", "--rounds", "2", "-p", "16", "-n", "4"))
    assert "does not tell its energy" not in run.err
    assert "J/token" in run.out
    tokens = 64 + 2 * 16 + 4 + 1
    for record in fake.records().values():
        joules = [sample["joules"] for sample in record["samples"]]
        assert min(joules) >= 20
        assert record["joules_per_token"] == pytest.approx(sum(joules) / 2 / tokens)


def test_platform_without_energy_says_so_once(fake: Fake, turbokv: Turbokv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turbokv.energy.packages", lambda *_: [])
    run = turbokv(*fake.arguments("--depth", "0", "--cache", "turbo3", "--rounds", "2"))
    assert run.err.count("does not tell its energy") == 1
    assert "J/token" not in run.out
    assert {record["joules_per_token"] for record in fake.records().values()} == {None}


# --- with the built llama-bench


def test_tiny_model_is_measured_and_what_it_refuses_is_named(
    tmp_path: Path, turbokv: Turbokv, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = write_llama(tmp_path / "tiny.gguf", head_dim=64), tmp_path / "speed.json"
    run = turbokv(
        "speed", "-m", model, "--depth", "0,32", "--cache", "turbo3,q8_0/turbo3,tbq3", "--rounds", "2", "-n", "2",
        "-p", "8", "-t", "1", "--json", path,
    )  # fmt: skip
    assert run.returncode == 1
    assert "2 of 8 failed" in run.err
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(record["cache"], record["depth"]) for record in records] == [
        (cache, depth) for depth in (0, 32) for cache in ("f16/f16", "turbo3/turbo3", "q8_0/turbo3", "tbq3/tbq3")
    ]
    for record in records:
        if record["cache"] == "tbq3/tbq3":
            assert "tbq3 needs heads of a multiple of 128 values" in record["error"]
            continue
        assert (record["error"], record["rounds"], len(record["samples"])) == (None, 2, 2)
        for test in ("tg", "pp"):
            low, high = record[test]["ci95"]
            assert 0 < low < record[test]["mean"] < high
            # 256 or 512 tokens of 2 layers with 2 heads of 64 values
            assert (
                record["kv_bytes"]
                == 256 * 2 * 2 * {"f16": 256, "turbo3": 52, "q8_0": 68 + 26}[record["cache"].split("/")[0]]
            )
            assert 0 < record[test]["ratio_ci95"][0] <= record[test]["ratio_f16"] <= record[test]["ratio_ci95"][1]
    assert data.MINI.name not in run.out


def test_truncated_model_is_refused(tmp_path: Path, turbokv: Turbokv) -> None:
    half = tmp_path / "half.gguf"
    half.write_bytes(data.BIAS.read_bytes()[: data.BIAS.stat().st_size // 2])
    run = turbokv("speed", "-m", half, "--depth", "0", "--cache", "f16", "--rounds", "1")
    assert run.returncode == 1
    assert f"turbokv: {half} cannot be loaded" in run.err
    assert "complete?" in run.err
