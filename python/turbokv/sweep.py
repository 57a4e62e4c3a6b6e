"""A sweep: every task on every model with every cache, one record per finished cell.

A cell is one cache in one task with one set of arguments, measured by one call of `turbokv kld`, `needle` or `speed`
in a process of its own: a crash costs that cell and no other, and the record holds the command that measures it
again. What is finished is known by its id alone, so a sweep goes on wherever it was stopped, and any number of
processes may work on the same folder: each claims the cell that it measures.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from turbokv import circumstances, data, device, native, store
from turbokv.closing import child
from turbokv.device import ON_CPU, Placement
from turbokv.errors import REFUSED, TurbokvError, signal_name
from turbokv.plan import Plan, Task
from turbokv.record import Record, Refusal, Result, requested
from turbokv.spec import BY_NAME

COMMAND = (sys.executable, "-m", "turbokv")
RESULT: TypeAdapter[Result] = TypeAdapter(Result)


@dataclass(frozen=True)
class Cell:
    """One thing to measure. `arguments` follow `turbokv`; --json is added when it runs."""

    id: str
    task: str
    model: Path
    cache: str  # as asked for, K/V
    arguments: tuple[str, ...]
    tokens: int  # about how many the command computes
    rung: int  # 0 for the smallest context or depth: small ones of all caches come before larger ones
    placement: Placement = ON_CPU

    def __str__(self) -> str:
        return shlex.join(("turbokv", *self.arguments))


class CellFailed(Exception):
    """The command failed for a reason that may pass; the message says which. Nothing is recorded."""


# --- what is to be done


def cells(plan: Plan) -> list[Cell]:
    """All cells of a plan in the order in which they run: small contexts first, then by task, model and cache, so that
    a sweep that is stopped has compared all caches. Raises TurbokvError for models that are none."""
    found = []
    placement = device.placement(plan.gpu_layers)
    asked = native.has_gpu() or plan.gpu_layers is not None  # else nobody needs to be told that it is the CPU
    layers = ("--gpu-layers", placement.option) if asked else ()
    for task in plan.tasks():
        text = task.text_fingerprint()
        calls = product(plan.models_of(task), enumerate(task.calls()), plan.caches_of(task))
        for model, (rung, (arguments, tokens)), cache in calls:
            path = data.model_path(model)
            threads = ("-t", str(plan.threads)) if plan.threads else ()
            command = (task.command, "-m", model, *arguments, "--cache", cache, *threads, *layers)
            identity = _identity(task, path, cache, arguments, text, plan.threads, placement)
            found.append(Cell(identity, task.name, path, cache, command, tokens, rung, placement))
    return sorted(found, key=lambda cell: cell.rung)


def _identity(
    task: Task,
    model: Path,
    cache: str,
    arguments: tuple[str, ...],
    text: str | None,
    threads: int,
    placement: Placement,
) -> str:
    """What makes two cells the same: not the build, and not what the model's file is called."""
    machine = circumstances.environment()
    identity: dict[str, Any] = {
        "task": task.name,
        "model": circumstances.model(model).fingerprint,
        "cache": cache,
        "arguments": arguments,
        "text": text,
        "machine": [machine.cpu, machine.gpu],
        "threads": threads if task.timed else None,  # of no effect on what is computed
        **placement.identity(),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


# --- measuring


@dataclass(frozen=True)
class Outcome:
    """How a run of cells ended: how many of them are in the folder now, which failed and why, and how many are left to
    other processes that measure them now, or to another run because the budget did not reach."""

    finished: int
    failed: dict[Cell, str]
    elsewhere: int
    left: int


@dataclass(frozen=True)
class Step:
    """What begins now. `left` is about how many seconds it and all that follow take; None before anything is known."""

    cell: Cell
    done: int
    total: int
    left: float | None


def run(
    todo: list[Cell],
    folder: Path,
    on_start: Callable[[Step], None],
    on_line: Callable[[str], None] = lambda _: None,
    *,
    budget: float | None = None,
    again: bool = False,
    turbokv: tuple[str, ...] | None = None,
) -> Outcome:
    """Measures what of `todo` is not in the folder yet.

    budget: in seconds; a cell that by estimate would not end within it is left, and a smaller one behind it is not. The
        first cell of each task runs in any case: there is nothing to estimate it by.
    again: repeat cells that another build measured.
    turbokv: how to start it, COMMAND unless given.

    `on_start` is called before each cell, `on_line` with each line that its command writes to stderr. Raises
    KeyboardInterrupt, and TurbokvError when a record cannot be written; what was finished before is in the folder.
    """
    started = time.monotonic()
    waiting, total = list(todo), len(todo)
    failed: dict[Cell, str] = {}
    elsewhere: list[Cell] = []
    while True:
        records = records_in(folder)
        have = done(records, again)
        waiting = [cell for cell in waiting if cell.id not in have]
        rates = measured_rates(todo, records)
        if budget is None:
            fitting = waiting
        else:
            left = budget - (time.monotonic() - started)
            fitting = [cell for cell in waiting if left > 0 and (seconds(cell, rates) or 0) <= left]
        if not fitting:
            break
        cell = fitting[0]
        with _claim(folder, cell) as claimed:
            if not claimed:
                elsewhere.append(cell)
            elif cell.id not in done(records_in(folder), again):  # or another process has just finished it
                on_start(Step(cell, total - len(waiting), total, seconds_left(waiting, rates)))
                try:
                    store.append(folder, measure(cell, on_line, turbokv or COMMAND))
                except CellFailed as error:
                    failed[cell] = str(error)
                    on_line(f"failed: {error}")
        waiting.remove(cell)
    have = done(records_in(folder), again)
    return Outcome(
        finished=sum(cell.id in have for cell in todo),
        failed=failed,
        elsewhere=sum(cell.id not in have for cell in elsewhere),
        left=sum(cell.id not in have for cell in waiting),
    )


def run_jobs(
    todo: list[Cell], folder: Path, executor: str, n_jobs: int, hours: float, settings: dict[str, Any], *, again: bool
) -> Outcome:
    """As run(), by n_jobs jobs of submitit that share the cells: `slurm`, or `local` for processes on this machine.

    Waits until all of them have ended; their logs are in folder/jobs. On KeyboardInterrupt they are cancelled. Raises
    TurbokvError if submitit or its cluster is missing, or a setting is unknown.
    """
    try:
        import submitit
    except ImportError:
        raise TurbokvError("--executor needs submitit: pip install 'turbokv[slurm]'") from None
    try:
        pool = submitit.AutoExecutor(folder=folder / "jobs", cluster=executor)
        pool.update_parameters(timeout_min=max(1, round(60 * hours)), name="turbokv", **settings)
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise TurbokvError(f"--executor {executor}: {error}") from None
    jobs = [pool.submit(_job, todo, folder, again, COMMAND) for _ in range(n_jobs)]
    failed: dict[Cell, str] = {}
    try:
        for job in jobs:
            try:
                failed |= job.result()
            except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError) as error:
                raise TurbokvError(f"job {job.job_id} ended early, its log is {job.paths.stderr}: {error}") from None
    except BaseException:
        for job in jobs:
            job.cancel(check=False)
        raise
    have = done(records_in(folder), again)
    missing = sum(cell.id not in have for cell in todo)
    return Outcome(len(todo) - missing, failed, 0, missing - len(failed))


