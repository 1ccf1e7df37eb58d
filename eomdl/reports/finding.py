"""The finding on one question: an answer in words, the numbers beside it, tables and pictures."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from eomdl._result import Table, format_number


class NoAnswer(Exception):
    """A question that cannot be answered; the message says why."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """The answer to one question of the report.

    - `answer`: in words. `summary`: in one sentence, or empty.
    - `answered`: False where it could not be; `answer` then says why.
    - `meaning`: what the words in it mean, for those who do not know the theory.
    - `numbers`: `{what: value}`, formatted. `tables`: `{name: Table}`. `pictures`: `{name: matplotlib.figure.Figure}`.
    - `data`: `{name: number or array}`, as they were computed.
    - `notes`: what a reader must know.
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
        """Return the finding as plain text, without pictures."""
        lines = [self.answer, *(f"  {what}: {value}" for what, value in self.numbers.items())]
        for name, table in self.tables.items():
            lines += [f"  {name}: {' | '.join(table.columns)}"]
            lines += [
                f"    {' | '.join(show(cell, i in table.fractions) for i, cell in enumerate(row))}"
                for row in table.rows
            ]
        return "\n".join([*lines, *(f"  ! {note}" for note in self.notes)]) + "\n"


_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float) -> str:
    """Return a number in three digits for people: 0.0123, 1.23·10⁻⁵."""
    if not np.isfinite(value):
        return "not finite" if np.isnan(value) else f"{float(value)}"
    digits, _, power = format_number(float(value)).partition("e")
    return f"{digits}·10{str(int(power)).translate(_SUPERSCRIPTS)}" if power else digits


def percent(fraction: float) -> str:
    """Return a fraction as a percentage of two digits; as a multiple where it is large."""
    if not np.isfinite(fraction):
        return number(fraction)
    if abs(fraction) >= 2:
        return f"{number(fraction)} times"
    return f"{number(float(f'{100 * fraction:.2g}'))} %"


def of(fraction: float, what: str) -> str:
    """Return a fraction of something in words: "18 % of the gradient", "2.5 times the gradient"."""
    words = percent(fraction)
    return f"{words} of {what}" if words.endswith("%") else f"{words} {what}"


def show(cell: Any, is_fraction: bool = False) -> str:
    """Return a cell of a table as text."""
    if isinstance(cell, float):
        return "" if np.isnan(cell) else percent(cell) if is_fraction else number(cell)
    return str(cell)


def block(name: str) -> str:
    """Return a block's name; words for parameters that are one array, and for the items of a list."""
    if not name:
        return "all parameters"
    return f"block {name}" if name.isdecimal() else name
