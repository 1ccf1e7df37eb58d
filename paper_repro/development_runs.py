"""Runs that differ in the order of the batches alone: their checkpoints, barriers, clusters and minima."""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import eomdl
from paper_repro import models


HIDDEN, SCALE, DECAY = 3, 0.3, 0.003
BATCH = 16
THRESHOLD = 0.1
LONGER = 8  # times as many steps in all
POINTS = 15  # on every line


class Minibatches(eomdl.StepMap):
    """A step on `size` images drawn anew at every step, by the run's seed and the step number alone.

    Args are (data, seed): nothing is stored, and a run that is resumed draws what it would have drawn.
    """

    step_map: eomdl.StepMap
    size: int

    def init(self, params):
        return self.step_map.init(params)

    def params(self, state):
        return self.step_map.params(state)

    def __call__(self, state, args, k):
        images, seed = args
        key = jax.random.fold_in(jax.random.key(seed), jnp.asarray(k, jnp.int32))
        index = jax.random.randint(key, (self.size,), 0, len(images[0]))
        return self.step_map(state, jax.tree.map(lambda x: x[index], images), k)


def learning_rate(k):
    """0.5 at first, where the noise of the batches lets runs part; then falling, so that they settle."""
    return 0.5 / (1 + k / 1000)


LOSS = eomdl.WeightDecay(models.mlp_loss, DECAY)
HEAVY_BALL = eomdl.optimizer_step(LOSS, optax.sgd(0.1, momentum=0.98))
SGD = Minibatches(eomdl.optimizer_step(LOSS, optax.sgd(learning_rate)), BATCH)


_losses_and_gradients = jax.jit(jax.vmap(jax.value_and_grad(LOSS), (0, None)))


class Development(NamedTuple):
    """Runs from one start, at n checkpoints; the last is at the minima, the last but one the end of SGD."""

    start: int
    at: int  # the checkpoint whose barriers make the clusters
    steps: np.ndarray  # (n,)
    params: list[Any]  # n pytrees with leading axis S
    matrices: np.ndarray  # (n, S, S), barriers
    losses: np.ndarray  # (n, S)
    labels: np.ndarray  # (S,), clusters
    minima: np.ndarray  # (S,), one label a point
    gradient: float  # the largest norm at the minima
    across: np.ndarray  # (S, S), barriers from the clustered checkpoint to the end of SGD

    def stage(self, i: int) -> str:
        if i == len(self.steps) - 1:
            return "full batch, at rest"
        return "SGD" if i <= self.at else "SGD, longer"


def develop(images, start: int, clustered: int, rest: int, runs: int) -> Development:
    """`runs` orders of batches from one start: SGD to `LONGER` times `clustered` steps, then `rest` without noise."""
    sizes = (images[0].shape[1], HIDDEN, 10)
    params = jax.tree.map(lambda x: SCALE * x, models.mlp_init(jax.random.key(start), sizes))
    stacked = jax.tree.map(lambda x: np.stack([x] * runs), params)
    before = [0, *(clustered // n for n in (8, 4, 2, 1))]
    steps = before + [round(clustered * LONGER ** (n / 6)) for n in range(1, 7)]
    at = len(before) - 1
    args = (images, jnp.arange(start * runs, (start + 1) * runs))
    with tempfile.TemporaryDirectory() as folder:
        store = eomdl.Checkpoints(folder, [k for k in steps if k <= clustered])
        ensemble = eomdl.Ensemble(SGD, (None, 0))
        common = {"args": args, "save_params": False}
        eomdl.iterate(ensemble, stacked, clustered, save_steps=clustered, checkpoints=store, **common)
        # The intervention is a branch from the checkpoint at which the clusters are taken.
        later = eomdl.Checkpoints(Path(folder) / "longer", steps[at + 1 :])
        real = eomdl.iterate(
            ensemble,
            stacked,
            steps[-1],
            save_steps=steps[-1],
            checkpoints=later,
            resume=store.latest,
            **common,
        )
        rows = [c.final_params for c in (*store, *later)]
    settled = eomdl.iterate(
        eomdl.Ensemble(HEAVY_BALL), real.final_params, rest, args=images, save_steps=[rest]
    )
    rows.append(settled.final_params)
    losses, gradients = zip(*[_losses_and_gradients(r, images) for r in rows], strict=True)
    matrices = np.stack([np.asarray(eomdl.geometry.barriers(LOSS, r, images, POINTS)) for r in rows])
    both = jax.tree.map(lambda a, b: np.concatenate([a, b]), rows[at], rows[-2])
    return Development(
        start=start,
        at=at,
        steps=np.array([*steps, steps[-1] + rest]),
        params=rows,
        matrices=matrices,
        losses=np.stack(losses),
        labels=labels_of(matrices[at], THRESHOLD),
        minima=_same_point(_flat(rows[-1])),
        gradient=float(np.linalg.norm(_flat(gradients[-1]), axis=1).max()),
        across=np.asarray(eomdl.geometry.barriers(LOSS, both, images, POINTS))[:runs, runs:],
    )


def row(params, i: int):
    return jax.tree.map(lambda x: x[i], params)


def _flat(stacked) -> np.ndarray:
    return np.concatenate([np.reshape(x, (len(x), -1)) for x in jax.tree.leaves(stacked)], axis=1)


def labels_of(matrix: np.ndarray, threshold: float) -> np.ndarray:
    """Clusters by average linkage: between two of them the mean barrier is above the threshold."""
    return eomdl.geometry.clusters(matrix, threshold, "average")


def _same_point(points: np.ndarray) -> np.ndarray:
    """Labels of runs that ended in one point, to a thousandth of the distance from the origin."""
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    return eomdl.geometry.clusters(distance, 1e-3 * np.linalg.norm(points, axis=1).mean())


def better_and_worse(d: Development, threshold: float) -> tuple[np.ndarray, np.ndarray] | None:
    """Members of the clusters of at least 2 runs with the lowest and the highest loss; None if there is one."""
    labels, losses = labels_of(d.matrices[d.at], threshold), d.losses[d.at]
    large = [c for c in np.unique(labels) if np.sum(labels == c) >= 2]
    if len(large) < 2:
        return None
    order = sorted(large, key=lambda c: losses[labels == c].mean())
    return np.flatnonzero(labels == order[0]), np.flatnonzero(labels == order[-1])


def matched_barriers(d: Development, better: np.ndarray, worse: np.ndarray, images) -> np.ndarray:
    """Barrier from each of the better to each of the worse when that has come down to its loss; NaN if never."""
    height = np.full((len(better), len(worse)), np.nan)
    for n, b in enumerate(better):
        for m, w in enumerate(worse):
            down = np.flatnonzero(d.losses[d.at : -1, w] <= d.losses[d.at, b])
            if len(down):
                ends = (row(d.params[d.at], b), row(d.params[d.at + down[0]], w))
                height[n, m] = eomdl.geometry.barrier(LOSS, *ends, images, POINTS)
    return height
