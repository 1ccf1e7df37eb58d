"""What the pictures share."""

from typing import Any

import numpy as np


def positive_or_nan(values: Any) -> np.ndarray:
    """Return the values with NaN where a log axis has no place for them."""
    array = np.asarray(values, float)
    return np.where(array > 0, array, np.nan)


def as_label(name: Any) -> str:
    """Return a name as it is to be read: no formula, and with an entry in a legend, which leaves out what begins with "_"."""
    text = str(name).replace("$", r"\$")
    return f" {text}" if text[:1] in ("", "_") else text


def panel(xlabel: str, ylabel: str, title: str = "", *, width: float = 5.0, **scales: Any) -> tuple[Any, Any]:
    """Return figure and axes of an empty panel with a grid; `xscale`, `yscale`, `ylim`, ... as for `Axes.set`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title, **scales)
    axes.grid(alpha=0.3)
    return figure, axes


def add_legend(figure: Any) -> Any:
    """Return the figure of one panel with its legend below the panel."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = 1 if max(map(len, labels)) > 30 else 2
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.2 * np.ceil(len(labels) / columns))
    return figure
