"""A page of HTML in one file: style and script inside, light and dark, for a phone too; tables sorted by a click."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


_FOLDER = Path(__file__).parent


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
    name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], said: str, *, opened: bool = True
) -> str:
    """A table that is sorted by a click on a head, under its name and what is `said` of its rows."""
    heads = "".join(f"<th scope='col'><button>{html.escape(column)}</button></th>" for column in columns)
    body = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows)
    label = html.escape(name)
    return (
        f"<details{' open' if opened else ''}><summary>{label} <span class='small'>{html.escape(said)}</span></summary>"
        f"<div class='scroll' tabindex='0' role='region' aria-label='table {label}'>"
        f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div></details>"
    )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"<td data-value='{value!r}'>{'' if np.isnan(value) else f'{value:.6g}'}</td>"
    return f"<td>{html.escape(str(value))}</td>"
