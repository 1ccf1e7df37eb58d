"""Figures of the pages: inline SVG that takes the page's colours, light or dark, and its width."""

import zlib
from pathlib import Path
from typing import Any

import matplotlib

from eomdl.plotting._inline import PAGE_COLOURS, svg as inline


def use_docs_style() -> None:
    """Text stays text, sizes suit a narrow page, and two builds make the same file."""
    matplotlib.use("svg")
    matplotlib.rcParams.update(
        PAGE_COLOURS
        | {
            "svg.fonttype": "none",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
        }
    )


def svg(figure: Any, label: str) -> str:
    """The figure as HTML, with `label` for those who do not see it."""
    text = inline(figure, f"figure-{zlib.crc32(label.encode()):x}", label)
    lines = (
        line.strip() for line in text.splitlines()
    )  # Markdown ends HTML at an empty line
    return f'<div class="figure">{" ".join(line for line in lines if line)}</div>'


def drawing(name: str) -> str:
    """An SVG of `assets` inside of the page, where it takes the page's colours."""
    return f'<div class="figure">{(Path(__file__).parent / "assets" / name).read_text()}</div>'
