"""Figures of the pages: inline SVG that takes the page's colours, light or dark, and its width."""

import html
import io
import re
from pathlib import Path
from typing import Any

import matplotlib


def use_docs_style() -> None:
    """Text stays text, sizes suit a narrow page, and two builds make the same file."""
    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "eomdl",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
        }
    )


def stacked(figure: Any, height: float = 3.2) -> Any:
    """Its panels one below the other, where side by side they would be too small to read on a phone."""
    panels = figure.axes
    grid = figure.add_gridspec(len(panels), 1)
    for place, axes in zip(grid, panels, strict=True):
        axes.set_subplotspec(place)
        axes.title.set_fontsize(10)
        for text in axes.get_legend().get_texts() if axes.get_legend() else ():
            text.set_fontsize(9)
    figure.set_size_inches(6.0, height * len(panels))
    return figure


def svg(figure: Any, label: str) -> str:
    """The figure as HTML, with `label` for those who do not see it."""
    out = io.StringIO()
    none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(out, format="svg", transparent=True, metadata=none)
    text = out.getvalue()
    text = text[text.index("<svg") :]  # no XML prolog
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    # Ids that nothing refers to would occur twice where a page has two figures.
    used = set(re.findall(r"#([\w.]+)", text))
    text = re.sub(r' id="([\w.]+)"', lambda m: m[0] if m[1] in used else "", text)
    text = re.sub(r"(stroke|fill): #000000", r"\1: currentColor", text)
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', text)[1])
    opening = f'<svg role="img" aria-label="{html.escape(label, quote=True)}" style="max-width: {width * 4 / 3:.0f}px"'
    text = re.sub(
        r'<svg( xmlns:xlink="[^"]*")? width="[^"]*" height="[^"]*"',
        opening,
        text,
        count=1,
    )
    lines = (line.strip() for line in text.splitlines())
    return f'<div class="figure">{" ".join(line for line in lines if line)}</div>'


def drawing(name: str) -> str:
    """An SVG of `assets` inside of the page, where it takes the page's colours."""
    return f'<div class="figure">{(Path(__file__).parent / "assets" / name).read_text()}</div>'
