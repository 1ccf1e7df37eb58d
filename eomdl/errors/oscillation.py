"""How far a real run oscillates along given directions: what the central flow's variances are compared with."""

from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from eomdl import _check
from eomdl._target import SMOOTHED
from eomdl.runs.trajectory import Trajectory, summary


def variances_along(
    reference: Trajectory, steps: ArrayLike, axes: ArrayLike, window: int = 32
) -> Float[np.ndarray, "n k"]:
    r"""Return the variances of a real run's iterates about its smoothed path along axes that are given at n steps.

    ```python
    flow = eomdl.flows.CentralFlow(loss, learning_rate=0.1)
    observe_state = {"variances": flow.variances, "axes": flow.axes}
    path = eomdl.solve(flow, params, 500, observe_state=observe_state, save_steps=20)
    real = eomdl.descend(loss, params, optax.sgd(0.1), 520)
    measured = eomdl.errors.variances_along(
        real, path.steps, path.observables["axes"]
    )
    ```

    $$V_i(k) = \frac1w \sum_{|j - k| \lesssim w/2} \big( a_i(k) \cdot (\theta_j - s_j) \big)^2, \qquad
    s_j = \frac{\theta_{j-1} + 2 \theta_j + \theta_{j+1}}{4},$$

    over the w = `window` steps from $k - \lfloor w/2 \rfloor$ on. An iterate that jumps from $c - x$ to $c + x$ and back lies
    exactly x beside the smoothed path. The run's own oscillation swells and dies over tens of steps, and a flow knows its
    mean only: take a window as long as that.

    **Arguments:**

    - `reference`: the real run, with its parameters.
    - `steps`: shape (n,); `axes`: (n, k, P), k vectors for each step, of length 1 or 0, with the P numbers of the parameters
        in the order of `jax.flatten_util.ravel_pytree`. Those of a flow are `path.steps` and the recorded `flow.axes`.
    - `window`: w.

    **Returns:** shape (n, k), in squared units of the parameters; NaN at steps about which the run has not saved all steps
    from $k - \lfloor w/2 \rfloor - 1$ to w + 1 steps after that. **Cost:** no gradients; w + 2 saved steps in memory at a time.

    **Raises:** `ValueError` for a wrong argument.
    """
    _check.kind("reference", reference, Trajectory, "an eomdl.Trajectory")
    if reference.params is None:
        raise ValueError("reference: expected a run with saved parameters, got one with save_params=False")
    window = _check.integer("window", window, 1)
    wanted = np.asarray(_check.numbers("steps", steps, "step numbers, shape (n,)", _is_step, ndim=1))
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(reference.params)]
    size = sum(int(np.prod(leaf.shape[1:])) for leaf in leaves)
    expected = f"finite numbers, shape ({len(wanted)}, k, {size}): vectors for each of `steps`"
    along = np.asarray(_check.numbers("axes", axes, expected, ndim=3))
    if along.shape[::2] != (len(wanted), size):
        raise ValueError(f"axes: expected {expected}, got shape {along.shape}")
    saved = np.asarray(reference.steps)
    measured = np.full(along.shape[:2], np.nan)
    for i, step in enumerate(wanted.astype(int)):
        first = step - window // 2 - 1
        at = int(np.searchsorted(saved, first))
        there = saved[at : at + window + 2]
        # They increase: as many as there are from the first to the last, these are all.
        if len(there) == window + 2 and (there[0], there[-1]) == (first, first + window + 1):
            measured[i] = np.mean(_beside(leaves, at, window + 2, along[i]) ** 2, axis=0)
    if np.isnan(measured).all():
        raise ValueError(
            f"steps: expected a step about which {window + 2} steps were saved, got {summary(wanted.astype(int))} with {summary(saved)}"
        )
    return measured


def _beside(leaves: list[Any], at: int, count: int, axes: np.ndarray) -> np.ndarray:
    """Return how far the iterates lie beside the smoothed path along the axes, shape (count - 2, k)."""
    rows = np.concatenate([leaf[at : at + count].reshape(count, -1) for leaf in leaves], axis=1) @ axes.T
    smoothed = sum(a * rows[1 + j : count - 1 + j] for j, a in SMOOTHED.weights)
    return np.asarray(rows[1:-1] - smoothed)


def _is_step(values: np.ndarray) -> np.ndarray:
    return np.isfinite(values) & (values >= 0) & (values == np.round(values))
