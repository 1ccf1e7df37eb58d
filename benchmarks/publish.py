"""What README.md and the documentation show of the benchmarks: written by `python -m benchmarks.report --readme`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks.tables import TABLES, cell
from eomdl.plotting._inline import page_colours, svg
from paper_repro.publish import ROOT, replaced


KEPT = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "cost.md"
PICTURES = ROOT / "docs" / "assets" / "benchmarks"
README = ROOT / "README.md"
# Folders of results, by what they are called on the page.
SUITES = {
    "": "Fields, solve, scripts, memory and observing",
    "first_answer": "The first answer of a process",
    "interpolating": "The flow of a step map",
    "choice": "The choice of a flow",
    "edge": "The edge of stability",
    "scale": "Larger than one device",
    "gpu": "On a GPU",
}
# Tables that a guide shows: its comments `<!-- table -->`, from the results of that suite.
GUIDE = ROOT / "docs" / "guides" / "larger-than-one-device.md"
GUIDE_TABLES = dict.fromkeys(
    ("chunk memory", "chunk time", "chunk runs", "large cost", "large runs"), "scale"
)
INTRODUCTION = """# Cost

Costs are ratios measured in one run: gradients are flops of the compiled program over those of one gradient of the loss, and the error
stands beside the cost. Absolute seconds mean little on a shared machine. `python -m benchmarks.report` runs the suite;
`python -m benchmarks.report --readme` writes this page from the results kept in `benchmarks/results`.
"""


def write() -> list[Path]:
    """README.md's table and the documentation's page with its pictures, from the results kept."""
    README.write_text(replaced(README.read_text(), "cost", table(read(""))))
    PICTURES.mkdir(parents=True, exist_ok=True)
    for old in PICTURES.glob("*.svg"):
        old.unlink()
    for suite in suites():
        with page_colours():
            for name, figure in figures.figures(read(suite)["tables"]).items():
                (PICTURES / f"{suite or 'main'}-{name}.svg").write_text(svg(figure, f"{suite}-{name}"))
    PAGE.write_text(page())
    GUIDE.write_text(guide(GUIDE.read_text()))
    return [README, PAGE, GUIDE, PICTURES]


def guide(text: str) -> str:
    """The guide with its tables."""
    for name, suite in GUIDE_TABLES.items():
        _, columns = TABLES[name]
        text = replaced(text, name, "\n" + markdown(read(suite)["tables"][name], columns) + "\n")
    return text


def suites() -> list[str]:
    """The folders of results that are there."""
    return [suite for suite in SUITES if (KEPT / suite / "results.json").exists()]


def read(suite: str) -> dict[str, Any]:
    """The results kept of a suite."""
    return json.loads((KEPT / suite / "results.json").read_text())


def table(results: Mapping[str, Any]) -> str:
    """One row per number of counter terms: cost of the field and of `solve`, and its errors, on the main problem."""
    fields = {row["order"]: row for row in results["tables"]["field"] if row["route"] == "trees"}
    paths = [row for row in results["tables"]["solve"] if row["problem"].startswith("64-64-64-10")]
    rows = []
    for row in sorted(paths, key=lambda row: row["order"]):
        field, error = fields[row["order"]], row.get("ode_error", row["ode_error_estimate"])
        values = (
            row["order"],
            field["gradients"],
            field["trace_s"] + field["compile_s"],
            row["gradients_per_step"],
            row["distance_to_GD"],
            error,
        )
        rows.append("| " + " | ".join(cell(value) for value in values) + " |")
    heads = (
        "counter terms",
        "one field [gradients]",
        "compile [s]",
        "`solve`, per step [gradients]",
        "distance to GD",
        "of it, ODE error",
    )
    return "\n".join(["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|", *rows])


def page() -> str:
    """Every table of every suite that is kept."""
    parts = [INTRODUCTION]
    for suite in suites():
        results = read(suite)
        machine, versions = results["machine"], results["versions"]
        where = (
            f"{machine.get('gpu') or machine['cpu']}, {machine['cores']} cores; jax {versions['jax']}, diffrax "
            f"{versions['diffrax']}, Python {machine['python']}; {results['date'][:10]}."
        )
        parts += [f"## {SUITES[suite]}\n", f"{where} {results['note']}".strip() + "\n"]
        for path in sorted(PICTURES.glob(f"{suite or 'main'}-*.svg")):
            parts.append(f'<div class="figure">\n--8<-- "docs/assets/benchmarks/{path.name}"\n</div>\n')
        for name, (title, columns) in TABLES.items():
            if rows := results["tables"].get(name):
                parts.append(f"### {title}\n\n{markdown(rows, columns)}\n")
    return "\n".join(parts)


def markdown(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A table of Markdown; columns that no row has are left out."""
    present = {key: heading for key, heading in columns.items() if any(key in row for row in rows)}
    lines = ["| " + " | ".join(present.values()) + " |", "|---" * len(present) + "|"]
    lines += ["| " + " | ".join(cell(row.get(key)) for key in present) + " |" for row in rows]
    return "\n".join(lines)
