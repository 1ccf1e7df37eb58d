"""What README.md and the documentation show of the results: written by `python -m paper_repro --readme`, never by hand.

The results kept are those of a full run. `tests/test_published.py` holds that the pages say what is kept, and that every
reproduction is in it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paper_repro import harness


ROOT = Path(__file__).parents[1]
KEPT = Path(__file__).parent / "results.json"
PICTURES = ROOT / "docs" / "assets" / "reproductions"
PAGE = ROOT / "docs" / "reproductions.md"
README = ROOT / "README.md"
SHOWN = ("nec-equilibrium", "norm")  # the picture of README.md
INKS = {"light": "#1f2328", "dark": "#e6edf3"}
WORDS = {True: "holds", False: "does not hold", None: "not asserted"}
_FIELDS = ("name", "title", "source", "setting", "seconds", "environment", "claims")


def write(reproductions: Sequence[harness.Reproduction], out: Path) -> list[Path]:
    """Keep the results of `out`, then write the table of README.md, the documentation's page and its pictures.

    Raises `ValueError` if a reproduction is not done there at full size.
    """
    options = harness.Options()
    missing = [r.name for r in reproductions if not harness.is_kept(r, options, out)]
    if missing:
        raise ValueError(
            f"--readme: expected all reproductions done in {out} at full size, "
            f"missing {', '.join(missing)}; run `python -m paper_repro --all` first"
        )
    results = [harness.read(r, out) for r in reproductions]
    kept = [{field: result.record[field] for field in _FIELDS} for result in results]
    KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    PICTURES.mkdir(parents=True, exist_ok=True)
    for old in PICTURES.glob("*.svg"):
        old.unlink()
    for result in results:
        (PICTURES / f"{result.reproduction.name}.svg").write_text(next(iter(result.pictures.values())))
    name, picture = SHOWN
    drawn = next(result.pictures[picture] for result in results if result.reproduction.name == name)
    _in_both_inks(picture, drawn)
    _in_both_inks("idea", (PICTURES.parent / "idea.svg").read_text())
    README.write_text(replaced(README.read_text(), "reproductions", table(kept)))
    PAGE.write_text(page(kept))
    return [KEPT, README, PAGE, PICTURES]


def _in_both_inks(name: str, svg: str) -> None:
    """A picture for a page that does not give it its colour, light and dark."""
    for theme, ink in INKS.items():
        (PICTURES.parent / f"{name}-{theme}.svg").write_text(svg.replace("currentColor", ink))


def replaced(text: str, marker: str, content: str) -> str:
    """The text with what stands between the comments `marker` and `/marker` replaced."""
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"expected the comments {start} and {end} once each")
    before, rest = text.split(start)
    return f"{before}{start}\n{content}\n{end}{rest.split(end)[1]}"


def table(kept: Sequence[Mapping[str, Any]]) -> str:
    """One row per reproduction: name, what it measures, claims that hold, seconds."""
    rows = [
        "| `python -m paper_repro ...` | what is measured | claims that hold | seconds |",
        "|---|---|---|---|",
    ]
    for result in kept:
        verdicts = [claim["holds"] for claim in result["claims"]]
        asserted = [verdict for verdict in verdicts if verdict is not None]
        held = f"{sum(asserted)} of {len(asserted)}"
        if len(asserted) < len(verdicts):
            held += f" ({len(verdicts) - len(asserted)} not asserted)"
        rows.append(f"| `{result['name']}` | {_escape(result['title'])} | {held} | {result['seconds']:.0f} |")
    return "\n".join(rows)


def page(kept: Sequence[Mapping[str, Any]]) -> str:
    """The documentation's page: every reproduction with its claims, numbers and first picture."""
    minutes = sum(result["seconds"] for result in kept) / 60
    environment = kept[0]["environment"]
    commits = dict.fromkeys(result["environment"]["commit"] for result in kept)
    versions = ", ".join(f"{name} {environment[name]}" for name in ("jax", "diffrax", "optax", "python"))
    parts = [
        "# Reproductions",
        "Every number here was measured by the command above it; nothing is copied from the papers. "
        f"`python -m paper_repro --all` runs all {len(kept)} in about {minutes:.0f} minutes on two cores, writes every "
        "table and picture to `results/`, and asserts the claims. This page is written by `python -m paper_repro --readme` "
        f"({versions}, commit {', '.join(commits)}).",
    ]
    for result in kept:
        claims = [
            f"- **{WORDS[c['holds']]}**: {_escape(c['text'])} *{_escape(c['measured'])}*"
            for c in result["claims"]
        ]
        parts += [
            f"## {_escape(result['title'])}",
            f"`python -m paper_repro {result['name']}`, {result['seconds']:.0f} s. {_escape(result['source'])}",
            _escape(result["setting"]),
            "\n".join(claims),
            f'<div class="figure">\n--8<-- "docs/assets/reproductions/{result["name"]}.svg"\n</div>',
        ]
    return "\n\n".join(parts) + "\n"


def _escape(text: str) -> str:
    """Plain text in Markdown: no emphasis, no HTML, no tables made of it."""
    for sign in ("\\", "*", "_", "<", "|", "$"):
        text = text.replace(sign, "\\" + sign)
    return text
