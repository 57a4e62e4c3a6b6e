"""`turbokv kld` and `turbokv ppl`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import rich.box
import typer
from rich.table import Table

from turbokv import cache_type, data, engine, perplexity
from turbokv.commands.options import DEFAULT_CACHES, CacheOption, ModelOption, ThreadsOption
from turbokv.errors import TurbokvError
from turbokv.terminal import deliver, err, nan_to_null, progress

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
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Write the results to this file, a list with one object per cache.")
]


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
            with progress(n_windows * (len(pairs) + 1)) as advance:
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
    deliver([_table(results, with_kld)], json.dumps(nan_to_null(results), indent=2) + "\n", json_file)
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
