"""Barriers and clusters of many runs against training time."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from eomdl import _check
from eomdl.geometry.connectivity import clusters


def plot_barriers(steps: ArrayLike, matrices: ArrayLike, labels: ArrayLike) -> Any:
    """Return a picture of the barrier matrix at every checkpoint, runs in the order of their clusters.

    **Arguments:** `steps`, shape (n,); `matrices`, shape (n, S, S), as from `eomdl.geometry.barriers`; `labels`, shape (S,), one
    clustering for all panels (`eomdl.geometry.clusters` of one of the matrices), so that a panel shows what
    became of it.

    **Returns:** a `matplotlib.figure.Figure`; nothing is shown or written.

    **Raises:** `ValueError` if the shapes do not fit.
    """
    from matplotlib.figure import Figure

    steps, matrices, labels = _checked(steps, matrices, labels)
    order = np.argsort(labels, kind="stable")
    edges = np.flatnonzero(np.diff(labels[order])) + 0.5
    figure = Figure(figsize=(2.9 * len(steps) + 0.8, 3.3), layout="constrained")
    panels = figure.subplots(1, len(steps), squeeze=False)[0]
    finite = matrices[np.isfinite(matrices)]
    for axes, step, matrix in zip(panels, steps, matrices, strict=True):
        image = axes.imshow(matrix[order][:, order], vmin=0, vmax=finite.max(initial=1e-300), cmap="viridis")
        for edge in edges:
            axes.axhline(edge, color="w", lw=0.8)
            axes.axvline(edge, color="w", lw=0.8)
        axes.set(title=f"step {step:g}", xlabel="run, by cluster", xticks=[], yticks=[])
    panels[0].set_ylabel("run, by cluster")
    figure.colorbar(image, ax=list(panels), label="loss barrier on the line")
    return figure


def plot_development(
    steps: ArrayLike,
    matrices: ArrayLike,
    losses: ArrayLike,
    labels: ArrayLike,
    threshold: float,
    intervention: float | None = None,
    linkage: str = "complete",
) -> Any:
    """Return barriers, number of clusters and losses against steps, for one clustering of the runs.

    **Arguments:** `steps`, `matrices`, `labels`: as in `eomdl.plotting.plot_barriers`; `losses`, shape (n, S);
    `threshold`, `linkage`: of the clusters that are counted; `intervention`: the step at which it began, a dotted
    line.

    **Returns:** a `matplotlib.figure.Figure`; nothing is shown or written.

    **Raises:** `ValueError` if the shapes do not fit.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    steps, matrices, labels = _checked(steps, matrices, labels)
    losses = np.asarray(_check.numbers("losses", losses, "losses, shape (n, S)", lambda x: True))
    threshold = float(_check.nonnegative_scalar("threshold", threshold))
    if intervention is not None:
        intervention = float(_check.nonnegative_scalar("intervention", intervention))
    if losses.shape != matrices.shape[:2]:
        raise ValueError(f"losses: expected shape {matrices.shape[:2]} as in matrices, got {losses.shape}")
    figure = Figure(figsize=(15, 4), layout="constrained")
    height, count, loss = figure.subplots(1, 3)
    same = labels[:, None] == labels
    above = np.triu(np.ones(same.shape, bool), 1)
    for name, pairs, color in (("within", same & above, "C0"), ("between", ~same & above, "C3")):
        if np.any(pairs):
            low, middle, high = np.nanquantile(matrices[:, pairs], [0.1, 0.5, 0.9], axis=1)
            height.plot(steps, middle, f"{color}o-", ms=3, label=f"{name} clusters, median")
            height.fill_between(steps, low, high, color=color, alpha=0.2, lw=0, label="10 to 90 % of pairs")
    height.axhline(threshold, color="k", ls="--", lw=0.8, label="threshold")
    height.set(ylabel="loss barrier on the line")
    numbers = [len(np.unique(clusters(matrix, threshold, linkage))) for matrix in matrices]
    count.plot(steps, numbers, "ko-", ms=3)
    count.set(ylabel=f"clusters at threshold {threshold:g}", ylim=(0, None))
    for label in np.unique(labels):
        own = losses[:, labels == label]
        loss.plot(steps, own, color=f"C{label}", lw=0.5, alpha=0.6)
        name = f"cluster {label}, {own.shape[1]} run{'s' * (own.shape[1] > 1)}"
        loss.plot(steps, own.mean(axis=1), color=f"C{label}", lw=2, label=name)
    loss.set(ylabel="loss", yscale="log")
    if np.nanmax(losses) < 10 * np.nanmin(losses):
        # Within one power of ten the plain ticks of a log axis would be one or none.
        loss.yaxis.set_minor_formatter(ScalarFormatter())
    for axes in (height, count, loss):
        axes.set_xscale("symlog", linthresh=np.min(steps[steps > 0], initial=steps.max()))
        axes.set(xlabel="step", xlim=(steps.min(), None))
        if intervention is not None:
            axes.axvline(intervention, color="k", ls=":", lw=1, label="trained longer from here")
        axes.grid(alpha=0.3)
    for axes in (height, loss):
        axes.legend(fontsize=8)
    return figure


def _checked(steps: Any, matrices: Any, labels: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    steps = np.asarray(_check.nonnegative_numbers("steps", steps))
    matrices = np.asarray(_check.numbers("matrices", matrices, "barriers, shape (n, S, S)", lambda x: True))
    labels = np.asarray(labels)
    if steps.ndim != 1 or (matrices.ndim == 3 and len(matrices) != len(steps)):
        raise ValueError(f"steps: expected one for each of {len(matrices)} matrices, got shape {steps.shape}")
    if matrices.ndim != 3 or matrices.shape[1] != matrices.shape[2]:
        raise ValueError(f"matrices: expected shape ({len(steps)}, S, S), got {matrices.shape}")
    if labels.shape != matrices.shape[1:2] or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels: expected integers of shape {matrices.shape[1:2]}, got {labels.dtype} of shape {labels.shape}"
        )
    return steps, matrices, labels
