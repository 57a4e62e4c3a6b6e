"""The report's page in a real browser: it loads nothing, fits a phone, and its tables and tabs work by keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import example_records as examples
import pytest
from browser import Browser
from turbokv import report

pytestmark = pytest.mark.browser

EVIL = '<script>document.title="taken"</script>"><img src=x onerror=alert(1)>.gguf'
CACHES = ("f16", "q8_0", "q4_0", "turbo4", "turbo3", "tbq4", "q8_0/turbo3")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(report.page(examples.sweep(contexts=(512, 2048))))
    return path


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser) -> Browser:
    chromium.messages.clear()
    chromium.requests.clear()
    return chromium


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, False), (360, True)])
def test_it_loads_nothing_and_fits(browser: Browser, page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    browser.open(page, width, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.messages == []
    assert browser.requests == [page.resolve().as_uri()]
    assert len(browser.screenshot(tmp_path / "page.png")) > 50_000
    light = browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light != dark


@pytest.mark.parametrize("width", [1280, 360])
def test_labels_of_charts_are_readable_and_do_not_overlap(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width)
    script = """[...document.querySelectorAll('svg')].filter(svg => svg.checkVisibility()).map(svg =>
        [...svg.querySelectorAll('.mark-text.role-mark text')].map(text => {
            const box = text.getBoundingClientRect();
            return [text.textContent, box.left, box.top, box.right, box.bottom, svg.getBoundingClientRect().right];
        }))"""
    charts = browser.evaluate(script)
    assert len(charts) > 4
    for texts in charts:
        assert texts
        for i, (name, left, top, right, bottom, edge) in enumerate(texts):
            assert bottom - top > 9, name
            assert right <= edge + 1, name
            for other, other_left, other_top, other_right, other_bottom, _ in texts[:i]:
                wide = min(right, other_right) - max(left, other_left)
                high = min(bottom, other_bottom) - max(top, other_top)
                assert wide <= 1 or high <= 3, (name, other)


def test_tables_sort_by_click_and_keyboard(browser: Browser, page: Path) -> None:
    browser.open(page, 1280)
    table = "document.querySelector('.panel:not(.hidden) table.sortable')"
    heading = f"[...{table}.tHead.rows[0].cells].find(cell => cell.textContent === 'mean KLD')"
    column = f"[...{table}.tBodies[0].rows].map(row => Number(row.cells[{heading}.cellIndex].dataset.value))"
    before = browser.evaluate(column)
    browser.evaluate(f"{heading}.querySelector('button').click()")
    assert browser.evaluate(column) == sorted(before) != before
    assert browser.evaluate(f"{heading}.ariaSort") == "ascending"
    browser.evaluate(f"{heading}.querySelector('button').focus()")
    browser.press("Enter", 13)
    assert browser.evaluate(column) == sorted(before, reverse=True)
    assert browser.evaluate(f"{heading}.ariaSort") == "descending"
    assert (
        browser.evaluate(f"{table}.querySelectorAll('[aria-sort=none]').length")
        == len(browser.evaluate(f"[...{table}.tHead.rows[0].cells].map(cell => cell.ariaSort)")) - 1
    )


def test_missing_values_sort_last_both_ways(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    records = examples.sweep([examples.MINI], CACHES, (512,), (0, 2048), with_server=False)
    path.write_text(
        report.page([r for r in records if not (r.command.startswith("turbokv speed --depth 0 --cache q"))])
    )
    browser.open(path, 1280)
    table = "document.querySelector('#speed table')"
    for _ in range(2):
        browser.evaluate(f"{table}.tHead.rows[0].cells[1].querySelector('button').click()")
        values = browser.evaluate(f"[...{table}.tBodies[0].rows].map(row => row.cells[1].dataset.value ?? null)")
        missing = [value is None for value in values]
        assert True in missing
        assert missing == sorted(missing)


def test_tabs_show_one_context_each(browser: Browser, page: Path) -> None:
    browser.open(page, 390)
    shown = "[...document.querySelectorAll('.panel')].filter(p => p.checkVisibility()).map(p => p.dataset.label)"
    assert browser.evaluate(shown) == ["ctx 2048", "ctx 2048"]
    browser.evaluate("document.querySelector('.tab-bar button').focus()")
    browser.press("Enter", 13)
    assert browser.evaluate(shown) == ["ctx 512", "ctx 2048"]
    pressed = "[...document.querySelectorAll('.tab-bar')][0].querySelector('[aria-pressed=true]').textContent"
    assert browser.evaluate(pressed) == "ctx 512"


def test_points_say_what_they_are(browser: Browser, page: Path) -> None:
    browser.open(page, 1280)
    where = "(b => [b.x + b.width / 2, b.y + b.height / 2])"
    point = "document.querySelector('.panel:not(.hidden) .wide svg [aria-roledescription=point]')"
    browser.evaluate(f"{point}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
    x, y = browser.evaluate(f"{where}({point}.getBoundingClientRect())")
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    tip = browser.evaluate(
        "document.querySelector('.tip').checkVisibility() && document.querySelector('.tip').innerText"
    )
    assert "bytes per token, KLD" in tip
    assert tip == browser.evaluate(f"{point}.getAttribute('aria-label')")


def test_names_from_records_do_not_run(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(report.page(examples.sweep([EVIL], ("f16", "q4_0", "turbo3"), (512,), (0,))))
    browser.open(path, 1280)
    assert browser.evaluate("document.title").startswith("KV caches of <script>")
    assert browser.evaluate("document.querySelectorAll('script').length") == 1
    assert browser.evaluate("document.querySelectorAll('img').length") == 0
    assert browser.messages == []
    assert browser.requests == [path.resolve().as_uri()]
