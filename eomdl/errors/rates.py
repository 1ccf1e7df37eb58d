"""How large a learning rate may be for a flow to stay near gradient descent."""

import dataclasses
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float
from typing_extensions import override

from eomdl import _check, _tree, _warn
from eomdl._autodiff import descent_field, linearize
from eomdl._result import AbstractResult, Note, Table
from eomdl._types import Args, Loss, Params
from eomdl.errors.comparison import top_level_blocks
from eomdl.errors.error_flows import AbstractErrorFlow, WithError
from eomdl.observe.curvature import sharpness
from eomdl.runs.continuous import solve
from eomdl.series.euler import MAX_ORDER, counterterms


LEADING_FRACTION = 0.9  # of the tolerance that the leading term may take. The rest is for the terms after it,
SAFE_EDGE = 0.3  # which is enough below this eta * lambda_max


@dataclasses.dataclass(frozen=True)
class LargestRate(AbstractResult):
    r"""The result of `largest_learning_rate`, along gradient flow at m times.

    - `value`: the largest learning rate $\eta$ for which the flow stays within the tolerance over the whole time.
    - `limited_at`: the time at which it is reached; `limited_by`: the block with the largest part of the error there.
    - `block_value`: `{block: eta}`, the largest rate at which the error of that block only stays within the tolerance.
    - `times`: shape (m,), from 0 to the time given.
    - `error`: (m,), $|E(t)|$ with the error $\eta^{n+1} E(t)$ of a flow with n counter terms.
    - `local`: (m,), the largest rate for which one step from there stays within the tolerance: a schedule.
    - `eta_lambda_max`: the largest $\eta \lambda_{max}$ of the path at `value`.
    - `notes`: where the value is not to be trusted, and why.

    Its picture shows `local` against time, log scale, and dashed the `value`, with a dot where it is reached.
    """

    value: float
    limited_at: float
    limited_by: str
    block_value: dict[str, float]
    times: Float[np.ndarray, " m"]
    error: Float[np.ndarray, " m"]
    local: Float[np.ndarray, " m"]
    eta_lambda_max: float
    notes: tuple[Note, ...]

    @override
    def _tables(self) -> tuple[Table, ...]:
        columns = ("largest learning rate", "reached at time", "eta*lambda_max there")
        whole = ("all parameters", self.value, self.limited_at, self.eta_lambda_max)
        blocks = [(name, value, None, None) for name, value in self.block_value.items()]
        return (
            Table(("error of", *columns), (whole, *blocks), title="Largest learning rate for the whole time"),
        )

    @override
    def to_frame(self) -> Any:
        """Return a pandas DataFrame with one row for each time: the error, and the largest rate for one step from there."""
        import pandas as pd

        return pd.DataFrame(
            {"time": self.times, "error": self.error, "largest rate for one step": self.local}
        )


class ScaledError(AbstractErrorFlow):
    r"""Gradient flow with the error of a flow of n counter terms over $\eta^{n+1}$: $E' = -H E + \xi_n$."""

    loss: Loss
    step_size: jax.Array  # the time between saved steps: no learning rate is in it
    order: int = eqx.field(static=True)

    if TYPE_CHECKING:  # a checker takes an AbstractVar for an argument

        def __init__(self, loss: Loss, step_size: ArrayLike, order: int) -> None: ...

    @override
    def validate(self, params: Params, args: Args) -> None:
        _check.loss_is_scalar(self.loss, params, args)

    def left_out(self, params: Params, args: Args) -> Params:
        r"""Return $\xi_n$, the first term that a flow of n counter terms leaves out."""
        if self.order == 0:
            velocity, along = linearize(descent_field(self.loss, args), params)
            return _tree.scale(0.5, along(velocity))
        return counterterms(self.loss, params, self.order + 1, args)[-1]

    @override
    def __call__(self, t: ArrayLike, state: WithError, args: Args) -> WithError:
        del t
        velocity, along = linearize(descent_field(self.loss, args), state.params)
        return WithError(velocity, _tree.add(along(state.error), self.left_out(state.params, args)))

    def source(self, t: ArrayLike, state: WithError, args: Args) -> Params:
        r"""Return $\xi_n$, to be recorded."""
        del t
        return self.left_out(state.params, args)

    def speed(self, t: ArrayLike, state: WithError, args: Args) -> jax.Array:
        """Return the norm of the gradient, to be recorded."""
        del t
        return _tree.norm(descent_field(self.loss, args)(state.params))


