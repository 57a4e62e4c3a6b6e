"""The command `turbokv`."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import rich.box
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from turbokv import __version__, cache_type, data, engine, native, perplexity, speed
from turbokv import doctor as doctor_module
from turbokv.errors import TurbokvError
from turbokv.spec import TYPES

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""KV-cache types for llama.cpp, and what they cost on your model.

    A cache is written K/V: `q8_0/turbo3` keeps the keys in q8_0 and the values in turbo3; `turbo3` alone means both.

    To begin: `turbokv doctor` (is the build sound?), `turbokv types` (what is there to choose from?),
    `turbokv kld -m model.gguf` (what does each choice cost on my model?), `turbokv speed -m model.gguf` (how fast is
    it?), `turbokv serve -m model.gguf` (use it).""",
)
out = Console(width=200)  # tables take what their content needs; a cut-off number is no result
err = Console(stderr=True, highlight=False, soft_wrap=True)  # progress and notes; the result alone goes to stdout

DEFAULT_CACHES = "f16,q8_0,q4_0,turbo4,turbo3"

ModelOption = Annotated[Path, typer.Option("--model", "-m", help="GGUF model.", show_default="the built-in mini model")]
TextOption = Annotated[
    str | None,
    typer.Option(
        "--text", "-f", help="Text file, or `wikitext2` (downloaded and checked).", show_default="the built-in sample"
    ),
]
CtxOption = Annotated[
    int,
    typer.Option(
        "--ctx", "-c", help="Tokens per window; the second half of each is scored. Best the length that you will use."
    ),
]
ChunksOption = Annotated[int, typer.Option("--chunks", help="Windows to measure; -1 means all that the text has.")]
CacheOption = Annotated[
    str, typer.Option("--cache", help="Comma-separated caches, each K/V or one type for both: `turbo4,q8_0/turbo3`.")
]
ThreadsOption = Annotated[
    int, typer.Option("--threads", "-t", min=0, help="CPU threads; 0 means all cores of this process.")
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Write the results to this file, a list with one object per cache.")
]


def _run(
    model: Path,
    text: str | None,
    ctx: int,
    chunks: int,
    cache: str,
    threads: int,
    json_file: Path | None,
    *,
    with_kld: bool,
) -> None:
    pairs = cache_type.parse_pairs(cache)
    if chunks == 0 or chunks < -1:
        raise TurbokvError(f"--chunks {chunks} measures nothing: give a number of windows, or -1 for all")
    if json_file:
        data.check_writable(json_file)
    content = data.read_text(text)
    try:
        with engine.interrupts.deferred(), engine.Model(model) as loaded:
            tokens = loaded.tokenize(content)
            n_windows = len(perplexity.windows(loaded, tokens, ctx, chunks))
            _notes(loaded, pairs, ctx, n_windows, chunks, with_kld=with_kld)
            with _progress(n_windows * (len(pairs) + 1)) as advance:
                measurement = perplexity.measure(
                    loaded,
                    tokens,
                    pairs,
                    n_ctx=ctx,
                    n_windows=chunks,
                    n_threads=threads or engine.default_threads(),
                    with_kld=with_kld,
                    advance=advance,
                )
            results = perplexity.records(measurement)
    except KeyboardInterrupt:
        err.print("turbokv: interrupted before the first window was finished; nothing to report")
        raise typer.Exit(130) from None
    _deliver([_table(results, with_kld)], json.dumps(_nan_to_null(results), indent=2) + "\n", json_file)
    if any(record["non_finite"] for record in results):
        err.print("warning: some logits were NaN or infinite; those tokens are counted (column bad) and left out")
    if measurement.n_windows < n_windows:
        err.print(f"interrupted: the table covers {measurement.n_windows} of {n_windows} windows")
        raise typer.Exit(130)


