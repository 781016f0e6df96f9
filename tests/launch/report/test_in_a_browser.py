"""The page as a person sees it: on a phone and on a desk, light and dark, of one run, of two and of twelve."""

import json
import shutil

import pytest

from launch.report import __main__ as report
from tests.support.browser import open_browser

pytestmark = [pytest.mark.browser, pytest.mark.slow]
SIZES = [(400, 800), (1280, 900)]


@pytest.fixture(scope="module")
def pages(runs, killed, resumed, stopped, diverged, report_dataset, tmp_path_factory):
    """Pages by their number of runs; those of two have samples and masks."""
    folder = tmp_path_factory.mktemp("pages")
    selective, standard = runs.values()
    kinds = [selective, standard, killed, resumed, stopped, diverged]
    twelve = {f"a run of some kind, number {i}": shutil.copytree(kinds[i % 6], folder / f"run{i}") for i in range(12)}
    report.write_report({"one": selective}, folder / "1")
    report.write_report(runs, folder / "2", dataset_path=report_dataset)
    report.write_report(twelve, folder / "12")
    return {count: folder / str(count) / "index.html" for count in (1, 2, 12)}


def test_pages_open_without_a_network_or_an_error_and_fit_their_windows(pages, tmp_path):
    with open_browser() as page:
        for count, path in pages.items():
            for width, height in SIZES:
                for dark in (False, True):
                    page.open(f"file://{path}", width, height, dark)
                    page.wait_for("Where the time went")
                    assert page.evaluate("document.documentElement.scrollWidth") == width
                    page.screenshot(tmp_path / f"{count}-{width}-{'dark' if dark else 'light'}.png")
        requests = page.evaluate("JSON.stringify(performance.getEntriesByType('resource').map(entry => entry.name))")
        assert json.loads(requests) == []
        assert page.errors == []


def test_the_switch_changes_what_all_curves_are_against_and_the_pointer_reads_them(pages):
    shown = "JSON.stringify([...document.querySelectorAll('.by')].filter(e => e.offsetParent).map(e => e.className))"
    point = """(() => {
        const svg = [...document.querySelectorAll('svg.chart')].find(e => e.getBoundingClientRect().width);
        const box = svg.getBoundingClientRect();
        svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.right - 20, clientY: box.top + 50}));
        return svg.closest('.by').querySelector('.readout').textContent; })()"""
    with open_browser() as page:
        page.open(f"file://{pages[2]}", 1280, 900)
        page.wait_for("Where the time went")
        for axis, last in (("steps", "6 steps"), ("tokens", "6,144 tokens"), ("hours", " hours")):
            page.evaluate(f"document.getElementById('by-{axis}').click()")
            assert json.loads(page.evaluate(shown)) == [f"by {axis}"] * 2
            assert last in page.evaluate(point)
        assert page.errors == []
