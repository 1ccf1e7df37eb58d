"""Charges along a run, and what was predicted for them."""

from collections.abc import Mapping
from typing import Any

from eomdl.plotting._lines import as_label, positive_or_nan
from eomdl.plotting._several import register_several
from eomdl.symmetry.charges import Conservation, total_over_units


@register_several(Conservation)
def plot_conservation(charges: Mapping[str, Conservation]) -> Any:
    """Return one row for each charge: its change, summed over units, and the errors of its predictions, against steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4 * len(charges)), layout="constrained")
    panels = figure.subplots(len(charges), 2, squeeze=False)
    for (left, right), (name, found) in zip(panels, charges.items(), strict=True):
        left.plot(found.steps, total_over_units(found.charge), "k", lw=2, label="measured")
        for i, (prediction, values) in enumerate(found.predictions.items()):
            style = {
                "color": f"C{i}",
                "ls": "--" if prediction in found.laws else ":",
                "label": as_label(prediction),
            }
            left.plot(found.steps, total_over_units(values), **style)
            error = found.errors[prediction]
            right.plot(found.steps, positive_or_nan(error), **style)
        left.set(xlabel="step", ylabel="charge, sum over units", title=as_label(f"{name}: {found.symmetry}"))
        left.title.set_fontsize(8)
        right.set(xlabel="step", ylabel="error of the charge (norm over units)", yscale="log")
        for axes in (left, right):
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
    return figure
