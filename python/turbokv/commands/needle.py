"""`turbokv needle`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import rich.box
import typer
from rich.table import Table
from rich.text import Text

from turbokv import cache_type, data, device, engine, fingerprint, haystack, prompt
from turbokv import needle as measurement
from turbokv.cache_type import DEFAULT_CACHES
from turbokv.commands.options import CacheOption, GpuLayersOption, ModelOption, ThreadsOption
from turbokv.errors import TurbokvError
from turbokv.terminal import deliver, err, number, percent, progress

if TYPE_CHECKING:  # pydantic is slow to import
    from turbokv import record

TOO_HARD = 0.9  # accuracy of f16 below which errors are the model's, not the cache's
HEAT = (  # cividis, which reads the same for colour-blind eyes: from all right to all wrong
    (0.995, "black on #fee838"),
    (0.9, "black on #d2b86a"),
    (0.75, "black on #a59c74"),
    (0.5, "white on #575d6d"),
    (0.0, "white on #00224e"),
)


def needle(
    model: ModelOption = data.MINI,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            "-f",
            help="Haystack: a text file, a folder of .txt files, or `wikitext2` (downloaded and checked).",
            show_default="the built-in sample",
        ),
    ] = None,
    lengths: Annotated[
        str, typer.Option("--lengths", "-l", help="Comma-separated lengths of the whole prompt in tokens.")
    ] = "512,1024,2048",
    depths: Annotated[
        str,
        typer.Option("--depths", "-d", help="Where the needles stand, in percent: 0 is the begin of the haystack."),
    ] = "0,25,50,75,100",
    seeds: Annotated[int, typer.Option("--seeds", "-s", min=1, help="Random repetitions of the whole grid.")] = 4,
    seed: Annotated[int, typer.Option("--seed", help="The first of them; the same seed gives the same numbers.")] = 0,
    distractors: Annotated[
        int, typer.Option("--distractors", "-k", min=1, help="Needles with other names in every haystack.")
    ] = 4,
    cache: CacheOption = DEFAULT_CACHES,
    task: Annotated[haystack.Task, typer.Option("--task", help="What is asked; see above.")] = haystack.Task.SINGLE,
    template: Annotated[
        str,
        typer.Option(
            "--template",
            help="`plain`, `chat` (the model's own), or a file with {haystack}, {question}, {answer_prefix}.",
        ),
    ] = "plain",
    threads: ThreadsOption = 0,
    gpu_layers: GpuLayersOption = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results to this file, a list with one object per cache.")
    ] = None,
) -> None:
    """Needle in a haystack: how well does the model find a fact far back in its context, with every cache?

    Sentences such as "The secret word of Drexel Boney is window." are put into a text at every depth, and each is
    asked for with the others as distractors. The f16 reference always runs first, on the same questions.

    How to read it: `accuracy` is how often greedy decoding gives the right word. It saturates: most caches find all
    or nothing. `margin` says how far, in nats of log-probability, the right word leads the best distractor's, and
    `change` is the margin minus that of f16 on the same question: below 0 is worse, and a 95% interval without 0 in it
    is a difference that other seeds would show too. More --seeds make it narrower. Rounding alone moves single margins
    by some tenths of a nat, in both directions: what q8_0 shows is about that. `lost` counts the questions that
    f16 answers and this cache does not, `gained` the other way round. The map below shows accuracy and change by length
    and depth. Where f16 itself is often wrong the task is too hard for the model and says little about caches.

    Tasks in the style of RULER: `single` asks for the one word of a name. `multivalue` hides 4 words of every name, the
    first at the depth and the others anywhere, and asks for all, in any order. `variable` hides chains of 4
    assignments (VAR a = 12345, VAR b = VAR a, ...), the first at the depth and the others behind it, and asks for all
    variables that hold a number. The built-in models were trained on `single` in the `plain` template, and fail the
    other two: use those with larger models, and `--template chat` with models that follow instructions.

    Example: `turbokv needle -m model.gguf --lengths 512,2048 --seeds 1 --cache q8_0,turbo3 --json needle.json`; with a
    model that follows instructions add --template chat and the lengths that you will use.
    """
    pairs = cache_type.parse_pairs(cache)
    grid = _lengths(lengths), _depths(depths)
    if json_file:
        data.check_writable(json_file)
    content = data.read_texts(text)
    placement = device.placement(gpu_layers)
    try:
        with engine.interrupts.deferred(), engine.Model(model, placement=placement) as loaded:
            plan = haystack.Plan(
                task=task,
                template=prompt.template(template, loaded),
                lengths=grid[0],
                depths=grid[1],
                seeds=tuple(range(seed, seed + seeds)),
                distractors=distractors,
            )
            tokens = loaded.tokenize(content, add_special=False)
            if not len(tokens):
                raise TurbokvError("the text is empty: give one that a needle can be hidden in")
            haystacks = haystack.haystacks(loaded, tokens, plan)
            _notes(loaded, pairs, plan, len(tokens))
            with progress(len(haystacks) * (len(pairs) + 1)) as advance:
                measured = measurement.measure(
                    loaded, haystacks, pairs, n_threads=threads or engine.default_threads(), advance=advance
                )
            results = measurement.results(measured, plan, loaded, _text(text, content))
    except KeyboardInterrupt:
        err.print("turbokv: interrupted before the first haystack was finished; nothing to report")
        raise typer.Exit(130) from None
    lines = json.dumps([result.model_dump(mode="json") for result in results], indent=2) + "\n"
    deliver([_table(results), *map(_heat_map, results)], lines, json_file)
    _warnings(results, again=measured.again)
    if measured.finished < len(haystacks):
        err.print(f"interrupted: the table covers {measured.finished} of {len(haystacks)} haystacks")
        raise typer.Exit(130)


def _lengths(argument: str) -> tuple[int, ...]:
    items = [item.strip() for item in argument.split(",")]
    if not all(item.isdecimal() and int(item) for item in items):
        raise TurbokvError(f"--lengths {argument} is no list of token counts: write them like 512,2048")
    return tuple(sorted({int(item) for item in items}))


def _depths(argument: str) -> tuple[float, ...]:
    """As shares from 0 to 1."""
    try:
        percents = {float(item) for item in argument.split(",")}
    except ValueError:
        percents = {-1.0}
    if not all(0 <= percent <= 100 for percent in percents):
        raise TurbokvError(f"--depths {argument} is no list of percentages: write them like 0,50,100")
    return tuple(percent / 100 for percent in sorted(percents))


def _text(argument: str | None, content: str) -> record.Text:
    from turbokv import record

    name = data.SAMPLE.name if argument is None else Path(argument).resolve().name
    return record.Text(name=name, sha256=fingerprint.text_fingerprint(content))


def _notes(model: engine.Model, pairs: list[cache_type.CachePair], plan: haystack.Plan, n_text: int) -> None:
    """What the user should know before the run, on stderr."""
    longest = plan.lengths[-1]
    if n_text < longest:
        err.print(f"note: the text has {n_text} tokens and is repeated in haystacks of {longest}")
    if longest > model.n_ctx_train:
        err.print(f"note: {model.path.name} was trained on contexts of {model.n_ctx_train} tokens, not {longest}")
    for pair in pairs:
        if (effective := model.effective(pair)) != pair:
            err.print(f"{pair} -> {effective} for the head size of {model.path.name}")


def _warnings(results: list[record.NeedleResult], *, again: bool) -> None:
    """What the user should know about the results, on stderr."""
    first = results[0]
    if again:
        err.print(
            f"note: the memory of {first.model} cannot be cut back to the haystack (sliding window or recurrent), "
            "so that it was decoded again for every question"
        )
    if first.accuracy_f16 < TOO_HARD:
        err.print(
            f"note: f16 itself is right in only {100 * first.accuracy_f16:.0f} %: the task is too hard for "
            f"{first.model} and says little about caches"
        )
    for result in results:
        if result.non_finite:
            err.print(
                f"warning: {result.cache} or f16 gave NaN or infinite logits in {result.non_finite} trials; they count "
                "as wrong and are in no margin"
            )


def _table(results: list[record.NeedleResult]) -> Table:
    first = results[0]
    counts = {"haystack": first.haystacks, "question": len(first.trials), "distractor": first.distractors}
    counted = ", ".join(f"{n} {name}{'s' * (n != 1)}" for name, n in counts.items())
    title = f"{first.model}, {first.task}, {counted}{first.placement.title}"
    table = Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD)
    table.add_column("cache K/V", no_wrap=True)
    for name in ("bits K/V", "accuracy", "95% CI", "f16", "margin", "change", "95% CI", "lost", "gained"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        accuracy, change = result.accuracy, result.margin_delta
        table.add_row(
            result.cache,
            f"{result.bits_k:g}/{result.bits_v:g}",
            percent(accuracy.mean, 1),
            "-" if accuracy.ci95 is None else f"{100 * accuracy.ci95[0]:.1f}..{100 * accuracy.ci95[1]:.1f}",
            percent(result.accuracy_f16, 1),
            number(result.margin.mean, 3),
            number(change.mean, 3, sign="+"),
            "-" if change.ci95 is None else f"{change.ci95[0]:+.3f}..{change.ci95[1]:+.3f}",
            str(result.lost),
            str(result.gained),
        )
    return table


def _heat_map(result: record.NeedleResult) -> Table:
    """Accuracy in percent and change of the margin, depths down, lengths across."""
    table = Table(box=rich.box.SIMPLE_HEAD)
    cells = {(cell.length, cell.depth): cell for cell in result.cells}
    lengths = sorted({cell.length for cell in result.cells})
    table.add_column(f"{result.cache}\naccuracy %, change", no_wrap=True)
    for length in lengths:
        table.add_column(str(length), justify="right", no_wrap=True)
    for depth in sorted({cell.depth for cell in result.cells}):
        table.add_row(f"depth {100 * depth:g} %", *[_heat(cells.get((length, depth))) for length in lengths])
    return table


def _heat(cell: record.NeedleCell | None) -> Text:
    if cell is None:
        return Text("-")
    style = next(style for least, style in HEAT if cell.accuracy >= least)
    return Text(f" {100 * cell.accuracy:3.0f}  {number(cell.margin_delta, 2, sign='+'):>6} ", style)