def _job(todo: list[Cell], folder: Path, again: bool, turbokv: tuple[str, ...]) -> dict[Cell, str]:
    """What one job runs; its prints are its log."""

    def on_start(step: Step) -> None:
        print(f"{step.done} of {step.total} done; {step.cell}", flush=True)

    return run(todo, folder, on_start, again=again, turbokv=turbokv).failed


def done(records: list[Record], again: bool) -> set[str]:
    """Ids of the cells that need no measuring."""
    build = circumstances.build().build if again else None
    return {record.id for record in store.latest(records) if not again or record.build.build == build}


def records_in(folder: Path) -> list[Record]:
    """What is in the folder so far; nothing if it is not there yet."""
    return store.read(folder) if store.runs_file(folder).exists() else []


@contextmanager
def _claim(folder: Path, cell: Cell) -> Iterator[bool]:
    """Holds the cell against other processes while the block runs; False if one of them holds it. A claim ends with its
    process, however that ends."""
    locks = folder / ".claims"
    try:
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / cell.id, timeout=0)
        lock.acquire()
    except Timeout:
        yield False
        return
    except OSError as error:
        raise TurbokvError(f"cannot write to {folder}: {error.strerror}. Choose another folder") from error
    try:
        yield True
    finally:
        lock.release()


