"""What every result has: a table, a picture, notes, a file, a data frame, and how a notebook shows it."""

import abc
import base64
import dataclasses
import functools
import html
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from typing_extensions import override

from eomdl import _check
from eomdl._types import Numbers
from eomdl.storage.files import DamagedFile, read_npz, write_npz
from eomdl.storage.values import decode, encode, fields, make_storable, require_kinds


Result = TypeVar("Result", bound="AbstractResult")


class Note(str):
    """A sentence that a reader of a result must know; it prints and compares as its text.

    `is_fault`: whether some of the numbers cannot be trusted because of it. Otherwise it only tells.
    """

    is_fault: bool

    def __new__(cls, text: str, is_fault: bool = False) -> "Note":
        note = str.__new__(cls, text)
        note.is_fault = is_fault
        return note

    def about(self, name: str) -> "Note":
        """Return the note with the name of what it is about in front."""
        return Note(f"{name}: {self}", self.is_fault)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over random samples: `value`, its `standard_error`, and the `interval` that is to cover the right value in 95 of 100 cases.

    Of few samples the interval is wider than two standard errors.
    """

    value: float
    standard_error: float
    interval: tuple[float, float] = (np.nan, np.nan)


def _read_note(found: Any) -> Note:
    text, is_fault = found
    if not isinstance(text, str) or not isinstance(is_fault, bool):
        raise ValueError(f"note: expected a text, and whether it is a fault, got {_check.show(found)}")
    return Note(text, is_fault)


make_storable(Note, lambda note: [str(note), note.is_fault], _read_note)
make_storable(Estimate)


def format_number(value: float) -> str:
    """Return a number in three digits: 0.0123, 12345, 1.23e-05."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        short = f"{value:.3g}"
        return f"{value:.0f}" if "e" in short else short
    return f"{value:.2e}"


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows of a table under the names of its columns; a cell is text, a number, or None where there is nothing.

    - `title`; `caption`: a sentence about the rows.
    - `fractions`: places of the columns whose numbers are parts of a whole.
    - `is_series`: whether the rows are points of one series, such as the saved steps of a run: where there are too many to print,
        some are taken evenly. Of other tables the first ones are printed.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    title: str = ""
    caption: str = ""
    fractions: tuple[int, ...] = ()
    is_series: bool = False

    def few(self, count: int) -> "Table":
        """Return the table with at most `count` of its rows, and a caption that says so."""
        if len(self.rows) <= count:
            return self
        places = range(count)
        if self.is_series:
            places = np.unique(np.linspace(0, len(self.rows) - 1, count).round().astype(int)).tolist()
        shown = f"{len(places)} of {len(self.rows)} rows; `table(rows=...)` shows more."
        rows = tuple(self.rows[i] for i in places)
        return dataclasses.replace(self, rows=rows, caption=f"{self.caption} {shown}".strip())

    def numbers(self) -> list[list[Any]]:
        """Return the rows with NaN where there is nothing."""
        return [[np.nan if cell is None else cell for cell in row] for row in self.rows]

    def cells(self) -> list[list[str]]:
        """Return the rows as text."""
        return [[format_cell(cell, i in self.fractions) for i, cell in enumerate(row)] for row in self.rows]

    def text(self) -> str:
        """Return the table as plain text."""
        # rich takes a tenth of the package's own import time, and most users of the package never print.
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable()
        for i, column in enumerate(self.columns):
            is_text = any(isinstance(row[i], str) for row in self.rows)
            table.add_column(Text(column), justify="left" if is_text else "right", no_wrap=True)
        for row in self.cells():
            table.add_row(*map(Text, row))
        text = io.StringIO()
        Console(file=text, width=10_000, legacy_windows=False).print(table)
        title, caption = (f"{words}\n" * bool(words) for words in (self.title, self.caption))
        return title + text.getvalue() + caption

    def html(self) -> str:
        """Return the table as HTML."""
        heads = "".join(f"<th>{html.escape(column)}</th>" for column in self.columns)
        body = "".join(
            f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in self.cells()
        )
        words = html.escape(f"{self.title}{'. ' * bool(self.title and self.caption)}{self.caption}")
        caption = f"<caption>{words}</caption>" if words else ""
        return f"<table>{caption}<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def format_cell(cell: Any, is_fraction: bool = False) -> str:
    """Return a cell of a table as text: numbers in three digits, fractions as percentages, "-" where there is nothing."""
    if cell is None:
        return "-"
    if isinstance(cell, float | np.floating):
        return f"{format_number(100 * float(cell))} %" if is_fraction else format_number(float(cell))
    return str(cell)


def series_table(title: str, columns: Mapping[str, Numbers]) -> Table:
    """Return the table of columns of one length, a row for each point of a series."""
    rows = zip(*(np.asarray(values).tolist() for values in columns.values()), strict=True)
    return Table(tuple(columns), tuple(rows), title=title, is_series=True)


