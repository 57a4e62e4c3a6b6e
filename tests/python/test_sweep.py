"""`turbokv sweep`: plans, cells, resuming, sharing, budgets, failures. A script plays the commands that it runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sample_records import kld_result
from turbokv import cli, plan, store, sweep
from turbokv.commands.sweep import seconds
from turbokv.errors import TurbokvError
from turbokv.record import KldResult, Refusal

# What the script does before it answers: it sees `arguments`, `cache` and `nth`, the number of its call from 1.
SCRIPT = """
import json, os, signal, sys, time
arguments = sys.argv[1:]
cache = arguments[arguments.index("--cache") + 1]
output = arguments[arguments.index("--json") + 1]
with open({calls!r}, "a") as file:
    file.write(" ".join(arguments[:arguments.index("--json")]) + "\\n")
nth = len(open({calls!r}).readlines())
exec(open({behaviour!r}).read())
result = json.loads({result!r}) | {{"cache": cache, "requested": cache}}
with open(output, "w") as file:
    json.dump([result], file)
"""
MAIN = """
import sys
from turbokv import cli, sweep
sweep.COMMAND = (sys.executable, sys.argv.pop(1))
cli.main()
"""


class Fake:
    """A folder with a script that plays `turbokv kld`."""

    def __init__(self, folder: Path) -> None:
        self.results, self.script = folder / "results", folder / "fake.py"
        self._calls, self._behaviour = folder / "calls", folder / "behaviour.py"
        result = json.dumps(kld_result().model_dump(mode="json"))
        paths = {"calls": str(self._calls), "behaviour": str(self._behaviour)}
        self.script.write_text(SCRIPT.format(result=result, **paths))
        self.behaves("")

    def behaves(self, code: str) -> None:
        self._behaviour.write_text(textwrap.dedent(code))

    def calls(self) -> list[str]:
        """`cache` of all calls since the last call of this."""
        lines = self._calls.read_text().splitlines() if self._calls.exists() else []
        self._calls.unlink(missing_ok=True)
        return [line.split()[line.split().index("--cache") + 1] for line in lines]

    def recorded(self) -> list[str]:
        return [record.result.cache for record in store.read(self.results)]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake(tmp_path)
    monkeypatch.setattr(sweep, "COMMAND", (sys.executable, str(made.script)))
    return made


Turbokv = Callable[..., tuple[int, str, str]]


@pytest.fixture
def turbokv(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Turbokv:
    """Runs the command in this process: exit code, stdout, stderr."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["turbokv", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capfd.readouterr()

    return run


def cells(caches: str = "q8_0,q4_0,turbo3", **changes: Any) -> list[sweep.Cell]:
    content = {"models": ["mini"], "caches": caches, "kld": {"ctx": [512]}}
    return sweep.cells(plan.load(None, content | changes))


def run(fake: Fake, todo: list[sweep.Cell], **options: Any) -> sweep.Outcome:
    return sweep.run(todo, fake.results, lambda _: None, **options)


# --- plans


