"""How large a learning rate may be, along gradient flow."""

from typing import Any

import numpy as np

from eomdl._result import plot
from eomdl.errors.rates import LargestRate
from eomdl.plotting._lines import as_label, positive_or_nan


@plot.register
def plot_largest_rate(rate: LargestRate) -> Any:
    """Return the largest rate for one step from there, and that for the whole time, against time, log scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    local = positive_or_nan(np.where(np.isfinite(rate.local), rate.local, np.nan))
    axes.plot(rate.times, local, color="k", label="for one step from there")
    if np.isfinite(rate.value):
        axes.axhline(rate.value, color="C0", ls="--", label="for the whole time")
        axes.plot(
            rate.limited_at,
            rate.value,
            "o",
            color="C0",
            label="reached here" + (f", by {as_label(rate.limited_by)}" if rate.limited_by else ""),
        )
    axes.set(xlabel="time (learning rate times steps)", ylabel="largest learning rate", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