@functools.singledispatch
def plot(result: Any, /, **options: Any) -> Any:
    """Return the picture of a result, or of several results of one type, `{name: result}`.

    ```python
    figure = eomdl.plotting.plot({"GD": eomdl.geometry.path_shape(run), "gradient flow": eomdl.geometry.path_shape(path)})
    figure.savefig("shape.svg")
    ```

    `result.plot(**options)` is the same for one result. A new type of result registers its picture with `plot.register`.

    **Arguments:** `result`; `options`: those of the picture, named in the docstring of the result's class.

    **Returns:** a `matplotlib.figure.Figure`; nothing is shown or written.

    **Raises:** `ValueError` for a type of result without a picture, and for a wrong value of an option; `ModuleNotFoundError`
    without matplotlib, which comes with `eomdl[plot]`.
    """
    drawn = ", ".join(sorted(kind.__name__ for kind in plot.registry if issubclass(kind, AbstractResult)))
    raise ValueError(
        f"result: expected a result that has a picture ({drawn}), or a dict {{name: result}}, "
        f"got {type(result).__name__}"
    )


class AbstractResult(abc.ABC):
    """What every result of the library has. A subclass is a frozen dataclass that declares its tables and has `notes`.

    `save` and `load` keep every field; a field may hold numbers, text, arrays, and containers and results of these.
    """

    notes: tuple[Note, ...]
    _formats: ClassVar[tuple[int, ...]] = (
        1,
    )  # versions of the file that `load` reads; `save` writes the last one

    @override
    def __init_subclass__(cls) -> None:
        make_storable(cls, lambda result: result._pack(), cls._unpack)

    @abc.abstractmethod
    def _tables(self) -> tuple[Table, ...]:
        """Return the tables that say what was found, with all their rows."""

    @property
    def verdict(self) -> str:
        """The result in a sentence; empty where the numbers say it all."""
        return ""

    def table(self, rows: int = 12) -> str:
        """Return the result as text: the verdict, tables of at most so many rows, and the notes."""
        rows = _check.integer("rows", rows, 1)
        tables = "".join(table.few(rows).text() for table in self._tables())
        notes = "".join(f"! {note}\n" for note in self.notes)
        return f"{self.verdict}\n" * bool(self.verdict) + tables + notes

    @override
    def __str__(self) -> str:
        return self.table()

    def to_frame(self) -> Any:
        """Return all rows of the table as a pandas DataFrame; of several tables, those with equal first columns in one row.

        **Raises:** `ValueError` for a batch of runs; `ModuleNotFoundError` without pandas, which comes with `eomdl[plot]`.
        """
        import pandas as pd

        frames = [pd.DataFrame(table.numbers(), columns=list(table.columns)) for table in self._tables()]
        if not frames:
            raise ValueError(f"result: expected one {type(self).__name__}, got a batch")
        return functools.reduce(lambda left, right: left.merge(right, how="outer"), frames)

    def plot(self, **options: Any) -> Any:
        """Return the picture of the result, a `matplotlib.figure.Figure`: see `eomdl.plotting.plot`."""
        return plot(self, **options)

    def _repr_html_(self) -> str:
        """Return what a notebook shows: verdict, tables, notes and a small picture."""
        verdict = f"<p>{html.escape(self.verdict)}</p>" if self.verdict else ""
        tables = "".join(table.few(12).html() for table in self._tables())
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        return f"<div>{verdict}{tables}{f'<ul>{notes}</ul>' if notes else ''}{_small_picture(self)}</div>"

    def save(self, path: str | Path) -> None:
        """Write one `.npz` file (NumPy arrays and JSON, no pickle), which replaces another as a whole.

        **Raises:** `ValueError` that names a field which no file can hold, such as a flow, whose loss is a function; `OSError`.
        """
        arrays: dict[str, Any] = {}
        value = encode(self._pack(), type(self).__name__, arrays)
        write_npz(_check.path("path", path), arrays, {"format": self._names()[-1], "value": value})

    @classmethod
    def load(cls: type[Result], path: str | Path) -> Result:
        """Read what `save` wrote.

        **Raises:** `ValueError` that names the file if it is something else or damaged, or its fields are of other kinds, shapes or
        names; `FileNotFoundError`.
        """
        return cls._read_file(path)

    @classmethod
    def _read_file(cls: type[Result], path: str | Path) -> Result:
        arrays, meta = read_npz(_check.path("path", path), *cls._names())
        try:
            result = cls._from_file(arrays, meta)
            if arrays:
                raise ValueError(f"arrays {sorted(arrays)} have no place")
            return result
        except Exception as error:
            raise DamagedFile(
                f"path: expected the contents of a {cls.__name__}, got others in {path} ({type(error).__name__}: {error})"
            ) from error

    @classmethod
    def _names(cls) -> list[str]:
        """Return the names of the file's formats, the newest last."""
        return [f"eomdl.{cls.__name__} {version}" for version in cls._formats]

    def _pack(self) -> Any:
        """Return what a file keeps of the result: its fields."""
        return fields(self)

    @classmethod
    def _unpack(cls: type[Result], found: Any) -> Result:
        """Return the result of which `_pack` made this."""
        return require_kinds(cls(**found))

    @classmethod
    def _from_file(cls: type[Result], arrays: dict[str, Any], meta: Mapping[str, Any]) -> Result:
        """Return the result from the contents of its file, its arrays taken out of `arrays`."""
        return cls._unpack(decode(meta["value"], arrays))


def _small_picture(result: AbstractResult) -> str:
    """Return the picture as an image in HTML; empty where there is none, or no matplotlib."""
    try:
        figure = result.plot()
    except (ImportError, ValueError):
        return ""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=60)
    data = base64.b64encode(file.getvalue()).decode()
    return f"<img alt='{type(result).__name__}' src='data:image/png;base64,{data}'>"
