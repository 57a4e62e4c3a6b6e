"""`turbokv speed`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import rich.box
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from turbokv import cache_type, data, engine
from turbokv import speed as measurement
from turbokv.commands.options import DEFAULT_CACHES, CacheOption, ModelOption, ThreadsOption
from turbokv.errors import TurbokvError
from turbokv.terminal import deliver, duration, err, terminated_as_interrupted


def speed(
    model: ModelOption = data.MINI,
    depth: Annotated[
        str, typer.Option("--depth", "-d", help="Comma-separated numbers of tokens that the cache already holds.")
    ] = "0,2048",
    cache: CacheOption = DEFAULT_CACHES,
    threads: ThreadsOption = 0,
    rounds: Annotated[
        int, typer.Option("--rounds", "-r", min=1, help="How often everything is measured; one gives no interval.")
    ] = 5,
    n_gen: Annotated[
        int, typer.Option("--n-gen", "-n", min=0, help="Tokens per tg measurement; 0 leaves tg out.")
    ] = 32,
    n_prompt: Annotated[
        int, typer.Option("--n-prompt", "-p", min=0, help="Tokens per pp measurement; 0 leaves pp out.")
    ] = 512,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0, help="Give a cache up that takes longer, in seconds; 0 means no limit.")
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Of the random order.")] = 0,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            help="Write the results to this file, one JSON object per line, one line per cache and depth. Every "
            "measurement is kept in FILE.samples as soon as it is made.",
        ),
    ] = None,
) -> None:
    """Speed of every cache beside f16, by llama-bench: `tg` is generation, `pp` prompt processing, in tokens/s.

    How to read it: `x f16` is the speed as a multiple of f16's, above 1 is faster; the 95% interval behind it says how
    sure that is. Both are taken behind as many tokens as --depth says: the cache costs more the fuller it is, so give
    the depths that you will use. Filling it takes most of the time.

    Every round runs every cache once at every depth in a random order, f16 always among them, and ratios are formed
    within the round: what else the machine does hits all of them alike. Means are geometric. The interval tells how
    the rounds differ: caches whose intervals overlap need more --rounds, or a quieter machine.

    With --json a run that was stopped goes on where it was when the same command is given again, and more --rounds
    add to those that there are. Delete FILE.samples to measure anew. A cache that llama-bench refuses is named with
    the reason, the others go on, and the exit code is 1.

    Example: `turbokv speed -m model.gguf --depth 0,8192 --cache q8_0,turbo4,q8_0/turbo3 --json speed.json`
    """
    plan = measurement.Plan(
        model=model,
        caches=measurement.with_f16(cache_type.parse_pairs(cache)),
        depths=measurement.parse_depths(depth),
        n_prompt=n_prompt,
        n_gen=n_gen,
        threads=threads or engine.default_threads(),
        rounds=rounds,
        seed=seed,
        timeout=timeout or None,
    )
    run = measurement.start(plan, json_file)
    _speed_notes(run)
    status = 0
    try:
        with terminated_as_interrupted(), _speed_progress(rounds) as on_start:
            measurement.measure(run, on_start, lambda cell, reason: err.print(f"{cell} failed, {reason}", markup=False))
    except KeyboardInterrupt:
        kept = f"; the same command goes on, from {run.file.path}" if run.file.path and run.file.samples else ""
        err.print(f"interrupted: only finished rounds are reported{kept}", markup=False)
        status = 130
    except TurbokvError as error:
        err.print(f"turbokv: {error}", markup=False)
        status = 1
    if results := measurement.records(run):
        lines = "".join(json.dumps(record) + "\n" for record in results)
        deliver(_speed_tables(results), lines, json_file)
    elif status:
        err.print("no round was finished, nothing to report")
    if status:
        raise typer.Exit(status)
    if run.failed:
        raise TurbokvError(f"{len(run.failed)} of {len(plan.order(1))} failed; the reasons are above")


def _speed_notes(run: measurement.Measurement) -> None:
    """What the user should know before the run, on stderr."""
    plan, left = run.plan, len(run.todo())
    longest = max(plan.depths) + max(plan.n_prompt, plan.n_gen)
    trained = measurement.n_ctx_train(plan.model)
    if trained and longest > trained:
        err.print(f"note: {plan.model.name} was trained on contexts of {trained} tokens, not {longest}", markup=False)
    if plan.rounds == 1:
        err.print("note: one round gives no interval; --rounds 2 or more do")
    if run.file.samples:
        done = plan.rounds * len(plan.order(1)) - left
        more = f", {left} are left" if left else "; nothing is left to measure. More --rounds add to them"
        err.print(f"{done} measurements are in {run.file.path}{more}", markup=False)


@contextmanager
def _speed_progress(rounds: int) -> Iterator[Callable[[measurement.Step], None]]:
    """A bar on a terminal, a line per measurement in a log; yields what to call as each one begins."""

    def describe(step: measurement.Step) -> str:
        return f"round {step.round} of {rounds}, {step.cell}" + (
            f", about {duration(step.left)} left" if step.left else ""
        )

    if not err.is_terminal:
        yield lambda step: err.print(f"[{step.done + 1}/{step.total}] {describe(step)}", markup=False)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err) as bar:
        task = bar.add_task("", total=None)
        yield lambda step: bar.update(task, completed=step.done, total=step.total, description=describe(step))


def _speed_tables(results: list[dict[str, Any]]) -> list[Table]:
    """One table per depth."""
    by_depth: dict[int, list[dict[str, Any]]] = {}
    for record in results:
        by_depth.setdefault(record["depth"], []).append(record)
    return [_speed_table(records) for records in by_depth.values()]


def _speed_table(results: list[dict[str, Any]]) -> Table:
    first = results[0]
    counts = {"round": max(record["rounds"] for record in results), "thread": first["threads"]}
    counted = ", ".join(f"{n} {name}{'s' * (n != 1)}" for name, n in counts.items())
    title = f"{first['model']}, depth {first['depth']}, {counted}"
    table = Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD)
    table.add_column("cache K/V", no_wrap=True)
    tests = [test for test, n_tokens in (("tg", first["n_gen"]), ("pp", first["n_prompt"])) if n_tokens]
    for test in tests:
        for name in (f"{test} tokens/s", "95% CI", "x f16", "95% CI"):
            table.add_column(name, justify="right", no_wrap=True)
    for record in results:
        failed = " (failed)" * (record["error"] is not None)
        table.add_row(record["cache"] + failed, *[text for test in tests for text in _speed_columns(record[test])])
    return table


def _speed_columns(summary: dict[str, Any] | None) -> list[str]:
    def interval(ends: tuple[float, float] | None, digits: int) -> str:
        return f"{ends[0]:.{digits}f}..{ends[1]:.{digits}f}" if ends else "-"

    if summary is None:
        return ["-"] * 4
    mean, ratio = summary["mean"], summary["ratio_f16"]
    digits = 2 if mean < 100 else 1
    return [
        f"{mean:.{digits}f}",
        interval(summary["ci95"], digits),
        "-" if ratio is None else f"{ratio:.3f}",
        interval(summary["ratio_ci95"], 3),
    ]
