"""How the error of a flow depends on the learning rate, and where on the path it arises."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from eomdl._batches import batch_at
from eomdl._types import Args, Loss, Params
from eomdl.compare import compare, row_norms
from eomdl.flows.base import AbstractFlow
from eomdl.integrate import solve
from eomdl.optimizers import descend
from eomdl.trajectory import RESULTS, Trajectory


def defect(
    flow: AbstractFlow,
    reference: Trajectory,
    *,
    args: Args = None,
    batches: Any = None,
    steps: Sequence[int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One-step discretization error of a flow at points of the real path.

    $d_k = |\\varphi_{mh}(\\theta_k) - \\theta_{k+m}|$: the flow restarted at the reference's
    own point, for the time of one step (of m steps, for a flow of stride m). $O(\\eta^{n+2})$
    for the equation of motion with n counter terms, $O(h^{K+1})$ for K points. A flow that carries
    an optimizer's state is restarted with the state that its map has there.

    **Arguments:** `reference` with saved `params`; `args` and `batches` (stacked) as it was
    run with; `steps` k to look at, by default up to 16 spread over the path.

    **Returns:** `(steps, defects)`, each of shape (m,).

    **Raises:** `ValueError` if steps k and k + m are not saved.
    """
    stride = flow.stride
    if reference.params is None:
        raise ValueError("reference: expected saved params, got a run with save_params=False")
    saved = np.asarray(reference.steps)
    possible = saved[np.isin(saved + stride, saved) & (saved % stride == 0)]
    if steps is None:
        spread = np.linspace(0, len(possible) - 1, min(16, len(possible))).round().astype(int)
        chosen = possible[spread]
    else:
        chosen = np.asarray(steps)
    if len(chosen) == 0 or not np.all(np.isin(chosen, possible)):
        raise ValueError(
            f"steps: expected multiples of the stride {stride} saved together with the step {stride} later, got "
            f"{steps} of {saved}"
        )
    defects = []
    for k, state in zip(chosen, _states(flow, reference, chosen, args, batches), strict=True):
        here = reference.at(k)
        start = Trajectory(
            steps=np.array([k]),
            times=np.array([np.nan]),
            params=jax.tree.map(lambda leaf: np.asarray(leaf)[None], here),
            observables={},
            ode_error=None,
            result=RESULTS.successful,
            stats={},
            final=state,
            final_step=int(k),
            final_params=here,
        )
        data = batch_at(batches, int(k), args, stride)
        ends = [int(k + stride)]
        end = solve(flow, here, ends[0], args=data, resume=start, save_steps=ends, estimate_error=False)
        difference = jax.tree.map(lambda a, b: np.asarray(a[-1:] - b), end.params, reference.at(ends[0]))
        defects.append(float(row_norms(difference)[0]))
    return chosen, np.array(defects)


def _states(flow: AbstractFlow, reference: Trajectory, chosen: np.ndarray, args: Args, batches: Any) -> Any:
    """The flow's state at points of the real path: the parameters, and what its map has beside them."""
    state, at = None, 0
    step = eqx.filter_jit(lambda flow, k, x, args: flow.step(k * flow.step_size, x, args))
    for k in chosen:
        example = batch_at(batches, int(k), args)
        if state is None:
            state = flow.init(reference.at(reference.steps[0]), example)
        if jax.tree.structure(state) == jax.tree.structure(flow.params(state)):
            yield reference.at(k)
            continue
        if at == 0 and reference.steps[0] != 0:
            raise ValueError(
                f"reference: expected step 0 to be saved, from where {type(flow).__name__} runs its map to get the "
                f"optimizer's state, got {reference.steps}"
            )
        for n in range(at, int(k)):
            state = step(flow, jnp.asarray(n), state, batch_at(batches, n, args))
        at = int(k)
        yield state


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
    warmup: float = 0.0,
    optimizer: Callable[[float], optax.GradientTransformation] = _sgd,
    args: Args = None,
) -> Convergence:
    """Error of a flow against the real run for several learning rates, and its order.

    With `time` the distance at that fixed time (order n + 1 for the equation of motion with n
    counter terms); without it after one step (order n + 2).

    **Arguments:** `flow` and `optimizer` make a flow and an optimizer from a learning rate;
    `optimizer` is `optax.sgd` by default. `warmup`: time of the real run before the flow starts from where
    it is, with the optimizer's state where the flow carries it: an optimizer's memory fills first.
    Time is counted in the flow's `step_size` per step.

    **Raises:** `ValueError` if `time` or `warmup` is not a whole number of steps of every learning rate.
    """

    def whole(name: str, time: float, step: float) -> int:
        count = round(time / step)
        if abs(count * step - time) > 1e-9 * time:
            raise ValueError(f"{name}: expected a multiple of every step size, got {time} with {step}")
        return count

    counts, errors, ode_errors = [], [], []
    for rate in learning_rates:
        made, real_optimizer = flow(rate), optimizer(float(rate))
        step = float(made.step_size)
        begin = whole("warmup", warmup, step)
        count = made.stride if time is None else whole("time", time, step)
        if count < 1:
            raise ValueError(
                f"time: expected at least one step of every learning rate, got {time} with {step}"
            )
        ends = [begin, begin + count]
        start = None
        if begin:
            start = descend(loss, params, real_optimizer, begin, args=args, save_steps=[begin])
        real = descend(loss, params, real_optimizer, ends[1], args=args, save_steps=ends, resume=start)
        model = solve(made, params, ends[1], args=args, save_steps=ends, resume=start)
        comparison = compare(real, {"model": model})
        counts.append(count)
        errors.append(comparison.distance["model"][-1])
        ode_errors.append(comparison.ode_error["model"][-1])
    return Convergence(
        np.asarray(learning_rates, float), np.array(counts), np.array(errors), np.array(ode_errors)
    )
