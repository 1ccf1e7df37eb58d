"""The order of a flow in the learning rate."""

from typing import Any

import numpy as np

from eomdl._result import plot
from eomdl.errors.convergence import Convergence
from eomdl.plotting._lines import panel, positive_or_nan


@plot.register
def plot_convergence(found: Convergence) -> Any:
    """Return the errors against the learning rates, log scales, with the line of the observed order and the ODE solver's part."""
    figure, axes = panel("learning rate", "error of the flow", xscale="log", yscale="log")
    axes.plot(found.learning_rates, positive_or_nan(found.errors), "ko", label="error")
    axes.plot(
        found.learning_rates,
        positive_or_nan(found.ode_errors),
        "k.:",
        lw=1,
        label="of it, ODE solver (at most)",
    )
    if found.verdict:
        slope, height = np.polyfit(np.log(found.learning_rates), np.log(found.errors), 1)
        line = np.exp(height + slope * np.log(found.learning_rates))
        axes.plot(found.learning_rates, line, "C0--", label=f"order {found.order:.2f}")
    axes.legend(fontsize=8)
    return figure
