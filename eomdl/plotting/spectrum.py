"""The spectral density of a Hessian."""

from typing import Any

import numpy as np

from eomdl import _check
from eomdl._result import plot
from eomdl.curvature.parts import OverBatches
from eomdl.curvature.spectrum import SpectralDensity
from eomdl.plotting._lines import panel


POINTS = 600
REACH = 4  # widths beyond the outermost eigenvalues


@plot.register
def plot_spectral_density(density: SpectralDensity, width: float | None = None) -> Any:
    """Return the density of the eigenvalues, log scale, with a band of 95 % intervals and the height of a single one."""
    from matplotlib.figure import Figure

    low, high = float(density.nodes.min()), float(density.nodes.max())
    if width is None:
        scale = max(high - low, 1e-3 * max(abs(low), abs(high)))  # 0 where all eigenvalues are one
        width = scale / 100 if scale > 0 else 1.0
    width = float(_check.positive_scalar("width", width))
    points = np.linspace(low - REACH * width, high + REACH * width, POINTS)
    found, (lower, upper) = density.at(points, width)[0], density.interval(points, width)
    single = 1 / (density.num_params * width * np.sqrt(2 * np.pi))
    floor = single / 30
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    top = 3 * found.max()
    band = np.clip(lower, floor / 10, 10 * top), np.clip(upper, floor / 10, 10 * top)
    axes.fill_between(points, *band, color="C0", alpha=0.3, lw=0, label="95 % interval")
    axes.plot(points, np.maximum(found, floor / 10), "C0", lw=1.5, label="density")
    axes.axhline(single, color="k", ls=":", lw=1, label=f"one of {density.num_params:,} eigenvalues")
    axes.set(xlabel="eigenvalue of the Hessian", ylabel=f"density (width {width:.2g})", yscale="log")
    axes.set_ylim(floor, top)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


@plot.register
def plot_eigenvalues_over_batches(found: OverBatches) -> Any:
    """Return the eigenvalues of every batch, with their means as lines; hollow, those that did not converge."""
    figure, axes = panel("batch", "eigenvalue of the Hessian")
    for i, (values, converged) in enumerate(zip(found.values.T, found.converged.T, strict=True)):
        batches = np.arange(len(values))
        axes.plot(
            batches[converged], values[converged], "o", color=f"C{i}", ms=4, label=f"eigenvalue {i + 1}"
        )
        axes.plot(batches[~converged], values[~converged], "o", color=f"C{i}", ms=4, mfc="none")
        axes.axhline(found.mean[i], color=f"C{i}", ls="--", lw=1)
    axes.legend(fontsize=8)
    return figure
