"""Telemetry of a run at the edge of stability."""

import textwrap
from typing import Any

import numpy as np

from eomdl._result import plot
from eomdl.plotting._lines import as_label, positive_or_nan
from eomdl.telemetry.edge_report import EdgeReport


BLOCKS = 6  # that have a colour of their own


@plot.register
def plot_edge(report: EdgeReport) -> Any:
    """Return the largest eigenvalue against the threshold, by block, above the critical multiple of the steps."""
    from matplotlib.figure import Figure

    drawers = [_edge_panel] * bool(len(report.edge_steps)) + [_along_panel] * bool(len(report.steps))
    figure = Figure(figsize=(7, 1.2 + 2.6 * max(len(drawers), 1)), layout="constrained")
    panels = figure.subplots(max(len(drawers), 1), sharex=True, squeeze=False)[:, 0]
    for draw, axes in zip(drawers, panels, strict=False):
        draw(report, axes)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    panels[-1].set_xlabel("step")
    figure.suptitle(as_label(textwrap.fill(report.verdict, 80)), fontsize=9)
    return figure


def _edge_panel(report: EdgeReport, axes: Any) -> None:
    steps, top = report.edge_steps, report.values[:, 0]
    parts = {name: top * fraction for name, fraction in report.fractions.items()}
    order = sorted(parts, key=lambda name: -float(np.nansum(np.abs(parts[name]))))
    drawn = {name: parts[name] for name in order[:BLOCKS]}
    if len(order) > BLOCKS:
        drawn["others"] = np.sum([parts[name] for name in order[BLOCKS:]], axis=0)
    labels = [as_label(name or "params") for name in drawn]
    axes.stackplot(steps, *drawn.values(), labels=labels, alpha=0.45)
    axes.plot(steps, top, "k.-", lw=1.5, label="largest eigenvalue")
    loose = ~report.converged[:, 0]
    if loose.any():
        axes.plot(steps[loose], top[loose], "o", color="k", mfc="white", label="not converged")
    known = np.isfinite(report.thresholds)
    if known.any():
        axes.plot(steps, report.thresholds, "C3--", label="threshold")
    axes.set_ylabel("$\\eta\\lambda$" if known.any() else "$\\lambda$ of the Hessian")


def _along_panel(report: EdgeReport, axes: Any) -> None:
    values = np.where(np.isfinite(report.multiples), report.multiples, np.nan)
    axes.plot(report.steps, positive_or_nan(values), "C0.-", lw=1, label="critical multiple")
    axes.axhline(1, color="k", ls=":", lw=1, label="the step taken")
    axes.set(ylabel="multiple of the step", yscale="log")
