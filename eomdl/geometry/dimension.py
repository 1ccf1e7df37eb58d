"""Intrinsic dimension of clouds of points: of a path, of gradients, of hidden activations."""

import contextlib
import dataclasses
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from typing_extensions import override

from eomdl import _check
from eomdl._result import AbstractResult, Note, Table
from eomdl._types import Args, Loss, Params
from eomdl.geometry.path import as_matrix, path_lengths, path_matrix
from eomdl.runs.trajectory import Trajectory


_MIN_POINTS_PER_BLOCK = 25  # more than the 20 neighbours that scikit-dimension's MLE uses


@dataclasses.dataclass(frozen=True)
class IntrinsicDimension(AbstractResult):
    """An estimate of intrinsic dimension with its error.

    - `dimension`: the estimate from all points.
    - `standard_error`: its statistical part, from disjoint blocks of the points.
    - `coarser`: the mean of the blocks' estimates, which is the estimate at the coarser scale that fewer
        points resolve. Where it differs from `dimension` by more than the errors, the dimension depends on
        the scale (curvature, boundary, noise), and that difference, not `standard_error`, is the error.
    - `num_points`: distinct points used.
    - `estimator`: its name.
    - `notes`: repeated points, warnings of the estimator.

    Its picture shows the dimension with two standard errors; `eomdl.plotting.plot` takes `{layer: {step: dimension}}`: layer by layer,
    a line for each checkpoint, and over training, a line for each layer.
    """

    dimension: float
    standard_error: float
    coarser: float
    num_points: int
    estimator: str
    notes: tuple[Note, ...]

    @override
    def _tables(self) -> tuple[Table, ...]:
        columns = ("estimator", "dimension", "standard error", "coarser", "points")
        row = (self.estimator, self.dimension, self.standard_error, self.coarser, self.num_points)
        return (Table(columns, (row,), title="Intrinsic dimension"),)


def intrinsic_dimension(
    points: Any,
    estimator: Any = None,
    *,
    blocks: int = 5,
    partitions: int = 4,
    seed: int = 0,
) -> IntrinsicDimension:
    r"""Return the intrinsic dimension of a cloud of n points, with its standard error.

    ```python
    activations = jax.jit(hidden_layer)
    by_step = {k: eomdl.geometry.intrinsic_dimension(activations(run.at(k), images)) for k in (0, 100)}
    ```

    **Arguments:**

    - `points`: an array (n, ...) or a pytree of arrays, one point per entry of the leading axis, such as
        hidden activations of n inputs, `path_points(...)`, `gradient_points(...)`.
    - `estimator`: any object whose `fit(X)`, X of shape (n, d), returns one with a `dimension_`, such as those of
        `skdim.id`. The default `skdim.id.TwoNN()` uses the two nearest neighbours of each point, so the finest scale;
        `skdim.id.MLE()` uses the 20 nearest, pooled as in MacKay & Ghahramani 2005.
    - `blocks`, `partitions`: see below. `seed`: of the random partitions.

    The standard error is measured on B = `blocks` disjoint random blocks. Estimates on blocks of n/B points have
    variance $s^2 \approx \sigma^2 B / n$ where the estimate on all points has $\sigma^2 / n$, hence $s / \sqrt{B}$; $s^2$ is
    averaged over `partitions` random partitions. A bootstrap would not do: a sample with replacement repeats points,
    and a repeated point has a neighbour at distance 0.

    Points that agree to $10^{-7}$ of the cloud's spread (or to four units of the last place of their
    dtype) in every coordinate are merged, since smaller distances are rounding. `notes` says how many.
    Neighbour estimators assume that the points are drawn independently. The saved steps of a path
    are not; use `path_points` for a path.

    **Cost:** no gradients; the time of `1 + partitions` fits to n points, of $O(n^2 \min(n, d))$ each for many coordinates.

    **Raises:** `ValueError` for fewer than 25 distinct points per block, a wrong argument, or an estimator that fails;
    `ImportError` without scikit-dimension if no estimator is given.

    Source: Facco et al. 2017 (TwoNN); Levina & Bickel 2004 (MLE); Politis, Romano & Wolf 1999 (subsampling).
    """
    blocks = _check.integer("blocks", blocks, 2)
    partitions = _check.integer("partitions", partitions, 1)
    seed = _check.seed("seed", seed)
    if estimator is None:
        estimator = _default_estimator()
    if not callable(getattr(estimator, "fit", None)):
        raise ValueError(f"estimator: expected an object with a method fit(X), got {_check.show(estimator)}")
    with _limit_threads():
        return _estimate_with_error(points, estimator, blocks, partitions, seed)


