"""What does the path look like, in the two directions in which it moves most?"""

from typing import Any

import jax
import numpy as np

from eomdl.geometry.path import PathComponents, distance_travelled, path_length, principal_components
from eomdl.geometry.plane import loss_plane
from eomdl.plotting._study import on_contours, path_picture
from eomdl.plotting.shape import plot_path_plane
from eomdl.reports.finding import Finding, Unanswered, number, percent
from eomdl.reports.study import Study
from eomdl.runs.trajectory import Trajectory


TITLE = "What does the path look like?"
RANDOM = (
    6 / np.pi**2 * (1 + 1 / 4)
)  # share of the first two components of a random walk in very many dimensions

_MEANING = (
    "The path lies in as many dimensions as there are parameters. Drawn is its shadow on the plane of the two directions in which "
    f"it moves most. Mind that a random walk would already have {percent(RANDOM)} of its variation there. A straight way has "
    "a length equal to the distance from start to end."
)


def ask(study: Study) -> Finding:
    """The path and its flows in the first two principal components, with the loss around them."""
    path = study.path
    if len(path.steps) < 3 or study.size < 2:
        raise Unanswered("A picture needs two parameters and two steps or more.")
    components = principal_components(path)
    flows = {name: run for name, run in study.flows.items() if isinstance(run, Trajectory)}
    paths = {"the run": components.scores} | {name: components.project(run) for name, run in flows.items()}
    share = float(components.explained.sum())
    whole = study.dense >= study.reached
    length = float(path_length(study.real if whole else path)[-1])
    distance = float(distance_travelled(path)[-1])
    bent = length / distance if distance > 0 else np.inf
    said = f"{percent(share)} of its variation lies in one plane. The way is {number(length)} long for a distance of {number(distance)}: "
    said += (
        "almost straight."
        if bent < 1.1
        else "bent."
        if bent < 2
        else f"{number(bent)} times as long as straight."
    )
    notes = (
        []
        if whole
        else ["The length is that of the line through the saved steps; the way from step to step is longer."]
    )
    return Finding(
        answer=said,
        meaning=_MEANING,
        numbers={
            "variation along the first component": percent(components.explained[0]),
            "along the second": percent(components.explained[1]),
            "length": number(length),
            "distance from start to end": number(distance),
        },
        pictures={"path": _picture(study, components, paths)},
        data={"explained": components.explained, "scores": components.scores, "length": length},
        notes=tuple(notes),
    )


def _picture(study: Study, components: PathComponents, paths: dict[str, np.ndarray]) -> Any:
    """With contours of the loss where it is known; else the paths only."""
    run = components.scores
    paths = {name: path for name, path in paths.items() if np.all(np.isfinite(path))}
    low, high = run.min(axis=0), run.max(axis=0)
    margin = 0.15 * max(high - low)
    axes = [np.linspace(a - margin, b + margin, study.effort.grid) for a, b in zip(low, high, strict=True)]
    try:
        data = study.whole_data
    except Unanswered:
        return path_picture(paths)
    centre = jax.tree.map(lambda x: np.asarray(x), components.mean)
    plane = loss_plane(
        study.loss, centre, components.direction(0), components.direction(1), axes[0], axes[1], data
    )
    if not np.all(plane.loss > 0):
        return path_picture(paths)
    figure = plot_path_plane(plane, paths)
    figure.axes[0].set(xlim=axes[0][[0, -1]], ylim=axes[1][[0, -1]])
    return on_contours(figure)
