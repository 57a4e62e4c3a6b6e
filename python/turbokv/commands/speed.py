"""`turbokv speed`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import rich.box
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from turbokv import cache_type, data, device, engine
from turbokv import speed as measurement
from turbokv.cache_type import DEFAULT_CACHES
from turbokv.cell import REQUESTS_PER_SLOT, Plan, Step
from turbokv.commands.options import CacheOption, GpuLayersOption, ModelOption, ThreadsOption
from turbokv.errors import TurbokvError
from turbokv.terminal import deliver, duration, err, interval, number, terminated_as_interrupted

if TYPE_CHECKING:
    from turbokv import record  # slow to import


def speed(
    model: ModelOption = data.MINI,
    depth: Annotated[
        str,
        typer.Option(
            "--depth",
            "-d",
            help="Comma-separated numbers of tokens that the cache already holds; `none` leaves llama-bench out.",
        ),
    ] = "0,2048",
    cache: CacheOption = DEFAULT_CACHES,
    threads: ThreadsOption = 0,
    gpu_layers: GpuLayersOption = None,
    rounds: Annotated[
        int, typer.Option("--rounds", "-r", min=1, help="How often everything is measured; one gives no interval.")
    ] = 5,
    n_gen: Annotated[
        int, typer.Option("--n-gen", "-n", min=0, help="Tokens per tg measurement; 0 leaves tg out.")
    ] = 32,
    n_prompt: Annotated[
        int, typer.Option("--n-prompt", "-p", min=0, help="Tokens per pp measurement; 0 leaves pp out.")
    ] = 512,
    parallel: Annotated[
        str | None,
        typer.Option(
            "--parallel",
            help="Also measure llama-server, with so many requests at a time: comma-separated numbers such as 1,4.",
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0, help="Give a cache up that takes longer, in seconds; 0 means no limit.")
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Of the random order.")] = 0,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            help="Write the results to this file, one JSON object per line, one line per cache and depth, then "
            "one per cache and number of requests. Every measurement "
            "is kept in FILE.samples as soon as it is made.",
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

    A run during which f16 itself moved by more than 3 % says so at the end: then trust the ratios, not the tokens/s.

    `KV MiB` is what llama.cpp allocates for the cache at that depth, `peak MiB` the largest resident memory of the
    process, the model's file included as far as it was read; llama-bench holds the cache twice. What is on a GPU is not
    in it. `J/token`, where the
    machine tells its energy, is that of CPU packages and GPUs for the whole llama-bench run over all tokens that it
    computed, not of generation alone.

    --parallel 1,4 starts llama-server for every cache and sends it requests, so many at a time, three per slot and
    round, each with its own prompt of --n-prompt tokens and an answer of --n-gen. `tokens/s` are generated tokens of
    all requests over the time that all took, reading the prompts included; `prompt/s` is how fast one prompt is read
    beside the others; p50 and p95 are seconds until a request's answer was whole.

    With --json a run that was stopped goes on where it was when the same command is given again, and more --rounds
    add to those that there are. Delete FILE.samples to measure anew. A cache that llama-bench refuses is named with
    the reason, the others go on, and the exit code is 1.

    Example: `turbokv speed -m model.gguf --depth 0,4096 --cache turbo4,q8_0/turbo3 --rounds 3 --json speed.json`,
    with a server `turbokv speed -m model.gguf --depth none --parallel 1,4 --cache q8_0,turbo3 -p 256 -n 64`
    """
    plan = Plan(
        model=model,
        caches=measurement.with_f16(cache_type.parse_pairs(cache)),
        depths=measurement.parse_depths(depth),
        n_prompt=n_prompt,
        n_gen=n_gen,
        threads=threads or engine.default_threads(),
        rounds=rounds,
        seed=seed,
        timeout=timeout or None,
        parallel=measurement.parse_parallel(parallel),
        placement=device.placement(gpu_layers),
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
        lines = "".join(json.dumps(result.model_dump(mode="json")) + "\n" for result in results)
        deliver(_tables(results), lines, json_file)
        if drifts := measurement.drifts(run):
            moved = "; ".join(map(str, drifts))
            err.print(f"note: f16 itself moved by more than 3 %, {moved}. Trust ratios, not tokens/s", markup=False)
    elif status:
        err.print("no round was finished, nothing to report")
    if status:
        raise typer.Exit(status)
    if run.failed:
        raise TurbokvError(f"{len(run.failed)} of {len(plan.order(1))} failed; the reasons are above")


def _speed_notes(run: measurement.Measurement) -> None:
    """What the user should know before the run, on stderr."""
    plan, left = run.plan, len(run.todo())
    longest = max(cell.depth for cell in plan.order(1)) + max(plan.n_prompt, plan.n_gen)
    trained = measurement.n_ctx_train(plan.model)
    if trained and longest > trained:
        err.print(f"note: {plan.model.name} was trained on contexts of {trained} tokens, not {longest}", markup=False)
    if plan.rounds == 1:
        err.print("note: one round gives no interval; --rounds 2 or more do")
    if not run.meter.counters:
        err.print("note: this machine does not tell its energy, or not to this user (RAPL, NVML)")
    if run.file.samples:
        done = plan.rounds * len(plan.order(1)) - left
        more = f", {left} are left" if left else "; nothing is left to measure. More --rounds add to them"
        err.print(f"{done} measurements are in {run.file.path}{more}", markup=False)


@contextmanager
def _speed_progress(rounds: int) -> Iterator[Callable[[Step], None]]:
    """A bar on a terminal, a line per measurement in a log; yields what to call as each one begins."""

    def describe(step: Step) -> str:
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


def _tables(results: list[record.SpeedResult | record.ServerResult]) -> list[Table]:
    """One table per depth, then one per number of requests."""
    by_depth: dict[int, list[record.SpeedResult]] = {}
    by_parallel: dict[int, list[record.ServerResult]] = {}
    for result in results:
        if result.kind == "speed":
            by_depth.setdefault(result.depth, []).append(result)
        else:
            by_parallel.setdefault(result.parallel, []).append(result)
    return [*map(_speed_table, by_depth.values()), *map(_server_table, by_parallel.values())]


def _empty_table(what: str, results: list[record.SpeedResult] | list[record.ServerResult], columns: list[str]) -> Table:
    first = results[0]
    counts = {"round": max(result.rounds for result in results), "thread": first.threads}
    counted = ", ".join(f"{n} {name}{'s' * (n != 1)}" for name, n in counts.items())
    title = f"{first.model}, {what}, {counted}{first.placement.title}"
    table = Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD)
    table.add_column("cache K/V", no_wrap=True)
    energy = any(result.joules_per_token is not None for result in results)
    for name in [*columns, "KV MiB", "peak MiB", *["J/token"] * energy]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _add_row(table: Table, result: record.SpeedResult | record.ServerResult, cells: list[str]) -> None:
    failed = " (failed)" * (result.error is not None)
    sizes = [number(size and size / 2**20, 2) for size in (result.kv_bytes, result.peak_bytes)]
    energy = [number(result.joules_per_token, 4)] * (table.columns[-1].header == "J/token")
    asked = result.cache if result.kind == "speed" else result.requested
    table.add_row(asked + failed, *cells, *sizes, *energy)


