"""The table of the names at the top of the package, and where each is described."""

import inspect
from pathlib import Path

import eomdl


NAMESPACES = sorted(
    name for name in eomdl.__all__ if inspect.ismodule(getattr(eomdl, name))
)


def home(name: str) -> str:
    """The namespace that describes a name of the top level."""
    return next(space for space in NAMESPACES if name in getattr(eomdl, space).__all__)


def summary(thing: object) -> str:
    """The first paragraph of its docstring, as a table cell, in which a bar would end the cell."""
    return (
        inspect.getdoc(thing)
        .split("\n\n")[0]
        .replace("\n", " ")
        .replace("|", r"\vert ")
    )


def top_level() -> str:
    """One row per name."""
    rows = ["| name | what it is |", "|---|---|"]
    for name in eomdl.__all__:
        if name not in (*NAMESPACES, "__version__"):
            rows.append(
                f"| [`eomdl.{name}`][eomdl.{home(name)}.{name}] | {summary(getattr(eomdl, name))} |"
            )
    return "\n".join(rows)


def results() -> str:
    """How a run can end, with the message that says what to do."""
    rows = ["| result | message |", "|---|---|"]
    for name, item in eomdl.RESULTS._name_to_item.items():
        rows.append(f"| `{name}` | {eomdl.RESULTS[item] or 'All went well.'} |")
    return "\n".join(rows)


def script(name: str) -> str:
    """The source of a script beside this one."""
    return (Path(__file__).parent / name).read_text()
