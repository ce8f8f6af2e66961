"""A report: one page from the rows of any results folder, which a browser shows wide and narrow."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from common.errors import UserError
from common.phases import ROOT
from common.results import Results, Row, read_rows
from common.tables import derive
from tests.support.beside import beside
from tests.support.browser import Browser, find_browser

report = beside(7, "instruments.report")
charts = beside(7, "instruments.charts")
RESULTS = ROOT / "phase-2-specdec" / "results"
VOID = {"meta", "circle", "rect", "line", "polyline"}


class Page(HTMLParser):
    """Checks that tags are balanced, and collects addresses and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.refers: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.refers += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def page() -> str:
    return str(report.page(RESULTS))


def test_the_page_refers_to_nothing_outside_itself(page: str) -> None:
    assert Page(page).refers == []
    assert "http" not in page
    assert "@media print" in page
    assert "prefers-color-scheme: dark" in page


def test_every_claim_has_its_interval_and_its_null_arm(page: str) -> None:
    rows = [row for row in read_rows(RESULTS) if row.section == "speed"]
    claimed = [line for line in derive(rows) if line.get("claimed")]
    assert claimed
    (section,) = re.findall(r"<h2>Claims</h2>.*?</section>", page, re.DOTALL)
    for line in claimed:
        shown = f"{line['speedup']:.2f} [{line['speedup_low']:.2f}, {line['speedup_high']:.2f}]"
        assert shown in section
    assert f"{len(claimed)} of" in section
    null = next(line for line in derive(rows) if str(line["variant"]).endswith(", again"))
    assert f"{null['speedup']:.2f} [" in section


def test_text_of_rows_cannot_break_the_page(tmp_path: Path) -> None:
    where = {"device_name": "<b>", "threads": 1, "dtype": "x", "timestamp": "now"}
    with Results(tmp_path, {"speed": "a & b"}, where, {}) as results:
        results.add(Row(kind="count", section="speed", variant="<script>x</script>", status="failed", reason="a<b"))
    text = report.page(tmp_path)
    Page(text)
    assert "<script>" not in text
    assert "<b>" not in text


def test_a_dry_run_and_another_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a results folder"):
        report.page(tmp_path)
    with Results(tmp_path, {}, {}, {}) as results:
        results.add(Row(kind="count", section="speed", synthetic=True))
    with pytest.raises(UserError, match="dry run"):
        report.page(tmp_path)


def test_two_folders_are_compared(tmp_path: Path) -> None:
    text = report.page(RESULTS, RESULTS)
    assert "within noise" in text
    assert "differs</td>" not in text
    Page(text)


def test_ticks_are_round_and_told_apart() -> None:
    assert charts.ticks(0.97, 1.52) == [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]
    labels = charts.tick_labels(charts.ticks(449.7, 450.2))
    assert len(set(labels)) == len(labels)
    assert charts.lines("t", "x", "y", {"a": []}) == ""


CHROMIUM = find_browser()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, and this machine has none")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_the_page_without_scrolling_sideways(page: str, width: int, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    file, picture = tmp_path / "page.html", tmp_path / "page.png"
    file.write_text(page, encoding="utf-8")
    with Browser(CHROMIUM) as browser:
        browser.open(file, width)
        assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.run("document.querySelectorAll('svg').length") >= 1
        browser.screenshot(picture)
    assert picture.stat().st_size > 10_000
