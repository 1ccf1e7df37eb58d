"""How large a learning rate may be, along gradient flow."""

from typing import Any

import numpy as np

from eomdl import _check
from eomdl.errors.rates import LargestRate
from eomdl.plotting._lines import positive


def plot_largest_rate(rate: LargestRate) -> Any:
    """The largest learning rate against time, log scale: for one step from there (a schedule), and for the whole time.

    Solid: the largest rate for which one step stays within the tolerance. Dashed: that for the whole time. Dot: the time at
    which the latter is reached.

    **Returns:** a `matplotlib.figure.Figure`. **Raises:** `ValueError` for anything else.
    """
    from matplotlib.figure import Figure

    _check.kind("rate", rate, LargestRate, "an eomdl.errors.LargestRate")
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    local = positive(np.where(np.isfinite(rate.local), rate.local, np.nan))
    axes.plot(rate.times, local, color="k", label="for one step from there")
    if np.isfinite(rate.value):
        axes.axhline(rate.value, color="C0", ls="--", label="for the whole time")
        axes.plot(rate.limited_at, rate.value, "o", color="C0", label=f"reached here, by {rate.limited_by}")
    axes.set(xlabel="time (learning rate times steps)", ylabel="largest learning rate", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
