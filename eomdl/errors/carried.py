"""Flows that carry their own error against the optimizer beside the state."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import equinox as eqx
import jax
import numpy as np
from jax.typing import ArrayLike

from eomdl import _check, _tree
from eomdl._autodiff import descent_field
from eomdl._end import Diagnostic
from eomdl._types import Args, Loss, Params, State, StateObservable
from eomdl.flows.base import AbstractFlow
from eomdl.flows.equation_of_motion import EquationOfMotion
from eomdl.flows.gradient import gradient_descent_step
from eomdl.flows.stride import step_data
from eomdl.runs.trajectory import Trajectory
from eomdl.series.euler import counterterms


class WithError(NamedTuple):
    """Parameters on the flow and the error of the flow there, both in the parameters' structure."""

    params: Params
    error: Params


class AbstractErrorFlow(AbstractFlow):
    """A flow of a loss whose state is the parameters and an error beside them, none at the start."""

    loss: eqx.AbstractVar[Loss]

    def validate(self, params: Params, args: Args) -> None:
        """Raise `ValueError` if the loss does not give one real number at `params`."""
        _check.loss_is_scalar(self.loss, params, args)

    def init(self, params: Params, args: Args) -> WithError:
        """No error at the start."""
        del args
        return WithError(params, _tree.zeros_like(params))

    def params(self, state: WithError) -> Params:
        """Those on the flow."""
        return state.params

    def observed(self, t: ArrayLike, state: WithError, args: Args) -> Params:
        """The error, to be recorded."""
        del t, args
        return state.error


class LeadingError(AbstractErrorFlow):
    r"""The equation of motion with its leading error: $e' = -H e + \eta^{n+1} \xi_n$, $e(0) = 0$.

    n is the number of counter terms kept, and $e(k\eta) = \theta(k\eta) - \theta_k + O(\eta^{n+2})$.

    Source: Miyagawa 2022 (arXiv 2210.15898), discretization error; Hairer, Lubich & Wanner 2006, ch. IX.
    """

    loss: Loss
    learning_rate: jax.Array
    order: int = eqx.field(static=True)

    if TYPE_CHECKING:  # a checker takes an AbstractVar for an argument

        def __init__(self, loss: Loss, learning_rate: ArrayLike, order: int) -> None: ...

    # Equinox lets a property fill an AbstractVar; mypy does not know.
    @property  # type: ignore[misc]
    def step_size(self) -> jax.Array:
        """The learning rate."""
        return self.learning_rate

    def __call__(self, t: ArrayLike, state: WithError, args: Args) -> WithError:
        """The equation of motion, and the error's."""
        del t
        eta, n = self.learning_rate, self.order
        velocity, along = jax.linearize(descent_field(self.loss, args), state.params)  # along(v) = -H v
        if n == 0:  # xi_0 = H g / 2, in the same product with H
            return WithError(velocity, along(_tree.add(state.error, _tree.scale(eta / 2, velocity))))
        *kept, left_out = counterterms(self.loss, state.params, n + 1, args)
        for a, term in enumerate(kept):
            velocity = _tree.sub(velocity, _tree.scale(eta ** (a + 1), term))
        return WithError(velocity, _tree.add(along(state.error), _tree.scale(eta ** (n + 1), left_out)))

    def step(self, t: ArrayLike, state: WithError, args: Args) -> WithError:
        r"""A step of gradient descent, and $e \leftarrow (I - \eta H) e + \eta^{n+2} \xi_n$."""
        moved = self(t, state, args).error
        params = gradient_descent_step(self.loss, self.learning_rate, state.params, args)
        return WithError(params, _tree.add(state.error, _tree.scale(self.learning_rate, moved)))

    def diagnostics(self, t: ArrayLike, state: WithError, args: Args) -> dict[str, Diagnostic]:
        """`eta*lambda_max`, as of the equation of motion."""
        return EquationOfMotion(self.loss, self.learning_rate, 1).diagnostics(t, state.params, args)


class Linearized(NamedTuple):
    """A flow's state, what the optimizer's step makes of the state at the stride's start, and of its error."""

    state: State
    image: State
    pushed: State


