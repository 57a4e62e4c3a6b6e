"""Results as tables of DuckDB: one per kind of result, and `runs` with what all of them have."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table

from turbokv.errors import TurbokvError
from turbokv.record import Record

TABLES = {"kld": "kld", "ppl": "kld", "needle": "needle", "speed": "speed", "server": "server", "refusal": "refusal"}
OVERVIEW = """
    select model, kind, count(*) as cells, string_agg(distinct cache, ' ' order by cache) as caches,
           min(started) as first, max(started) as last
    from runs group by model, kind order by model, kind"""


@dataclass(frozen=True)
class Answer:
    columns: list[str]
    rows: list[tuple[Any, ...]]

    def render(self, form: str) -> str:
        """The rows as a `table` for people, as `csv`, or as `json`, one object per line."""
        if form == "json":
            rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
            return "".join(json.dumps(row, default=str) + "\n" for row in rows)
        text = io.StringIO()
        if form == "csv":
            csv.writer(text, lineterminator="\n").writerows([self.columns, *self.rows])
        elif form == "table":
            table = Table(*self.columns, box=rich.box.SIMPLE_HEAD)
            for row in self.rows:
                table.add_row(*("" if value is None else str(value) for value in row))
            Console(file=text, width=400).print(table, markup=False)
        else:
            raise TurbokvError(f"--format {form} is not one of table, csv, json")
        return "".join(line.rstrip() + "\n" for line in text.getvalue().splitlines())


def flat(record: Record) -> dict[str, Any]:
    """A row: the circumstances under short names, then the fields of the result."""
    return {
        "id": record.id,
        "fingerprint": record.model.fingerprint,
        "cpu": record.environment.cpu,
        "gpu": record.environment.gpu,
        "commit": record.build.commit,
        "dirty": record.build.dirty,
        "build": record.build.build,
        "upstream_commit": record.build.upstream_commit,
        "started": record.started.removesuffix("Z"),  # a timestamp with a zone would need pytz
        "duration": record.seconds,
        "command": record.command,
        "model": record.model.name,
        **record.result.model_dump(mode="json"),
    }


def run(records: list[Record], sql: str) -> Answer:
    """What the query gives. Raises TurbokvError with DuckDB's message and the tables that there are."""
    import duckdb  # slow to import

    rows: dict[str, list[dict[str, Any]]] = {"runs": []}
    for record in records:
        row = flat(record)
        rows["runs"].append({key: row[key] for key in ("kind", "cache", *list(row)[:12])})
        rows.setdefault(TABLES[record.result.kind], []).append(row)
    with tempfile.TemporaryDirectory(prefix="turbokv-query-") as folder, duckdb.connect() as connection:
        for name, content in rows.items():
            file = Path(folder) / f"{name}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in content))
            if content:
                options = "format = 'newline_delimited', sample_size = -1, maximum_object_size = 268435456"
                connection.execute(f"create table {name} as select * from read_json('{file}', {options})")
        try:
            cursor = connection.execute(sql)
            return Answer([column[0] for column in cursor.description or ()], cursor.fetchall())
        except duckdb.Error as error:
            raise TurbokvError(f"{str(error).strip()}. These results have the tables {', '.join(rows)}") from None
