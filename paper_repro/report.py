"""One page that a browser opens: every claim, table and figure of a run."""

import base64
import html
from pathlib import Path

import pandas as pd

from paper_repro.reproduction import Claim, Reproduction


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 13px; margin: 1em 0 } th, td { padding: 2px 9px; text-align: right }
th { border-bottom: 1px solid #888 } tr:nth-child(even) { background: #f4f4f4 } img { max-width: 100% }
.yes { color: #06702c } .no { color: #b00020; font-weight: bold } .na { color: #777 }
.scroll { overflow-x: auto; max-height: 480px } h2 { border-top: 1px solid #ccc; padding-top: 1em }
"""


def page(
    results: list[tuple[Reproduction, dict[str, pd.DataFrame], list[Claim], dict[str, Path]]],
    environment: dict[str, str],
) -> str:
    """The report as HTML; pictures are inside it."""
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>eomdl: reproductions</title>",
        f"<style>{_STYLE}</style><h1>The equation of motion of gradient descent, measured</h1>",
        "<p>Every number on this page was measured by this run. The papers' own tables were not at hand and "
        "nothing is copied from them.</p>",
        "<p>" + html.escape(", ".join(f"{k} {v}" for k, v in environment.items())) + "</p>",
    ]
    for reproduction, tables, claims, figures in results:
        parts.append(f"<h2 id='{reproduction.name}'>{html.escape(reproduction.title)}</h2>")
        parts.append(f"<p><code>{reproduction.name}</code>. {html.escape(reproduction.source)}</p>")
        parts.append(f"<p>{html.escape(reproduction.setting)}</p><ul>")
        for claim in claims:
            kind, word = {
                True: ("yes", "holds"),
                False: ("no", "DOES NOT HOLD"),
                None: ("na", "not asserted"),
            }[claim.holds]
            text = f"{html.escape(claim.text)} <em>{html.escape(claim.measured)}</em>"
            parts.append(f"<li><span class='{kind}'>{word}</span>: {text}</li>")
        parts.append("</ul>")
        for name, path in figures.items():
            data = base64.b64encode(path.read_bytes()).decode()
            parts.append(f"<img alt='{name}' src='data:image/png;base64,{data}'>")
        for name, table in tables.items():
            shown = table.head(60)
            cut = f" (first 60 of {len(table)} rows; all in {name}.csv)" if len(table) > 60 else ""
            parts.append(f"<h3>{name}{cut}</h3><div class='scroll'>")
            parts.append(shown.to_html(index=False, border=0, float_format=lambda x: f"{x:.8g}"))
            parts.append("</div>")
    return "\n".join(parts) + "</html>\n"
