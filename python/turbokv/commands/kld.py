"""`turbokv kld` and `turbokv ppl`."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import rich.box
import typer
from rich.table import Table

from turbokv import cache_type, data, device, diagnosis, engine, perplexity, reference
from turbokv.cache_type import DEFAULT_CACHES
from turbokv.commands.options import (
    CacheOption,
    ChunksOption,
    CtxOption,
    GpuLayersOption,
    ModelOption,
    TextOption,
    ThreadsOption,
)
from turbokv.errors import TurbokvError
from turbokv.terminal import deliver, err, interval, number, percent, progress

if TYPE_CHECKING:
    from turbokv.record import KldResult


class TokenPath(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


PathOption = Annotated[
    TokenPath,
    typer.Option(
        "--path",
        help="`prefill` gives the model many tokens at a time, `decode` one, as generation does: other code runs then. "
        "The reference goes the same way, so that the difference of the ways is not in the numbers. Four to fifteen "
        "times slower on a CPU; use it to see that generation is as good as the rest says.",
    ),
]
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
    gpu_layers: GpuLayersOption = None,
    path: PathOption = TokenPath.PREFILL,
    noise_floor: Annotated[
        bool,
        typer.Option("--noise-floor/--no-noise-floor", help="Run f16 once more, in other batches, to show rounding."),
    ] = True,
    wide: Annotated[
        bool, typer.Option("--wide", help="More columns: trimmed mean, 99%, largest, and the last 64 positions.")
    ] = False,
    reference_cache: Annotated[
        Path | None,
        typer.Option(
            "--reference-cache",
            metavar="DIR",
            help="Folder in which the f16 reference is kept for the next run, up to 10 GiB; what was not used for "
            "longest goes first.",
            show_default="~/.cache/turbokv/reference",
        ),
    ] = None,
    no_reference_cache: Annotated[
        bool, typer.Option("--no-reference-cache", help="Compute the f16 reference again and keep nothing.")
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Perplexity, and KL divergence from the f16 cache, of every cache on the same windows.

    How to read it: `mean KLD` says in nats how far the predictions move from those with an f16 cache; compare it with
    that of q8_0 and q4_0, which many people use. `99.9%` is how bad the worst tokens get, `same top` how often the
    most likely token stays the same. `dNLL` is the loss that the true text shows, log(PPL / PPL of f16), token by
    token; behind it the half width of its 95% interval. Caches whose `95% CI` overlap need more windows to be told
    apart; from 8 windows on, the intervals know how much windows differ from each other.

    The line below the table is the noise floor: f16 against itself, with its sums in another order. What is not above
    it is rounding. An `f16` among the caches is the same computation twice: its divergence has to be exactly 0.

    --wide adds `trimmed`, the mean without the largest 1 % and the smallest 1 % of the tokens: far below the mean, it
    says that few tokens do the damage. `last 64` is the mean over the last 64 positions of every window: above the
    mean, it says that damage grows with the length.

    The f16 reference is computed once per model, text, --ctx, --path, --threads, --gpu-layers and build, and kept on
    disk.

    Example: `turbokv kld -m model.gguf -f book.txt -c 4096 --chunks 2 --cache f16,q8_0,turbo4/turbo3 --json kld.json`
    """
    if no_reference_cache and reference_cache:
        raise TurbokvError("--reference-cache names a folder and --no-reference-cache uses none: give one of the two")
    directory = None if no_reference_cache else reference_cache or reference.default_directory()
    _run(
        model, text, ctx, chunks, cache, threads, gpu_layers, path, json_file,
        with_kld=True, noise_floor=noise_floor, wide=wide, directory=directory,
    )  # fmt: skip


def ppl(
    model: ModelOption = data.MINI,
    text: TextOption = None,
    ctx: CtxOption = 2048,
    chunks: ChunksOption = 4,
    cache: CacheOption = DEFAULT_CACHES,
    threads: ThreadsOption = 0,
    gpu_layers: GpuLayersOption = None,
    path: PathOption = TokenPath.PREFILL,
    json_file: JsonOption = None,
) -> None:
    """Perplexity of every cache on the same windows: the numbers that other people publish.

    It only looks at the true next token, and errors up and down cancel, so it hides damage that KL divergence shows:
    judge a cache by `turbokv kld`. Compare perplexities of the same model, text and --ctx only. `dNLL` is
    log(PPL / PPL of f16), token by token, with the half width of its 95% interval: if that is larger than the value,
    the two perplexities do not differ.

    Example: `turbokv ppl -m model.gguf -f wikitext2 -c 2048 --chunks -1 --cache f16,turbo3`
    """
    _run(
        model, text, ctx, chunks, cache, threads, gpu_layers, path, json_file,
        with_kld=False, noise_floor=False, wide=False, directory=None,
    )  # fmt: skip


