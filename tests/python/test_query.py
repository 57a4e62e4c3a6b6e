"""`turbokv results`: records as tables."""

from __future__ import annotations

import json

import pytest
from sample_records import kld_result, record
from turbokv import query
from turbokv.errors import TurbokvError
from turbokv.record import Refusal

RECORDS = [
    record(id="a" * 16, result=kld_result("q4_0/q4_0", ctx=512)),
    record(id="b" * 16, result=kld_result("turbo3/turbo3", ctx=2048, ppl=None)),
    record(id="c" * 16, result=Refusal(task="kld", cache="tbq3/tbq3", reason="heads of 64")),
]


def rows(sql: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in query.run(RECORDS, sql).render("json").splitlines()]


def test_nested_values_and_circumstances_are_columns() -> None:
    answer = rows("select d.cache, d.kld.mean, d.kld.ci95[1] as low, d.cpu, d.dirty from kld d order by d.ctx")
    assert answer[0] == {"cache": "q4_0/q4_0", "mean": 0.04, "low": 0.035, "cpu": "CPU", "dirty": False}
    assert len(answer) == 2


def test_every_kind_has_a_table_and_runs_has_all() -> None:
    assert rows("select reason from refusal") == [{"reason": "heads of 64"}]
    assert rows("select count(*) as n from runs") == [{"n": 3}]


def test_overview_counts_the_cells_of_each_kind() -> None:
    assert [(row["kind"], row["cells"]) for row in rows(query.OVERVIEW)] == [("kld", 2), ("refusal", 1)]


def test_missing_number_is_empty_in_csv() -> None:
    assert query.run(RECORDS, "select d.cache, d.ppl from kld d order by d.ctx desc").render("csv") == (
        "cache,ppl\nturbo3/turbo3,\nq4_0/q4_0,15.5\n"
    )


def test_bad_sql_is_explained_with_the_tables_that_there_are() -> None:
    with pytest.raises(TurbokvError, match=r"nonsense[\s\S]*tables runs, kld, refusal"):
        query.run(RECORDS, "select * from nonsense")


def test_unknown_format_is_refused() -> None:
    with pytest.raises(TurbokvError, match="table, csv, json"):
        query.run(RECORDS, "select 1").render("xml")