def _speed_table(results: list[record.SpeedResult]) -> Table:
    first = results[0]
    tests = [test for test, n_tokens in (("tg", first.n_gen), ("pp", first.n_prompt)) if n_tokens]
    columns = [name for test in tests for name in (f"{test} tokens/s", "95% CI", "x f16", "95% CI")]
    table = _empty_table(f"depth {first.depth}", results, columns)
    for result in results:
        summaries = [result.tg if test == "tg" else result.pp for test in tests]
        _add_row(table, result, [text for summary in summaries for text in _speed_columns(summary)])
    return table


def _server_table(results: list[record.ServerResult]) -> Table:
    first = results[0]
    what = f"llama-server, {first.parallel} at a time, {REQUESTS_PER_SLOT} requests per slot"
    columns = ["tokens/s", "95% CI", "x f16", "95% CI", "prompt/s", "p50 s", "p95 s"]
    table = _empty_table(what, results, columns)
    for r in results:
        speeds = _mean_and_ratio(r.tokens_per_second, r.ci95, r.ratio_f16, r.ratio_ci95)
        rest = [number(r.prompt_tokens_per_second, 1), number(r.latency_p50, 2), number(r.latency_p95, 2)]
        _add_row(table, r, speeds + rest)
    return table


def _speed_columns(summary: record.Speed | None) -> list[str]:
    if summary is None:
        return ["-"] * 4
    return _mean_and_ratio(summary.mean, summary.ci95, summary.ratio_f16, summary.ratio_ci95)


def _mean_and_ratio(
    mean: float | None, ci95: tuple[float, float] | None, ratio: float | None, ratio_ci95: tuple[float, float] | None
) -> list[str]:
    digits = 2 if mean is None or mean < 100 else 1
    return [number(mean, digits), interval(ci95, digits), number(ratio, 3), interval(ratio_ci95, 3)]