def _estimate_with_error(
    points: Any, estimator: Any, blocks: int, partitions: int, seed: int
) -> IntrinsicDimension:
    cloud, notes = _drop_repeated(points)
    needed = blocks * _MIN_POINTS_PER_BLOCK
    if len(cloud) < needed:
        repeated = f" ({'; '.join(notes)})" if notes else ""
        raise ValueError(
            f"points: expected at least {needed} distinct points, {_MIN_POINTS_PER_BLOCK} for each of {blocks} "
            f"blocks, got {len(cloud)}{repeated}"
        )
    rng = np.random.default_rng(seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dimension = _fit(estimator, cloud)
        parts = np.array(
            [
                [_fit(estimator, cloud[part]) for part in np.array_split(rng.permutation(len(cloud)), blocks)]
                for _ in range(partitions)
            ]
        )
    notes += list(dict.fromkeys(str(w.message) for w in caught))
    return IntrinsicDimension(
        dimension=dimension,
        standard_error=float(np.sqrt(np.mean(np.var(parts, axis=1, ddof=1)) / blocks)),
        coarser=float(parts.mean()),
        num_points=len(cloud),
        estimator=type(estimator).__name__,
        notes=tuple(map(Note, notes)),
    )


def participation_ratio(points: Any) -> float:
    r"""Return the effective number of dimensions that the points span, $(\sum_i \lambda_i)^2 / \sum_i \lambda_i^2$.

    $\lambda_i$: eigenvalues of the covariance. It is m for a cloud of equal variance along m directions and no
    variance along the others. It is a linear measure, so that a curved line makes it large. A random walk in very
    many dimensions has $(\pi^2/6)^2 / (\pi^4/90) = 5/2$ for any length.

    **Cost:** no gradients; one product of the (n, d) matrix with itself, $O(n d \min(n, d))$.

    **Raises:** `ValueError` for fewer than 2 points, or where all are one point.
    """
    cloud = as_matrix(points)
    centred = cloud - cloud.mean(axis=0)
    variance = np.sum(centred**2)
    if len(cloud) < 2 or not variance > len(cloud) * np.finfo(float).eps ** 2 * np.sum(cloud**2):
        raise ValueError(f"points: expected at least 2 that differ, got {len(cloud)} of one value")
    # The nonzero eigenvalues of the covariance and of the Gram matrix are the same.
    gram = centred @ centred.T if len(cloud) < cloud.shape[1] else centred.T @ centred
    return float(variance**2 / np.sum(gram**2))


def path_points(trajectory: Trajectory, num_points: int, seed: int = 0) -> Float[np.ndarray, "num_points d"]:
    """Draw points uniformly in length along a path, shape (num_points, d), for an estimator of dimension.

    The saved steps themselves are evenly spaced, so that both neighbours are equally far and TwoNN finds nonsense.
    Between saved steps the path is taken as straight. A smooth path has dimension 1 in any shape. A random
    walk in many dimensions has dimension 2 where points are much further apart than saved steps, so with
    fewer points than a twentieth of them; with more points the estimator sees the straight lines.

    **Cost:** no gradients, two passes over the saved parameters.

    **Raises:** `ValueError` for a path that stands still, or without saved params.
    """
    num_points = _check.integer("num_points", num_points, 1)
    seed = _check.seed("seed", seed)
    path = path_matrix(trajectory)
    length = path_lengths(path)
    if not length[-1] > 0:
        raise ValueError("trajectory: expected a path that moves, got one that stands still")
    drawn = np.sort(np.random.default_rng(seed).uniform(0, length[-1], num_points))
    before = np.searchsorted(length, drawn, side="right") - 1
    fraction = (drawn - length[before]) / (length[before + 1] - length[before])
    return path[before] + fraction[:, None] * (path[before + 1] - path[before])


def gradient_points(loss: Loss, params: Params, args: Args, batch_size: int = 64) -> Float[jax.Array, "n d"]:
    """Return the gradient of the loss for each single example, shape (n, number of parameters).

    Example i is entry i of the leading axis of every leaf of `args`; the loss gets it as a batch of one. Where the
    loss is a mean over examples, its gradient is the mean of these rows.

    **Arguments:** `batch_size`: how many gradients are taken at once.

    **Cost:** n gradients of one example. **Memory:** n times that of the parameters for the result, and
    `batch_size` gradients while it is computed.

    **Raises:** `ValueError` if the leaves of `args` have no common leading axis, or the loss is not a scalar.
    """
    params = _check.params("params", params)
    batch_size = _check.integer("batch_size", batch_size, 1)
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(args)]
    if not shapes or not all(shapes) or len({shape[0] for shape in shapes}) != 1:
        raise ValueError(f"args: expected arrays with the examples as leading axis, got shapes {shapes}")
    _check.loss_is_scalar(loss, params, jax.tree.map(lambda leaf: leaf[:1], args))
    return _gradients(loss, batch_size, params, args)


