"""`turbokv sweep`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import rich.box
import typer
from rich.table import Table

from turbokv.commands.options import GpuLayersOption
from turbokv.errors import FAILED, INTERRUPTED, TurbokvError
from turbokv.terminal import duration, err, out, terminated_as_interrupted


def sweep(
    plan_file: Annotated[
        Path | None, typer.Argument(metavar="[PLAN.toml]", help="What to measure; flags replace what it says.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the results; runs.jsonl in it gets a line per cell.")
    ] = ...,  # type: ignore[assignment]  # typer's way to say that it must be given
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="GGUF model, or `mini` or `bias`, which are built in; may be repeated."),
    ] = None,
    cache: Annotated[str | None, typer.Option("--cache", help="Comma-separated caches, each K/V or one type.")] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="Only these, comma-separated: kld, needle, speed, server.")
    ] = None,
    ctx: Annotated[str | None, typer.Option("--ctx", "-c", help="kld: comma-separated window sizes in tokens.")] = None,
    text: Annotated[str | None, typer.Option("--text", "-f", help="kld and needle: text file or `wikitext2`.")] = None,
    lengths: Annotated[str | None, typer.Option("--lengths", help="needle: comma-separated haystack sizes.")] = None,
    depth: Annotated[str | None, typer.Option("--depth", "-d", help="speed: comma-separated filled tokens.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", "-t", min=0, help="CPU threads; 0 means all.")] = None,
    gpu_layers: GpuLayersOption = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Time to spend now, such as 10m or 1h30m; the rest another time.")
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Repeat cells that another build of turbokv measured; both stay on file.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells and what is finished, and stop.")] = False,
    executor: Annotated[
        str | None,
        typer.Option("--executor", help="`slurm`: run as cluster jobs through submitit; `local`: as processes here."),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="With --executor: how many jobs share the cells.")] = 1,
    job_hours: Annotated[
        float, typer.Option("--job-hours", min=0.01, help="With --executor: the time limit of a job.")
    ] = 4,
    job_setting: Annotated[
        list[str] | None,
        typer.Option("--job-setting", help="With --executor: NAME=VALUE for submitit, e.g. slurm_partition=gpu."),
    ] = None,
) -> None:
    """Measure every task with every cache on every model, and keep each result as soon as it is there.

    A cell is one cache in one task at one context; each is measured by `turbokv kld`, `needle` or `speed` in a process
    of its own, and becomes one line of runs.jsonl with the model, machine, build and command. Finished cells are never
    measured again: a sweep that was stopped, killed, or ran out of --budget goes on when the same command is given
    again. Several sweeps may work on one folder at a time; each cell is measured by one of them.

    Small contexts come first, for all caches, then larger ones. A cache that a model does not take is recorded as
    refused. A cell that fails for another reason is named, the others go on, the exit code is 1, and the next run tries
    it again.

    A plan is a TOML file (every key but `models` has a default; a task without a table is not measured):

        models = ["mini", "model.gguf"]
        caches = "f16,q8_0,q4_0,turbo4,turbo3,q8_0/turbo3"
        [kld]
        ctx = [512, 2048, 8192]
        tokens = 8192          # per context
        [needle]
        lengths = [512, 2048]
        [speed]
        depths = [0, 8192]

    Example: `turbokv sweep -m mini --task kld --ctx 256 --cache q8_0,turbo3 -o sweep`, then
    `turbokv report sweep -o report.html`, `turbokv results sweep`
    """
    from turbokv import plan as plans
    from turbokv import sweep as measuring

    tasks = [name.strip() for name in task.split(",")] if task else None
    plan = plans.load(plan_file, _flags(model, cache, ctx, lengths, depth, threads, gpu_layers), tasks, text)
    cells = measuring.cells(plan)
    if dry_run:
        _list(cells, output, again)
        return
    try:
        with terminated_as_interrupted():
            if executor:
                settings = dict(_setting(item) for item in job_setting or ())
                outcome = measuring.run_jobs(cells, output, executor, jobs, job_hours, settings, again=again)
            else:
                with _progress() as (on_start, on_line):
                    outcome = measuring.run(
                        cells, output, on_start, on_line, budget=seconds(budget) if budget else None, again=again
                    )
    except KeyboardInterrupt:
        err.print(f"interrupted: the cell in flight is lost, the same command goes on, from {output}", markup=False)
        raise typer.Exit(INTERRUPTED) from None
    out.print(f"{outcome.finished} of {len(cells)} cells are in {output}", markup=False, highlight=False)
    if outcome.elsewhere:
        err.print(f"{outcome.elsewhere} are being measured by another sweep")
    if outcome.left:
        err.print(f"{outcome.left} are left, for which the budget did not reach: the same command goes on with them")
    for cell, reason in outcome.failed.items():
        err.print(f"failed: {cell}: {reason}", markup=False)
    if outcome.failed:
        raise typer.Exit(FAILED)


def seconds(text: str) -> float:
    """Parses 45s, 10m, 1h30m. Raises TurbokvError."""
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if not found or not any(found.groups()):
        raise TurbokvError(f"--budget {text} is no time: write 45s, 10m or 1h30m")
    hours, minutes, rest = (int(group or 0) for group in found.groups())
    return 3600 * hours + 60 * minutes + rest


def _flags(
    model: list[str] | None,
    cache: str | None,
    ctx: str | None,
    lengths: str | None,
    depth: str | None,
    threads: int | None,
    gpu_layers: str | None,
) -> dict[str, Any]:
    """What the flags say, in the shape of a plan."""
    plan: dict[str, Any] = {"models": model, "caches": cache, "threads": threads, "gpu_layers": gpu_layers}
    plan = {key: value for key, value in plan.items() if value is not None}
    for name, key, value in (("kld", "ctx", ctx), ("needle", "lengths", lengths), ("speed", "depths", depth)):
        if value is not None:
            plan.setdefault(name, {})[key] = [item.strip() for item in value.split(",")]
    return plan


def _setting(item: str) -> tuple[str, str | int]:
    name, separator, value = item.partition("=")
    if not separator or not name:
        raise TurbokvError(f"--job-setting {item} is not NAME=VALUE, such as slurm_partition=gpu")
    return name, int(value) if value.isdigit() else value


def _list(cells: list[Any], folder: Path, again: bool) -> None:
    """The cells, with a mark for those that are finished."""
    from turbokv import sweep as measuring

    records = measuring.records_in(folder)
    have, rates = measuring.done(records, again), measuring.measured_rates(cells, records)
    table = Table(box=rich.box.SIMPLE_HEAD)
    for name in ("", "about", "command"):
        table.add_column(name, no_wrap=True)
    for cell in cells:
        estimate = measuring.seconds(cell, rates)
        table.add_row("done" if cell.id in have else "", duration(estimate) if estimate else "", str(cell))
    out.print(table)


@contextmanager
def _progress() -> Iterator[tuple[Any, Any]]:
    """A line per cell; on a terminal, what the cell says last below it."""

    def describe(step: Any) -> str:
        left = f", about {duration(step.left)} left" if step.left is not None else ""
        return f"[{step.done + 1}/{step.total}] {step.cell}{left}"

    if not err.is_terminal:
        yield lambda step: err.print(describe(step), markup=False), lambda _: None
        return
    with err.status("") as status:
        yield (
            lambda step: err.print(describe(step), markup=False),
            lambda line: status.update(line.replace("[", r"\[")[: err.width - 4]),
        )
