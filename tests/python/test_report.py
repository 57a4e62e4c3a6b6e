"""`turbokv report`: what it derives from records, that it is self-contained, and what it does when little is there."""

from __future__ import annotations

import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import example_records as examples
import pytest
from test_cli import COMMAND, Run, check_refused, turbokv
from turbokv import findings, report
from turbokv.errors import TurbokvError
from turbokv.record import Environment, KldResult, Record, Result, SpeedResult
from turbokv.summary import summaries

CACHES = ("f16", "q8_0", "q4_0", "turbo4", "turbo3", "tbq4", "q8_0/turbo3")


def small() -> list[Record]:
    """Two models, one short context and one longer one."""
    return examples.sweep((examples.MINI, examples.BIAS), CACHES, (512, 2048), (0, 2048))


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return small()


@pytest.fixture(scope="module")
def page(records: list[Record]) -> str:
    return report.page(records)


def kld(cache: str, mean: float, *, ci: float = 0.1, ctx: int = 512, model: str = examples.MINI) -> Record:
    """A record whose mean KLD is given, with an interval of that relative half-width."""
    result = examples.kld(cache, ctx, model)
    assert result.kld is not None
    divergence = result.kld.model_copy(update={"mean": mean, "ci95": (mean * (1 - ci), mean * (1 + ci))})
    return examples.record(result.model_copy(update={"kld": divergence}), model)


