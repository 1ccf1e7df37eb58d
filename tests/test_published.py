"""What README.md and the documentation show of results is what is kept, and all of it."""

import json
import re

import pytest

from benchmarks import publish as benchmarks
from paper_repro import harness, publish
from paper_repro.__main__ import main


pytestmark = pytest.mark.source
README = publish.README.read_text()


def between(text: str, marker: str) -> str:
    return text.split(f"<!-- {marker} -->\n")[1].split(f"\n<!-- /{marker} -->")[0]


def test_reproductions():
    kept = json.loads(publish.KEPT.read_text())
    known = harness.discover()
    assert [(result["name"], result["title"]) for result in kept] == [
        (r.name, r.title) for r in known.values()
    ]
    assert "<lambda>" not in publish.KEPT.read_text()
    assert all(claim["holds"] is not False for result in kept for claim in result["claims"])
    assert between(README, "reproductions") == publish.table(kept)
    assert publish.PAGE.read_text() == publish.page(kept)
    assert {path.stem for path in publish.PICTURES.glob("*.svg")} == set(known)


def test_costs():
    assert between(README, "cost") == benchmarks.table(benchmarks.read(""))
    page = benchmarks.PAGE.read_text()
    assert page == benchmarks.page()
    assert all((publish.ROOT / path).exists() for path in re.findall(r'--8<-- "(.*?)"', page))
    guide = benchmarks.GUIDE.read_text()
    assert guide == benchmarks.guide(guide)


def test_readme_is_short_and_its_files_are_there():
    prose = re.sub(r"```.*?```|<!--.*?-->|^\|.*?$", "", README, flags=re.DOTALL | re.MULTILINE)
    assert len(prose.split()) < 700
    for target in re.findall(r'(?:\]\(|src(?:set)?=")(?!http)([^)"#]+)', README):
        assert (publish.ROOT / target).exists(), target


def test_drawings_are_there_in_both_inks():
    drawn = (publish.PICTURES.parent / "idea.svg").read_text()
    for theme, ink in publish.INKS.items():
        path = publish.PICTURES.parent / f"idea-{theme}.svg"
        assert path.read_text() == drawn.replace("currentColor", ink)
        assert "currentColor" not in path.with_name(f"norm-{theme}.svg").read_text()


def test_readme_without_results_says_what_is_missing(tmp_path, capsys):
    assert main(["--readme", "--out", str(tmp_path)]) == 2
    said = " ".join(capsys.readouterr().out.split())  # however the terminal folds it
    assert "run `python -m paper_repro --all` first" in said


def test_markers_must_be_there_once():
    assert publish.replaced("a <!-- x -->old<!-- /x --> b", "x", "new") == "a <!-- x -->\nnew\n<!-- /x --> b"
    with pytest.raises(ValueError, match="once each"):
        publish.replaced("nothing", "x", "new")


def test_results_that_are_not_there_are_not_published(tmp_path):
    with pytest.raises(ValueError, match=r"missing nec-discretization.*--all` first"):
        publish.write(list(harness.discover().values()), tmp_path)
