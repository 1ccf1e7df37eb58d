"""How many points the logarithm of a step map needs on a path, and the multipliers of the map."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Complex, Float

from eomdl import _check, _tree
from eomdl._end import End
from eomdl._types import Args, Params, State
from eomdl.choice.differences import scan_increments, starting_state
from eomdl.flows.linearized import krylov_of_step
from eomdl.maps.step_map import StepFunction, StepMap, as_step_map, check_step
from eomdl.series.weights import MAX_POINTS, difference_weights


@dataclasses.dataclass(frozen=True)
class Points:
    """The result of `choose_points`.

    - `points`: the best number of points.
    - `terms`: shape (max_points,), the mean size along the path of the first term left out by
        1, 2, ..., max_points points, in units of the first difference.
    """

    points: int
    terms: Float[np.ndarray, " max_points"]


def choose_points(
    step_map: StepMap | StepFunction,
    params: Params,
    num_steps: int,
    *,
    args: Args = None,
    stride: int = 1,
    max_points: int = 8,
    start: End | None = None,
) -> Points:
    r"""Choose the number of points whose first term left out is smallest along the real path.

    $K = \arg\min_K \sum_k \frac{1}{K+1} |\Delta^{K+1} \theta_k|$ over the iterates $\theta_k$ of the real run. The series
    of the logarithm is at best asymptotic where the map changes from step to step, so it is cut at its
    smallest term.

    **Arguments:** `step_map`, `stride`: as in `eomdl.InterpolatingFlow`; `params`, `num_steps`, `args`: the
    run; `max_points`: the largest number to consider; `start`: the end of a real run (`trajectory.end`),
    to begin there; its steps count in `num_steps`.

    **Returns:** an object with `points`, the best number, and `terms`, shape (max_points,): the mean size along the path of
    the first term left out by 1, 2, ..., max_points points, in units of the first difference.

    **Cost:** `num_steps + stride * (max_points + 1)` steps of the map, and memory for
    `max_points + 2` copies of the parameters. The flow would compute the same differences of the
    real iterates, so nothing else is evaluated.

    **Raises:** `ValueError` for a wrong argument or a run that becomes non-finite.
    """
    step_map = as_step_map(step_map)
    num_steps = _check.integer("num_steps", num_steps, 1)
    stride = _check.integer("stride", stride, 1)
    max_points = _check.integer("max_points", max_points, 1, MAX_POINTS)
    params = _check.params("params", params)
    check_step(step_map, params, args)
    state, first = starting_state(step_map, params, start)
    if first >= num_steps:
        raise ValueError(f"num_steps: expected more than the {first} steps of start, got {num_steps}")
    count = max((num_steps - first) // stride, 1)
    sizes = np.asarray(_term_sizes(step_map, state, np.asarray(first), args, count, stride, max_points))
    if not np.all(np.isfinite(sizes)):
        raise ValueError("params: expected a run that stays finite, got infinite or NaN differences")
    return Points(int(np.argmin(sizes[1:])) + 1, sizes[1:] / sizes[0])


@eqx.filter_jit
def _term_sizes(
    step_map: StepMap, state: State, start: Any, args: Args, count: int, stride: int, max_points: int
) -> jax.Array:
    r"""Return the means of $|\Delta^j \theta| / j$ over the path, j = 1 ... max_points + 1."""
    weights = jnp.asarray(
        np.stack(
            [np.pad(difference_weights(j), (0, max_points + 1 - j)) / j for j in range(1, max_points + 2)]
        )
    )

    def measure(first: Params, here: Params) -> jax.Array:
        del first
        return jax.vmap(
            lambda w: _tree.norm(
                jax.tree.map(lambda leaf: jnp.tensordot(w.astype(leaf.dtype), leaf, 1), here)
            )
        )(weights)

    return scan_increments(step_map, state, start, args, stride, max_points + 1, count, measure).mean(0)


def multipliers(
    step_map: StepMap, state: State, step: int, args: Args, stride: int, depth: int
) -> Complex[np.ndarray, " depth"]:
    """Return the Ritz values of the map's Jacobian on a Krylov space of dimension `depth`: its multipliers, the outermost best.

    Where the Jacobian is not finite they are nan: a root at 0 has no derivative, as of a second moment without a gradient.
    """
    matrix = np.asarray(_jacobian_matrix(step_map, state, np.asarray(float(step)), args, stride, depth))
    if not np.all(np.isfinite(matrix)):
        return np.full(depth, complex(np.nan, np.nan))
    return 1 + np.linalg.eigvals(matrix).astype(complex)


@eqx.filter_jit
def _jacobian_matrix(
    step_map: StepMap, state: State, k: Any, args: Args, stride: int, depth: int
) -> jax.Array:
    """Return the map's Jacobian less the identity, on a Krylov space of dimension `depth`."""
    return krylov_of_step(step_map, state, k, args, stride, depth).matrix
