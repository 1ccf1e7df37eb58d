"""The spectral density of a Hessian."""

from typing import Any

import numpy as np

from eomdl import _check
from eomdl.curvature.spectrum import SpectralDensity


POINTS = 600
REACH = 4  # widths beyond the outermost eigenvalues


def plot_spectral_density(density: SpectralDensity, width: float | None = None) -> Any:
    r"""The density of the eigenvalues, log scale, with a band of one standard error.

    Each eigenvalue is a Gaussian of the width w. Dotted: the height of a single one among n, $1/(n w \sqrt{2\pi})$; what lies far below
    is not shown.

    **Arguments:** `width`: in units of the eigenvalues; by default a hundredth of their range.

    **Returns:** a `matplotlib.figure.Figure`. **Raises:** `ValueError` for a wrong argument.
    """
    from matplotlib.figure import Figure

    _check.kind("density", density, SpectralDensity, "an eomdl.curvature.SpectralDensity")
    low, high = float(density.nodes.min()), float(density.nodes.max())
    if width is None:
        scale = max(high - low, 1e-3 * max(abs(low), abs(high)))  # 0 where all eigenvalues are one
        width = scale / 100 if scale > 0 else 1.0
    width = float(_check.positive_scalar("width", width))
    points = np.linspace(low - REACH * width, high + REACH * width, POINTS)
    found, error = density.at(points, width)
    single = 1 / (density.num_params * width * np.sqrt(2 * np.pi))
    floor = single / 30
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    band = np.maximum(found - error, floor / 10), np.maximum(found + error, floor / 10)
    axes.fill_between(points, *band, color="C0", alpha=0.3, lw=0, label="one standard error")
    axes.plot(points, np.maximum(found, floor / 10), "C0", lw=1.5, label="density")
    axes.axhline(single, color="k", ls=":", lw=1, label=f"one of {density.num_params:,} eigenvalues")
    axes.set(xlabel="eigenvalue of the Hessian", ylabel=f"density (width {width:.2g})", yscale="log")
    axes.set_ylim(floor, 3 * found.max())
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
