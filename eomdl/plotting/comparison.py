"""Distances of models to a reference run."""

from typing import Any

import numpy as np

from eomdl._result import plot
from eomdl.errors.comparison import Comparison
from eomdl.plotting._lines import as_label, positive_or_nan


@plot.register
def plot_comparison(comparison: Comparison) -> Any:
    """Return the distance to the reference against steps, log scale, and one panel for each scalar observable.

    **Raises:** `ValueError` for a comparison of nothing that can be drawn.
    """
    from matplotlib.figure import Figure

    scalars = sorted({k for d in comparison.differences.values() for k, v in d.items() if v.ndim == 1})
    panels = [*(["distance"] if comparison.distance else []), *scalars]
    if not panels:
        raise ValueError("comparison: expected saved params or scalar observables to plot, got neither")
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for color, model in enumerate(comparison.models):
            if panel == "distance":
                values = comparison.distance.get(model)
            else:
                values = comparison.differences[model].get(panel)
            if values is None:
                continue
            _log_line(axes, comparison.steps, np.abs(values), color=f"C{color}", label=as_label(model))
            if panel == "distance" and model in comparison.ode_error:
                _log_line(axes, comparison.steps, comparison.ode_error[model], color=f"C{color}", ls=":")
        if panel == "distance":
            axes.plot([], [], "k:", label="ODE error (estimate)")
        axes.set(
            xlabel="step",
            ylabel="distance to the reference"
            if panel == "distance"
            else f"|difference in {as_label(panel)}|",
            yscale="log",
        )
        axes.legend()
        axes.grid(alpha=0.3)
    return figure


def _log_line(axes: Any, x: np.ndarray, y: np.ndarray, **style: Any) -> None:
    axes.plot(x, positive_or_nan(y), **style)
