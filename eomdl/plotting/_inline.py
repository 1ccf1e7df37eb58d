"""Figures as SVG inside of a page: in the page's colours, light or dark, at its width, and with words beside them."""

import html
import io
import re
from contextlib import AbstractContextManager
from typing import Any


_INK = "#101112"  # stands for the page's text colour, light or dark
PAGE_COLOURS: Any = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.framealpha": 0,
    "svg.hashsalt": "eomdl",
}


def page_colours() -> AbstractContextManager[None]:
    """Return a context in which figures take the colour of the page's text for their axes and words."""
    import matplotlib

    return matplotlib.rc_context(PAGE_COLOURS)


def svg(figure: Any, identity: str, label: str | None = None) -> str:
    """Return the figure as SVG to be put into a page, with a text alternative: `label`, or what its axes and lines say.

    Black and ink become `currentColor`; identifiers are made unique by `identity`; the page sets the size.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None}, dpi=150)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(rf"{_INK}|#000000", "currentColor", text)
    prefix = re.sub(r"\W+", "-", identity)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    width = figure.get_size_inches()[0]
    kind = "wide" if width > 6.5 else "panel"
    label = html.escape(describe_figure(figure) if label is None else label)
    head, rest = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None  # matplotlib writes one
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    style = f'class="{kind}" role="img" aria-label="{label}" style="--width: {width * 72:.0f}px"'
    return f"<svg {names} {box[0]} {style}>{re.sub('<metadata>.*?</metadata>', '', rest, flags=re.DOTALL)}"


def describe_figure(figure: Any) -> str:
    """Return what the picture shows, in words: for each panel its title, what is drawn against what, and the lines' names."""
    parts = []
    for axes in figure.axes:
        lines = dict.fromkeys(str(line.get_label()) for line in axes.get_lines())
        names = [name.strip() for name in lines if not name.startswith("_")]
        what = f"{axes.get_ylabel()} against {axes.get_xlabel()}" if axes.get_xlabel() else axes.get_ylabel()
        parts.append(
            ": ".join(part.replace("\n", " ") for part in (axes.get_title(), what, ", ".join(names)) if part)
        )
    return "; ".join(part for part in parts if part).replace(r"\$", "$")


def stack_panels(figure: Any, height: float = 3.2) -> Any:
    """Return a figure with its panels one below the other, where side by side they would be too small to read on a phone."""
    panels = figure.axes
    grid = figure.add_gridspec(len(panels), 1)
    for place, axes in zip(grid, panels, strict=True):
        axes.set_subplotspec(place)
        axes.title.set_fontsize(10)
        for text in axes.get_legend().get_texts() if axes.get_legend() else ():
            text.set_fontsize(9)
    figure.set_size_inches(6.0, height * len(panels))
    return figure