def _notes(
    model: engine.Model, pairs: list[cache_type.CachePair], ctx: int, n_windows: int, chunks: int, *, with_kld: bool
) -> None:
    """What the user should know before the run, on stderr."""
    if n_windows < chunks:
        err.print(f"the text has only {n_windows} windows of {ctx} tokens; measuring those")
    if ctx > model.n_ctx_train:
        err.print(f"note: {model.path.name} was trained on contexts of {model.n_ctx_train} tokens, not {ctx}")
    reference_gib = (ctx - ctx // 2) * model.n_vocab * 4 / 2**30
    if with_kld and reference_gib > 2:
        err.print(f"note: the reference logits of a window take {reference_gib:.1f} GiB of memory")
    for pair in pairs:
        if (effective := model.effective(pair)) != pair:
            err.print(f"{pair} -> {effective} for the head size of {model.path.name}")


def _deliver(tables: list[Table], content: str, json_file: Path | None) -> None:
    """Writes the JSON and prints the tables; trouble with one does not keep the other from being delivered."""
    failure: TurbokvError | None = None
    if json_file:
        try:
            data.write_atomically(json_file, content.encode())
        except TurbokvError as error:
            failure = error
    try:
        for table in tables:
            out.print(table)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python flushes it again at exit
        failure = failure or TurbokvError(f"the table could not be printed: {error.strerror}")
    if failure:
        raise failure


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, a line per pass in a log; yields what to call with the name of each finished pass."""
    if err.is_terminal:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(TextColumn("{task.description:24}"), *columns, console=err) as bar:
            task = bar.add_task("", total=total)
            yield lambda name: bar.update(task, advance=1, description=name)
        return

    started, done = time.monotonic(), 0

    def line(name: str) -> None:
        nonlocal done
        done += 1
        elapsed = time.monotonic() - started
        err.print(
            f"[{done}/{total}] {name}, {elapsed:.0f} s, about {elapsed / done * (total - done):.0f} s left",
            markup=False,
        )

    yield line


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Within it SIGTERM is a KeyboardInterrupt too, or the running llama-bench would outlive this process."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _speed_notes(run: speed.Measurement) -> None:
    """What the user should know before the run, on stderr."""
    plan, left = run.plan, len(run.todo())
    longest = max(plan.depths) + max(plan.n_prompt, plan.n_gen)
    trained = speed.n_ctx_train(plan.model)
    if trained and longest > trained:
        err.print(f"note: {plan.model.name} was trained on contexts of {trained} tokens, not {longest}", markup=False)
    if plan.rounds == 1:
        err.print("note: one round gives no interval; --rounds 2 or more do")
    if run.file.samples:
        done = plan.rounds * len(plan.order(1)) - left
        more = f", {left} are left" if left else "; nothing is left to measure. More --rounds add to them"
        err.print(f"{done} measurements are in {run.file.path}{more}", markup=False)


@contextmanager
def _speed_progress(rounds: int) -> Iterator[Callable[[speed.Step], None]]:
    """A bar on a terminal, a line per measurement in a log; yields what to call as each one begins."""

    def describe(step: speed.Step) -> str:
        return f"round {step.round} of {rounds}, {step.cell}" + (
            f", about {_duration(step.left)} left" if step.left else ""
        )

    if not err.is_terminal:
        yield lambda step: err.print(f"[{step.done + 1}/{step.total}] {describe(step)}", markup=False)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err) as bar:
        task = bar.add_task("", total=None)
        yield lambda step: bar.update(task, completed=step.done, total=step.total, description=describe(step))


def _duration(seconds: float) -> str:
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"


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


def _nan_to_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nan_to_null(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_nan_to_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(results: list[dict[str, Any]], with_kld: bool) -> Table:
    first = results[0]
    plural = "s" * (first["chunks"] != 1)
    title = f"{first['model']}, {first['chunks']} window{plural} of {first['ctx']} tokens"
    table = Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD)
    table.add_column("cache K/V", no_wrap=True)
    names = ["bits K/V", "KV MiB", "PPL", *(("mean KLD", "95% CI", "median", "99.9%", "same top") if with_kld else ())]
    bad = any(record["non_finite"] for record in results)
    for name in names + ["bad"] * bad:
        table.add_column(name, justify="right", no_wrap=True)
    for record in results:
        row = [record["cache"], f"{record['bits_k']:g}/{record['bits_v']:g}", f"{record['kv_bytes'] / 2**20:.2f}"]
        row.append(f"{record['ppl']:.3f}")
        if with_kld:
            kld = record["kld"]
            low, high = kld["ci95"]
            row.append(f"{kld['mean']:.6f}")
            row.append("-" if math.isnan(low) else f"{low:.6f}..{high:.6f}")
            row += [f"{kld['median']:.6f}", f"{kld['p999']:.4f}", f"{100 * record['same_top']:.2f} %"]
        table.add_row(*row, *[str(record["non_finite"])] * bad)
    return table


@app.command()
def kld(
    model: ModelOption = data.MINI,
    text: TextOption = None,
    ctx: CtxOption = 2048,
    chunks: ChunksOption = 4,
    cache: CacheOption = DEFAULT_CACHES,
    threads: ThreadsOption = 0,
    json_file: JsonOption = None,
) -> None:
    """Perplexity, and KL divergence from the f16 cache, of every cache on the same windows.

    How to read it: `mean KLD` says in nats how far the predictions move from those with an f16 cache; compare it with
    that of q8_0 and q4_0, which many people use. Below 0.0003 it is rounding. `99.9%` is how bad the worst tokens
    get, `same top` how often the most likely token stays the same. Caches whose `95% CI` overlap need more windows to
    be told apart.

    The f16 reference always runs; an `f16` among the caches is a second run of it and shows the noise floor.

    Example: `turbokv kld -m model.gguf -f book.txt -c 4096 --chunks 8 --cache f16,q8_0,turbo4/turbo3 --json kld.json`
    """
    _run(model, text, ctx, chunks, cache, threads, json_file, with_kld=True)


@app.command()
def ppl(
    model: ModelOption = data.MINI,
    text: TextOption = None,
    ctx: CtxOption = 2048,
    chunks: ChunksOption = 4,
    cache: CacheOption = DEFAULT_CACHES,
    threads: ThreadsOption = 0,
    json_file: JsonOption = None,
) -> None:
    """Perplexity of every cache on the same windows: the numbers that other people publish.

    It only looks at the true next token, and errors up and down cancel, so it hides damage that KL divergence shows:
    judge a cache by `turbokv kld`. Compare perplexities of the same model, text and --ctx only.

    Example: `turbokv ppl -m model.gguf -f wikitext2 -c 2048 --chunks -1 --cache f16,turbo3`
    """
    _run(model, text, ctx, chunks, cache, threads, json_file, with_kld=False)


@app.command(name="speed")
def speed_command(
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
    plan = speed.Plan(
        model=model,
        caches=speed.with_f16(cache_type.parse_pairs(cache)),
        depths=speed.parse_depths(depth),
        n_prompt=n_prompt,
        n_gen=n_gen,
        threads=threads or engine.default_threads(),
        rounds=rounds,
        seed=seed,
        timeout=timeout or None,
    )
    run = speed.start(plan, json_file)
    _speed_notes(run)
    status = 0
    try:
        with _terminated_as_interrupted(), _speed_progress(rounds) as on_start:
            speed.measure(run, on_start, lambda cell, reason: err.print(f"{cell} failed, {reason}", markup=False))
    except KeyboardInterrupt:
        kept = f"; the same command goes on, from {run.file.path}" if run.file.path and run.file.samples else ""
        err.print(f"interrupted: only finished rounds are reported{kept}", markup=False)
        status = 130
    except TurbokvError as error:
        err.print(f"turbokv: {error}", markup=False)
        status = 1
    if results := speed.records(run):
        lines = "".join(json.dumps(record) + "\n" for record in results)
        _deliver(_speed_tables(results), lines, json_file)
    elif status:
        err.print("no round was finished, nothing to report")
    if status:
        raise typer.Exit(status)
    if run.failed:
        raise TurbokvError(f"{len(run.failed)} of {len(plan.order(1))} failed; the reasons are above")


@app.command()
def types() -> None:
    """The cache types that turbokv adds, with their exact byte layouts.

    f16 has 16 bits per value, q8_0 8.5, q4_0 4.5. `relative MSE` is the error that a type makes on Gaussian values,
    which rotated keys and values nearly are; what it means for a model says `turbokv kld`.

    Example: `turbokv types`
    """
    table = Table("type", "id", "bits per value", "block", "bytes", "relative MSE", "layout", "what")
    for t in TYPES:
        table.add_row(
            t.name, str(t.type_id), f"{t.bits_per_value:g}", str(t.block), str(t.block_bytes), f"{t.relative_mse:g}",
            t.layout_string, t.about,
        )  # fmt: skip
    out.print(table)
    out.print(
        "Type the short name (turbo3): the context takes the _64 type for heads that 128 does not divide, and logs it."
    )


@app.command()
def doctor(
    deep: Annotated[
        bool,
        typer.Option(
            "--deep",
            help="Also measure that decoding token by token gives the logits that one batch gives, for every type on "
            "both built-in models: a minute or two. `turbokv kld` never decodes, so only this shows a broken decode.",
        ),
    ] = False,
    llama_source: Annotated[
        Path | None,
        typer.Option(
            "--llama-source",
            metavar="DIR",
            help="Instead say which hooks apply to this llama.cpp tree. It is only read, and nothing need be built.",
        ),
    ] = None,
) -> None:
    """What is built, where it lies, which lines were added to llama.cpp, and whether it works.

    Every line marked `BAD` says what is wrong; then the exit code is 1.

    Before you build on a llama.cpp of your own (`cmake -DTURBOKV_LLAMA_SOURCE=DIR`), `--llama-source DIR` says whether
    our lines still find their places in it, and which ones do not.

    Example: `turbokv doctor`, after a change of machine or compiler `turbokv doctor --deep`
    """
    if llama_source and deep:
        raise TurbokvError("--deep measures this build, --llama-source looks at another tree: give one of the two")
    sound = _report(doctor_module.hook_findings(llama_source) if llama_source else doctor_module.findings())
    if deep and not sound:
        raise TurbokvError("--deep was left out: mend what is marked BAD first")
    if deep:
        sound = _report(_decode_findings())
    if not sound:
        raise typer.Exit(1)


def _report(findings: Iterable[doctor_module.Finding]) -> bool:
    """Prints the findings as they come; False if one is bad."""
    marks = {True: "[green]ok [/]", False: "[red]BAD[/]", None: "   "}
    sound = True
    for finding in findings:
        sound &= finding.ok is not False
        value = escape(finding.value).replace("\n", "\n" + 29 * " ")  # below the first line
        out.print(f"{marks[finding.ok]} {finding.name + ':':24} {value}", highlight=False, soft_wrap=True)
    return sound


def _decode_findings() -> list[doctor_module.Finding]:
    """All of --deep at the end, behind its progress; if interrupted, what there is."""
    found: list[doctor_module.Finding] = []
    try:
        with engine.interrupts.deferred(), _progress(doctor_module.N_DECODE_FINDINGS) as advance:
            for finding in doctor_module.decode_findings():
                found.append(finding)
                advance(finding.name)
    except KeyboardInterrupt:
        _report(found)
        err.print(f"interrupted: --deep got to {len(found)} of {doctor_module.N_DECODE_FINDINGS} measurements")
        raise typer.Exit(130) from None
    return found


testbed_app = typer.Typer(
    no_args_is_help=True,
    help="""Test models that are harder on a cache than the built-in ones.

    Example: `turbokv testbed imprint --profile extreme -o extreme.gguf`""",
)
app.add_typer(testbed_app, name="testbed")


@testbed_app.command()
def imprint(
    profile: Annotated[str, typer.Option("--profile", "-p", help="`mild`, `extreme`, or an .npz file of K energies.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The GGUF file to write.")],
    model: ModelOption = data.MINI,
) -> None:
    """Write a copy of a model that computes the same, with the K-cache outliers of a model that is hard to quantize.

    Some models have K channels with thousands of times the energy of their neighbours, which breaks 4-bit caches; the
    built-in models have none. Here the weights of the K norm are multiplied by a profile and those of the Q norm
    divided by it: every product of Q and K, and so the perplexity of the f16 cache, stays, but for rounding. Works on
    qwen3 and qwen3moe models.

    Profiles: `mild` has outliers of 550 times the median energy (published for Llama-3.1-8B), `extreme` of 71,000
    times (Qwen2.5-7B), made up but for that number. An .npz file gives the statistics of a real model: an array `K`,
    [layers, kv_heads, head size], with the mean square E[x^2] of every K channel; KV head 0 is taken.

    Example: `turbokv testbed imprint --profile extreme -o extreme.gguf`, then
    `turbokv kld -m extreme.gguf -c 512 --chunks 2 --cache q8_0,q4_0,q8_0/turbo3`
    """
    from turbokv import testbed  # it needs gguf, which is slow to import and which no other command needs

    ratios = testbed.max_to_median(testbed.imprint(model, profile, output))
    out.print(
        f"{output}: {len(ratios)} layers, largest K outlier {ratios.min():,.0f} to {ratios.max():,.0f} times the "
        "median energy",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}
)
def serve(context: typer.Context, model: ModelOption = data.MINI) -> None:
    """Start the bundled llama-server; everything after `--` goes to it as it is.

    Any llama-server option works there (`turbokv serve -- --help`); its log says which cache types the model really
    got, and how many bytes they take.

    Example: `turbokv serve -m model.gguf -- --cache-type-k turbo3 --cache-type-v turbo3 --port 8080`
    """
    if not model.is_file():
        raise TurbokvError(f"there is no model at {model}")
    server = str(native.tool("llama-server"))
    os.execv(server, [server, "--model", str(model), *context.args])  # signals and the exit code are the server's own


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"turbokv {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    try:
        app()
    except TurbokvError as error:
        err.print(f"turbokv: {error}", markup=False)
        sys.exit(1)
    except OSError as error:
        err.print(f"turbokv: {error.filename or 'input/output'}: {error.strerror}", markup=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
