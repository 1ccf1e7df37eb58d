"""A page of HTML in one file: style and script inside, light and dark, for a phone too; tables sorted by a click."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


_FOLDER = Path(__file__).parent


class Cell(NamedTuple):
    """What a cell shows, and the value by which it is sorted."""

    text: str
    value: Any


def document(title: str, body: str) -> str:
    """The whole page around its body."""
    style, script = ((_FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta name='color-scheme' content='light dark'><link rel='icon' href='data:,'>"
        f"<title>{html.escape(title)}</title><style>{style}</style></head>"
        f"<body><main>{body}</main><script>{script}</script></body></html>\n"
    )


def table(
    name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], said: str, *, opened: bool = True
) -> str:
    """A table that is sorted by a click on a head, under its name and what is `said` of its rows."""
    kinds = [_kind(rows[0][i]) if len(rows) else "" for i in range(len(columns))]
    heads = "".join(
        f"<th scope='col'{kind}><button>{html.escape(column)}</button></th>"
        for column, kind in zip(columns, kinds, strict=True)
    )
    body = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows)
    label = html.escape(name)
    return (
        f"<details{' open' if opened else ''}><summary>{label} <span class='small'>{html.escape(said)}</span></summary>"
        f"<div class='scroll' tabindex='0' role='region' aria-label='table {label}'>"
        f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div></details>"
    )


def _kind(value: Any) -> str:
    """The class of cells with words, which stand on the left and may be broken."""
    return " class='words'" if isinstance(value, Cell) and isinstance(value.value, str) else ""


def _cell(value: Any) -> str:
    if isinstance(value, Cell):
        sorted_by = f" data-value='{value.value!r}'" if isinstance(value.value, float) else ""
        return f"<td{_kind(value)}{sorted_by}>{html.escape(value.text)}</td>"
    if isinstance(value, float):
        return f"<td data-value='{value!r}'>{'' if np.isnan(value) else f'{value:.6g}'}</td>"
    return f"<td>{html.escape(str(value))}</td>"
