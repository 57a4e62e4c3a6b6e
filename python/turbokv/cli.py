"""The command `turbokv`."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import rich.box
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from turbokv import __version__, cache_type, data, engine, native, perplexity
from turbokv import doctor as doctor_module
from turbokv.errors import TurbokvError
from turbokv.spec import TYPES

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="KV-cache types for llama.cpp, and what they cost on your model.",
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
CtxOption = Annotated[int, typer.Option("--ctx", "-c", help="Tokens per window; the second half of each is scored.")]
ChunksOption = Annotated[int, typer.Option("--chunks", help="Windows to measure; -1 means all that the text has.")]
CacheOption = Annotated[str, typer.Option("--cache", help="Comma-separated caches, each K/V or one type for both.")]
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
    _deliver(results, json_file, with_kld=with_kld)
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


def _deliver(results: list[dict[str, Any]], json_file: Path | None, *, with_kld: bool) -> None:
    """Writes the JSON and prints the table; trouble with one does not keep the other from being delivered."""
    failure: TurbokvError | None = None
    if json_file:
        try:
            data.write_atomically(json_file, (json.dumps(_nan_to_null(results), indent=2) + "\n").encode())
        except TurbokvError as error:
            failure = error
    try:
        out.print(_table(results, with_kld))
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
    """Perplexity of every cache on the same windows.

    Perplexity can hide damage that KL divergence shows: prefer `turbokv kld` for judging a cache.

    Example: `turbokv ppl -m model.gguf -f wikitext2 -c 2048 --chunks -1 --cache f16,turbo3`
    """
    _run(model, text, ctx, chunks, cache, threads, json_file, with_kld=False)


@app.command()
def types() -> None:
    """The cache types that turbokv adds, with their exact byte layouts.

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
def doctor() -> None:
    """What is built, where it lies, which lines were added to llama.cpp, and whether it works.

    Exit code 1 if something is wrong. Example: `turbokv doctor`
    """
    marks = {True: "[green]ok [/]", False: "[red]BAD[/]", None: "   "}
    broken = False
    for finding in doctor_module.findings():
        broken |= finding.ok is False
        out.print(f"{marks[finding.ok]} {finding.name + ':':24} {finding.value}", highlight=False, soft_wrap=True)
    if broken:
        raise typer.Exit(1)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}
)
def serve(context: typer.Context, model: ModelOption = data.MINI) -> None:
    """Start the bundled llama-server; everything after `--` goes to it as it is.

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