def largest_learning_rate(
    loss: Loss,
    params: Params,
    time: float,
    tolerance: float,
    order: int = 0,
    *,
    args: Args = None,
    relative: bool = False,
    points: int = 64,
    progress: Any = False,
) -> LargestRate:
    r"""Return the largest learning rate for which a flow stays within a tolerance of gradient descent over a time.

    ```python
    rate = eomdl.errors.largest_learning_rate(loss, params, time=10.0, tolerance=1e-2, args=data)
    print(rate.value, rate.limited_by)
    ```

    The error of the flow with n counter terms is $\eta^{n+1} E(t) + O(\eta^{n+2})$ with $E' = -H E + \xi_n$ along gradient
    flow, where nothing depends on $\eta$: so one integration answers for all rates,

    $$\eta = \min_t \big(0.9\,\epsilon / |E(t)|\big)^{1/(n+1)}, \qquad \eta_{local}(t) = \big(\epsilon / |\xi_n|\big)^{1/(n+2)}.$$

    A tenth of the tolerance is kept for the terms after the leading one.

    **Arguments:**

    - `loss`, `params`, `args`: as in `eomdl.descend`; the whole data, no minibatches.
    - `time`: how long, $k\eta$; `tolerance`: $\epsilon$, the Euclidean distance over all parameters, or with `relative=True`
        that over the distance travelled (`local` then takes it of the distance in one step of gradient descent).
    - `order`: n, the number of counter terms of the flow; 0 is gradient flow.
    - `points`: the number of times at which it is evaluated, evenly spaced.

    **Returns:** `eomdl.errors.LargestRate`.

    **Cost:** one integration of gradient flow with an evaluation of the field of order n + 1, the sharpness at each
    point, and no run of gradient descent.

    **Raises:** `ValueError` for a wrong argument, and if gradient flow does not reach the time.

    Source: Miyagawa 2022 (arXiv 2210.15898), learning rates for which the discretization error is bounded.
    """
    time = float(_check.positive_scalar("time", time))
    tolerance = float(_check.positive_scalar("tolerance", tolerance))
    order = _check.integer("order", order, 0, MAX_ORDER - 1)
    relative = _check.flag("relative", relative)
    points = _check.integer("points", points, 1)
    flow = ScaledError(_check.function("loss", loss), jnp.asarray(time / points), order)
    path = _warn.quietly(solve)(
        flow,
        params,
        points,
        args=args,
        observe={"sharpness": sharpness(loss)},
        observe_state={
            "error": flow.error,
            "source": flow.source,
            "speed": flow.speed,
        },
        estimate_error=False,
        progress=progress,
    )
    if path.message:
        raise ValueError(
            f"time: expected gradient flow to reach {time:g}, got to {path.times[-1]:g}. {path.message}"
        )
    return _answer(path, tolerance, order, relative)


def _answer(path: Any, tolerance: float, order: int, relative: bool) -> LargestRate:
    vectors, sources = (jax.tree.map(np.asarray, path.observables[name]) for name in ("error", "source"))
    error, source = _tree.row_norms(vectors), _tree.row_norms(sources)
    speed, distance = np.asarray(path.observables["speed"], float), np.ones(len(error))
    if relative:  # at the start error and distance vanish, and their ratio is that of the velocities
        distance = _tree.row_norms(jax.tree.map(lambda x: x - x[:1], path.params))
        distance[0] = speed[0]
        vectors = jax.tree.map(lambda e, xi: np.concatenate([xi[:1], e[1:]]), vectors, sources)
    allowed = LEADING_FRACTION * tolerance * distance
    rates = rates_within(allowed, _tree.row_norms(vectors), order)
    at = int(np.argmin(rates))
    blocks = {name: _tree.row_norms(block) for name, block in top_level_blocks(vectors).items()}
    one_step = tolerance * (speed if relative else np.ones(len(source)))
    local = rates_within(one_step, source, order if relative else order + 1)
    value = float(rates[at])
    edge = value * float(np.max(path.observables["sharpness"]))
    return LargestRate(
        value=value,
        limited_at=float(path.times[at]),
        limited_by=max(blocks, key=lambda name: blocks[name][at]),
        block_value={
            name: float(rates_within(allowed, block, order).min()) for name, block in blocks.items()
        },
        times=np.asarray(path.times),
        error=error,
        local=local,
        eta_lambda_max=edge,
        notes=notes_on(value, edge),
    )


def rates_within(allowed: np.ndarray, error: np.ndarray, order: int) -> np.ndarray:
    """Return the rates at which the error reaches what is allowed; infinite where there is none."""
    ratio = np.full(len(error), np.inf)
    np.divide(allowed, error, out=ratio, where=error > 0)
    return ratio ** (1 / (order + 1))


def notes_on(value: float, edge: float) -> tuple[Note, ...]:
    """Return notes on where a rate is not to be trusted, by its largest `eta*lambda_max`."""
    if not np.isfinite(value):
        return (Note("No rate is too large: the terms that the flow leaves out are zero on this path."),)
    if edge >= 1:
        said = (
            f"At this rate eta*lambda_max reaches {edge:.2f}. From 1 on the series in the learning rate has no limit, so the "
            "leading term says nothing about the error: a lower tolerance, or a shorter time, is needed for an answer."
        )
        return (Note(said, is_fault=True),)
    if edge >= SAFE_EDGE:
        said = (
            f"At this rate eta*lambda_max reaches {edge:.2f}. From about {SAFE_EDGE} on the terms after the leading one may take "
            "more than the tenth of the tolerance that is kept for them."
        )
        return (Note(said, is_fault=True),)
    return ()
