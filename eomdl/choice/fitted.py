"""Weights of the logarithm of a step map, fitted to the path that they are for."""

import numpy as np
from jaxtyping import Float

from eomdl import _check
from eomdl._end import End
from eomdl._types import Args, Params
from eomdl.choice.differences import Differences, differences, starting_state
from eomdl.maps.step_map import StepFunction, StepMap, as_step_map, check_step
from eomdl.series.weights import log_coefficients, weights_of_differences


NUM_LEFT_OUT = 4  # differences after the last point, which stand for all that a flow leaves out
MAX_FITTED_POINTS = 16  # the rounding of the differences after them grows like 2^K


def fitted_weights(
    step_map: StepMap | StepFunction,
    params: Params,
    points: int,
    num_steps: int = 32,
    *,
    args: Args = None,
    stride: int = 1,
    order: int | None = None,
    start: End | None = None,
) -> Float[np.ndarray, " points"]:
    r"""Return the weights of least error on the path itself, for `InterpolatingFlow(..., weights=...)`.

    ```python
    weights = eomdl.choice.fitted_weights(step_map, params, points=6, args=data)
    flow = eomdl.InterpolatingFlow(step_map, step_size=0.1, points=6, weights=weights)
    ```

    $\min_c \sum_k |\sum_j (c_j - c^{log}_j)\, \Delta^j \theta_k|^2$ over the first strides k of the real run, with
    $c^{log}_j = (-1)^{j+1}/j$ up to the fourth difference after the last point, and $c_j = c^{log}_j$ up to the order p. Taylor
    weights are best where all multipliers are near 1, minimax weights for any multiplier up to a bound; these are best for
    the multipliers that the path has, with the sizes that they have in it.

    **Arguments:**

    - `step_map`, `stride`: as in `eomdl.InterpolatingFlow`; `params`, `args`, `start`: as in `eomdl.choice.choose_points`.
    - `points`: K, at most 16; `order`: p, the formal order, by default K // 2, at least 1.
    - `num_steps`: how many steps of the real run to fit to, its fastest ones.

    **Returns:** $b_0, \dots, b_{K-1}$.

    **Cost:** `num_steps + stride * (points + 4)` steps of the map. **Memory:** 2 (K + 4) copies of the parameters.

    **Raises:** `ValueError` for a wrong argument or a run that becomes non-finite.
    """
    step_map = as_step_map(step_map)
    points = _check.integer("points", points, 1, MAX_FITTED_POINTS)
    num_steps = _check.integer("num_steps", num_steps, 1)
    stride = _check.integer("stride", stride, 1)
    order = max(points // 2, 1) if order is None else _check.integer("order", order, 1, points)
    params = _check.params("params", params)
    check_step(step_map, params, args)
    state, first = starting_state(step_map, params, start)
    count = max(num_steps // stride, 1)
    measured = differences(step_map, state, first, args, stride, count, points + NUM_LEFT_OUT)
    return weights_of_differences(fitted_coefficients(measured, points, order))


def fitted_coefficients(measured: Differences, points: int, order: int) -> Float[np.ndarray, " points"]:
    r"""Return $c_1 \dots c_K$: those of the logarithm up to the order, the others by least squares over the strides measured."""
    log = log_coefficients(measured.order)
    if order == points:
        return log[:points]
    free, tail = slice(order, points), slice(points, None)
    products = measured.products[:, : measured.order, : measured.order].sum(0)
    scale = np.sqrt(np.diag(products))
    scale = np.where(scale > 0, scale, 1.0)
    normal = products / scale[:, None] / scale
    # c - c^log is -c^log beyond the points.
    right = normal[free, tail] @ (scale[tail] * log[tail])
    free_part = np.linalg.lstsq(normal[free, free], right, rcond=None)[0] / scale[free]
    return np.concatenate([log[:order], log[free] + free_part])
