"""`turbokv recommend`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import rich.box
import typer
from rich.table import Table

from turbokv import data
from turbokv import recommend as advice
from turbokv.cache_type import F16
from turbokv.commands.options import ModelOption
from turbokv.errors import TurbokvError
from turbokv.recommend import CACHES, show_bytes
from turbokv.terminal import deliver, err, interval, out

if TYPE_CHECKING:
    from turbokv import record  # slow to import


def recommend(
    memory: Annotated[str, typer.Option("--memory", help="What may be used, such as 24GiB, 24GB or 800MiB.")],
    model: ModelOption = data.MINI,
    ctx: Annotated[
        int, typer.Option("--ctx", "-c", min=0, help="Tokens per request; 0 means what the model was trained on.")
    ] = 0,
    parallel: Annotated[
        int, typer.Option("--parallel", min=1, max=256, help="Requests at a time, each with --ctx tokens of its own.")
    ] = 1,
    cache: Annotated[
        str, typer.Option("--cache", help="Comma-separated caches to choose among, each K/V or one type for both.")
    ] = CACHES,
    results: Annotated[
        Path | None,
        typer.Option("--results", help="Results of `turbokv sweep`: runs.jsonl, or the folder that holds it."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the answer to this file, one JSON object.")
    ] = None,
) -> None:
    """Which cache to use: what fits into --memory at --ctx, ranked by what was measured on this model.

    How to read it: `weights`, `KV` and `compute` are asked of llama.cpp itself, which builds the context without
    allocating it: they are what llama-server will allocate, in any architecture. `longest ctx` is how many tokens per
    request would fit, looked for up to --ctx and the context that the model was trained on. The program itself, its
    vocabulary and threads take more: 40 MiB with the 16 thousand tokens of the built-in models. Leave room for it.

    `KLD` and `x f16` (speed of generation as a multiple of f16's) come from --results, and only from measurements of
    this very file: other models' say little about it. Caches are ranked by KLD; those whose KLDs cannot be told apart,
    by speed, then by bytes. What was not measured stands as `-`, ranks last, and a command that measures it is shown.
    Without results caches are ranked by bytes alone, the largest first: that says nothing about quality.

    Example: `turbokv recommend -m model.gguf --ctx 8192 --memory 200MiB`, after a sweep
    `turbokv recommend -m model.gguf --ctx 8192 --memory 200MiB --results sweep --json recommend.json`
    """
    budget = advice.parse_bytes(memory)
    if json_file:
        data.check_writable(json_file)
    records = []
    if results:
        from turbokv import store

        records = store.latest(store.read(results))
    try:
        answer, known = advice.recommend(model, budget, ctx or None, parallel, cache, records)
    except KeyboardInterrupt:
        err.print("turbokv: interrupted; nothing to report")
        raise typer.Exit(130) from None
    deliver([_table(answer)], json.dumps(answer.model_dump(mode="json"), indent=2) + "\n", json_file)
    if known.others:
        err.print(f"note: {known.others} results are of other models or byte layouts, and were not used")
    for line in _sentences(answer, model):
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    if not answer.recommended:
        raise TurbokvError(_nothing_fits(answer))


def _table(answer: record.Recommendation) -> Table:
    requests = f"{answer.parallel} requests of " * (answer.parallel > 1)
    title = (
        f"{answer.model}, {requests}{answer.ctx} tokens, weights {show_bytes(answer.weights_bytes)}, "
        f"memory {show_bytes(answer.memory)}"
    )
    table = Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD)
    table.add_column("cache K/V", no_wrap=True)
    for name in ("KV MiB", "compute MiB", "total MiB", "fits", "longest ctx", "KLD", "95% CI", "x f16", "95% CI"):
        table.add_column(name, justify="right", no_wrap=True)
    for c in answer.candidates:
        name = c.requested if c.cache in (None, c.requested) else f"{c.requested} -> {c.cache}"
        if c.refused is not None:
            table.add_row(name, *["-"] * 3, "refused", *["-"] * 5)
            continue
        sizes = [f"{(size or 0) / 2**20:.1f}" for size in (c.kv_bytes, c.compute_bytes, c.total_bytes)]
        kld = ["-", "-"]
        if c.kld and c.kld.mean is not None:
            kld = [f"{c.kld.mean:.6f}", interval(c.kld.ci95, 6)]
        speed = ["-" if c.tg_ratio_f16 is None else f"{c.tg_ratio_f16:.3f}", interval(c.tg_ratio_ci95, 3)]
        table.add_row(name, *sizes, "yes" if c.fits else "no", str(c.longest_ctx), *kld, *speed)
    return table


def _sentences(answer: record.Recommendation, model: Path) -> list[str]:
    """What was measured, what was not, and the recommendation."""
    lines = [f"{c.requested} is refused: {c.refused}" for c in answer.candidates if c.refused is not None]
    lines.append("Bytes: computed by llama.cpp for this model without allocating; exact for weights and KV.")
    if source := answer.kld_source:
        windows = f"{source.chunks} window{'s' * (source.chunks != 1)} of {source.ctx} tokens of {source.text.name}"
        lines.append(f"KLD: measured on this model, {windows}, {source.path}, {source.placement}.")
        if source.ctx != answer.ctx:
            lines.append(f"  At {answer.ctx} tokens it was not measured; that it is the same there is an assumption.")
    else:
        lines.append(
            "KLD: not measured on this model; f16's is 0 by definition. The others are in the order of their bytes."
        )
    if speed := answer.speed_source:
        where = "on this machine" if speed.here else f"on another machine ({speed.cpu}), so here it is an estimate"
        how = f"at depth {speed.depth} with {speed.threads} threads, {speed.placement}"
        lines.append(f"Speed: measured {where}, {how}.")
    else:
        lines.append("Speed: not measured on this model.")
    missing = [c.requested for c in answer.candidates if c.fits and not (c.kld and c.tg_ratio_f16)]
    if missing:
        caches = ",".join(missing)
        measure = f"turbokv sweep -m {advice.as_given(model)} --task kld,speed --ctx {_window(answer)}"
        lines.append(f"To measure what is missing: {measure} --depth {_window(answer)} --cache {caches} -o FOLDER")
    if answer.recommended:
        best = answer.candidates[0]
        why = "the best by measured KLD" if best.kld else "the largest that fits; its quality is not measured"
        if best.cache == str(F16):
            why = "the reference, which loses nothing"
        room = show_bytes(answer.memory - (best.total_bytes or 0))
        lines.append(f"Recommended: {answer.recommended}, {why}; {room} stay free. --cache-ram 0 keeps the server from")
        lines[-1] += " storing up to 8 GiB of old prompts beside that."
        lines.append(f"  {answer.command}")
    return lines


def _window(answer: record.Recommendation) -> int:
    """A context to measure at: as asked for, but not more than the model knows or takes forever on a CPU."""
    return min(answer.ctx, answer.n_ctx_train or answer.ctx, 8192)


def _nothing_fits(answer: record.Recommendation) -> str:
    taken = [c for c in answer.candidates if c.total_bytes is not None]
    if not taken:
        return f"{answer.model} takes none of these caches"
    smallest = min(taken, key=lambda c: c.total_bytes or 0)
    longest = max(taken, key=lambda c: c.longest_ctx or 0)
    missing = show_bytes((smallest.total_bytes or 0) - answer.memory)
    hint = f"; {longest.requested} fits with --ctx {longest.longest_ctx}" if longest.longest_ctx else ""
    return f"nothing fits: {smallest.requested}, the smallest of all, lacks {missing}{hint}"
