"""What is said about one question: an answer in words, the numbers beside it, tables and pictures."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np


class Unanswered(Exception):
    """A question that cannot be answered; the message says why."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under the names of the columns; what is `said` of it; `shares`: columns that are shown as percentages."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    said: str = ""
    shares: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was found about one question.

    - `answer`: in words. `summary`: in one sentence, or empty.
    - `answered`: False where it could not be; `answer` then says why.
    - `meaning`: what the words in it mean, for those who do not know the theory.
    - `numbers`: `{what: value}`, formatted. `tables`: `{name: Table}`. `pictures`: `{name: matplotlib.figure.Figure}`.
    - `data`: `{name: number or array}`, as they were computed.
    - `notes`: what to mind.
    """

    answer: str
    summary: str = ""
    answered: bool = True
    meaning: str = ""
    numbers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tables: Mapping[str, Table] = dataclasses.field(default_factory=dict)
    pictures: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """As plain text, without pictures."""
        lines = [self.answer, *(f"  {what}: {value}" for what, value in self.numbers.items())]
        for name, table in self.tables.items():
            lines += [f"  {name}: {' | '.join(table.columns)}"]
            lines += [
                f"    {' | '.join(shown(cell, i in table.shares) for i, cell in enumerate(row))}"
                for row in table.rows
            ]
        return "\n".join([*lines, *(f"  ! {note}" for note in self.notes)]) + "\n"


_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float) -> str:
    """Three digits: 0.0123, 1.23·10⁻⁵."""
    value = float(value)
    if not np.isfinite(value):
        return "not finite" if np.isnan(value) else f"{value}"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        short = f"{value:.3g}"
        return f"{value:.0f}" if "e" in short else short
    digits, power = f"{value:.2e}".split("e")
    return f"{digits}·10{str(int(power)).translate(_SUPERSCRIPTS)}"


def percent(share: float) -> str:
    """A share as a percentage of two digits; as a multiple where it is large."""
    if not np.isfinite(share):
        return number(share)
    if abs(share) >= 2:
        return f"{number(share)} times"
    return f"{number(float(f'{100 * share:.2g}'))} %"


def of(share: float, what: str) -> str:
    """A share of something in words: "18 % of the gradient", "2.5 times the gradient"."""
    said = percent(share)
    return f"{said} of {what}" if said.endswith("%") else f"{said} {what}"


def shown(cell: Any, share: bool = False) -> str:
    """A cell of a table as text."""
    if isinstance(cell, float):
        return "" if np.isnan(cell) else percent(cell) if share else number(cell)
    return str(cell)


def block(name: str) -> str:
    """A block's name; words for parameters that are one array, and for the items of a list."""
    if not name:
        return "all parameters"
    return f"block {name}" if name.isdecimal() else name
