"""The predicted error of a flow, and what was measured of it."""

from typing import Any

import numpy as np

from eomdl import _check
from eomdl._result import plot
from eomdl._types import Numbers
from eomdl.errors.predicted import PredictedError
from eomdl.plotting._lines import as_label, positive_or_nan


@plot.register
def plot_predicted_error(predicted: PredictedError, measured: Numbers | None = None) -> Any:
    """Return the predicted error against steps, log scale: whole, by one term more, of each block, and `measured`.

    **Raises:** `ValueError` for another number of measured errors than of steps.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    lines: list[tuple[np.ndarray, dict[str, Any]]] = [
        (predicted.norm, {"color": "k", "lw": 2, "label": "predicted"})
    ]
    if predicted.embedded is not None:
        lines.append((predicted.embedded, {"color": "k", "ls": "--", "label": "by one term more"}))
    blocks = enumerate(predicted.block_norm.items())
    lines += [(norm, {"color": f"C{i}", "lw": 1, "label": as_label(name)}) for i, (name, norm) in blocks]
    if measured is not None:
        errors = np.asarray(_check.nonnegative_numbers("measured", measured))
        if errors.shape != predicted.norm.shape:
            raise ValueError(f"measured: expected shape {predicted.norm.shape}, got {errors.shape}")
        lines.append(
            (errors, {"color": "k", "ls": "", "marker": "o", "ms": 3, "mfc": "none", "label": "measured"})
        )
    for values, style in lines:
        axes.plot(predicted.steps, positive_or_nan(values), **style)
    axes.set(xlabel="step", ylabel="error of the flow (Euclidean norm)", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
