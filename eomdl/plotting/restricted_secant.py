"""RSI, EB and gamma along paths."""

from collections.abc import Mapping
from typing import Any

from eomdl.geometry.restricted_secant import Secants
from eomdl.plotting._lines import as_label, positive_or_nan
from eomdl.plotting._several import register_several


@register_several(Secants)
def plot_secants(runs: Mapping[str, Secants]) -> Any:
    r"""Return $\gamma$, RSI and EB, and the locally best learning rate against steps, runs overlaid."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.4), layout="constrained")
    cosines, bounds, rates = figure.subplots(1, 3)
    for i, (name, run) in enumerate(runs.items()):
        style: dict[str, Any] = {"color": f"C{i}", "ls": "-" if i == 0 else "--"}
        cosines.plot(run.steps, run.gamma, label=as_label(name), **style)
        cosines.plot(run.steps, run.random_size, color=f"C{i}", ls=":", lw=1)
        bounds.plot(run.steps, positive_or_nan(run.eb), label=f"EB, {as_label(name)}", **style)
        bounds.plot(run.steps, positive_or_nan(run.rsi), label=f"RSI, {as_label(name)}", alpha=0.5, **style)
        rates.plot(run.steps, positive_or_nan(run.learning_rate), label=as_label(name), **style)
    cosines.plot([], [], "k:", label="random directions")
    cosines.set(ylabel="gamma = RSI / EB (cosine)")
    bounds.set(ylabel="RSI, EB [1/time]", yscale="log")
    rates.set(ylabel="locally best learning rate RSI / EB^2 [time]", yscale="log")
    for axes in (cosines, bounds, rates):
        axes.set(xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return figure