class LinearizedError(AbstractFlow):
    r"""Any flow with its error by the linearized step map: $e_{k+1} = D\Phi(x_k) e_k + d_k$.

    $d_k$ is the flow's own error over the step (over the stride), $x_{k+1} - \Phi(x_k)$; both are taken at points of
    the flow, so no real run is needed. The error is that of the whole state, an optimizer's memory included.
    """

    flow: AbstractFlow

    if TYPE_CHECKING:  # a checker takes an AbstractVar for an argument

        def __init__(self, flow: AbstractFlow) -> None: ...

    # Equinox lets a property fill an AbstractVar; mypy does not know.
    @property  # type: ignore[misc]
    def step_size(self) -> jax.Array:
        """The flow's."""
        return self.flow.step_size

    @property
    def stride(self) -> int:
        """The flow's."""
        return self.flow.stride

    @property
    def refreshes(self) -> bool:
        """The error is carried from stride to stride."""
        return True

    def init(self, params: Params, args: Args) -> Linearized:
        """No error at the start."""
        return _without_error(self.flow.init(params, args))

    def begin(self, t: ArrayLike, params: Params, state: State, args: Args) -> Linearized:
        """No error where a real run ended."""
        return _without_error(self.flow.begin(t, params, state, args))

    def params(self, state: Linearized) -> Params:
        """Those on the flow."""
        return self.flow.params(state.state)

    def error(self, state: Linearized) -> State:
        """Flow minus optimizer, at the end of a stride."""
        return _tree.add(state.pushed, _tree.sub(state.state, state.image))

    def observed(self, t: ArrayLike, state: Linearized, args: Args) -> Params:
        """The parameters' error, to be recorded."""
        del t, args
        return self.flow.params(self.error(state))

    def refresh(self, t: ArrayLike, state: Linearized, args: Args) -> Linearized:
        """At the start of a stride: the map of the stride and its derivative, here."""
        here = self.flow.refresh(t, state.state, args) if self.flow.refreshes else state.state

        def stride(x: State) -> State:
            for n in range(self.stride):
                x = self.flow.step(cast(Any, t) + n * self.step_size, x, step_data(args, n))
            return x

        return Linearized(here, *jax.jvp(stride, (here,), (self.error(state),)))

    def __call__(self, t: ArrayLike, state: Linearized, args: Args) -> Linearized:
        """The flow; the rest waits for the end of the stride."""
        rest = _tree.zeros_like(state.image)
        return Linearized(self.flow(t, state.state, args), rest, rest)

    def step(self, t: ArrayLike, state: Linearized, args: Args) -> Linearized:
        """The optimizer's step, and what its derivative makes of the error."""
        image, pushed = jax.jvp(lambda x: self.flow.step(t, x, args), (state.state,), (self.error(state),))
        return Linearized(image, image, pushed)

    def step_span(self, args: Args) -> int:
        """The flow's."""
        return self.flow.step_span(args)

    def validate(self, params: Params, args: Args) -> None:
        """As the flow does."""
        self.flow.validate(params, args)

    def diagnostics(self, t: ArrayLike, state: Linearized, args: Args) -> dict[str, Diagnostic]:
        """The flow's."""
        return self.flow.diagnostics(t, state.state, args)


def _without_error(state: State) -> Linearized:
    return Linearized(state, state, _tree.zeros_like(state))


class Leaf(eqx.Module):
    """One leaf of a pytree that a function of the state gives: recorded by itself, it stays spread over devices as it is."""

    whole: Callable[..., Params]
    number: int = eqx.field(static=True)

    def __call__(self, t: ArrayLike, state: State, args: Args) -> jax.Array:
        """The leaf."""
        return jax.tree.leaves(self.whole(t, state, args))[self.number]


def leaf_by_leaf(name: str, whole: Callable[..., Params], params: Params) -> dict[str, StateObservable]:
    """What to give `observe_state` for a pytree like the parameters."""
    return {column: Leaf(whole, number) for number, column in enumerate(_columns(name, params))}


def recorded(path: Trajectory, name: str) -> Params:
    """What `leaf_by_leaf` has recorded, as a pytree like the parameters, one row per saved step."""
    columns = [np.asarray(path.observables[column]) for column in _columns(name, path.params)]
    return jax.tree.structure(path.params).unflatten(columns)


def _columns(name: str, params: Params) -> list[str]:
    return [
        f"{name}{jax.tree_util.keystr(place)}" for place, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
