"""One page that a browser opens: a summary, then every reproduction with its claims, pictures and tables."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from paper_repro.claims import Claim
from paper_repro.harness import Result


ROWS = 60  # of a table that are shown
VERDICTS = {True: ("yes", "holds"), False: ("no", "DOES NOT HOLD"), None: ("na", "not asserted")}
_FOLDER = Path(__file__).parent


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
    style, script = ((_FOLDER / name).read_text() for name in ("report.css", "report.js"))
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta name='color-scheme' content='light dark'><link rel='icon' href='data:,'>"
        f"<title>eomdl: reproductions</title><style>{style}</style></head>"
        f"<body><main>{''.join(body)}</main><script>{script}</script></body></html>\n"
    )


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


def _table(name: str, table: pd.DataFrame) -> str:
    cut = f", the first {ROWS} here, all in {name}.csv" if len(table) > ROWS else ""
    shown = table.head(ROWS)
    heads = "".join(f"<th scope='col'><button>{html.escape(str(c))}</button></th>" for c in shown)
    rows = "".join(
        "<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in shown.to_numpy(object)
    )
    count = f"{len(table)} row{'s' * (len(table) != 1)}"
    return (
        f"<details{' open' if len(table) <= 12 else ''}><summary>{html.escape(name)} <span class='small'>{count}"
        f"{cut}</span></summary><div class='scroll' tabindex='0' role='region' aria-label='table {html.escape(name)}'>"
        f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div></details>"
    )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"<td data-value='{value!r}'>{'' if pd.isna(value) else f'{value:.6g}'}</td>"
    return f"<td>{html.escape(str(value))}</td>"
