"""Many runs from one start: minibatches by seed, clusters, what becomes of pairs, and one cluster trained longer."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from typing_extensions import override

import eomdl
from paper_repro.runs import Loss


COLUMNS = [
    *("threshold", "stage", "better runs", "worse runs", "loss of the better", "loss of the worse"),
    *("pairs", "connected", "barrier, smallest", "barrier, median"),
]
STAGES = ("when clustered", "matched loss", "longer, other as it was", "both longer", "at the minima")


class Minibatches(eomdl.StepMap):
    """A step on `size` images drawn again at every step, by the run's seed and the step number only.

    Args are (data, seed): nothing is stored, and a run that is resumed draws what it would have drawn.
    """

    step_map: eomdl.StepMap
    size: int

    @override
    def init(self, params: Any) -> Any:
        """The optimizer's."""
        return self.step_map.init(params)

    @override
    def params(self, state: Any) -> Any:
        """The optimizer's."""
        return self.step_map.params(state)

    @override
    def __call__(self, state: Any, args: Any, k: Any) -> Any:
        """The optimizer's step on this step's own images."""
        images, seed = args
        key = jax.random.fold_in(jax.random.key(seed), jnp.asarray(k, jnp.int32))
        index = jax.random.randint(key, (self.size,), 0, len(images[0]))
        return self.step_map(state, jax.tree.map(lambda x: x[index], images), k)


def flat(stacked: Any) -> np.ndarray:
    """Parameters of S runs as S vectors."""
    return np.concatenate([np.reshape(x, (len(x), -1)) for x in jax.tree.leaves(stacked)], axis=1)


def linked(matrix: np.ndarray, threshold: float) -> np.ndarray:
    """Clusters by average linkage: between two of them the mean barrier is above the threshold."""
    return eomdl.geometry.clusters(matrix, threshold, "average")


def same_point(points: np.ndarray) -> np.ndarray:
    """Labels of runs that ended in one point, to a thousandth of the distance from the origin."""
    apart = np.linalg.norm(points[:, None] - points[None], axis=-1)
    return eomdl.geometry.clusters(apart, 1e-3 * np.linalg.norm(points, axis=1).mean())


def fates(pairs: pd.DataFrame, steps: Sequence[int], at: int, thresholds: Sequence[float]) -> pd.DataFrame:
    """What became of every two runs that were separated, or connected, at checkpoints up to `at`.

    The last but one of `steps` is the end of training, the last one the minima.
    """
    index = ["start", "run", "other run", "one minimum", "one loss"]
    wide = pairs.pivot(index=index, columns="step", values="barrier")
    fate = {name: wide.index.get_level_values(name).to_numpy() for name in index[3:]}
    rows = []
    for threshold, step in ((t, s) for t in thresholds for s in steps[1 : at + 1]):
        apart, longer, rest = (wide[s].to_numpy() > threshold for s in (step, steps[-2], steps[-1]))
        fate |= {"connected longer": ~longer, "connected at the minima": ~rest}
        row = {"threshold": threshold, "step": step, "clustered": step == steps[at]}
        for name, some in (("separated", apart), ("connected", ~apart)):
            row[f"{name} pairs"] = some.sum()
            row |= {f"{name}: {k}": np.mean(v[some]) if some.any() else np.nan for k, v in fate.items()}
        rows.append(row)
    return pd.DataFrame(rows)


class Moments(NamedTuple):
    """Of S runs at n checkpoints: parameters, barriers (S, S), losses (n, S); the last is at the minima."""

    params: list[Any]
    matrices: list[np.ndarray]
    losses: np.ndarray
    across: np.ndarray  # (S, S), from the checkpoint `at` to the end of training
    at: int  # where clusters are taken


def intervention(
    m: Moments, threshold: float, loss: Loss, data: Any, points: int
) -> Iterator[dict[str, Any]]:
    """The worse cluster trained longer: one row per stage with the barriers to the better one; none if there is one."""
    labels = linked(m.matrices[m.at], threshold)
    large = [c for c in np.unique(labels) if np.sum(labels == c) >= 2]
    if len(large) < 2:
        return
    order = sorted(large, key=lambda c: m.losses[m.at, labels == c].mean())
    better, worse = (np.flatnonzero(labels == c) for c in (order[0], order[-1]))
    here, end, rest = (m.matrices[i][np.ix_(better, worse)] for i in (m.at, -2, -1))
    matched = _matched(m, better, worse, loss, data, points)
    heights = (here, matched, m.across[np.ix_(better, worse)], end, rest)
    when = ((m.at, m.at), (m.at, None), (m.at, -2), (-2, -2), (-1, -1))
    for stage, height, (i, j) in zip(STAGES, heights, when, strict=True):
        known = height[np.isfinite(height)]
        row = {"threshold": threshold, "stage": stage, "better runs": len(better), "worse runs": len(worse)}
        row["loss of the better"] = m.losses[i, better].mean()
        row["loss of the worse"] = np.nan if j is None else m.losses[j, worse].mean()
        row["pairs"] = known.size
        if known.size:
            row |= {"connected": np.mean(known <= threshold), "barrier, smallest": known.min()}
            row["barrier, median"] = np.median(known)
        yield row


def by_stage(stages: pd.DataFrame, value: str) -> pd.DataFrame:
    """One row per threshold, one column per stage: means over starts, weighted by the pairs; NaN without clusters."""
    known = stages.dropna(subset=[value])
    sums = known.assign(weighted=known[value] * known["pairs"]).groupby(["threshold", "stage"])
    mean = sums["weighted"].sum() / sums["pairs"].sum()
    return mean.unstack("stage").reindex(columns=list(STAGES))


def _matched(
    m: Moments, better: np.ndarray, worse: np.ndarray, loss: Loss, data: Any, points: int
) -> np.ndarray:
    """Barrier from each of the better to each of the worse when that has come down to its loss; NaN if never."""
    height = np.full((len(better), len(worse)), np.nan)
    for (n, b), (k, w) in ((x, y) for x in enumerate(better) for y in enumerate(worse)):
        down = np.flatnonzero(m.losses[m.at : -1, w] <= m.losses[m.at, b])
        if len(down):
            ends = ((m.params[m.at], b), (m.params[m.at + down[0]], w))
            one, other = (jax.tree.map(lambda x, i=i: x[i], params) for params, i in ends)
            height[n, k] = eomdl.geometry.barriers(loss, eomdl.runs.stack([one, other]), data, points)[0, 1]
    return height
