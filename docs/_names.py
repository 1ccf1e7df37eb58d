"""The table of the names at the top of the package."""

import inspect
from pathlib import Path

import eomdl


RESULTS = (
    "successful",
    "nonfinite",
    "max_steps_reached",
    "interrupted",
    "batches_exhausted",
)
NAMESPACES = sorted(
    name for name in eomdl.__all__ if inspect.ismodule(getattr(eomdl, name))
)


def summary(thing: object) -> str:
    """Return the first paragraph of its docstring, as a table cell, in which a bar would end the cell."""
    return (
        inspect.getdoc(thing)
        .split("\n\n")[0]
        .replace("\n", " ")
        .replace("|", r"\vert ")
    )


def top_level() -> str:
    """Return the table, one row per name."""
    rows = ["| name | what it is |", "|---|---|"]
    for name in eomdl.__all__:
        if name not in (*NAMESPACES, "__version__"):
            rows.append(
                f"| [`eomdl.{name}`][eomdl.{name}] | {summary(getattr(eomdl, name))} |"
            )
    return "\n".join(rows)


def results() -> str:
    """Return the table of how a run can end, with the message that says what to do."""
    rows = ["| result | message |", "|---|---|"]
    assert len(RESULTS) == len(eomdl.RESULTS)
    for name in RESULTS:
        message = eomdl.RESULTS[getattr(eomdl.RESULTS, name)]
        rows.append(f"| `{name}` | {message or 'All went well.'} |")
    return "\n".join(rows)


def script(name: str) -> str:
    """Return the source of a script beside this one."""
    return (Path(__file__).parent / name).read_text()