def measure(cell: Cell, on_line: Callable[[str], None], turbokv: tuple[str, ...]) -> Record:
    """Runs the command of a cell. Raises CellFailed, or KeyboardInterrupt if the command was interrupted."""
    started, clock = datetime.now(UTC), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="turbokv-sweep-") as scratch:
        output = Path(scratch) / "result.json"
        status, lines = _call((*turbokv, *cell.arguments, "--json", str(output)), on_line)
        result = _result(cell, status, lines, output)
    effective = result.cache.split("/")
    layouts = [BY_NAME[name].layout_string if name in BY_NAME else "" for name in effective]
    return Record(
        id=cell.id,
        command=str(cell),
        started=started.strftime("%Y-%m-%dT%H:%M:%SZ"),
        seconds=round(time.monotonic() - clock, 3),
        model=circumstances.model(cell.model),
        layout_k=layouts[0],
        layout_v=layouts[-1],
        environment=circumstances.environment(),
        build=circumstances.build(),
        result=result,
    )


def _call(command: tuple[str, ...], on_line: Callable[[str], None]) -> tuple[int, list[str]]:
    """Exit status, and what was written to stderr. However this is left, the command has ended."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    lines: list[str] = []
    with child(command, env={**os.environ, "PYTHONUNBUFFERED": "1"}, **pipes) as process:
        assert process.stderr
        for line in process.stderr:
            lines.append(line.rstrip())
            on_line(lines[-1])
        return process.wait(), lines


def _result(cell: Cell, status: int, lines: list[str], output: Path) -> Result:
    reason = next((line.removeprefix("turbokv: ") for line in reversed(lines) if line.startswith("turbokv: ")), "")
    if status in (130, -signal.SIGINT, -signal.SIGTERM):
        raise KeyboardInterrupt
    if status == REFUSED:
        on = cell.placement
        return Refusal(task=cell.task, cache=cell.cache, reason=reason, device=on.device, gpu_layers=on.gpu_layers)
    if status < 0:
        number = -status
        hint = ", out of memory?" if number == signal.SIGKILL else ""
        raise CellFailed(f"killed by {signal_name(number)}{hint}")
    if status:
        raise CellFailed(reason or "; ".join(lines[-3:]) or f"exit code {status}, no reason given")
    try:
        content = output.read_text()
        parsed = json.loads(content) if content.startswith("[") else [json.loads(line) for line in content.splitlines()]
        results = [RESULT.validate_python(item) for item in parsed]
    except (OSError, ValueError, ValidationError) as error:
        raise CellFailed(f"the command wrote no result that fits the schema: {error}") from None
    own = [result for result in results if requested(result) == cell.cache]
    if len(own) != 1:
        raise CellFailed(f"the command wrote {len(own)} results for {cell.cache}")
    return own[0]


# --- time


def seconds(cell: Cell, rates: dict[str, float]) -> float | None:
    """About how long a cell takes, None if nothing like it was measured."""
    rate = rates.get(cell.task)
    return _work(cell) / rate if rate else None


def _work(cell: Cell) -> float:
    return float(cell.tokens) * circumstances.model(cell.model).parameters


def seconds_left(waiting: list[Cell], rates: dict[str, float]) -> float | None:
    """About how long all of them take, None if that of one is not known."""
    estimates = [seconds(cell, rates) for cell in waiting]
    known = [estimate for estimate in estimates if estimate is not None]
    return sum(known) if len(known) == len(estimates) else None


def measured_rates(plan: list[Cell], records: list[Record]) -> dict[str, float]:
    """Tokens times parameters per second, by task, of the cells of a plan that are finished."""
    taken = {record.id: record.seconds for record in records if not isinstance(record.result, Refusal)}
    rates = {}
    for task in {cell.task for cell in plan}:
        measured = [cell for cell in plan if cell.task == task and taken.get(cell.id)]
        if measured:
            rates[task] = sum(map(_work, measured)) / sum(taken[cell.id] for cell in measured)
    return rates
