"""The observables of runs."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from eomdl.plotting._lines import as_label
from eomdl.plotting._several import register_several
from eomdl.runs.trajectory import Trajectory


@register_several(Trajectory)
def plot_trajectories(runs: Mapping[str, Trajectory]) -> Any:
    """Return the scalar observables against steps: one panel for each, one line for each run, on a log scale where all are positive.

    **Raises:** `ValueError` for runs without scalar observables.
    """
    from matplotlib.figure import Figure

    drawn: dict[str, dict[str, np.ndarray]] = {}
    for name, run in runs.items():
        for observable, values in run.observables.items():
            if np.ndim(run.steps) == 1 and np.ndim(values) == 1:
                drawn.setdefault(observable, {})[name] = np.asarray(values)
    if not drawn:
        raise ValueError("result: expected a run with scalar observables to plot, got none")
    figure = Figure(figsize=(5.0 * len(drawn), 4.0), layout="constrained")
    panels = figure.subplots(1, len(drawn), squeeze=False)[0]
    for axes, (observable, lines) in zip(panels, drawn.items(), strict=True):
        for name, values in lines.items():
            axes.plot(runs[name].steps, values, label=as_label(name))
        is_positive = all(np.all(values > 0) for values in lines.values())
        axes.set(xlabel="step", ylabel=as_label(observable), yscale="log" if is_positive else "linear")
        axes.grid(alpha=0.3)
        if len(runs) > 1:
            axes.legend(fontsize=8)
    return figure
