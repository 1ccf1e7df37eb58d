"""Pictures of the report on a learning rate: one panel each, to be read on a phone."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from eomdl.plotting._lines import add_legend, as_label, panel, positive_or_nan


_DARK = "#1a1a1a"  # not the black that becomes the colour of the page's text
Series = Mapping[str, tuple[np.ndarray, np.ndarray]]  # {name: (steps, values)}


def sharpness_picture(steps: np.ndarray, products: np.ndarray, threshold: float | None, symbol: str) -> Any:
    """Return the learning rate times the sharpness against steps, and the threshold."""
    figure, axes = panel("step", f"learning rate × {symbol}")
    axes.plot(steps, products, "C0o-", ms=4, label="measured along the run")
    if threshold is not None:
        axes.axhline(threshold, color="C3", ls="--", label=f"edge of stability: {threshold:.3g}")
    axes.set_ylim(bottom=min(0.0, float(np.nanmin(products, initial=0.0))))
    return add_legend(figure)


def lines_picture(series: Series, ylabel: str, yscale: str = "log", ylim: Any = None) -> Any:
    """Return lines against steps, the first one black and broad."""
    figure, axes = panel("step", ylabel, yscale=yscale)
    for i, (name, (steps, values)) in enumerate(series.items()):
        style: dict[str, Any] = {"color": "k", "lw": 2.4, "alpha": 0.7} if i == 0 else {"color": f"C{i - 1}"}
        axes.plot(
            steps, positive_or_nan(values) if yscale == "log" else values, label=as_label(name), **style
        )
    if ylim is not None:
        axes.set_ylim(*ylim)
    if yscale == "log":
        _set_plain_ticks(axes)
    return add_legend(figure)


def distances_picture(
    steps: Mapping[str, np.ndarray], distances: Mapping[str, np.ndarray], errors: Mapping[str, np.ndarray]
) -> Any:
    """Return the distances of the models to the run against steps; dotted, the ODE solver's own error."""
    figure, axes = panel("step", "distance to the run", yscale="log")
    for i, (name, values) in enumerate(distances.items()):
        axes.plot(steps[name], positive_or_nan(values), color=f"C{i}", label=as_label(name))
        if name in errors:
            axes.plot(steps[name], positive_or_nan(errors[name]), color=f"C{i}", ls=":", lw=1)
    if errors:
        axes.plot([], [], "k:", lw=1, label="of it, ODE solver (at most)")
    _set_plain_ticks(axes)
    return add_legend(figure)


def path_picture(paths: Mapping[str, np.ndarray]) -> Any:
    """Return paths on two axes, the run first."""
    figure, axes = panel("first component (parameter distance)", "second component (parameter distance)")
    for i, (name, path) in enumerate(paths.items()):
        style: dict[str, Any] = {"color": "k", "lw": 2.2} if i == 0 else {"color": f"C{i - 1}", "ls": "--"}
        axes.plot(path[:, 0], path[:, 1], label=as_label(name), **style)
    return add_legend(figure)


def move_legend_below(figure: Any) -> Any:
    """Return a figure of one panel with its legend below, where it lies over nothing."""
    found = figure.axes[0].get_legend()
    if found is not None:
        found.remove()
    return add_legend(figure)


def style_on_contours(figure: Any) -> Any:
    """Return a picture of paths on contours in the style of a page: contours stay light on a dark page, a dark line has a white edge."""
    from matplotlib.patheffects import withStroke

    for line in figure.axes[0].get_lines():
        if line.get_color() == "k":
            line.set(color=_DARK, path_effects=[withStroke(linewidth=4, foreground="white")])
    figure.set_size_inches(6.2, 5)
    return move_legend_below(figure)


def _set_plain_ticks(axes: Any) -> None:
    """Set plain ticks where a log axis spans less than a power of ten, and would have one label or none."""
    from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

    low, high = axes.get_ylim()
    if low > 0 and high < 10 * low:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
