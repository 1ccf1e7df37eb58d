"""What does the path look like, in the two directions in which it moves most?"""

from typing import Any

import jax
import numpy as np

from eomdl.geometry.path import PathComponents, path_lengths, path_matrix, principal_components
from eomdl.geometry.plane import loss_plane
from eomdl.plotting._study import path_picture, style_on_contours
from eomdl.reports.finding import Finding, NoAnswer, number, percent
from eomdl.reports.study import Study
from eomdl.runs.trajectory import Trajectory


TITLE = "What does the path look like?"
# Fraction of the variance along the first two components of a random walk in very many dimensions.
RANDOM = 6 / np.pi**2 * (1 + 1 / 4)

_MEANING = (
    "The path lies in as many dimensions as there are parameters. Drawn is its shadow on the plane of the two directions in which "
    f"it moves most. A random walk would already have {percent(RANDOM)} of its variation there. A straight path has "
    "a length equal to the distance from start to end."
)


def ask(study: Study) -> Finding:
    """Draw the path and its flows in the first two principal components, with the loss around them."""
    path = study.path
    if len(path.steps) < 3 or study.size < 2:
        raise NoAnswer("A picture needs two parameters and two steps or more.")
    components = principal_components(path)
    flows = {name: run for name, run in study.flows.items() if isinstance(run, Trajectory)}
    paths = {"the run": components.scores} | {name: components.project(run) for name, run in flows.items()}
    fraction = float(components.explained.sum())
    whole = study.dense >= study.reached
    length = float(path_lengths(path_matrix(study.real if whole else path))[-1])
    saved = path_matrix(path)
    distance = float(np.linalg.norm(saved[-1] - saved[0]))
    ratio = length / distance if distance > 0 else np.inf
    bent = f"{number(ratio)} times as long as straight"
    shape = "almost straight" if ratio < 1.1 else "bent" if ratio < 2 else bent
    answer = (
        f"{percent(fraction)} of its variation lies in one plane. The path is {number(length)} long for a distance of "
        f"{number(distance)}: {shape}."
    )
    notes = (
        []
        if whole
        else ["The length is that of the line through the saved steps; the path from step to step is longer."]
    )
    return Finding(
        answer=answer,
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
    """Draw the paths with contours of the loss where it is known, else the paths only."""
    run = components.scores
    paths = {name: path for name, path in paths.items() if np.all(np.isfinite(path))}
    low, high = run.min(axis=0), run.max(axis=0)
    margin = 0.15 * max(high - low)
    axes = [
        np.linspace(a - margin, b + margin, study.resolution.grid) for a, b in zip(low, high, strict=True)
    ]
    try:
        data = study.whole_data
    except NoAnswer:
        return path_picture(paths)
    centre = jax.tree.map(lambda x: np.asarray(x), components.mean)
    plane = loss_plane(
        study.loss, centre, components.direction(0), components.direction(1), axes[0], axes[1], data
    )
    if not np.all(plane.loss > 0):
        return path_picture(paths)
    figure = plane.plot(paths=paths)
    figure.axes[0].set(xlim=axes[0][[0, -1]], ylim=axes[1][[0, -1]])
    return style_on_contours(figure)
