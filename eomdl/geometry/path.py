"""The shape of a path through weight space: length, curvature, torsion, principal components."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Float, Int
from typing_extensions import override

from eomdl import _check, _tree
from eomdl._result import AbstractResult, Note, Table, series_table
from eomdl._types import Args, Observable, Params, VectorField
from eomdl.flows.base import AbstractFlow, as_ode
from eomdl.observe.base import AbstractObservable
from eomdl.runs.trajectory import Trajectory


_STENCIL = 5  # saved steps of a derivative: fourth order for x' and x'', second for x'''


def as_matrix(tree: Any, name: str = "points") -> Float[np.ndarray, "n d"]:
    """Return the leaves side by side, shape (n, d), float64: line i has entry i of every leading axis.

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
    matrix = _tree.rows(leaves, float)
    finite = np.isfinite(matrix).all(axis=1)
    if not finite.all():
        raise ValueError(f"{name}: expected finite values, got infinity or NaN in row {np.argmin(finite)}")
    return matrix


def path_matrix(trajectory: Trajectory) -> Float[np.ndarray, "n d"]:
    """Return the saved parameters of one run, shape (n, d).

    **Raises:** `ValueError` for what is no run, a batch of runs, or a run without saved params.
    """
    _check.kind("trajectory", trajectory, Trajectory, "an eomdl.Trajectory")
    if trajectory.params is None:
        raise ValueError("trajectory: expected saved params, got a run with save_params=False")
    if np.ndim(trajectory.steps) != 1:
        raise ValueError(f"trajectory: expected one run, got a batch with steps {np.shape(trajectory.steps)}")
    return as_matrix(trajectory.params, "trajectory")


