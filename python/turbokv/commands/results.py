"""`turbokv results`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from turbokv.terminal import err, write_out


def results(
    path: Annotated[Path, typer.Argument(metavar="RESULTS", help="runs.jsonl, or the folder that holds one.")],
    sql: Annotated[str | None, typer.Option("--sql", help="A query in DuckDB's SQL.")] = None,
    form: Annotated[str, typer.Option("--format", help="table, csv or json.")] = "table",
    history: Annotated[
        bool, typer.Option("--history", help="All records, not only the last one of each cell.")
    ] = False,
) -> None:
    """Look into the results of a sweep: an overview, or any question in SQL.

    Without --sql: what was measured. With it: each kind of result is a table, `kld`, `needle`, `speed`, `server`,
    `refusal`, with a row per cell. A column for every field of the result (nested ones with a dot, `d.kld.mean` for
    a row d), and for its circumstances: model, fingerprint, cpu, gpu, commit, dirty, build, upstream_commit, started,
    duration, command, id. `turbokv results sweep --sql "describe kld"` lists them.

    Example: `turbokv results sweep --sql "select d.model, d.ctx, d.cache, d.kld.mean from kld d order by all"`
    """
    from turbokv import query, store

    records = store.read(path)
    answer = query.run(records if history else store.latest(records), sql or query.OVERVIEW)
    write_out(answer.render(form))
    if not sql:
        err.print(f"{len(records)} records; questions: --sql, see --help")