def test_plan_file_with_everything(tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    file.write_text(
        'models = ["mini", "bias"]\ncaches = "f16,q8_0/turbo3"\nthreads = 1\n'
        "[kld]\nctx = [2048, 512]\ntokens = 4096\n[needle]\nlengths = [512]\n[speed]\ndepths = [0, 64]\n"
    )
    commands = [str(cell) for cell in sweep.cells(plan.load(file, {}))]
    assert len(commands) == len(set(commands)) == 2 * 2 * (2 + 1 + 2)
    assert commands[0] == "turbokv kld -m mini -c 512 --chunks 8 --cache f16/f16 -t 1"
    assert "turbokv kld -m bias -c 2048 --chunks 2 --cache q8_0/turbo3 -t 1" in commands
    assert "turbokv speed -m mini --depth 64 --rounds 3 --n-gen 32 --n-prompt 512 --cache f16/f16 -t 1" in commands


def test_flags_replace_what_the_file_says_and_add_tasks(tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    file.write_text('models = ["mini"]\ncaches = ["q4_0"]\n[kld]\nctx = [512]\ntokens = 512\n')
    commands = [str(c) for c in sweep.cells(plan.load(file, {"caches": "q8_0", "kld": {"ctx": ["1024"]}, "speed": {}}))]
    assert commands[0] == "turbokv kld -m mini -c 1024 --chunks 1 --cache q8_0/q8_0"
    assert [command.split()[1] for command in commands] == ["kld", "speed", "speed"]


def test_chosen_tasks_are_measured_and_no_others(tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    file.write_text('models = ["mini"]\ncaches = ["q4_0"]\n[kld]\nctx = [512]\n[speed]\ndepths = [64]\n')
    found = sweep.cells(plan.load(file, {"needle": {"text": "x"}}, ["speed", "server"]))
    assert [str(cell).split(" -")[0] for cell in found] == ["turbokv speed"] * 3
    assert "--depth 64" in str(found[0])
    (cell,) = sweep.cells(plan.load(file, {}, ["kld", "speed"], str(file)))[:1]
    assert f"-f {file}" in str(cell)
    assert [cell.task for cell in found] == ["speed", "server", "server"]


def test_a_task_may_have_models_and_caches_of_its_own() -> None:
    found = cells("q8_0,turbo3", speed={"depths": [0], "caches": "q4_0", "models": ["bias"]})
    assert [(cell.task, cell.model.name[:4], cell.cache) for cell in found] == [
        ("kld", "mini", "q8_0/q8_0"),
        ("kld", "mini", "turbo3/turbo3"),
        ("speed", "bias", "q4_0/q4_0"),
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('models = ["mini"]\ncaches = "f16"\n', ["nothing to measure", "kld"]),
        ('models = []\ncaches = "f16"\n[kld]\n', ["models"]),
        ('caches = "f16"\n[kld]\n', ["models"]),
        ('models = ["mini"]\ncaches = "f16"\n[kld]\ncontext = 3\n', ["kld.context"]),
        ('models = ["mini"]\n[klds]\n', ["klds"]),
        ('models = ["mini"]\ncaches = "f16"\n[kld]\nctx = ["x"]\n', ["kld.ctx.0"]),
        ('models = ["mini"]\ncaches = "f17"\n[kld]\n', ["f17"]),
        ("models = [", ["plan.toml"]),
        ('models = ["missing.gguf"]\ncaches = "f16"\n[kld]\n', ["no model", "missing.gguf"]),
        ('models = ["mini"]\ncaches = "f16"\n[kld]\ntext = "missing.txt"\n', ["missing.txt"]),
    ],
)
def test_bad_plan_is_refused_with_the_place(content: str, words: list[str], tmp_path: Path, turbokv: Turbokv) -> None:
    (tmp_path / "plan.toml").write_text(content)
    status, out, err = turbokv("sweep", tmp_path / "plan.toml", "-o", tmp_path / "results")
    assert (status, out) == (1, "")
    assert [word for word in words if word not in err] == []
    assert not (tmp_path / "results").exists()


def test_small_contexts_of_all_caches_come_before_large_ones() -> None:
    found = cells(kld={"ctx": [2048, 512], "tokens": 2048}, speed={"depths": [64, 0]})
    assert [cell.rung for cell in found] == [0] * 6 + [1] * 6
    assert [cell.task for cell in found[:6]] == ["kld"] * 3 + ["speed"] * 3


def test_identity_is_of_the_content_not_of_the_name(tmp_path: Path) -> None:
    from turbokv import data

    link = tmp_path / "other-name.gguf"
    link.symlink_to(data.MINI)
    assert [c.id for c in cells(models=[str(link)])] == [c.id for c in cells()]
    assert {c.id for c in cells(models=["bias"])}.isdisjoint(c.id for c in cells())
    assert {c.id for c in cells(kld={"ctx": [256]})}.isdisjoint(c.id for c in cells())


def test_threads_make_another_cell_only_where_time_is_measured() -> None:
    assert [c.id for c in cells(threads=1)] == [c.id for c in cells(threads=2)]
    speed: dict[str, Any] = {"kld": None, "speed": {"depths": [0]}}
    assert {c.id for c in cells(threads=1, **speed)}.isdisjoint(c.id for c in cells(threads=2, **speed))


def test_unknown_task_is_named() -> None:
    with pytest.raises(TurbokvError, match=r"'klx'.*kld, needle, speed, server"):
        plan.load(None, {"models": ["mini"]}, ["klx"])


@pytest.mark.parametrize(("text", "expected"), [("45s", 45), ("10m", 600), ("1h30m", 5400), ("2h", 7200)])
def test_budget(text: str, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "10", "m", "1.5h", "-3m", "10 m"])
def test_bad_budget_is_named(text: str) -> None:
    with pytest.raises(TurbokvError, match="10m or 1h30m"):
        seconds(text)


# --- running


def test_every_cell_becomes_a_record_with_its_circumstances(fake: Fake) -> None:
    todo = cells()
    assert run(fake, todo) == sweep.Outcome(finished=3, failed={}, elsewhere=0, left=0)
    records = store.read(fake.results)
    assert [record.id for record in records] == [cell.id for cell in todo]
    record = records[2]
    assert record.command == "turbokv kld -m mini -c 512 --chunks 16 --cache turbo3/turbo3"
    assert isinstance(record.result, KldResult)
    assert record.model.architecture == "qwen3"
    assert record.layout_k.startswith("turbo3/1 b128")
    assert record.build.upstream_commit.startswith("0c1e57098")
    assert records[0].layout_k == ""  # q8_0 is upstream's


def test_finished_cells_are_not_measured_again(fake: Fake) -> None:
    run(fake, cells())
    assert len(fake.calls()) == 3
    assert run(fake, cells("q8_0,turbo3,turbo4")).finished == 3
    assert fake.calls() == ["turbo4/turbo4"]


def test_again_repeats_what_another_build_measured(fake: Fake) -> None:
    run(fake, cells())
    file = fake.results / "runs.jsonl"
    first, *rest = file.read_text().splitlines(keepends=True)
    record = json.loads(first)
    record["build"]["build"] = "0" * 12
    file.write_text(json.dumps(record) + "\n" + "".join(rest))
    fake.calls()
    assert run(fake, cells()).finished == 3
    assert fake.calls() == []
    assert run(fake, cells(), again=True).finished == 3
    assert fake.calls() == ["q8_0/q8_0"]
    assert len(store.read(fake.results)) == 4


def test_refused_cache_is_a_result(fake: Fake) -> None:
    fake.behaves(
        """
        if cache == "q4_0/q4_0":
            print("note: first", "turbokv: heads of 64 do not fit", sep="\\n", file=sys.stderr)
            sys.exit(3)
        """
    )
    assert run(fake, cells()).finished == 3
    (refusal,) = (r.result for r in store.read(fake.results) if isinstance(r.result, Refusal))
    assert (refusal.task, refusal.cache, refusal.reason) == ("kld", "q4_0/q4_0", "heads of 64 do not fit")
    fake.calls()
    run(fake, cells())
    assert fake.calls() == []


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("print('turbokv: no space', file=sys.stderr); sys.exit(1)", "no space"),
        ("raise ValueError('unexpected')", "ValueError: unexpected"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL, out of memory?"),
        ("open(output, 'w').write('half'); os._exit(0)", "no result that fits the schema"),
        ("os._exit(0)", "no result that fits the schema"),
    ],
)
def test_failed_cell_is_named_and_tried_again_next_time(fake: Fake, behaviour: str, reason: str) -> None:
    fake.behaves(f"if cache == 'q4_0/q4_0': {behaviour}")
    outcome = run(fake, cells())
    assert outcome.finished == 2
    ((cell, said),) = outcome.failed.items()
    assert cell.cache == "q4_0/q4_0"
    assert reason in said
    assert fake.recorded() == ["q8_0/q8_0", "turbo3/turbo3"]
    fake.behaves("")
    fake.calls()
    assert run(fake, cells()).finished == 3
    assert fake.calls() == ["q4_0/q4_0"]


