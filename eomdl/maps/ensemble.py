"""Many seeds in one compiled program: a step map on a stack of states, and its runs taken apart."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from eomdl import _check, _devices, _tree
from eomdl._end import RESULTS, Stats
from eomdl._types import Args, Observable, Params, State
from eomdl.maps.step_map import StepFunction, StepMap, as_step_map
from eomdl.observe.base import AbstractObservable


class EnsembleState(NamedTuple):
    """The state of an `Ensemble` of S members.

    - `members`: the states of the members, leaves with leading axis S.
    - `alive`: shape (S,), 1.0 for a member that is stepped, 0.0 for one that is frozen.
    - `reached`: shape (S,), the number of the last step at which each member was finite.
    """

    members: State
    alive: Float[jax.Array, " S"]
    reached: Float[jax.Array, " S"]


class Ensemble(StepMap):
    r"""S runs of one step map side by side, $x^{(s)}_{k+1} = \Psi(x^{(s)}_k, k)$, $s = 1 \dots S$, as one step map.

    ```python
    ensemble = eomdl.Ensemble(eomdl.optimizer_step(loss, optax.sgd(0.1)))
    starts = eomdl.maps.stack([params, jax.tree.map(lambda p: 1.1 * p, params)])
    runs = eomdl.maps.members(eomdl.iterate(ensemble, starts, 100, args=data))
    ```

    Many seeds run in one compiled program, with all options of `iterate`. Params have a leading axis S
    in every leaf, and observables see them with it (see `eomdl.maps.each`); `eomdl.maps.members` makes
    one trajectory for each member.

    **Arguments:**

    - `step_map`: an `eomdl.StepMap`, or a function `(state, args, k) -> state`.
    - `args_axis`: the part of a step's data (its batch, or `args` where there are no batches)
        that a member sees, as `in_axes` of `jax.vmap`: None for all of it; 0 for its own entry
        of the leading axis; or a tuple of these, for args that are a tuple.

    **A member that diverges** neither ends the run nor changes the others: a step into a
    non-finite state is not taken, the member stays at its last finite state, and `alive` and
    `reached` in the state (`Trajectory.end.state`) say so. `eomdl.maps.members` drops its rows from there on.

    **Exactness.** Members do not mix: another start of one member leaves the others the same, bit
    for bit. A member agrees with a single run from the same start bit for bit where the map consists of
    elementwise operations, and otherwise to rounding: products over a stack of matrices add in another
    order, and an unstable run magnifies that.

    **Cost** of a step: S steps of the map; frozen members are computed too.

    **Raises:** `ValueError` for a wrong argument; from `.init` for params without a common leading axis
    or not finite.
    """

    step_map: StepMap
    args_axis: Any = eqx.field(static=True)

    def __init__(self, step_map: StepMap | StepFunction, args_axis: int | tuple | None = None) -> None:
        self.step_map = as_step_map(step_map)
        self.args_axis = _axis(args_axis)

    def init(self, params: Params) -> EnsembleState:
        """The state of S members, all alive, that start at the rows of `params`."""
        params = _check.params("params", params)
        size = stacked_size("params", params)
        if not _tree.is_traced(params) and not np.all(finite := _devices.on_host(_finite(params))):
            (bad,) = np.nonzero(~finite)
            raise ValueError(f"params: expected finite numbers, got others in members {bad.tolist()}")
        real = jnp.result_type(float)
        return EnsembleState(
            jax.vmap(self.step_map.init)(params), jnp.ones(size, real), jnp.zeros(size, real)
        )

    def params(self, state: EnsembleState) -> Params:
        """The parameters of all members, leaves with leading axis S."""
        return jax.vmap(self.step_map.params)(state.members)

    def __call__(self, state: EnsembleState, args: Args, k: ArrayLike) -> EnsembleState:
        """One step of every member that is alive; one whose step is not finite stays where it is."""
        new = self._each(self.step_map, state, args, k)
        return _taken(state, new, new, k)

    def increment(self, state: EnsembleState, args: Args, k: ArrayLike) -> EnsembleState:
        """The change of the state in one step; zero for a member that is frozen."""
        d = self._each(self.step_map.increment, state, args, k)
        new = _taken(state, _tree.add(state.members, d), d, k)
        zero = _tree.zeros_like(state.members)
        return EnsembleState(
            _where(new.alive > 0.5, d, zero), new.alive - state.alive, new.reached - state.reached
        )

    def _each(self, function: Any, state: EnsembleState, args: Args, k: ArrayLike) -> State:
        return jax.vmap(function, in_axes=(0, self.args_axis, None))(state.members, args, k)


def _taken(old: EnsembleState, new: State, looked_at: State, k: ArrayLike) -> EnsembleState:
    """`new` for the members that are alive and whose step is finite, `old` for the others."""
    alive = (old.alive > 0.5) & _finite(new) & _finite(looked_at)
    return EnsembleState(
        _where(alive, new, old.members),
        alive.astype(old.alive.dtype),
        jnp.where(alive, jnp.asarray(k, old.reached.dtype) + 1, old.reached),
    )


def _finite(stacked: Any) -> jax.Array:
    """Which members are finite in every leaf, shape (S,)."""
    leaves = [jnp.all(jnp.isfinite(x), axis=tuple(range(1, jnp.ndim(x)))) for x in jax.tree.leaves(stacked)]
    return jnp.all(jnp.stack(leaves), axis=0)


def _where(condition: jax.Array, this: Any, other: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition.reshape(-1, *[1] * (a.ndim - 1)), a, b), this, other)


def _axis(value: Any) -> Any:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and -32 <= value < 32):
        return value
    if isinstance(value, tuple) and value:
        return tuple(_axis(v) for v in value)
    raise ValueError(
        f"args_axis: expected None, an integer or a tuple of these (in_axes of jax.vmap), got {value!r}"
    )


def stacked_size(name: str, stacked: Any) -> int:
    """The length of the leading axis that all leaves share; `ValueError` if there is none."""
    shapes = sorted({np.shape(leaf)[:1] for leaf in jax.tree.leaves(stacked)})
    if len(shapes) != 1 or len(shapes[0]) == 0 or shapes[0][0] == 0:
        raise ValueError(
            f"{name}: expected leaves with one leading axis, the members (see eomdl.maps.stack), got leading axes "
            f"{shapes}"
        )
    return shapes[0][0]


def stack(params: Sequence[Params]) -> Params:
    """One pytree from several of the same structure: leaves with a new leading axis S.

    **Raises:** `ValueError` if there is none, or if structures or shapes differ.
    """
    if not isinstance(params, Sequence) or isinstance(params, str) or len(params) == 0:
        raise ValueError(f"params: expected a sequence of at least one pytree, got {params!r:.80}")
    params = [_check.params(f"params[{i}]", p) for i, p in enumerate(params)]
    for i, p in enumerate(params[1:], 1):
        _check.same_structure(f"params[{i}]", p, "params[0]", params[0])
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)


class _Each(AbstractObservable):
    """A module, not a closure, so that two of the same observable share a compiled program."""

    observable: Observable
    args_axis: Any = eqx.field(static=True)

    @property
    def per_member(self) -> bool:
        return True

    def __call__(self, params: Params, args: Args) -> jax.Array:
        return jax.vmap(self.observable, in_axes=(0, self.args_axis))(params, args)


def each(observable: Observable, args_axis: int | tuple | None = None) -> Observable:
    r"""The observable of every member of an ensemble: $O(\theta^{(s)})$, shape (S, ...).

    `args_axis`: as in `eomdl.Ensemble`, for the `args` of the run. **Cost:** S times the observable's.
    """
    return _Each(_check.function("observable", observable), _axis(args_axis))


def members(trajectory: Any) -> list[Any]:
    """One `eomdl.Trajectory` for each member, from a run (`eomdl.iterate`) of an `eomdl.Ensemble`.

    Params lose their axis of members, and so do the observables made by `eomdl.maps.each`. Other observables are of
    the ensemble as a whole: they are left out, as are `stats` and `ode_error`.
    A frozen member has the rows up to the last step at which it was finite, and the result
    `RESULTS.nonfinite`. Its `end` is what `resume=` takes in `eomdl.iterate` of the members' step map.

    **Raises:** `ValueError` if the trajectory is not a run of an ensemble.
    """
    state = ensemble_state(trajectory)
    alive, reached = (np.asarray(column) for column in _devices.on_host((state.alive > 0.5, state.reached)))
    final_params = _devices.on_host(trajectory.final_params)

    def member(s: int) -> Any:
        rows = trajectory.rows(np.asarray(trajectory.steps) <= reached[s] + 0.5)
        end = dataclasses.replace(
            trajectory.end,
            step=round(float(reached[s])),
            state=jax.tree.map(lambda x: x[s], state.members),
            params=jax.tree.map(lambda x: np.asarray(x)[s], final_params),
            stats=Stats(),
        )
        return dataclasses.replace(
            rows,
            params=jax.tree.map(lambda x: x[:, s], rows.params),
            observables={name: rows.observables[name][:, s] for name in rows.per_member},
            ode_error=None,
            per_member=(),
            result=trajectory.result if alive[s] else RESULTS.nonfinite,
            end=end,
        )

    return [member(s) for s in range(len(reached))]


def ensemble_state(trajectory: Any) -> EnsembleState:
    """The state at the end of an ensemble's run.

    **Raises:** `ValueError` if the trajectory is not a run of an ensemble.
    """
    state = getattr(getattr(trajectory, "end", None), "state", None)
    if not isinstance(state, EnsembleState):
        raise ValueError(
            "trajectory: expected a run (iterate) of an eomdl.Ensemble, got one whose final state is a "
            f"{type(state).__name__}"
        )
    return state
