"""One page that a browser opens: a summary, then every reproduction with its claims, pictures and tables."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from eomdl.reports.page import Table, document, table
from paper_repro.claims import Claim
from paper_repro.harness import Result


ROWS = 60  # of a table that are shown
VERDICTS = {True: ("yes", "holds"), False: ("no", "DOES NOT HOLD"), None: ("na", "not asserted")}


def page(results: Sequence[Result], environment: Mapping[str, str]) -> str:
    """The report as one self-contained file of HTML."""
    body = [
        "<header><h1>The equation of motion of gradient descent, measured</h1>",
        f"<p class='lead'>{_summary(results)}</p>",
        "<p>Every number on this page was measured by this run; nothing is copied from the papers.</p>",
        f"<p class='small'>{html.escape(', '.join(f'{k} {v}' for k, v in environment.items()))}</p></header>",
        _contents(results),
        *(_section(result) for result in results),
    ]
    return document("eomdl: reproductions", "".join(body))


def _summary(results: Sequence[Result]) -> str:
    claims = [claim for result in results for claim in result.claims]
    counts = {verdict: sum(claim.holds is verdict for claim in claims) for verdict in VERDICTS}
    minutes = sum(result.record["seconds"] for result in results) / 60
    said = f"{counts[True]} of {len(claims)} claims hold"
    if counts[False]:
        said += f", <span class='no'>{counts[False]} do not</span>"
    if counts[None]:
        said += f", {counts[None]} are not asserted here"
    count = f"{len(results)} reproduction{'s' * (len(results) != 1)}"
    return f"{count}, {minutes:.1f} minutes: {said}."


def _contents(results: Sequence[Result]) -> str:
    items = []
    for result in results:
        held = sum(claim.holds is True for claim in result.claims)
        kind = "no" if result.failed else "yes" if held else "na"
        count = f"{held}/{len(result.claims)}"
        title = html.escape(result.reproduction.title)
        items.append(
            f"<li><a href='#{result.reproduction.name}'>{title}</a> <span class='badge {kind}'>{count}</span></li>"
        )
    return f"<nav aria-label='Contents'><h2>Contents</h2><ol>{''.join(items)}</ol></nav>"


def _section(result: Result) -> str:
    r = result.reproduction
    command = f"python -m paper_repro {r.name}"
    pictures = "".join(f"<figure>{svg}</figure>" for svg in result.pictures.values())
    tables = "".join(_table(name, table) for name, table in result.tables.items())
    return (
        f"<section id='{r.name}'><h2>{html.escape(r.title)}</h2>"
        f"<p class='small'><code>{command}</code>, {result.record['seconds']:.0f} s. {html.escape(r.source)}</p>"
        f"<p>{html.escape(r.setting)}</p><ul class='claims'>{''.join(map(_claim, result.claims))}</ul>"
        f"<div class='pictures'>{pictures}</div>{tables}</section>"
    )


def _claim(claim: Claim) -> str:
    kind, word = VERDICTS[claim.holds]
    text = f"{html.escape(claim.text)} <span class='measured'>{html.escape(claim.measured)}</span>"
    return f"<li><span class='badge {kind}'>{word}</span> {text}</li>"


def _table(name: str, frame: pd.DataFrame) -> str:
    cut = f", the first {ROWS} here, all in {name}.csv" if len(frame) > ROWS else ""
    shown = frame.head(ROWS)
    count = f"{len(frame)} row{'s' * (len(frame) != 1)}{cut}"
    columns = tuple(str(column) for column in shown)
    rows = tuple(tuple(row) for row in shown.to_numpy(object))
    return table(name, Table(columns, rows, caption=count), _show)


def _show(cell: Any, is_fraction: bool) -> str:
    """Return a cell as text: numbers in six digits."""
    del is_fraction
    if isinstance(cell, float):
        return "" if np.isnan(cell) else f"{cell:.6g}"
    return str(cell)
