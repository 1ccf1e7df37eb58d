"""The shape of paths: curvature, the path on a plane of the loss, dimensions, linear regions."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from eomdl import _check
from eomdl._result import plot
from eomdl.geometry.dimension import IntrinsicDimension
from eomdl.geometry.path import PathComponents, PathShape
from eomdl.geometry.plane import LossPlane
from eomdl.geometry.regions import RegionMap
from eomdl.plotting._lines import as_label, panel, positive_or_nan
from eomdl.plotting._several import register_several


@register_several(PathShape)
def plot_path_shape(shapes: Mapping[str, PathShape]) -> Any:
    """Return curvature and torsion against steps, how far the models' are off, and distance against length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    (bend, twist), (off, length) = figure.subplots(2, 2)
    real = next(iter(shapes.values()))
    for i, (name, shape) in enumerate(shapes.items()):
        style = _style(i) | {"label": as_label(name)}
        bend.plot(shape.steps, positive_or_nan(shape.curvature), **style)
        twist.plot(shape.steps, positive_or_nan(shape.torsion), **style)
        length.plot(shape.length, shape.distance, **style)
        if i == 0:
            continue
        steps, here, there = np.intersect1d(shape.steps, real.steps, return_indices=True)
        for what, line in (("curvature", "--"), ("torsion", ":")):
            expected = positive_or_nan(getattr(real, what)[there])
            relative = np.abs(getattr(shape, what)[here] / expected - 1)
            off.plot(
                steps, positive_or_nan(relative), **style | {"ls": line, "label": f"{what}, {as_label(name)}"}
            )
    longest = max(shape.length[-1] for shape in shapes.values())
    length.plot([0, longest], [0, longest], "0.7", lw=1, zorder=0, label="a straight line")
    bend.set(xlabel="step", ylabel="curvature (1 / parameter distance)", yscale="log")
    twist.set(xlabel="step", ylabel="torsion (1 / parameter distance)", yscale="log")
    off.set(xlabel="step", ylabel=f"relative difference to {as_label(next(iter(shapes)))}", yscale="log")
    length.set(xlabel="length of the path", ylabel="distance from the start")
    for axes in (bend, twist, off, length):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    return figure


@plot.register
def plot_path_plane(plane: LossPlane, paths: Mapping[str, np.ndarray] | None = None) -> Any:
    """Return contours at even distances of the loss's logarithm, with paths on them.

    **Raises:** `ValueError` for paths of wrong shapes.
    """
    from matplotlib.figure import Figure

    paths = {} if paths is None else _check.mapping("paths", paths, object, "coordinates of shape (n, 2)")
    for name, path in paths.items():
        if np.ndim(path) != 2 or np.shape(path)[1] != 2:
            raise ValueError(f"paths[{name!r}]: expected coordinates of shape (n, 2), got {np.shape(path)}")
    figure = Figure(figsize=(6.6, 5), layout="constrained")
    axes = figure.subplots()
    logarithm = np.log10(np.where(plane.loss > 0, plane.loss, np.nan))
    filled = axes.contourf(plane.x, plane.y, logarithm, 30, cmap="Blues_r")
    figure.colorbar(filled, label="log10 of the loss on the plane")
    for i, (name, path) in enumerate(paths.items()):
        axes.plot(path[:, 0], path[:, 1], **_style(i), label=as_label(name))
    _name_components(axes, paths)
    return figure


@plot.register
def plot_path_components(components: PathComponents) -> Any:
    """Return the path on the first two axes; a path of one component against the number of the saved step."""
    figure, axes = panel("", "")
    scores = components.scores
    if scores.shape[1] == 1:
        axes.plot(scores[:, 0], **_style(0))
        axes.set(xlabel="saved step", ylabel="first component (parameter distance)")
        return figure
    axes.plot(scores[:, 0], scores[:, 1], **_style(0), label="path")
    _name_components(axes, {"path": scores})
    return figure


def _name_components(axes: Any, paths: Mapping[str, np.ndarray]) -> None:
    axes.set(xlabel="first component (parameter distance)", ylabel="second component (parameter distance)")
    if paths:
        axes.plot(*next(iter(paths.values()))[0][:2], "ko", ms=6, mfc="w", label="start")
        axes.legend(fontsize=8)


@register_several(IntrinsicDimension)
def plot_dimensions(dimensions: Mapping[Any, Any]) -> Any:
    """Return the dimension layer by layer, a line for each checkpoint, and over training, a line for each layer.

    `dimensions`: `{layer: {step: dimension}}`, or `{layer: dimension}` of one checkpoint.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    dimensions = {
        name: layer if isinstance(layer, Mapping) else {0: layer} for name, layer in dimensions.items()
    }
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    layers, training = figure.subplots(1, 2, sharey=True)
    steps = sorted({step for layer in dimensions.values() for step in layer})
    for i, step in enumerate(steps):
        have = {
            as_label(name) if isinstance(name, str) else name: layer[step]
            for name, layer in dimensions.items()
            if step in layer
        }
        color = colormaps["viridis"](i / max(len(steps) - 1, 1) * 0.9)
        _bars(layers, list(have), list(have.values()), color=color, label=f"step {step}")
    for i, (name, layer) in enumerate(dimensions.items()):
        _bars(training, list(layer), list(layer.values()), color=f"C{i}", label=as_label(name))
    layers.set(ylabel="intrinsic dimension (bars: 2 standard errors)", ylim=(0, None))
    training.set(xlabel="step")
    if len(steps) > 1:
        training.set_xscale("symlog", linthresh=max(1, steps[1]))
        training.set_xlim(left=steps[0] - 0.1 * max(1, steps[1]))
    for axes in (layers, training):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


@register_several(RegionMap)
def plot_regions(maps: Mapping[str, RegionMap]) -> Any:
    """Return one panel for each map: the regions, one colour each, with the three inputs that span the plane."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(maps), 4.6), layout="constrained")
    for axes, (title, regions) in zip(
        figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True
    ):
        # Neighbours have labels close to one another: colours at random keep them apart.
        colors = np.random.default_rng(0).permutation(regions.count)[regions.labels]
        axes.pcolormesh(regions.x, regions.y, colors, cmap="Spectral", shading="nearest", rasterized=True)
        edges = np.zeros(regions.labels.shape, bool)
        edges[:, 1:] |= regions.labels[:, 1:] != regions.labels[:, :-1]
        edges[1:] |= regions.labels[1:] != regions.labels[:-1]
        lines = np.ma.masked_where(~edges, np.zeros(edges.shape))
        axes.pcolormesh(regions.x, regions.y, lines, cmap="gray", shading="nearest", rasterized=True)
        axes.plot(*regions.corners.T, "ko", mfc="w", ms=7)
        axes.set(
            title=f"{as_label(title)}: {regions.count} regions seen",
            xlabel="input distance",
            ylabel="input distance",
        )
        axes.set_aspect("equal")
    return figure


def _style(i: int) -> dict[str, Any]:
    return (
        {"color": "k", "lw": 2.2, "alpha": 0.8} if i == 0 else {"color": f"C{i - 1}", "ls": "--", "lw": 1.4}
    )


def _bars(axes: Any, x: list, dimensions: list[IntrinsicDimension], **style: Any) -> None:
    errors = [2 * d.standard_error for d in dimensions]
    axes.errorbar(x, [d.dimension for d in dimensions], errors, marker="o", ms=4, capsize=3, **style)