def text_of(html: str) -> str:
    """The words of a page, without markup, style and script."""
    html = re.sub(r"<(style|script)>.*?</\1>", " ", html, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", html).replace("&#39;", "'").split())


class Attributes(HTMLParser):
    """All tags of a page, and all their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]


# --- what is derived


def test_front_is_what_nothing_dominates() -> None:
    sweep = [
        kld("q8_0", 0.001),
        kld("q4_0", 0.02),  # larger than turbo4 and worse: off the front
        kld("turbo4", 0.01),
        kld("turbo3", 0.05),
        kld("q8_0/turbo3", 0.06),  # larger than turbo3 and worse
        kld("turbo2", 0.5),
        kld("f16", 0.0),  # the reference is on no front
    ]
    (group,) = findings.find(sweep).divergences
    assert [r.requested for r in group.front()] == ["turbo2/turbo2", "turbo3/turbo3", "turbo4/turbo4", "q8_0/q8_0"]
    for r in group.plotted():
        better = [
            o for o in group.plotted() if o.kv_bytes <= r.kv_bytes and findings.mean_kld(o) < findings.mean_kld(r)
        ]
        assert (r in group.front()) == (not better)


def test_summary_compares_with_upstream_and_says_what_is_not_told_apart() -> None:
    sweep = [kld("f16", 0.0), kld("q8_0", 0.001), kld("q4_0", 0.0105), kld("turbo4", 0.01), kld("turbo3", 0.042)]
    sweep += [kld("tbq4", 0.0104)]
    (item,) = summaries(findings.find(sweep))
    texts = {choice.cache: choice.text for choice in item.choices}
    assert list(texts) == ["turbo3", "turbo4", "q8_0"]
    assert texts["turbo3"].startswith("5.1 times smaller than f16, 1,600 bytes per token; KLD 0.042 (0.038..0.046)")
    assert "31 % fewer bytes than q4_0, 4.0 times its KLD." in texts["turbo3"]
    assert "8 % fewer bytes than q4_0; their KLD is not told apart." in texts["turbo4"]
    assert "Not told apart from it: tbq4." in texts["turbo4"]
    assert "fewer" not in texts["q8_0"]
    assert any("Off the front" in sentence and "q4_0 and tbq4" in sentence for sentence in item.sentences)


def test_summary_speaks_of_the_fullest_comparison_and_where_the_front_differs() -> None:
    sweep = [kld("q4_0", 0.02), kld("turbo4", 0.01), kld("q4_0", 0.02, ctx=2048), kld("turbo4", 0.03, ctx=2048)]
    sweep += [kld("q4_0", 0.02, ctx=8192)]
    (item,) = summaries(findings.find(sweep))
    assert item.title == "ctx 2048, 8 windows of sample.txt"
    texts = {choice.cache: choice.text for choice in item.choices}
    assert texts["q4_0"].endswith("Not on the front at ctx 512.")
    assert "Not on the front" not in texts["turbo4"]


def test_only_equal_terms_are_compared() -> None:
    """Windows, path, text and model part divergences; the machine parts speeds."""
    base = examples.kld("turbo3", 512)
    others = [
        examples.kld("turbo3", 512, chunks=4),
        examples.kld("turbo3", 512, path="decode"),
        base.model_copy(update={"text": base.text.model_copy(update={"sha256": "ffffffffffffffff"})}),
    ]
    assert len(findings.find([*map(examples.record, [base, *others])]).divergences) == 4
    slow = examples.speed("turbo3", 0).model_copy(update={"cpu": "another"})
    assert len(findings.find([*map(examples.record, [examples.speed("turbo3", 0), slow])]).speeds) == 2


def test_a_record_measured_again_counts_once_and_the_last_one() -> None:
    first, again = kld("turbo3", 0.5), kld("turbo3", 0.25)
    assert first.id == again.id
    text = text_of(report.page([first, kld("q4_0", 0.02), again]))
    assert "2 results, measured" in text
    assert "KLD 0.25" in text
    assert "0.500" not in text


def test_the_same_cell_of_another_build_is_left_out_and_counted() -> None:
    build = examples.BUILD.model_copy(update={"build": "ffffffffffff", "dirty": True})
    other = examples.record(examples.kld("turbo3", 512), build=build)
    text = text_of(report.page([kld("turbo3", 0.5), kld("q4_0", 0.02), other]))
    assert "1 result of the same cell from another build or machine is not shown: the last one counts." in text
    assert "1 result came from a checkout with changes that were not committed." in text
    assert "The results came from 2 builds, which may differ." in text


# --- what the page has


def test_page_has_every_number_of_the_tables(records: list[Record], page: str) -> None:
    text = text_of(page)
    for item in records:
        if isinstance(item.result, KldResult):
            assert f" {item.result.ppl:.3f} " in text
            assert f" {100 * (item.result.same_top or 0):.2f} % " in text
            assert item.result.kld is not None
            assert item.result.kld.mean is not None
            assert f" {item.result.kld.mean:.6f} " in text
        if isinstance(item.result, SpeedResult):
            assert item.result.tg is not None
            assert f"{item.result.tg.ratio_f16:.2f} ×" in text  # noqa: RUF001
        assert item.command in text.replace("&amp;", "&")
    assert "Noise floor: f16 against itself in batches of 256 tokens gives a mean KLD of 0.000031" in text
    assert "tbq4 needs heads that are a multiple of 128" in text
    assert "AMD EPYC 9R14" in text
    for term in ("KLD", "same top", "margin"):
        assert re.search(rf"<dt>[^<]*{term}", page)
    assert "Incomplete" not in text


def test_page_is_self_contained(page: str) -> None:
    parser = Attributes()
    parser.feed(page)
    assert "link" not in parser.tags
    links = [
        value for name, value in parser.attributes if name in ("src", "href", "srcset", "action", "data", "poster")
    ]
    assert links
    assert [link for link in links if not link.startswith("#")] == []
    assert re.findall(r"url\(|@import", page) == []
    assert "http://" not in page
    assert "https://" not in page
    assert "default-src 'none'" in page
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert len(page) < 2_000_000


def test_every_colour_of_a_chart_has_a_counterpart_for_dark_screens(page: str) -> None:
    used = set(re.findall(r'(?:fill|stroke)="(#[0-9a-fA-F]+)"', page))
    dark = set(re.findall(r'svg \[fill="(#[0-9a-f]+)"\] \{', page))
    assert used
    assert used <= dark


def test_same_records_same_bytes(records: list[Record], page: str) -> None:
    assert report.page(list(records)) == page
    assert report.markdown(records) == report.markdown(list(records))


EVIL = '<script>alert("1")</script> | `x` *y* [z](javascript:1).gguf'


def test_text_from_records_is_escaped_everywhere() -> None:
    environment = Environment(cpu=EVIL, cores=2, gpu=EVIL, os=EVIL, python=EVIL, OMP_WAIT_POLICY=EVIL)
    build = examples.BUILD.model_copy(update={"turbokv": EVIL, "commit": EVIL, "upstream_commit": EVIL, "build": EVIL})
    sweep = []
    for item in examples.sweep([EVIL], ("f16", "q4_0", "turbo3"), (512,), (0,)):
        result = item.result
        if isinstance(result, KldResult):
            result = result.model_copy(update={"text": result.text.model_copy(update={"name": EVIL})})
        if isinstance(result, SpeedResult):
            result = result.model_copy(update={"cpu": EVIL, "error": EVIL})
        sweep.append(item.model_copy(update={"result": result, "environment": environment, "build": build}))
    refusal = examples.refusal("tbq4", "kld", EVIL).model_copy(update={"cache": EVIL, "reason": EVIL, "task": EVIL})
    sweep.append(examples.record(refusal, EVIL))
    assert report.page(sweep).count("<script") == 1  # its own
    markdown = "\n".join(line for line in report.markdown(sweep).splitlines() if not line.startswith("    "))
    assert "<script" not in markdown
    assert re.search(r"(?<!\\)\[z", markdown) is None


# --- when little is there


def test_half_a_sweep_says_what_is_missing(records: list[Record]) -> None:
    done = [
        r
        for r in records
        if not (isinstance(r.result, KldResult) and r.result.ctx == 2048 and r.model.name == examples.BIAS)
    ]
    done = [r for r in done if r.command != "turbokv speed --depth 2048 --cache turbo3/turbo3 -m mini-q8_0.gguf"]
    found = findings.find(done)
    gaps = {(gap.kind, gap.model, gap.cell): gap.caches for gap in found.gaps}
    assert gaps == {
        ("kld", examples.BIAS, "ctx 2048 of sample.txt"): (
            "q8_0/q8_0", "q8_0/turbo3", "q4_0/q4_0", "turbo4/turbo4", "turbo3/turbo3",
        ),  # not tbq4, which it refuses, and not f16, which is in every run
        ("speed", examples.MINI, "512 prompt and 64 generated tokens, depth 2048"): ("turbo3/turbo3",),
    }  # fmt: skip
    text = text_of(report.page(done))
    assert f"Incomplete: 6 of {found.expected} cells are not in these results." in text
    assert "ctx 2048 of sample.txt q8_0, q8_0/turbo3, q4_0, turbo4, turbo3" in text


def test_another_machine_or_number_of_windows_leaves_no_gap() -> None:
    fast = examples.ENVIRONMENT.model_copy(update={"cpu": "another"})
    speeds = [
        examples.record(examples.speed("turbo3", 0)),
        examples.record(
            examples.speed("turbo3", 0, examples.BIAS).model_copy(update={"cpu": "another"}),
            examples.BIAS,
            environment=fast,
        ),
    ]
    windows = [
        examples.record(examples.kld("turbo3", 512)),
        examples.record(examples.kld("turbo3", 512, examples.BIAS, chunks=4), examples.BIAS),
    ]
    assert findings.find(speeds + windows).gaps == ()


ONE: dict[str, Result] = {
    "kld": examples.kld("turbo3", 512),
    "decode": examples.kld("turbo3", 512, path="decode"),
    "f16": examples.kld("f16", 512),
    "ppl": examples.perplexity("turbo3", 512),
    "needle": examples.needle("turbo3", lengths=(512,), depths=(0.5,)),
    "speed": examples.speed("turbo3", 0),
    "given up": examples.speed("turbo3", 0, error="llama-bench took longer than --timeout 60"),
    "server": examples.server("turbo3", 4),
    "refusal": examples.refusal("tbq4", "kld"),
}


@pytest.mark.parametrize("name", ONE)
def test_one_record_gives_a_page(name: str) -> None:
    sweep = [examples.record(ONE[name])]
    text = text_of(report.page(sweep))
    assert "1 result, measured 2026-11-20 (UTC)" in text
    assert ("took longer" in text) == (name == "given up")
    assert ("multiple of 128" in text) == (name == "refusal")
    assert "1 result" in report.markdown(sweep)


def test_nulls_where_nothing_could_be_measured() -> None:
    """One window, one round: no interval, no ratio; null means."""
    empty = {"mean": None, "ci95": None, "median": None, "trimmed_mean": None, "p99": None, "p999": None, "max": None}
    result = examples.kld("turbo3", 512)
    assert result.kld is not None
    nothing = {"ppl": None, "ppl_f16": None, "same_top": None, "last64": None, "noise_floor": None, "non_finite": 256}
    sweep = [
        examples.record(result.model_copy(update=nothing | {"kld": result.kld.model_copy(update=empty)})),
        examples.record(examples.kld("q4_0", 512)),
        examples.record(examples.kld("q8_0", 512)),
    ]
    speed = examples.speed("turbo3", 0)
    assert speed.tg is not None
    bare = speed.tg.model_copy(update={"ci95": None, "ratio_f16": None, "ratio_ci95": None})
    sweep.append(examples.record(speed.model_copy(update={"tg": bare, "pp": None})))
    text = text_of(report.page(sweep))
    assert "NaN or infinite logits with turbo3" in text
    assert "None" not in text
    assert "nan" not in text.lower().replace("nan or infinite", "")
    assert "None" not in report.markdown(sweep)


def test_intervals_without_measure_do_not_flatten_the_plot() -> None:
    """Two rounds or windows give intervals over many powers of ten; some reach below 0."""
    wide = [kld("q4_0", 0.02, ci=1e6), kld("turbo4", 0.01), kld("turbo3", 0.05)]
    plot = re.findall(r"<svg.*?</svg>", report.page(wide), flags=re.DOTALL)[0]
    heights = [
        float(y) for y in re.findall(r'aria-roledescription="point" transform="translate\([^,]*,([^)]*)\)', plot)
    ]
    assert len(heights) == 3
    assert max(heights) - min(heights) > 70


# --- Markdown


def test_markdown_tables_are_compact_and_complete(records: list[Record]) -> None:
    mini = [item for item in records if item.model.name == examples.MINI]
    made = report.markdown_tables(mini)
    assert list(made) == ["kld", "ppl", "needle", "speed_tg", "speed_pp", "memory", "server"]
    assert made["ppl"].splitlines()[0] == "| cache K/V | ctx 512 | ctx 2048 |"
    lines = made["kld"].splitlines()
    assert lines[0] == "| cache K/V | bits K/V | ctx 512 | ctx 2048 |"
    assert lines[1] == "|---|---:|---:|---:|"
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "f16", "q8_0", "q8_0/turbo3", "q4_0", "turbo4", "tbq4", "turbo3",
    ]  # fmt: skip
    result = next(r.result for r in mini if isinstance(r.result, KldResult) and r.result.requested == "turbo3/turbo3")
    assert result.kld is not None
    assert result.kld.ci95 is not None
    low, high = result.kld.ci95
    assert f"| turbo3 | 3.125/3.125 | {result.kld.mean:.6f} ({low:.6f}..{high:.6f}) |" in made["kld"]
    for table in made.values():
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert made["memory"].splitlines()[2] == "| f16 | 8,192 |"
    both = report.markdown_tables(records)["kld"].splitlines()
    assert both[0].endswith("| mini-q8_0 ctx 512 | mini-q8_0 ctx 2048 | bias-q8_0 ctx 512 | bias-q8_0 ctx 2048 |")
    assert both[-2].endswith(" – | – |")  # noqa: RUF001


# --- the command


def test_command_writes_a_page(tmp_path: Path) -> None:
    examples.write(tmp_path / "runs.jsonl", small()[:6])
    run = turbokv("report", tmp_path, "-o", tmp_path / "report.html")
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "runs.jsonl"]


def test_command_prints_markdown_or_writes_it(tmp_path: Path) -> None:
    runs = examples.write(tmp_path / "runs.jsonl", small()[:6])
    printed = turbokv("report", runs, "--markdown")
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout.startswith("# KV caches of mini-q8_0\n")
    written = turbokv("report", runs, "--markdown", "-o", tmp_path / "report.md")
    assert written.stdout == ""
    assert (tmp_path / "report.md").read_text() == printed.stdout


def test_command_says_that_stdout_is_full(tmp_path: Path) -> None:
    runs = examples.write(tmp_path / "runs.jsonl", small()[:6])
    with Path("/dev/full").open("w") as full:
        run = subprocess.run([COMMAND, "report", runs, "--markdown"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 1
    assert run.stderr == "turbokv: the output could not be printed: No space left on device\n"


@pytest.mark.parametrize("content", ["", '{"schema_version": 1}\n', "not json\n"])
def test_command_refuses_what_is_no_result(tmp_path: Path, content: str) -> None:
    (tmp_path / "runs.jsonl").write_text(content)
    run: Run = turbokv("report", tmp_path, "-o", tmp_path / "report.html")
    check_refused(run, "runs.jsonl" if content else "no result")
    assert not (tmp_path / "report.html").exists()


def test_command_refuses_early_what_it_cannot_write(tmp_path: Path) -> None:
    examples.write(tmp_path / "runs.jsonl", small()[:2])
    check_refused(turbokv("report", tmp_path, "-o", tmp_path / "missing" / "report.html"), "missing", "does not exist")
    check_refused(turbokv("report", tmp_path / "nothing", "-o", tmp_path / "report.html"), "nothing")


def test_no_records_are_an_error() -> None:
    with pytest.raises(TurbokvError, match="no result"):
        report.markdown_tables([])
