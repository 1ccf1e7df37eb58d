"""The report in a real browser: no error, no sideways scrolling, sharp pictures with words beside them, sorted tables.

`EOMDL_REPORT=results/report.html python -m pytest tests/test_report.py` looks at a report that is there; else one is made.
"""

import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from browsing import WIDTHS, looked_at

from eomdl.plotting._inline import page_colours, svg
from paper_repro import harness, report
from paper_repro.claims import Claim
from paper_repro.pictures import errors, panel


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A report with what one can have: wide pictures, long tables, all three verdicts."""
    table = pd.DataFrame(
        {
            "model": ["a", "b"] * 40,
            "x": np.arange(1.0, 81),
            "error": np.linspace(1, 9, 80),
            "note": "a long word " * 9,
        }
    )
    with page_colours():
        wide, axes = panel("x", "y", width=12)
        axes.plot([0, 1], "k", label="a line")
        pictures = {"errors": svg(errors(table, "x", "error"), "errors"), "wide": svg(wide, "wide")}
    claims = [
        Claim("holds", "1", True),
        Claim("a_very_long_name_" * 20, "2", False),
        Claim("open <b>", "3", None),
    ]
    known = list(harness.discover().values())[:2]
    results = [
        harness.Result(r, {"table": table, "short": table[:3]}, claims, pictures, {"seconds": 1.0})
        for r in known
    ]
    written = tmp_path_factory.mktemp("report") / "report.html"
    written.write_text(report.page(results, {"jax": "0"}))
    return written


@pytest.fixture(scope="module")
def path(made) -> Path:
    """The report asked for, or the one made."""
    return Path(os.environ.get("EOMDL_REPORT", made)).resolve()


def test_page_is_self_contained(path):
    text = path.read_text()
    assert not re.search(r'(src|href)="https?:|@import|<link [^>]*stylesheet', text)
    assert text.count('role="img"') == text.count("<figure>")


def test_page_tells_the_verdicts(made):
    text = made.read_text()
    assert "2 of 6 claims hold" in text
    assert "2 do not" in text
    assert "open &lt;b&gt;" in text


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", WIDTHS)
def test_in_a_browser(path, browser, device, scheme):
    looked_at(browser, path, device, scheme)


def test_tables_are_sorted_by_a_click(made, browser):
    page = browser.new_page()
    page.goto(made.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    head = page.locator("table").first.locator("th").nth(1)
    cells = (
        "[...document.querySelector('table').tBodies[0].rows].map(row => Number(row.cells[1].textContent))"
    )
    for order, reverse in (("ascending", False), ("descending", True)):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == order
        values = page.evaluate(cells)
        assert values == sorted(values, reverse=reverse)
    page.close()
