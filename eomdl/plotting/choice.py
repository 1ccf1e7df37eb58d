"""Flows by their cost and their error."""

from typing import Any

import numpy as np

from eomdl._result import plot
from eomdl.choice.choice import Choice


@plot.register
def plot_choice(choice: Choice) -> Any:
    """Return the flows by predicted cost and own error, log scales."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    kinds: dict[str, list[Any]] = {}
    for c in choice.by_flow():
        kinds.setdefault(c.kind, []).append(c)
    for i, (kind, some) in enumerate(sorted(kinds.items())):
        axes.plot(
            [c.predicted_cost for c in some],
            [c.model_error for c in some],
            ls="",
            marker="o",
            ms=4,
            color=f"C{i}",
            label=kind,
        )
    axes.axhline(choice.tolerance, color="k", ls="--", lw=1, label="tolerance")
    ring: dict[str, Any] = {"ls": "", "marker": "o", "ms": 11, "mfc": "none", "color": "k"}
    axes.plot(choice.predicted_cost, choice.chosen.model_error, label="chosen", **ring)
    ran = np.array([(c.measured_cost, c.measured_error) for c in choice.candidates])
    if np.isfinite(ran).any():
        axes.plot(*ran.T, ls="", marker="x", color="k", label="measured")
    axes.set(
        xlabel="gradients a step of the optimizer",
        ylabel="largest error of the flow",
        xscale="log",
        yscale="log",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