@eqx.filter_jit
def _gradients(loss: Loss, batch_size: int, params: Params, args: Args) -> jax.Array:
    def gradient_of(example: Args) -> jax.Array:
        gradient = jax.grad(loss)(params, jax.tree.map(lambda leaf: leaf[None], example))
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(gradient)])

    return jax.lax.map(gradient_of, args, batch_size=batch_size)


def _drop_repeated(points: Any) -> tuple[np.ndarray, list[str]]:
    """Return the centred points without repetitions, and notes on what was left out."""
    cloud = as_matrix(points)
    dtypes = [np.asarray(leaf).dtype for leaf in jax.tree.leaves(points)]
    ulp = max((float(jnp.finfo(d).eps) for d in dtypes if jnp.issubdtype(d, jnp.floating)), default=0.0)
    largest = np.abs(cloud).max(initial=0.0)
    cloud = cloud - cloud.mean(axis=0)
    grain = max(1e-7 * np.sqrt(np.mean(np.sum(cloud**2, axis=1))), 4 * ulp * largest, np.finfo(float).tiny)
    _, first = np.unique(np.round(cloud / grain), axis=0, return_index=True)
    repeated = len(cloud) - len(first)
    notes = [f"{repeated} of {len(cloud)} points repeat another and were left out"] if repeated else []
    cloud = cloud[np.sort(first)]
    if len(cloud) < cloud.shape[1]:
        # n points span at most n dimensions: rotated into those, they keep their distances.
        factor: Any = np.linalg.qr(cloud.T, mode="r")
        cloud = factor.T
    return cloud, notes


def _fit(estimator: Any, cloud: np.ndarray) -> float:
    # scikit-dimension needs two columns; a constant column changes no distance.
    padded = np.pad(cloud, ((0, 0), (0, max(0, 2 - cloud.shape[1]))))
    try:
        dimension = float(np.real(estimator.fit(padded).dimension_))
    except Exception as error:
        name = type(estimator).__name__
        raise ValueError(
            f"estimator: expected one that takes {len(cloud)} points, got {name}, which raised {error!s:.200}"
        ) from error
    if not np.isfinite(dimension):
        raise ValueError(
            f"estimator: expected a finite dimension, got {dimension} of {type(estimator).__name__}"
        )
    return dimension


def _limit_threads() -> Any:
    """Return a context of one BLAS thread: in many small fits several threads wait for each other."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return contextlib.nullcontext()
    return threadpool_limits(1)


def _default_estimator() -> Any:
    try:
        # Optional, and it imports scikit-learn: seconds.
        import skdim
    except ImportError as error:
        raise ImportError("scikit-dimension is needed here: pip install eomdl[shape]") from error
    return skdim.id.TwoNN()
