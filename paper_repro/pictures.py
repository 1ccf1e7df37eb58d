"""The pictures of the reproductions: one panel a figure, so that a page lays them out at any width.

A model has one colour; the ODE solver's error is dotted; no legend lies over the points.
"""

import html
import io
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure


ODE = "ODE error (estimate)"
_INK = "#101112"  # stands for the page's text colour, light or dark
_STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.framealpha": 0,
    "svg.hashsalt": "eomdl",
}


def inked() -> AbstractContextManager[None]:
    """Figures made inside take the colour of the page's text for their axes and words."""
    return matplotlib.rc_context(_STYLE)


def svg(figure: Figure, identity: str) -> str:
    """The figure as SVG to be put into a page, with a text alternative.

    Black and ink become `currentColor`; identifiers are made unique; the page sets the size.
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
    label = html.escape(alternative(figure))
    head, rest = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None  # matplotlib writes one
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    style = f'class="{kind}" role="img" aria-label="{label}" style="--width: {width * 72:.0f}px"'
    return f"<svg {names} {box[0]} {style}>{re.sub('<metadata>.*?</metadata>', '', rest, flags=re.DOTALL)}"


def alternative(figure: Figure) -> str:
    """What the picture shows, in words: for each panel its title, what is drawn against what, and the lines' names."""
    parts = []
    for axes in figure.axes:
        lines = dict.fromkeys(str(line.get_label()) for line in axes.get_lines())
        names = [name for name in lines if not name.startswith("_")]
        what = f"{axes.get_ylabel()} against {axes.get_xlabel()}" if axes.get_xlabel() else axes.get_ylabel()
        parts.append(
            ": ".join(part.replace("\n", " ") for part in (axes.get_title(), what, ", ".join(names)) if part)
        )
    return "; ".join(part for part in parts if part)


def panel(
    xlabel: str, ylabel: str, title: str = "", *, width: float = 5.0, **scales: Any
) -> tuple[Figure, Axes]:
    """An empty panel with a grid; `xscale`, `yscale`, `ylim`, ... as for `Axes.set`."""
    figure = Figure(figsize=(width, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title, **scales)
    axes.grid(alpha=0.3)
    return figure, axes


def legend(figure: Figure) -> Figure:
    """The legend of a panel, below it."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = 1 if max(map(len, labels)) > 30 else 2
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.2 * np.ceil(len(labels) / columns))
    return figure


def errors(
    table: pd.DataFrame,
    x: str,
    y: str,
    *,
    by: str = "model",
    ode: str | None = None,
    label: Callable[[Any], str] = str,
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
    marker: str = "o",
    **scales: Any,
) -> Figure:
    """The common picture: an error against x on log axes, a colour for each model, its ODE error dotted."""
    scales = {"xscale": "log", "yscale": "log"} | scales
    figure, axes = panel(xlabel or x, ylabel or y, title, **scales)
    for color, (model, some) in enumerate(table.groupby(by, sort=False)):
        axes.plot(some[x], positive(some[y]), f"C{color}{marker}-", ms=4, label=label(model))
        if ode is not None:
            axes.plot(some[x], positive(some[ode]), f"C{color}:")
    if ode is not None:
        axes.plot([], [], "k:", label=ODE)
    values = sorted(table[x].unique())
    if scales["xscale"] == "log" and len(values) < 8:
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.set_xticks([], minor=True)
    return legend(figure)


def points(
    table: pd.DataFrame, columns: dict[str, str], ticks: list[str], *, xlabel: str, ylabel: str, title: str
) -> Figure:
    """A column of markers for each setting: `columns` is `{label: column}`, `ticks` names the settings."""
    figure, axes = panel(xlabel, ylabel, title, yscale="log", width=6.0)
    x = np.arange(len(table))
    for marker, (label, column) in zip("osD^vx", columns.items(), strict=False):
        axes.plot(x, positive(table[column]), marker, label=label)
    axes.set_xticks(x, ticks)
    return legend(figure)


def named(values: Mapping[Any, float], what: str) -> Callable[[Any], str]:
    """Labels of models with a number: "EoM 1: slope 2.00"."""
    return lambda name: f"{name}: {what} {values[name]:.2f}"


def ticks(table: pd.DataFrame, *columns: str) -> list[str]:
    """Names of settings: the values of these columns, one per line."""
    return ["\n".join(f"{value:.3g}" for value in row) for row in table[[*columns]].to_numpy()]


def positive(values: Any) -> np.ndarray:
    """The values with NaN where a log axis has no place for them."""
    array = np.asarray(values, float)
    return np.where(array > 0, array, np.nan)


def plane(
    axes: Axes, paths: pd.DataFrame, product: float = 0.0, minima: np.ndarray | None = None, *, real: str
) -> None:
    """Paths of two parameters a and b, the real run as dots, the minima a b = `product` as a line."""
    if minima is not None:
        axes.plot(minima, product / minima, "0.6", lw=1, label="minima, a b = y")
    groups = dict(list(paths.groupby("run", sort=False)))
    axes.plot(groups[real]["a"], groups[real]["b"], "k.", ms=4, label=real)
    for color, (name, path) in enumerate((n, p) for n, p in groups.items() if n != real):
        axes.plot(path["a"], path["b"], f"C{color}", label=name)


def bars(table: pd.DataFrame, x: str, y: str, error: str, ylabel: str, *, by: str) -> Figure:
    """One line per group and seed with bars of two standard errors, a colour for each group."""
    figure, axes = panel(f"{x} (bars: 2 standard errors)", ylabel)
    for color, (group, some) in enumerate(table.groupby(by, sort=False)):
        for seed, rows in some.groupby("seed"):
            style: dict[str, Any] = {
                "capsize": 3,
                "alpha": 0.7,
                "label": f"{by} {group}" if seed == 0 else None,
            }
            axes.errorbar(rows[x], rows[y], 2 * rows[error], fmt=f"C{color}o-", **style)
    axes.set_xscale("symlog", linthresh=10)
    axes.set(xlim=(-1, None), ylim=(0, None))
    return legend(figure)
