"""The pictures of the reproductions: one panel a figure, so that a page lays them out at any width.

A model has one colour; the ODE solver's error is dotted; no legend lies over the points.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eomdl.plotting._lines import add_legend, panel, positive_or_nan


ODE = "ODE error (estimate)"


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
        axes.plot(some[x], positive_or_nan(some[y]), f"C{color}{marker}-", ms=4, label=label(model))
        if ode is not None:
            axes.plot(some[x], positive_or_nan(some[ode]), f"C{color}:")
    if ode is not None:
        axes.plot([], [], "k:", label=ODE)
    values = sorted(table[x].unique())
    if scales["xscale"] == "log" and len(values) < 8:
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.set_xticks([], minor=True)
    return add_legend(figure)


def points(
    table: pd.DataFrame, columns: dict[str, str], ticks: list[str], *, xlabel: str, ylabel: str, title: str
) -> Figure:
    """A column of markers for each setting: `columns` is `{label: column}`, `ticks` names the settings."""
    figure, axes = panel(xlabel, ylabel, title, yscale="log", width=6.0)
    x = np.arange(len(table))
    for marker, (label, column) in zip("osD^vx", columns.items(), strict=False):
        axes.plot(x, positive_or_nan(table[column]), marker, label=label)
    axes.set_xticks(x, ticks)
    return add_legend(figure)


def named(values: Mapping[Any, float], what: str) -> Callable[[Any], str]:
    """Labels of models with a number: "EoM 1: slope 2.00"."""
    return lambda name: f"{name}: {what} {values[name]:.2f}"


def ticks(table: pd.DataFrame, *columns: str) -> list[str]:
    """Names of settings: the values of these columns, one per line."""
    return ["\n".join(f"{value:.3g}" for value in row) for row in table[[*columns]].to_numpy()]


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
    return add_legend(figure)