def _run(
    model: Path,
    text: str | None,
    ctx: int,
    chunks: int,
    cache: str,
    threads: int,
    gpu_layers: str | None,
    path: TokenPath,
    json_file: Path | None,
    *,
    with_kld: bool,
    noise_floor: bool,
    wide: bool,
    directory: Path | None,  # of the reference; None keeps it in memory
) -> None:
    pairs = cache_type.parse_pairs(cache)
    if chunks == 0 or chunks < -1:
        raise TurbokvError(f"--chunks {chunks} measures nothing: give a number of windows, or -1 for all")
    if json_file:
        data.check_writable(json_file)
    passage = perplexity.Passage("sample" if text is None else Path(text).name, data.read_text(text))
    n_threads = threads or engine.default_threads()
    placement = device.placement(gpu_layers)
    try:
        with engine.interrupts.deferred(), engine.Model(model, placement=placement) as loaded:
            tokens = loaded.tokenize(passage.content)
            n_windows = len(perplexity.windows(loaded, tokens, ctx, chunks))
            _notes(loaded, pairs, ctx, n_windows, chunks, with_kld=with_kld)
            if lost := diagnosis.text_lost(loaded, tokens[: n_windows * ctx], passage.content):
                _note(f"note: {lost}")
            store = None
            if directory:
                key = reference.key(
                    model, passage.content, n_ctx=ctx, path=path.value, n_threads=n_threads, placement=placement
                )
                store = reference.Store(directory, key, _note)
            with progress(n_windows * (len(pairs) + 1 + noise_floor)) as advance:
                measurement = perplexity.measure(
                    loaded,
                    tokens,
                    pairs,
                    n_ctx=ctx,
                    n_windows=chunks,
                    n_threads=n_threads,
                    with_kld=with_kld,
                    path=path.value,
                    noise_floor=noise_floor,
                    text=passage,
                    store=store,
                    advance=advance,
                )
            results = perplexity.records(measurement)
    except KeyboardInterrupt:
        kept = "; finished windows of the f16 reference are kept" if directory else ""
        err.print(f"turbokv: interrupted before the first window was finished; nothing to report{kept}")
        raise typer.Exit(130) from None
    content = json.dumps([result.model_dump(mode="json") for result in results], indent=2, allow_nan=False) + "\n"
    deliver([_table(results, wide=wide)], content, json_file)
    if any(result.non_finite for result in results):
        err.print("warning: some logits were NaN or infinite; those tokens are counted (column bad) and left out")
    if measurement.n_windows < n_windows:
        err.print(f"interrupted: the table covers {measurement.n_windows} of {n_windows} windows")
        raise typer.Exit(130)


def _note(text: str) -> None:
    err.print(text, markup=False)


def _notes(
    model: engine.Model, pairs: list[cache_type.CachePair], ctx: int, n_windows: int, chunks: int, *, with_kld: bool
) -> None:
    """What the user should know before the run, on stderr."""
    if n_windows < chunks:
        _note(f"the text has only {n_windows} windows of {ctx} tokens; measuring those")
    if ctx > model.n_ctx_train:
        _note(f"note: {model.path.name} was trained on contexts of {model.n_ctx_train} tokens, not {ctx}")
    reference_gib = (ctx - ctx // 2) * model.n_vocab * 2 / 2**30
    if with_kld and reference_gib > 2:
        _note(f"note: the reference of a window takes {reference_gib:.1f} GiB of memory")
    for pair in pairs:
        if (effective := model.effective(pair)) != pair:
            _note(f"{pair} -> {effective} for the head size of {model.path.name}")


def _table(results: list[KldResult], *, wide: bool) -> Table:
    first = results[0]
    plural = "s" * (first.chunks != 1)
    way = ", token by token" if first.path == "decode" else ""
    title = f"{first.model}, {first.chunks} window{plural} of {first.ctx} tokens{way}{first.placement.title}"
    table = Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, caption_justify="left", caption_style="")
    columns = [_columns(result, wide=wide) for result in results]
    if any(result.non_finite for result in results):
        for column, result in zip(columns, results, strict=True):
            column["bad"] = str(result.non_finite)
    for name in columns[0]:
        table.add_column(name, justify="left" if name == "cache K/V" else "right", no_wrap=True)
    for column in columns:
        table.add_row(*column.values())
    if floor := first.noise_floor:
        table.caption = (
            f"noise floor, f16 in batches of {floor.n_ubatch}: mean KLD {number(floor.mean_kld, 6)}, "
            f"same top {percent(floor.same_top, 2)}"
        )
    return table


def _columns(result: KldResult, *, wide: bool) -> dict[str, str]:
    """Text of a row by the name of its column."""
    delta = result.delta_nll
    half = (delta.ci95[1] - delta.ci95[0]) / 2 if delta.ci95 else None
    columns = {
        "cache K/V": result.cache,
        "bits K/V": f"{result.bits_k:g}/{result.bits_v:g}",
        "KV MiB": f"{result.kv_bytes / 2**20:.2f}",
        "PPL": number(result.ppl, 3),
        "dNLL": f"{number(delta.mean, 5)} ±{number(half, 5)}",
    }
    if kld := result.kld:
        columns |= {"mean KLD": number(kld.mean, 6), "95% CI": interval(kld.ci95, 6)}
        if wide:
            columns["trimmed"] = number(kld.trimmed_mean, 6)
        columns["median"] = number(kld.median, 6)
        if wide:
            columns["99%"] = number(kld.p99, 4)
        columns["99.9%"] = number(kld.p999, 4)
        if wide:
            columns["max"] = number(kld.max, 4)
        if wide and result.last64:
            columns["last 64"] = number(result.last64.mean, 6)
        columns["same top"] = percent(result.same_top, 2)
    return columns