def test_command_reports_what_failed(fake: Fake, turbokv: Turbokv) -> None:
    fake.behaves("if cache == 'q4_0/q4_0': sys.exit('turbokv: no space')")
    arguments = ("sweep", "-m", "mini", "--task", "kld", "--ctx", "512", "--cache", "q8_0,q4_0", "-o", fake.results)
    status, out, err = turbokv(*arguments)
    assert status == 1
    assert "1 of 2 cells are in" in out
    assert "failed: turbokv kld -m mini" in err
    assert "no space" in err


def test_dry_run_lists_and_measures_nothing(fake: Fake, turbokv: Turbokv) -> None:
    run(fake, cells("q8_0"))
    fake.calls()
    common = ("sweep", "-m", "mini", "--task", "kld", "--ctx", "512", "-o", fake.results)
    status, out, _ = turbokv(*common, "--cache", "q8_0,q4_0", "--dry-run")
    assert status == 0
    assert fake.calls() == []
    assert len([line for line in out.splitlines() if "turbokv kld" in line]) == 2


# --- budget


def test_budget_leaves_what_would_not_end_in_time(fake: Fake) -> None:
    fake.behaves("time.sleep(0.5)")
    run(fake, cells("q8_0"))  # from here on it is known how long a cell takes
    records = store.read(fake.results)
    slow = records[0].model_copy(update={"seconds": 1000.0})
    (fake.results / "runs.jsonl").write_text(slow.model_dump_json() + "\n")
    fake.calls()
    outcome = run(fake, cells(), budget=100)
    assert (outcome.finished, outcome.left) == (1, 2)
    assert fake.calls() == []
    assert run(fake, cells(), budget=2500).finished == 3


