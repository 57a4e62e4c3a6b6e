"""`turbokv report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from turbokv import data
from turbokv.errors import TurbokvError
from turbokv.terminal import err, write_out

ResultsArgument = Annotated[Path, typer.Argument(help="A runs.jsonl, or the folder that holds one.")]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="File to write.", show_default="report.html, stdout for --markdown"),
]
MarkdownOption = Annotated[bool, typer.Option("--markdown", help="GitHub Markdown instead of a page.")]


def report(results: ResultsArgument, output: OutputOption = None, markdown: MarkdownOption = False) -> None:
    """One page of everything that was measured: it opens without a network and can be sent as it is.

    How to read it: the plot has the size of a cache to the right and its harm upwards, both logarithmic; what lies on
    the line is the least harm for its size. Bars are 95 % intervals: caches whose bars overlap are not told apart.
    Filled fields of a needle map are answers found, `▼` are those that f16 finds more often. Tables sort by a click
    on a heading. What was refused or is missing is listed with the reason, so that a sweep that is half done can be
    reported too. The same results give the same file.

    Example: `turbokv report sweep -o report.html`
    """
    from turbokv import report as reporting  # jinja2 and pydantic are slow to import
    from turbokv import store

    target = output or (Path("-") if markdown else Path("report.html"))
    to_stdout = target == Path("-")
    if not to_stdout:
        data.check_writable(target)
    try:
        records = store.read(results)
        text = reporting.markdown(records) if markdown else reporting.page(records)
    except TurbokvError as error:
        raise TurbokvError(f"no report of {results}: {error}") from error
    if to_stdout:
        write_out(text)
        return
    data.write_atomically(target, text.encode())
    err.print(f"{target}: {len(text.encode()) / 1e3:,.0f} kB", markup=False)
