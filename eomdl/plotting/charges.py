"""Charges along a run, and what was predicted for them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from eomdl import _check
from eomdl.plotting._lines import positive
from eomdl.symmetry.charges import Conservation


def plot_conservation(charges: Mapping[str, Conservation]) -> Any:
    """A row for each charge: its change, summed over units, and the errors of its predictions, against steps.

    Solid black: measured. Dashed: laws. Dotted: flows integrated from the start.

    **Returns:** a `matplotlib.figure.Figure`. **Raises:** `ValueError` for anything else.
    """
    from matplotlib.figure import Figure

    _check.mapping("charges", charges, Conservation, "eomdl.symmetry.Conservation")
    figure = Figure(figsize=(11, 3.4 * len(charges)), layout="constrained")
    panels = figure.subplots(len(charges), 2, squeeze=False)
    for (left, right), (name, found) in zip(panels, charges.items(), strict=True):
        left.plot(found.steps, _total(found.charge), "k", lw=2, label="measured")
        for i, (prediction, values) in enumerate(found.predictions.items()):
            style = {"color": f"C{i}", "ls": "--" if prediction in found.laws else ":", "label": prediction}
            left.plot(found.steps, _total(values), **style)
            error = found.errors[prediction]
            right.plot(found.steps, positive(error), **style)
        left.set(xlabel="step", ylabel="charge, sum over units", title=f"{name}: {found.symmetry}")
        left.title.set_fontsize(8)
        right.set(xlabel="step", ylabel="error of the charge (norm over units)", yscale="log")
        for axes in (left, right):
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
    return figure


def _total(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1).sum(axis=1)
