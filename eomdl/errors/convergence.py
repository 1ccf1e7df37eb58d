"""How the error of a flow depends on the learning rate."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import diffrax
import numpy as np
import optax
from jaxtyping import Float, Int
from typing_extensions import override

from eomdl import _check, _warn
from eomdl._result import AbstractResult, Note, Table, series_table
from eomdl._types import Args, Loss, Numbers, Params
from eomdl.errors.comparison import compare
from eomdl.flows.base import AbstractFlow, as_ode
from eomdl.runs.continuous import solve
from eomdl.runs.discrete import descend


@dataclasses.dataclass(frozen=True)
class Convergence(AbstractResult):
    r"""Errors against real runs over a set of learning rates, each of shape (m,).

    `order` is the slope of $\log$ `errors` against $\log$ `learning_rates`; `ode_errors` are
    the part of the ODE solver in the errors. Its picture shows the errors against the learning rates, on log scales.
    """

    learning_rates: Float[np.ndarray, " m"]
    num_steps: Int[np.ndarray, " m"]
    errors: Float[np.ndarray, " m"]
    ode_errors: Float[np.ndarray, " m"]
    notes: tuple[Note, ...] = ()

    @property
    @override
    def verdict(self) -> str:
        is_known = len(self.errors) > 1 and bool(np.all(np.isfinite(self.errors) & (self.errors > 0)))
        return f"The error is of order {self.order:.2f} in the learning rate." if is_known else ""

    @override
    def _tables(self) -> tuple[Table, ...]:
        columns = {"learning rate": self.learning_rates, "steps": self.num_steps}
        errors = {"error": self.errors, "ODE error <=": self.ode_errors}
        return (series_table("Error of the flow against real runs", columns | errors),)

    @property
    def order(self) -> float:
        """The observed order."""
        return observed_order(self.learning_rates, self.errors)


def observed_order(learning_rates: Numbers, errors: Numbers) -> float:
    """Return the least-squares slope of log error against log learning rate.

    **Raises:** `ValueError` for errors that are not positive, or fewer than two learning rates.
    """
    x, y = (
        np.log(np.asarray(_check.positive_numbers(name, values)))
        for name, values in (("learning_rates", learning_rates), ("errors", errors))
    )
    if x.shape != y.shape or x.ndim != 1 or len(np.unique(x)) < 2 or not np.all(np.isfinite([x, y])):
        raise ValueError(
            "errors: expected positive errors at two learning rates or more, got "
            f"learning_rates={_check.show(learning_rates)}, errors={_check.show(errors)}"
        )
    return float(np.polyfit(x, y, 1)[0])


_sgd = functools.cache(optax.sgd)  # jit knows an optimizer by identity: the same one twice compiles once


def convergence_study(
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
    """Measure the error of a flow against the real run for several learning rates, and its order.

    With `time`, the distance at that fixed time (order n + 1 for the equation of motion with n
    counter terms); without it, the distance after one step (order n + 2).

    **Arguments:** `flow` and `optimizer` make a flow and an optimizer from a learning rate;
    `optimizer` is `optax.sgd` by default. `warmup`: the time of the real run after which the flow starts, at the
    real run's end, with the optimizer's state where the flow carries it, so that the optimizer's memory fills first.
    One step counts as the flow's `step_size`.

    **Returns:** an object with `order`, the slope of log `errors` against log `learning_rates`; `ode_errors`, the ODE solver's
    part of the errors; `num_steps`: each of shape (m,), for m learning rates.

    **Cost:** one real run and one flow for each learning rate.

    **Raises:** `ValueError` if `time` or `warmup` is not a whole number of steps of every learning rate.
    """
    _check.function("flow", flow, "a function learning rate -> eomdl.AbstractFlow", takes=1)
    _check.function(
        "optimizer", optimizer, "a function learning rate -> optax.GradientTransformation", takes=1
    )
    rates = np.asarray(_check.positive_numbers("learning_rates", learning_rates))
    if rates.ndim != 1:
        raise ValueError(f"learning_rates: expected a sequence of numbers, got shape {rates.shape}")
    time = None if time is None else float(_check.positive_scalar("time", time))
    warmup = float(_check.nonnegative_scalar("warmup", warmup))

    def whole(name: str, time: float, step: float) -> int:
        count = round(time / step)
        if abs(count * step - time) > 1e-9 * time:
            raise ValueError(f"{name}: expected a multiple of every step size, got {time} with {step}")
        return count

    counts, errors, ode_errors = [], [], []
    for rate in rates.tolist():
        model_flow, real_optimizer = flow(rate), optimizer(rate)
        as_ode(model_flow, "a function that returns an eomdl.AbstractFlow")
        step = float(model_flow.step_size)
        begin = whole("warmup", warmup, step)
        count = model_flow.stride if time is None else whole("time", time, step)
        ends = [begin, begin + count]
        start = None
        if begin:
            start = descend(loss, params, real_optimizer, begin, args=args, save_steps=[begin])
        real = descend(loss, params, real_optimizer, ends[1], args=args, save_steps=ends, resume=start)
        # Not what the flow recommends: this is the error of the flow itself.
        solver = diffrax.Tsit5()
        model = _warn.quietly(solve)(
            model_flow, params, ends[1], solver=solver, args=args, save_steps=ends, resume=start
        )
        comparison = compare(real, {"model": model})
        counts.append(count)
        errors.append(comparison.distance["model"][-1])
        ode_errors.append(comparison.ode_error["model"][-1])
    return Convergence(rates, np.array(counts), np.array(errors), np.array(ode_errors))
