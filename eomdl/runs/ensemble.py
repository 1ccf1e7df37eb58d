"""Ensembles: what is run side by side, and its runs one by one."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import override

from eomdl import _check, _devices, _tree
from eomdl._end import RESULTS
from eomdl._types import Args, Observable, Params, State
from eomdl.flows.base import AbstractFlow
from eomdl.maps.step_map import StepFunction, StepMap
from eomdl.observe.base import AbstractObservable
from eomdl.runs.dynamics import AbstractPreparation
from eomdl.runs.ensemble_dynamics import EnsemblePreparation, EnsembleState, new_member, of_member
from eomdl.runs.trajectory import Trajectory


class AbstractMembers(eqx.Module):
    """What is run: a step map or a flow, once or for many members side by side."""

    member: eqx.AbstractVar[Any]

    @abc.abstractmethod
    def check_params(self, params: Params) -> None:
        """Raise `ValueError` for parameters that do not start all members."""

    @abc.abstractmethod
    def first(self, stacked: Any) -> Any:
        """The part of a stacked pytree that belongs to the first member."""

    @abc.abstractmethod
    def first_args(self, args: Args) -> Args:
        """The part of a step's data that the first member sees."""

    @abc.abstractmethod
    def each(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function `(params, args, *others)` of one member's as a function of stacked ones."""

    @abc.abstractmethod
    def start(self, init: Callable[..., State], step: int) -> Callable[..., State]:
        """A function `(params[, args])` that gives one member's state as one that starts all of them at a step."""

    @abc.abstractmethod
    def vectorize(self, prepared: AbstractPreparation) -> AbstractPreparation:
        """The dynamics of all members, from that of one."""


class Single(AbstractMembers):
    """A step map or a flow that is run once."""

    member: Any

    @override
    def check_params(self, params: Params) -> None:
        return None

    @override
    def first(self, stacked: Any) -> Any:
        return stacked

    @override
    def first_args(self, args: Args) -> Args:
        return args

    @override
    def each(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    @override
    def start(self, init: Callable[..., State], step: int) -> Callable[..., State]:
        return init

    @override
    def vectorize(self, prepared: AbstractPreparation) -> AbstractPreparation:
        return prepared


class Ensemble(AbstractMembers):
    r"""S runs of one step map or one flow side by side, $s = 1 \dots S$.

    ```python
    ensemble = eomdl.Ensemble(eomdl.optimizer_step(loss, optax.sgd(0.1)))
    starts = eomdl.runs.stack([params, jax.tree.map(lambda p: 1.1 * p, params)])
    runs = eomdl.runs.members(eomdl.iterate(ensemble, starts, 100, args=data))
    paths = eomdl.runs.members(eomdl.solve(eomdl.Ensemble(eomdl.GradientFlow(loss, 0.1)), starts, 100, args=data))
    ```

    Many seeds run in one compiled program, with all options of `eomdl.iterate` and `eomdl.solve`. Params have a leading
    axis S in every leaf, and observables see them with it (see `eomdl.runs.each`); `eomdl.runs.members` makes
    one trajectory for each member.

    **Arguments:**

    - `member`: an `eomdl.StepMap`, a function `(state, args, k) -> state`, or an `eomdl.AbstractFlow`.
    - `args_axis`: the part of a step's data (its batch, or `args` where there are no batches)
        that a member sees, as `in_axes` of `jax.vmap`: None for all of it; 0 for its own entry
        of the leading axis; or a tuple of these, for args that are a tuple.

    **A member that diverges** neither ends the run nor changes the others. A step into a
    non-finite state is not taken: the member of a step map stays at its last finite state, that of a flow at the last
    finite one that was recorded (saved steps, checkpoints, every 1024th step), and `alive` and `reached` in the state
    (`Trajectory.end.state`) say so, as do the notes of the run. `eomdl.runs.members` drops its saved steps from there on.

    **Exactness.** Members do not mix: another start of one member leaves the others the same, bit
    for bit. A member agrees with a single run from the same start bit for bit where the map consists of
    elementwise operations, and otherwise to rounding: products over a stack of matrices add in another
    order, and an unstable run magnifies that. Members of a flow have ODE steps of their own; their tolerances are the
    smallest of those that up to 8 of them would have alone, so that they agree with single runs within the ODE error.

    **Cost** of a step: S steps of the map; frozen members are computed too. Of a flow: S times the evaluations of the
    member that needs most ODE steps.

    **Raises:** `ValueError` for a wrong argument; from a run for params without a common leading axis
    or not finite.
    """

    member: StepMap | StepFunction | AbstractFlow
    args_axis: Any = eqx.field(static=True)

    def __init__(
        self, member: StepMap | StepFunction | AbstractFlow, args_axis: int | tuple | None = None
    ) -> None:
        if not callable(member):
            raise ValueError(
                "member: expected an eomdl.StepMap, a function (state, args, k) -> state or an eomdl.AbstractFlow, got "
                f"{_check.show(member)}"
            )
        self.member = member
        self.args_axis = _axis(args_axis)

    @override
    def check_params(self, params: Params) -> None:
        stacked_size("params", params)
        if not _tree.is_traced(params) and not np.all(finite := _devices.on_host(_finite(params))):
            (bad,) = np.nonzero(~finite)
            raise ValueError(f"params: expected finite numbers, got others in members {bad.tolist()}")

    @override
    def first(self, stacked: Any) -> Any:
        return jax.tree.map(lambda x: x[0], stacked)

    @override
    def first_args(self, args: Args) -> Args:
        return of_member(args, self.args_axis, 0)

    @override
    def each(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def mapped(stacked: Any, *args: Any) -> Any:
            axes = (0, self.args_axis, *[0] * (len(args) - 1)) if args else (0,)
            return jax.vmap(function, in_axes=axes)(stacked, *args)

        return mapped

    @override
    def start(self, init: Callable[..., State], step: int) -> Callable[..., State]:
        return self.each(lambda *inputs: new_member(init(*inputs), step))

    @override
    def vectorize(self, prepared: AbstractPreparation) -> AbstractPreparation:
        return EnsemblePreparation(prepared.as_member(), self.args_axis)


def as_members(model: Any) -> AbstractMembers:
    """An ensemble as it is; anything else to be run once."""
    return model if isinstance(model, AbstractMembers) else Single(model)


def _finite(stacked: Any) -> jax.Array:
    """Which members are finite in every leaf, shape (S,)."""
    leaves = [jnp.all(jnp.isfinite(x), axis=tuple(range(1, jnp.ndim(x)))) for x in jax.tree.leaves(stacked)]
    return jnp.all(jnp.stack(leaves), axis=0)


def _axis(value: Any) -> Any:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and -32 <= value < 32):
        return value
    if isinstance(value, tuple) and value:
        return tuple(_axis(v) for v in value)
    raise ValueError(
        f"args_axis: expected None, an integer or a tuple of these (in_axes of jax.vmap), got {_check.show(value)}"
    )


# ------------------------------------------------------------------ into a stack and out of it


def stacked_size(name: str, stacked: Any) -> int:
    """The length of the leading axis that all leaves share; `ValueError` if there is none."""
    shapes = sorted({np.shape(leaf)[:1] for leaf in jax.tree.leaves(stacked)})
    if len(shapes) != 1 or len(shapes[0]) == 0 or shapes[0][0] == 0:
        raise ValueError(
            f"{name}: expected leaves with one leading axis, the members (see eomdl.runs.stack), got leading axes "
            f"{shapes}"
        )
    return shapes[0][0]


def stack(params: Sequence[Params]) -> Params:
    """One pytree from several of the same structure: leaves with a new leading axis S.

    **Raises:** `ValueError` if there is none, or if structures or shapes differ.
    """
    if not isinstance(params, Sequence) or isinstance(params, str) or len(params) == 0:
        raise ValueError(f"params: expected a sequence of at least one pytree, got {_check.show(params)}")
    params = [_check.params(f"params[{i}]", p) for i, p in enumerate(params)]
    for i, p in enumerate(params[1:], 1):
        _check.same_structure(f"params[{i}]", p, "params[0]", params[0])
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)


class _Each(AbstractObservable):
    """A module, not a closure, so that two of the same observable share a compiled program."""

    observable: Observable
    args_axis: Any = eqx.field(static=True)

    @property
    @override
    def per_member(self) -> bool:
        return True

    @override
    def __call__(self, params: Params, args: Args) -> Any:
        return jax.vmap(self.observable, in_axes=(0, self.args_axis))(params, args)


def each(observable: Observable, args_axis: int | tuple | None = None) -> Observable:
    r"""The observable of every member of an ensemble: $O(\theta^{(s)})$, shape (S, ...).

    `args_axis`: as in `eomdl.Ensemble`, for the `args` of the run. **Cost:** S times the observable's.
    """
    return _Each(_check.function("observable", observable), _axis(args_axis))


def members(trajectory: Any) -> list[Any]:
    """One `eomdl.Trajectory` for each member, from a run (`eomdl.iterate`, `eomdl.solve`) of an `eomdl.Ensemble`.

    Params lose their axis of members, and so do the observables made by `eomdl.runs.each` and those of a flow's state
    (`observe_state`). Other observables are of the ensemble as a whole: they are left out, as are `ode_error` and what the
    run has cost; the diagnostics and all else in `stats` are the member's.
    A frozen member has the saved steps up to the last at which it was finite, and the result
    `RESULTS.nonfinite` or `RESULTS.max_steps_reached`. Its `end` is what `resume=` takes in a run of the member alone.

    **Raises:** `ValueError` if the trajectory is not a run of an ensemble.
    """
    state = ensemble_state(trajectory)
    alive, reached = (np.asarray(column) for column in _devices.on_host((state.alive, state.reached)))
    final_params = _devices.on_host(trajectory.final_params)

    def member(s: int) -> Any:
        rows = trajectory.rows(np.asarray(trajectory.steps) <= reached[s] + 0.5)
        end = dataclasses.replace(
            trajectory.end,
            step=round(float(reached[s])),
            state=jax.tree.map(lambda x: x[s], state.members),
            params=jax.tree.map(lambda x: np.asarray(x)[s], final_params),
            stats=trajectory.stats.of_member(s),
        )
        own = {name: rows.observables[name] for name in rows.per_member}
        return dataclasses.replace(
            rows,
            params=jax.tree.map(lambda x: x[:, s], rows.params),
            observables=jax.tree.map(lambda x: x[:, s], own),
            ode_error=None,
            per_member=(),
            result=_result(trajectory, alive[s]),
            end=end,
        )

    return [member(s) for s in range(len(reached))]


def _result(trajectory: Trajectory, alive: float) -> Any:
    """How a member ended."""
    if alive > 0.5:
        return trajectory.result
    return RESULTS.max_steps_reached if alive < -0.5 else RESULTS.nonfinite


def ensemble_state(trajectory: Any) -> EnsembleState:
    """The state at the end of an ensemble's run.

    **Raises:** `ValueError` if the trajectory is not a run of an ensemble.
    """
    state = trajectory.end.state if isinstance(trajectory, Trajectory) else None
    if not isinstance(state, EnsembleState):
        raise ValueError(
            "trajectory: expected a run (iterate or solve) of an eomdl.Ensemble, got one whose final state is a "
            f"{type(state).__name__}"
        )
    return state