def path_lengths(path: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    """Return the length of the polygon through the saved steps up to each of them."""
    chords = np.linalg.norm(np.diff(path, axis=0), axis=1)
    return np.concatenate([[0.0], np.cumsum(chords)])


@dataclasses.dataclass(frozen=True)
class PathShape(AbstractResult):
    r"""The shape of a path at its n saved steps; every array has shape (n,).

    - `length`: $\sum_{j<k} |\theta_{j+1} - \theta_j|$, that of the polygon through the saved steps. With steps left out it
        can only be shorter.
    - `distance`: $|\theta_k - \theta_0|$, from the start.
    - `straightness`: distance over length, in [0, 1]; 1 on a straight line, NaN until the path moves.
    - `curvature`: $\kappa_1 = \sqrt{G_2} / G_1^{3/2} \ge 0$, in 1 / parameter distance. $G_j$ is the Gram determinant of the
        first j derivatives; $\kappa_1$ does not depend on the speed along the path.
    - `torsion`: $\kappa_2 = \sqrt{G_3} / G_2 \ge 0$, in 1 / parameter distance: how fast the path leaves the plane in which it
        bends. In three dimensions it is the absolute value of the usual torsion.

    Its picture shows curvature and torsion against steps, and distance against length; `eomdl.plotting.plot` takes several: the first,
    solid and black, is the real run, the others, dashed, its flows, with their relative differences to the first.
    """

    steps: Int[np.ndarray, " n"]
    length: Float[np.ndarray, " n"]
    distance: Float[np.ndarray, " n"]
    curvature: Float[np.ndarray, " n"]
    torsion: Float[np.ndarray, " n"]
    notes: tuple[Note, ...] = ()

    @override
    def _tables(self) -> tuple[Table, ...]:
        columns = {"step": self.steps, "length": self.length, "distance": self.distance}
        columns |= {"curvature": self.curvature, "torsion": self.torsion}
        return (series_table("Shape of the path", columns),)

    @property
    def straightness(self) -> Float[np.ndarray, " n"]:
        """Distance over length, in [0, 1]; NaN until the path moves."""
        return self.distance / np.where(self.length > 0, self.length, np.nan)


@_tree.nonfinite_is_data
def path_shape(trajectory: Trajectory) -> PathShape:
    r"""Return length, distance from the start, curvature and torsion of a path at its saved steps.

    Derivatives with respect to the step are taken from five saved steps at a time, which need not be evenly spaced. On
    a smooth path the error of the curvature is of order 4 in an even spacing, 3 in an uneven one; that of the torsion
    of order 2. The determinants are never formed: with $(x', x'', x''') = QR$, $\kappa_1 = r_2 / r_1^2$ and
    $\kappa_2 = r_3 / (r_1 r_2)$, which keeps the digits that a Gram matrix would square away.

    **Curvature** is NaN at the first two and last two saved steps, and where the path stands still: where the rounding of
    the parameters ($\epsilon |\theta|$ each) makes the angle turned from one saved step to the next uncertain by more
    than 0.1. It is 0 where $r_2$ is below that rounding. A path that alternates (past the edge of stability) has
    no curvature in this sense; take that of `trajectory.smoothed()`.

    **Torsion** is NaN where the curvature is NaN or 0, since there is no such plane, and where rounding could make it up.
    Rounding moves it by $e = \delta_3 / (r_1 r_2)$, with $\delta_3$ the rounding of $r_3$ (of the third difference, and of
    the plane that it leaves); refused is $e > \frac{1}{10} \sqrt{\kappa_1^2 + \kappa_2^2}$. That root is the rate at which the
    principal normal turns, the scale of which torsion is a part. A third difference also enlarges the ODE solver's error:
    integrate flows with `rtol` of 1e-9 or less before you read their torsion, or take `flow_torsion`.

    **Cost:** no gradients; about 30 passes over the saved parameters and three copies of them.

    **Raises:** `ValueError` without saved params.

    Source: Jordan 1874; Gluck 1966 (higher curvatures of curves in Euclidean space, by Gram determinants).
    """
    path = path_matrix(trajectory)
    curvature, torsion = _frenet(
        path, np.asarray(trajectory.steps, float), float(np.finfo(_tree.dtype(trajectory.params)).eps)
    )
    return PathShape(
        steps=np.asarray(trajectory.steps),
        length=path_lengths(path),
        distance=np.linalg.norm(path - path[0], axis=1),
        curvature=curvature,
        torsion=torsion,
    )


class _FlowCurvature(AbstractObservable):
    r"""$\kappa_1 = r_2 / r_1^2$ or $\kappa_2 = r_3 / (r_1 r_2)$ of the flow's path through a point."""

    flow: AbstractFlow
    num_derivatives: int = eqx.field(static=True)

    @override
    def __call__(self, params: Params, args: Args) -> Float[jax.Array, ""]:
        lengths = _flow_frame(self.flow, params, args, self.num_derivatives)
        return lengths[-1] / (lengths[0] * lengths[-2])


def flow_curvature(flow: AbstractFlow) -> Observable:
    r"""Return the observable $\kappa_1$ of the flow's path through the given point, in 1 / parameter distance.

    It is exact, without integrating and without differences: $x' = F$, $x'' = F'F$. It is the `curvature` of
    `path_shape` along `solve(flow, ...)`, and what a flow predicts for the real run. NaN where $F = 0$.

    For flows whose state is only the parameters and that do not depend on time.

    **Cost:** one Jacobian-vector product of the flow: 2.7 gradients for gradient flow.

    **Raises:** `ValueError` if `flow` is no flow, or carries more than the parameters.
    """
    return _FlowCurvature(as_ode(flow), 2)


def flow_torsion(flow: AbstractFlow) -> Observable:
    r"""Return the observable $\kappa_2$ of the flow's path through the given point, in 1 / parameter distance.

    As `flow_curvature`, with $x''' = (F'F)'F$. NaN where $F = 0$ or the path does not bend. Where it hardly bends, the
    value is rounding, as in any ratio of small numbers.

    **Cost:** a Jacobian-vector product of a Jacobian-vector product of the flow: about 6 gradients for gradient flow.

    **Raises:** as `flow_curvature`.
    """
    return _FlowCurvature(as_ode(flow), 3)


@dataclasses.dataclass(frozen=True)
class PathComponents(AbstractResult):
    """Principal components of a path.

    - `explained`: fraction of the variance along each component, shape (k,), falling.
    - `scores`: the path in these axes, shape (n, k), parameter distance.
    - `directions`: orthonormal directions, a pytree like `params` with leading axis k.
    - `mean`: where the axes cross, a pytree like `params`.

    Its picture shows the path on the first two axes.
    """

    explained: Float[np.ndarray, " k"]
    scores: Float[np.ndarray, "n k"]
    directions: Params
    mean: Params
    notes: tuple[Note, ...] = ()

    @override
    def _tables(self) -> tuple[Table, ...]:
        rows = tuple(
            (i, float(part), float(np.ptp(scores)))
            for i, (part, scores) in enumerate(zip(self.explained, self.scores.T, strict=True), 1)
        )
        columns = ("component", "part of the variance", "extent of the path")
        return (Table(columns, rows, title="Principal components of the path", fractions=(1,)),)

    def direction(self, i: int) -> Params:
        """Return direction i as a pytree like `params`."""
        i = _check.integer("i", i, 0, len(self.explained) - 1)
        return jax.tree.map(lambda leaf: leaf[i], self.directions)

    def project(self, trajectory: Trajectory) -> Float[np.ndarray, "m k"]:
        """Return another run in the same axes, shape (m, k).

        **Raises:** `ValueError` if its parameters are others.
        """
        path = path_matrix(trajectory)
        mean = as_matrix(jax.tree.map(lambda leaf: leaf[None], self.mean))[0]
        if path.shape[1] != len(mean):
            raise ValueError(f"trajectory: expected {len(mean)} parameters, got {path.shape[1]}")
        return (path - mean) @ as_matrix(self.directions).T


@_tree.nonfinite_is_data
def principal_components(trajectory: Trajectory, k: int = 2) -> PathComponents:
    r"""Return the k directions in which the path varies most: singular vectors of $\theta_j - \bar\theta$.

    Each direction is signed so that its score of largest absolute value is positive. Compare with the baseline: of a
    random walk in very many dimensions the components explain $6 / (\pi k)^2$, that is 61 %, 15 %, 7 % ..., and its scores
    are cosines (Antognini & Sohl-Dickstein 2018). A path on two axes tells little by itself.

    **Cost:** no gradients; one singular value decomposition, $O(n^2 d)$ for n saved steps of d > n parameters.

    **Raises:** `ValueError` if k is not from 1 to the smaller of n - 1 and d, or the path stands still.
    """
    k = _check.integer("k", k, 1)
    path = path_matrix(trajectory)
    largest = min(len(path) - 1, path.shape[1])
    if k > largest:
        raise ValueError(f"k: expected at most {largest} for {path.shape} rows and parameters, got {k}")
    mean = path.mean(axis=0)
    if not np.isfinite(np.linalg.norm(path)):
        raise ValueError(
            "trajectory: expected a path of finite length, got one whose squares overflow; cut it by `rows`"
        )
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


def _unflatten(matrix: np.ndarray, like: Params) -> Params:
    """Return the lines of a matrix as a pytree with a leading axis, in the leaves' dtypes."""
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([math.prod(leaf.shape[1:]) for leaf in leaves])
    parts = np.split(matrix, ends[:-1], axis=1)
    return structure.unflatten(
        [
            part.reshape(-1, *leaf.shape[1:]).astype(leaf.dtype)
            for part, leaf in zip(parts, leaves, strict=True)
        ]
    )


def _frenet(
    path: np.ndarray, steps: np.ndarray, epsilon: float
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Return curvature and torsion at every saved step; `epsilon` is the rounding unit of the parameters."""
    if len(path) < _STENCIL:
        return np.full(len(path), np.nan), np.full(len(path), np.nan)
    weights = _difference_weights(steps)
    num_stencils = weights.shape[1]
    # At least three columns, so that R has three rows: what is missing is 0.
    path = np.pad(path, ((0, 0), (0, max(0, 3 - path.shape[1]))))
    derivatives = np.zeros((num_stencils, path.shape[1], 3))
    for i in range(_STENCIL):
        derivatives += path[i : i + num_stencils, :, None] * weights[:, :, i].T[:, None, :]
    r = np.abs(np.linalg.qr(derivatives, mode="r"))
    r1, r2, r3 = np.diagonal(r, axis1=1, axis2=2).T
    # The rounding of the saved parameters, in their own dtype; that of this arithmetic is no larger.
    sizes = np.lib.stride_tricks.sliding_window_view(np.linalg.norm(path, axis=1), _STENCIL)
    d1, d2, d3 = epsilon * np.einsum("jwi,wi->jw", np.abs(weights), sizes)
    d2 += d1 * r[:, 0, 1] / r1
    d3 += d1 * r[:, 0, 2] / r1 + d2 * r[:, 1, 2] / r2
    # Derivatives are with respect to the mean spacing, so r2 / r1 is the angle from one saved step to the next.
    moves = d2 / r1 <= 0.1
    curvature = np.where(moves, np.where(r2 > d2, r2, 0.0) / r1**2, np.nan)
    torsion = r3 / (r1 * r2)
    is_resolved = (curvature > 0) & (d3 / (r1 * r2) <= 0.1 * np.hypot(curvature, torsion))
    margin = np.full(_STENCIL // 2, np.nan)
    torsion = np.where(is_resolved, torsion, np.nan)
    return np.concatenate([margin, curvature, margin]), np.concatenate([margin, torsion, margin])


def _difference_weights(steps: np.ndarray) -> np.ndarray:
    """Return weights (j, stencil, step) of the first three derivatives at the middle of each five saved steps.

    They are exact for polynomials of degree 4. The unit is the mean spacing of the five.
    """
    stencils = np.lib.stride_tricks.sliding_window_view(steps, _STENCIL)
    spacing = (stencils[:, -1] - stencils[:, 0]) / (_STENCIL - 1)
    offsets = (stencils - stencils[:, [_STENCIL // 2]]) / spacing[:, None]
    powers = np.swapaxes(offsets[:, :, None] ** np.arange(_STENCIL), 1, 2)
    factorials = np.diag([math.factorial(j) for j in range(_STENCIL)])[:, 1:4]
    weights = np.linalg.solve(powers, np.broadcast_to(factorials, (len(stencils), _STENCIL, 3)))
    return np.moveaxis(weights, 2, 0)


def _flow_frame(flow: AbstractFlow, params: Params, args: Args, count: int) -> list[jax.Array]:
    r"""Return $r_1 \dots r_{count}$: lengths of the orthogonalized derivatives of the path through `params`."""
    state = jax.eval_shape(flow.init, params, args)
    if jax.tree.structure(state) != jax.tree.structure(params):
        raise ValueError(
            f"flow: expected one whose state is only the parameters, got {type(flow).__name__} with a state of "
            f"structure {jax.tree.structure(state)}"
        )

    def field(x: Params) -> Params:
        return flow(0.0, x, args)

    def differentiate(f: Callable[[Params], Params]) -> Callable[[Params], Params]:
        return lambda x: jax.jvp(f, (x,), (field(x),))[1]

    frame: list[Params] = []
    lengths = []
    derivative: VectorField = field
    for _ in range(count):
        vector = derivative(params)
        # Twice, for what rounding leaves of the first pass.
        for unit in frame * 2:
            vector = _tree.sub(vector, _tree.scale(_tree.vdot(unit, vector), unit))
        lengths.append(_tree.norm(vector))
        # 0/0 where the path stands still: NaN, as promised.
        frame.append(_tree.scale(1 / lengths[-1], vector))
        derivative = differentiate(derivative)
    return lengths
