"""Flows that integrate their own error against the optimizer beside their state."""

from typing import TYPE_CHECKING, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from typing_extensions import override

from eomdl import _tree
from eomdl._autodiff import jvp
from eomdl._end import Diagnostic
from eomdl._types import Args, Params, State
from eomdl.flows.base import AbstractFlow, AbstractStateStep, Differentiated, Increments, LeadingError, map_of
from eomdl.flows.stride import step_data


class WithError(NamedTuple):
    """Parameters on a flow and the error of the flow there, both in the structure of the parameters."""

    params: Params
    error: Params


class AbstractErrorFlow(AbstractFlow):
    """A flow whose state is the parameters and an error beside them, which is zero at the start."""

    @override
    def init(self, params: Params, args: Args) -> WithError:
        del args
        return WithError(params, _tree.zeros_like(params))

    @override
    def begin(self, t: ArrayLike, params: Params, state: State, args: Args) -> WithError:
        del t, state
        return self.init(params, args)

    @override
    def params(self, state: WithError) -> Params:
        return state.params

    def error(self, t: ArrayLike, state: WithError, args: Args) -> Params:
        """Return the error, to be recorded."""
        del t, args
        return state.error


class LeadingErrorFlow(AbstractErrorFlow):
    r"""A flow with the leading error that it knows of itself: for the equation of motion $e' = -H e + \eta^{n+1} \xi_n$."""

    flow: AbstractFlow

    if TYPE_CHECKING:  # a checker takes an AbstractVar for an argument

        def __init__(self, flow: AbstractFlow) -> None: ...

    # Equinox lets a property fill an AbstractVar; mypy does not know.
    @property  # type: ignore[misc]
    @override
    def step_size(self) -> jax.Array:
        return jnp.asarray(self.flow.step_size)

    @property
    @override
    def map(self) -> "_LeadingErrorStep | None":
        return None if self.flow.map is None else _LeadingErrorStep(self)

    @override
    def validate(self, params: Params, args: Args) -> None:
        self.flow.validate(params, args)

    @override
    def __call__(self, t: ArrayLike, state: WithError, args: Args) -> WithError:
        leading_error = cast(LeadingError, self.flow.leading_error)
        return WithError(*leading_error(t, state.params, state.error, args))

    @property
    def _with_next_term(self) -> AbstractFlow:
        # The leading error is the first term that the flow leaves out: it holds where the flow with that term does.
        return self.flow if self.flow.next_order is None else self.flow.next_order

    @override
    def differentiated(self, state: WithError) -> Differentiated | None:
        return self._with_next_term.differentiated(state.params)

    @override
    def diagnostics(self, t: ArrayLike, state: WithError, args: Args) -> dict[str, Diagnostic]:
        return self._with_next_term.diagnostics(t, state.params, args)


class _LeadingErrorStep(AbstractStateStep):
    """A step of the flow's map, and of Euler's method for the error."""

    flow: LeadingErrorFlow

    @override
    def __call__(self, state: WithError, args: Args, k: ArrayLike) -> WithError:
        h, flow = self.flow.step_size, self.flow.flow
        velocity = self.flow(k * h, state, args).error
        params = map_of(flow)(state.params, args, k)
        return WithError(params, _tree.add(state.error, _tree.scale(h, velocity)))

    @override
    def params(self, state: WithError) -> Params:
        return state.params


class LinearizedState(NamedTuple):
    """A flow's state, and where the optimizer's map takes the state and the error from the start of the stride.

    - `map_value`: the map of the stride at the state there; `propagated_error`: its derivative there, of the error.
    """

    state: State
    map_value: State
    propagated_error: State


class LinearizedErrorFlow(AbstractFlow):
    r"""Any flow with its error by the linearized step map: $e_{k+1} = D\Phi(x_k) e_k + d_k$.

    $d_k$ is the flow's own error over the step (over the stride), $x_{k+1} - \Phi(x_k)$; both are taken at points of
    the flow, so no real run is needed. The error is that of the whole state, an optimizer's memory included.

    **Raises:** `ValueError` in `solve` for a flow without a map, or whose map takes several steps at once.
    """

    flow: AbstractFlow

    if TYPE_CHECKING:  # a checker takes an AbstractVar for an argument

        def __init__(self, flow: AbstractFlow) -> None: ...

    # Equinox lets a property fill an AbstractVar; mypy does not know.
    @property  # type: ignore[misc]
    @override
    def step_size(self) -> jax.Array:
        return jnp.asarray(self.flow.step_size)

    @property
    @override
    def stride(self) -> int:
        return self.flow.stride

    @property
    @override
    def map(self) -> "_LinearizedStep":
        return _LinearizedStep(self)

    @override
    def init(self, params: Params, args: Args) -> LinearizedState:
        return _without_error(self.flow.init(params, args))

    @override
    def begin(self, t: ArrayLike, params: Params, state: State, args: Args) -> LinearizedState:
        return _without_error(self.flow.begin(t, params, state, args))

    def state_error(self, state: LinearizedState) -> State:
        """Return the difference flow minus optimizer at the end of a stride."""
        return _tree.add(state.propagated_error, _tree.sub(state.state, state.map_value))

    def error(self, t: ArrayLike, state: LinearizedState, args: Args) -> Params:
        """Return the error of the parameters, to be recorded."""
        del t, args
        return self.flow.params(self.state_error(state))

    @override
    def refresh(self, t: ArrayLike, state: LinearizedState, args: Args) -> LinearizedState:
        """Return the state at the start of a stride, with the map of the stride and its derivative here."""
        refresh, step_map = self.flow.refresh, map_of(self.flow)
        here = state.state if refresh is None else refresh(t, state.state, args)
        k = jnp.asarray(t / self.step_size)

        def stride(x: State) -> State:
            for n in range(self.stride):
                x = step_map(x, step_data(args, n), k + n)
            return x

        return LinearizedState(here, *jvp(stride, here, self.state_error(state)))

    @override
    def __call__(self, t: ArrayLike, state: LinearizedState, args: Args) -> LinearizedState:
        # What belongs to the error changes at the end of the stride only.
        rest = _tree.zeros_like(state.map_value)
        return LinearizedState(self.flow(t, state.state, args), rest, rest)

    @override
    def validate(self, params: Params, args: Args) -> None:
        self.flow.validate(params, args)
        step_map = map_of(self.flow)
        if step_map.num_steps(step_data(args, 0)) != 1:
            name = type(self.flow).__name__
            raise ValueError(f"flow: expected a model of single steps, got {name}, which models epochs")

    @override
    def differentiated(self, state: LinearizedState) -> Differentiated:
        return Differentiated(Increments(map_of(self.flow)), state.state)

    @override
    def diagnostics(self, t: ArrayLike, state: LinearizedState, args: Args) -> dict[str, Diagnostic]:
        return self.flow.diagnostics(t, state.state, args)


class _LinearizedStep(AbstractStateStep):
    """A step of the flow's map, and of its derivative for the error."""

    flow: LinearizedErrorFlow

    @override
    def __call__(self, state: LinearizedState, args: Args, k: ArrayLike) -> LinearizedState:
        step_map, error = map_of(self.flow.flow), self.flow.state_error(state)
        value, propagated = jvp(lambda x: step_map(x, args, k), state.state, error)
        return LinearizedState(value, value, propagated)

    @override
    def params(self, state: LinearizedState) -> Params:
        return self.flow.flow.params(state.state)


def _without_error(state: State) -> LinearizedState:
    return LinearizedState(state, state, _tree.zeros_like(state))
