"""The shape of a path through weight space: length, curvature, torsion, principal components."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from eomdl import _check, _tree
from eomdl._types import Args, Observable, Params
from eomdl.flows.base import AbstractFlow
from eomdl.observe.base import AbstractObservable
from eomdl.runs.trajectory import Trajectory


_STENCIL = 5  # rows that a derivative looks at: fourth order for x' and x'', second for x'''


def rows(tree: Any, name: str = "points") -> Float[np.ndarray, "n d"]:
    """The leaves side by side, one row an entry of the leading axis: shape (n, d), float64.

    **Raises:** `ValueError` if the leaves have no common leading axis, or are not finite.
    """
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    shapes = [leaf.shape for leaf in leaves]
    if not leaves or len({shape[:1] for shape in shapes}) != 1 or not shapes[0]:
        raise ValueError(f"{name}: expected arrays with one leading axis in common, got shapes {shapes}")
    if any(leaf.dtype.kind not in "fiuV" for leaf in leaves):
        raise ValueError(
            f"{name}: expected real numbers, got dtypes {sorted({str(x.dtype) for x in leaves})}"
        )
    flat = np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1, dtype=float)
    finite = np.isfinite(flat).all(axis=1)
    if not finite.all():
        raise ValueError(f"{name}: expected finite values, got infinity or NaN in row {np.argmin(finite)}")
    return flat


def path_length(trajectory: Trajectory) -> Float[np.ndarray, " n"]:
    r"""Length of the path up to each saved step, $\sum_{j<k} |\theta_{j+1} - \theta_j|$, shape (n,).

    Of the polygon through the saved rows: with rows left out it can only be shorter.
    **Cost:** no gradients, one pass over the rows. **Raises:** `ValueError` without saved params.
    """
    chords = np.linalg.norm(np.diff(_path(trajectory), axis=0), axis=1)
    return np.concatenate([[0.0], np.cumsum(chords)])


def distance_travelled(trajectory: Trajectory) -> Float[np.ndarray, " n"]:
    r"""Distance from the start, $|\theta_k - \theta_0|$, shape (n,).

    **Cost:** no gradients, one pass over the rows. **Raises:** `ValueError` without saved params.
    """
    path = _path(trajectory)
    return np.linalg.norm(path - path[0], axis=1)


def straightness(trajectory: Trajectory) -> Float[np.ndarray, " n"]:
    """Distance over length, in [0, 1]: 1 on a straight line, shape (n,), NaN until the path moves.

    **Cost:** no gradients, one pass over the rows. **Raises:** `ValueError` without saved params.
    """
    length = path_length(trajectory)
    return distance_travelled(trajectory) / np.where(length > 0, length, np.nan)


def path_curvature(trajectory: Trajectory) -> Float[np.ndarray, " n"]:
    r"""Curvature $\kappa_1 = \sqrt{G_2} / G_1^{3/2}$ at each saved step, shape (n,), 1 / parameter distance.

    $G_j$ is the Gram determinant of the first j derivatives. Those are derivatives with respect to the step,
    from five rows at a time, which need not be evenly spaced (on a smooth path the error is of order 4 in an
    even spacing, 3 in an uneven one); $\kappa_1$ does not depend on the parameter. The determinants are never formed: with
    $(x', x'', x''') = QR$, $\kappa_1 = r_2 / r_1^2$, which keeps the digits that a Gram matrix would square away.

    NaN at the first two and last two rows, and where the path stands still: where the rounding of the rows
    ($\epsilon |\theta|$ each) makes the angle turned from one row to the next uncertain by more than 0.1. 0 where
    $r_2$ is below that rounding. A path that alternates (past the edge of stability) has no curvature
    in this sense; look at `trajectory.smoothed()`.

    **Cost:** no gradients; about 30 passes over the rows and three copies of them. **Raises:** `ValueError` for fewer
    than 5 rows, or without saved params.

    Source: Jordan 1874; Gluck 1966 (higher curvatures of curves in Euclidean space, by Gram determinants).
    """
    return _frenet(trajectory)[0]


def path_torsion(trajectory: Trajectory) -> Float[np.ndarray, " n"]:
    r"""Torsion $\kappa_2 = \sqrt{G_3} / G_2 = r_3 / (r_1 r_2) \ge 0$, shape (n,), 1 / parameter distance.

    How fast the path leaves the plane in which it bends: `path_curvature` one derivative further, on the same
    rows, by order 2 in the spacing. In three dimensions the absolute value of the usual torsion.

    A third difference also enlarges the ODE solver's error, which differs from row to row: integrate flows with
    `rtol` of 1e-9 or less before you look at their torsion, or take `flow_torsion`.

    NaN where the curvature is NaN or 0, for then there is no such plane. A ratio of small numbers: rounding
    moves it by $e = \delta_3 / (r_1 r_2)$, with $\delta_3$ the rounding of $r_3$ (of the third difference, and of the plane
    that it leaves). NaN too where $e > \frac{1}{10} \sqrt{\kappa_1^2 + \kappa_2^2}$: that root is the rate at which the principal normal
    turns, the scale of which torsion is a part. Rounding by itself makes $\kappa_2 \approx e$, which that
    refuses unless the curvature is so much larger that the path is plane for all purposes.

    **Cost** and **Raises:** as `path_curvature`.
    """
    return _frenet(trajectory)[1]


@dataclasses.dataclass(frozen=True)
class PathShape:
    """Shape of a path at its n saved steps; every array of shape (n,).

    `length`, `distance`, `curvature`, `torsion` as `eomdl.geometry.path_length`, `eomdl.geometry.distance_travelled`,
    `eomdl.geometry.path_curvature` and `eomdl.geometry.path_torsion` give them.
    """

    steps: Int[np.ndarray, " n"]
    length: Float[np.ndarray, " n"]
    distance: Float[np.ndarray, " n"]
    curvature: Float[np.ndarray, " n"]
    torsion: Float[np.ndarray, " n"]


def path_shape(trajectory: Trajectory) -> PathShape:
    """Length, distance, curvature and torsion of one path together.

    **Cost** and **Raises:** as `path_curvature`.
    """
    curvature, torsion = _frenet(trajectory)
    return PathShape(
        np.asarray(trajectory.steps),
        path_length(trajectory),
        distance_travelled(trajectory),
        curvature,
        torsion,
    )


class _FlowCurvature(AbstractObservable):
    flow: AbstractFlow

    def __call__(self, params: Params, args: Args) -> Float[jax.Array, ""]:
        r1, r2 = _flow_frame(self.flow, params, args, 2)
        return r2 / r1**2


class _FlowTorsion(AbstractObservable):
    flow: AbstractFlow

    def __call__(self, params: Params, args: Args) -> Float[jax.Array, ""]:
        r1, r2, r3 = _flow_frame(self.flow, params, args, 3)
        return r3 / (r1 * r2)


def flow_curvature(flow: AbstractFlow) -> Observable:
    r"""Observable $\kappa_1$ of the flow's path through the given point, in 1 / parameter distance.

    Exact, without integrating and without differences: $x' = F$, $x'' = F'F$. What `path_curvature` finds along
    `solve(flow, ...)`, and what a flow predicts for the real run. NaN where $F = 0$.

    For flows whose state is only the parameters and that do not depend on time.

    **Cost:** one Jacobian-vector product of the flow: 2.7 gradients for gradient flow.

    **Raises:** `ValueError` if `flow` is no flow, or carries more than the parameters.
    """
    return _FlowCurvature(_check.kind("flow", flow, AbstractFlow, "an eomdl.AbstractFlow"))


def flow_torsion(flow: AbstractFlow) -> Observable:
    r"""Observable $\kappa_2$ of the flow's path through the given point, in 1 / parameter distance.

    As `flow_curvature`, with $x''' = (F'F)'F$. NaN where $F = 0$ or the path does not bend; where it hardly bends,
    rounding, as in any ratio of small numbers.

    **Cost:** a Jacobian-vector product of a Jacobian-vector product of the flow: about 6 gradients for gradient flow.

    **Raises:** as `flow_curvature`.
    """
    return _FlowTorsion(_check.kind("flow", flow, AbstractFlow, "an eomdl.AbstractFlow"))


@dataclasses.dataclass(frozen=True)
class PathComponents:
    """Principal components of a path.

    - `explained`: share of the variance along each component, shape (k,), falling.
    - `scores`: the path in these axes, shape (n, k), parameter distance.
    - `directions`: orthonormal directions, a pytree like `params` with leading axis k.
    - `mean`: where the axes cross, a pytree like `params`.
    """

    explained: Float[np.ndarray, " k"]
    scores: Float[np.ndarray, "n k"]
    directions: Params
    mean: Params

    def direction(self, i: int) -> Params:
        """Direction i as a pytree like `params`."""
        return jax.tree.map(lambda leaf: leaf[i], self.directions)

    def project(self, trajectory: Trajectory) -> Float[np.ndarray, "m k"]:
        """Another run in the same axes, shape (m, k). `ValueError` if its parameters are others."""
        path = _path(trajectory)
        mean = rows(jax.tree.map(lambda leaf: leaf[None], self.mean))[0]
        if path.shape[1] != len(mean):
            raise ValueError(f"trajectory: expected {len(mean)} parameters, got {path.shape[1]}")
        return (path - mean) @ rows(self.directions).T


def principal_components(trajectory: Trajectory, k: int = 2) -> PathComponents:
    r"""The k directions in which the path varies most: singular vectors of $\theta_j - \bar\theta$.

    Each direction is signed so that its score of largest absolute value is positive. Mind the baseline: of a
    random walk in very many dimensions the components explain $6 / (\pi k)^2$, that is 61 %, 15 %, 7 % ..., and its scores
    are cosines (Antognini & Sohl-Dickstein 2018). A path on two axes tells little by itself.

    **Cost:** no gradients; one singular value decomposition, $O(n^2 d)$ for n rows of d > n parameters.

    **Raises:** `ValueError` if k is not from 1 to the smaller of n - 1 and d, or the path stands still.
    """
    k = _check.integer("k", k, 1)
    path = _path(trajectory)
    largest = min(len(path) - 1, path.shape[1])
    if k > largest:
        raise ValueError(f"k: expected at most {largest} for {path.shape} rows and parameters, got {k}")
    mean = path.mean(axis=0)
    left, sizes, right = np.linalg.svd(path - mean, full_matrices=False)
    if sizes[0] <= len(path) * np.finfo(float).eps * np.linalg.norm(path):
        raise ValueError("trajectory: expected a path that moves, got one that stands still")
    scores = left[:, :k] * sizes[:k]
    largest_rows = np.argmax(np.abs(scores), axis=0)
    signs = np.sign(scores[largest_rows, np.arange(k)])
    # A component of no variance has scores of 0, and either sign.
    signs = np.where(signs == 0, 1.0, signs)
    return PathComponents(
        explained=sizes[:k] ** 2 / np.sum(sizes**2),
        scores=scores * signs,
        directions=_unflatten(right[:k] * signs[:, None], trajectory.params),
        mean=jax.tree.map(lambda leaf: leaf[0], _unflatten(mean[None], trajectory.params)),
    )


def _unflatten(flat: np.ndarray, like: Params) -> Params:
    """Rows of parameters as a pytree with a leading axis, in the leaves' dtypes."""
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([math.prod(leaf.shape[1:]) for leaf in leaves])
    parts = np.split(flat, ends[:-1], axis=1)
    return structure.unflatten(
        [
            part.reshape(-1, *leaf.shape[1:]).astype(leaf.dtype)
            for part, leaf in zip(parts, leaves, strict=True)
        ]
    )


def _path(trajectory: Trajectory) -> Float[np.ndarray, "n d"]:
    _check.kind("trajectory", trajectory, Trajectory, "an eomdl.Trajectory")
    if trajectory.params is None:
        raise ValueError("trajectory: expected saved params, got a run with save_params=False")
    if np.ndim(trajectory.steps) != 1:
        raise ValueError(f"trajectory: expected one run, got a batch with steps {np.shape(trajectory.steps)}")
    return rows(trajectory.params, "trajectory")


def _frenet(trajectory: Trajectory) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Curvature and torsion."""
    path = _path(trajectory)
    if len(path) < _STENCIL:
        raise ValueError(f"trajectory: expected at least {_STENCIL} saved steps, got {len(path)}")
    weights = _difference_weights(np.asarray(trajectory.steps, float))
    windows = weights.shape[1]
    # At least three columns, so that R has three rows: what is missing is 0.
    path = np.pad(path, ((0, 0), (0, max(0, 3 - path.shape[1]))))
    derivatives = np.zeros((windows, path.shape[1], 3))
    for i in range(_STENCIL):
        derivatives += path[i : i + windows, :, None] * weights[:, :, i].T[:, None, :]
    r = np.abs(np.linalg.qr(derivatives, mode="r"))
    r1, r2, r3 = np.diagonal(r, axis1=1, axis2=2).T
    # The rounding of the saved rows, each in its own dtype; that of this arithmetic is no larger.
    sizes = np.lib.stride_tricks.sliding_window_view(np.linalg.norm(path, axis=1), _STENCIL)
    rounding = float(np.finfo(_tree.dtype(trajectory.params)).eps)
    d1, d2, d3 = rounding * np.einsum("jwi,wi->jw", np.abs(weights), sizes)
    with np.errstate(divide="ignore", invalid="ignore"):
        d2 += d1 * r[:, 0, 1] / r1
        d3 += d1 * r[:, 0, 2] / r1 + d2 * r[:, 1, 2] / r2
        # Derivatives are with respect to rows, so r2 / r1 is an angle a row.
        moves = d2 / r1 <= 0.1
        curvature = np.where(moves, np.where(r2 > d2, r2, 0.0) / r1**2, np.nan)
        torsion = r3 / (r1 * r2)
        known = (curvature > 0) & (d3 / (r1 * r2) <= 0.1 * np.hypot(curvature, torsion))
    edge = np.full(_STENCIL // 2, np.nan)
    padded = [np.concatenate([edge, x, edge]) for x in (curvature, np.where(known, torsion, np.nan))]
    return padded[0], padded[1]


def _difference_weights(steps: np.ndarray) -> np.ndarray:
    """Weights (j, window, row) of the first three derivatives at the middle of each five rows.

    With respect to the step in units of the window's mean spacing: exact for polynomials of degree 4.
    """
    windows = np.lib.stride_tricks.sliding_window_view(steps, _STENCIL)
    spacing = (windows[:, -1] - windows[:, 0]) / (_STENCIL - 1)
    offsets = (windows - windows[:, [_STENCIL // 2]]) / spacing[:, None]
    powers = np.swapaxes(offsets[:, :, None] ** np.arange(_STENCIL), 1, 2)
    factorials = np.diag([math.factorial(j) for j in range(_STENCIL)])[:, 1:4]
    weights = np.linalg.solve(powers, np.broadcast_to(factorials, (len(windows), _STENCIL, 3)))
    return np.moveaxis(weights, 2, 0)


def _flow_frame(flow: AbstractFlow, params: Params, args: Args, count: int) -> list[jax.Array]:
    r"""$r_1 \dots r_{count}$: lengths of the orthogonalized derivatives of the path through `params`."""
    state = jax.eval_shape(flow.init, params, args)
    if jax.tree.structure(state) != jax.tree.structure(params):
        raise ValueError(
            f"flow: expected one whose state is only the parameters, got {type(flow).__name__} with a state of "
            f"structure {jax.tree.structure(state)}"
        )

    def field(x: Params) -> Params:
        return flow(0.0, x, args)

    def along(f: Any) -> Any:
        """Derivative of a function of the state along the flow."""
        return lambda x: jax.jvp(f, (x,), (field(x),))[1]

    frame: list[Params] = []
    lengths = []
    derivative = field
    for _ in range(count):
        vector = derivative(params)
        # Twice, for what rounding leaves of the first pass.
        for unit in frame * 2:
            vector = _tree.sub(vector, _tree.scale(_tree.vdot(unit, vector), unit))
        lengths.append(_tree.norm(vector))
        # 0/0 where the path stands still: NaN, as promised.
        frame.append(_tree.scale(1 / lengths[-1], vector))
        derivative = along(derivative)
    return lengths
