"""How the error of a flow depends on the learning rate, and where on the path it arises."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.typing import ArrayLike

from eomdl._types import Args, Loss, Params
from eomdl.compare import compare, row_norms
from eomdl.flows.base import AbstractFlow
from eomdl.integrate import solve
from eomdl.optimizers import descend
from eomdl.trajectory import Trajectory


def defect(
    flow: AbstractFlow,
    reference: Trajectory,
    *,
    args: Args = None,
    batches: Any = None,
    steps: Sequence[int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One-step discretization error of a flow at points of the real path.

    $d_k = |\\varphi_h(\\theta_k) - \\theta_{k+1}|$: the flow restarted at the reference's
    own point, for the time of one step. $O(\\eta^{n+2})$ for the equation of motion with n
    counter terms.

    **Arguments:** `reference` with saved `params`; `args` and `batches` (stacked) as it was
    run with; `steps` k to look at, by default up to 16 spread over the path.

    **Returns:** `(steps, defects)`, each of shape (m,).

    **Raises:** `ValueError` if steps k and k + 1 are not saved.
    """
    if reference.params is None:
        raise ValueError("reference: expected saved params, got a run with save_params=False")
    saved = np.asarray(reference.steps)
    possible = saved[np.isin(saved + 1, saved)]
    if steps is None:
        spread = np.linspace(0, len(possible) - 1, min(16, len(possible))).round().astype(int)
        chosen = possible[spread]
    else:
        chosen = np.asarray(steps)
    if len(chosen) == 0 or not np.all(np.isin(chosen, possible)):
        raise ValueError(f"steps: expected steps saved together with the next one, got {steps} of {saved}")
    defects = []
    for k in chosen:
        data = args if batches is None else jax.tree.map(lambda leaf, k=k: leaf[k], batches)
        end = solve(flow, reference.at(k), 1, args=data, estimate_error=False)
        difference = jax.tree.map(lambda a, b: np.asarray(a[-1:] - b), end.params, reference.at(k + 1))
        defects.append(float(row_norms(difference)[0]))
    return chosen, np.array(defects)


@dataclasses.dataclass(frozen=True)
class Convergence:
    """Errors against real runs over a set of learning rates, each of shape (m,).

    `order` is the slope of $\\log$ `errors` against $\\log$ `learning_rates`; `ode_errors`
    the ODE solver's share.
    """

    learning_rates: np.ndarray
    num_steps: np.ndarray
    errors: np.ndarray
    ode_errors: np.ndarray

    @property
    def order(self) -> float:
        return observed_order(self.learning_rates, self.errors)


def observed_order(learning_rates: ArrayLike, errors: ArrayLike) -> float:
    """Least-squares slope of log error against log learning rate."""
    x, y = np.log(np.asarray(learning_rates, float)), np.log(np.asarray(errors, float))
    if x.shape != y.shape or x.ndim != 1 or len(np.unique(x)) < 2 or not np.all(np.isfinite([x, y])):
        raise ValueError(
            "errors: expected positive errors at two learning rates or more, got "
            f"learning_rates={learning_rates}, errors={errors}"
        )
    return float(np.polyfit(x, y, 1)[0])


_sgd = functools.cache(optax.sgd)  # jit knows an optimizer by identity: the same one twice compiles once


def convergence(
    flow: Callable[[Any], AbstractFlow],
    loss: Loss,
    params: Params,
    learning_rates: Sequence[float],
    *,
    time: float | None = None,
    optimizer: Callable[[float], optax.GradientTransformation] = _sgd,
    args: Args = None,
) -> Convergence:
    """Error of a flow against the real run for several learning rates, and its order.

    With `time` the distance at that fixed time (order n + 1 for the equation of motion with n
    counter terms); without it after one step (order n + 2).

    **Arguments:** `flow` and `optimizer` make a flow and an optimizer from a learning rate;
    `optimizer` is `optax.sgd` by default.

    **Raises:** `ValueError` if `time` is not a whole number of steps of every learning rate.
    """
    counts, errors, ode_errors = [], [], []
    for rate in learning_rates:
        count = 1 if time is None else round(time / rate)
        if time is not None and (count < 1 or abs(count * rate / time - 1) > 1e-9):
            raise ValueError(f"time: expected a multiple of every learning rate, got {time} with {rate}")
        ends = [0, count]
        real = descend(loss, params, optimizer(float(rate)), count, args=args, save_steps=ends)
        model = solve(flow(rate), params, count, args=args, save_steps=ends)
        comparison = compare(real, {"model": model})
        counts.append(count)
        errors.append(comparison.distance["model"][-1])
        ode_errors.append(comparison.ode_error["model"][-1])
    return Convergence(
        np.asarray(learning_rates, float), np.array(counts), np.array(errors), np.array(ode_errors)
    )
