"""A page of HTML in one file: style and script inside, light and dark, for a phone too; tables sorted by a click."""

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eomdl._result import Table as Table  # for those that draw a page
from eomdl.reports.finding import show


_LONG = 12  # rows up to which a table is open from the start
_FOLDER = Path(__file__).parent


def document(title: str, body: str) -> str:
    """Return the whole page around its body."""
    style, script = ((_FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta name='color-scheme' content='light dark'><link rel='icon' href='data:,'>"
        f"<title>{html.escape(title)}</title><style>{style}</style></head>"
        f"<body><main>{body}</main><script>{script}</script></body></html>\n"
    )


def table(name: str, table: Table, show: Callable[[Any, bool], str] = show) -> str:
    """Return a table, open if it is short, that a click on a head sorts: under its name and its caption.

    `show`: (cell, whether it is a fraction) -> its text.
    """
    kinds = [_kind(cell) for cell in table.rows[0]] if table.rows else [""] * len(table.columns)
    heads = "".join(
        f"<th scope='col'{kind}><button>{html.escape(column)}</button></th>"
        for column, kind in zip(table.columns, kinds, strict=True)
    )
    body = "".join(
        f"<tr>{''.join(_cell(cell, show(cell, i in table.fractions)) for i, cell in enumerate(row))}</tr>"
        for row in table.rows
    )
    label, is_open = html.escape(name), len(table.rows) <= _LONG
    caption = f"<span class='small'>{html.escape(table.caption)}</span>"
    return (
        f"<details{' open' if is_open else ''}><summary>{label} {caption}</summary>"
        f"<div class='scroll' tabindex='0' role='region' aria-label='table {label}'>"
        f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div></details>"
    )


def _kind(value: Any) -> str:
    """Return the class of cells with words, which stand on the left and may be broken."""
    return " class='words'" if isinstance(value, str) else ""


def _cell(value: Any, text: str) -> str:
    """Return a cell with its text, and for a number the value by which it is sorted."""
    sorted_by = f" data-value='{value!r}'" if isinstance(value, float) else ""
    return f"<td{_kind(value)}{sorted_by}>{html.escape(text)}</td>"