def test_without_anything_to_estimate_by_the_first_cell_runs(fake: Fake) -> None:
    outcome = run(fake, cells(), budget=0.001)
    assert (outcome.finished, outcome.left) in ((0, 3), (1, 2))  # the clock may be past the budget already
    assert run(fake, cells(), budget=60).finished == 3


# --- stopped, killed, shared


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_stopped_sweep_loses_the_cell_in_flight_only(fake: Fake, name: str) -> None:
    fake.behaves(f"if nth == 2: os.kill(os.getppid(), signal.{name}); time.sleep(600 if '{name}' != 'SIGKILL' else 0)")
    process = sweep_process(fake)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if name == "SIGKILL" else 130)
    if name != "SIGKILL":
        assert "the same command goes on" in err
    assert "Traceback" not in err
    assert fake.recorded() == ["q8_0/q8_0"]
    fake.behaves("")
    fake.calls()
    assert run(fake, cells()).finished == 3
    assert fake.calls() == ["q4_0/q4_0", "turbo3/turbo3"]


def sweep_process(fake: Fake, caches: str = "q8_0,q4_0,turbo3") -> subprocess.Popen[str]:
    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

    arguments = ["sweep", "-m", "mini", "--task", "kld", "--ctx", "512", "--cache", caches, "-o", str(fake.results)]
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, str(fake.script), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=prepare,
    )  # fmt: skip


def test_two_sweeps_on_one_folder_share_the_cells(fake: Fake) -> None:
    fake.behaves("time.sleep(0.3)")
    caches = "f16,q8_0,q5_0,q4_0,turbo4,turbo3,turbo2"
    sweeps = [sweep_process(fake, caches) for _ in range(2)]
    for process in sweeps:
        process.communicate(timeout=120)
        assert process.returncode == 0
    assert sorted(fake.calls()) == sorted(f"{name}/{name}" for name in caches.split(","))
    assert len(fake.recorded()) == 7


def test_cell_that_another_sweep_measures_is_left_to_it(fake: Fake) -> None:
    todo = cells()
    with sweep._claim(fake.results, todo[1]) as claimed:
        assert claimed
        assert run(fake, todo) == sweep.Outcome(finished=2, failed={}, elsewhere=1, left=0)
    assert "q4_0/q4_0" not in fake.calls()


def test_folder_that_cannot_be_written_is_named_before_anything_is_measured(fake: Fake, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TurbokvError, match="cannot write"):
        sweep.run(cells(), tmp_path / "file", lambda _: None)
    assert fake.calls() == []


def test_full_disk_keeps_what_was_recorded_and_stops(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    run(fake, cells("q8_0"))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(TurbokvError, match="Free some space"):
        run(fake, cells())
    assert fake.recorded() == ["q8_0/q8_0"]


# --- jobs


def test_jobs_of_submitits_local_executor_share_the_cells(fake: Fake) -> None:
    pytest.importorskip("submitit")
    outcome = sweep.run_jobs(cells(), fake.results, "local", 2, 1, {}, again=False)
    assert outcome == sweep.Outcome(finished=3, failed={}, elsewhere=0, left=0)
    assert sorted(fake.calls()) == ["q4_0/q4_0", "q8_0/q8_0", "turbo3/turbo3"]


def test_missing_cluster_is_named(fake: Fake) -> None:
    pytest.importorskip("submitit")
    with pytest.raises(TurbokvError, match="--executor slurm"):
        sweep.run_jobs(cells(), fake.results, "slurm", 1, 1, {}, again=False)


def test_real_cell_end_to_end(tmp_path: Path, turbokv: Turbokv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = ("-m", "mini", "--task", "kld", "--ctx", "64", "--cache", "turbo3", "-o", tmp_path / "r")
    plan_file = tmp_path / "plan.toml"
    plan_file.write_text('models = ["mini"]\ncaches = "turbo3"\n[kld]\nctx = [64]\ntokens = 128\n')
    status, _, err = turbokv("sweep", plan_file, *arguments)
    assert status == 0, err
    (record,) = store.read(tmp_path / "r")
    assert isinstance(record.result, KldResult)
    assert record.result.cache == "turbo3/turbo3"
    assert record.result.kld is not None
    started = time.strptime(record.started, "%Y-%m-%dT%H:%M:%SZ")
    assert started.tm_year >= 2026
