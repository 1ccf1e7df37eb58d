"""The dynamics of an ensemble: those of one member, for all of them by `vmap` of advance."""

import dataclasses
from typing import Any, ClassVar, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float
from typing_extensions import override

from eomdl import _devices
from eomdl._end import RESULTS, STOPPED_MEMBERS, Diagnostic, Stats, is_finite
from eomdl._types import STATIC, Args, Params, State, record_type
from eomdl.maps.step_map import StepMap
from eomdl.runs.chunk import Chunk
from eomdl.runs.data import ChunkData
from eomdl.runs.dynamics import AbstractDynamics, AbstractPreparation, Advanced


MAX_MEASURED_MEMBERS = 8  # by which the tolerances of an ensemble of flows are measured


class EnsembleState(NamedTuple):
    """The state of an ensemble of S members; that of one member has no axis S.

    - `members`: the states of the members, leaves with leading axis S.
    - `alive`: shape (S,), 1.0 for a member that is advanced; of one that is frozen 0.0 if it was not finite, -1.0 if the
        ODE solver reached `max_steps`.
    - `reached`: shape (S,), the number of the last step at which each member was finite.
    """

    members: State
    alive: Float[jax.Array, "*S"]
    reached: Float[jax.Array, "*S"]


class MemberMap(StepMap):
    """A step map that does not step into a state that is not finite; its state is an `EnsembleState` of one member."""

    step_map: StepMap

    @override
    def init(self, params: Params) -> EnsembleState:
        return new_member(self.step_map.init(params), 0)

    @override
    def params(self, state: EnsembleState) -> Params:
        return self.step_map.params(state.members)

    @override
    def memory(self, state: EnsembleState) -> State:
        return self.step_map.memory(state.members)

    @override
    def __call__(self, state: EnsembleState, args: Args, k: ArrayLike) -> EnsembleState:
        new = self.step_map(state.members, args, k)
        alive = (state.alive > 0.5) & is_finite(new)
        return freeze(state, alive, new, jnp.asarray(k) + 1)


def new_member(state: State, step: int) -> EnsembleState:
    """A member that is alive, at the step where a run begins."""
    real = jnp.result_type(float)
    return EnsembleState(state, jnp.ones((), real), jnp.full((), step, real))


def freeze(old: EnsembleState, alive: jax.Array, new: State, step: Any) -> EnsembleState:
    """One member at a new state and step, or as it was where it is not alive."""
    members = jax.tree.map(lambda a, b: jnp.where(alive, a, b), new, old.members)
    reached = jnp.where(alive, jnp.asarray(step, old.reached.dtype), old.reached)
    return EnsembleState(members, alive.astype(old.alive.dtype), reached)


@record_type
class _OfMembers(AbstractPreparation):
    """What is asked of one member, asked of all of them: they have one plan and one time of a step."""

    member: AbstractPreparation
    args_axis: Any = dataclasses.field(metadata=STATIC)

    @property
    @override
    def max_records(self) -> int:
        """The number of records of a member's chunk."""
        return self.member.max_records

    @property
    @override
    def step_size(self) -> Any:
        return self.member.step_size

    @override
    def fingerprint(self, params: Params, args: Args) -> str:
        own = self.member.fingerprint(of_member(params, 0, 0), of_member(args, self.args_axis, 0))
        return f"Ensemble({own}, {self.args_axis})"


@record_type
class EnsembleDynamics(_OfMembers, AbstractDynamics):
    """The dynamics of one member for all of them, by `vmap`. The member's state is an `EnsembleState` of one."""

    has_members: ClassVar[bool] = True

    member: AbstractDynamics

    @override
    def as_member(self) -> AbstractPreparation:
        return self

    @override
    def advance(self, state: EnsembleState, chunk: Chunk) -> Advanced:
        member = self.member.without_labels()
        out = _advance_members(member, self.args_axis, _devices.shardings(state), state, chunk)
        # One result for all: a member that fails is frozen, and does not end the run.
        return Advanced(*out[:4], RESULTS.successful, out[4])

    @override
    def params(self, state: EnsembleState, step: int, data: ChunkData) -> Params:
        axes = _data_axes(data, self.args_axis)
        return jax.vmap(lambda s, d: self.member.params(s, step, d), in_axes=(0, axes))(state, data)

    @override
    def diagnose(self, state: EnsembleState, step: int, data: ChunkData) -> dict[str, Diagnostic]:
        axes = _data_axes(data, self.args_axis)
        found = jax.vmap(lambda s, d: self.member.diagnose(s, step, d), in_axes=(0, axes))(state, data)
        frozen = Diagnostic(
            jnp.sum(state.alive < 0.5),
            limit=1,
            meaning="Their saved steps end earlier: `eomdl.runs.members` says where, and why.",
            is_fault=False,
        )
        each = {name: dataclasses.replace(d, value=d.value[None]) for name, d in found.items()}
        return each | {STOPPED_MEMBERS: frozen}

    @override
    def monitor_state(self, state: EnsembleState) -> State:
        return self.member.monitor_state(state)

    @override
    def stats(self, stats: Stats) -> Stats:
        return self.member.stats(stats)


@eqx.filter_jit
def _advance_members(
    member: AbstractDynamics, args_axis: Any, shardings: tuple, state: EnsembleState, chunk: Chunk
) -> tuple[EnsembleState, Params, dict[str, Any], jax.Array | None, dict[str, jax.Array]]:
    """State, parameters (R, S, ...), observables (R, S, ...), ODE error (R,) of all members, and counts of all."""

    def advance(state: EnsembleState, data: ChunkData) -> tuple:
        out = member.advance(state, chunk.with_data(data))
        return out.state, (out.params, out.observables, out.ode_error), out.counts

    axes = (0, _data_axes(chunk.data, args_axis))
    state, columns, counts = jax.vmap(advance, in_axes=axes, out_axes=(0, 1, 0))(state, chunk.data)
    params, observables, error = columns
    total = None if error is None else jnp.sqrt(jnp.sum(error**2, axis=1))
    counts = jax.tree.map(jnp.sum, counts)
    return _devices.with_shardings(state, shardings), params, observables, total, counts


@record_type
class EnsemblePreparation(_OfMembers):
    """What was asked of one member, for all of them."""

    @override
    def as_member(self) -> AbstractPreparation:
        raise ValueError("member: expected a step map or a flow, got an eomdl.Ensemble")

    @override
    def prepare(self, state: EnsembleState, chunk: Chunk) -> AbstractDynamics:
        size = len(state.alive)
        chosen = np.unique(np.linspace(0, size - 1, min(size, MAX_MEASURED_MEMBERS)).round().astype(int))
        prepared = []
        for s in chosen:
            data = _member_data(chunk.data, self.args_axis, int(s))
            own = jax.tree.map(lambda x, s=s: x[s], state)
            prepared.append(self.member.prepare(own, chunk.with_data(data)))
        return EnsembleDynamics(prepared[0].for_all(prepared), self.args_axis)


def _data_axes(data: ChunkData, args_axis: Any) -> Any:
    """Where the members' axis is: in `args`, or behind the steps' axis of batches."""
    if data.batches is None:
        return ChunkData(args_axis, None, cast(Any, None))
    behind = jax.tree.map(lambda axis: axis + 1 if axis >= 0 else axis, args_axis)
    return ChunkData(None, behind, cast(Any, None))


def _member_data(data: ChunkData, args_axis: Any, s: int) -> ChunkData:
    axes = _data_axes(data, args_axis)
    return ChunkData(of_member(data.args, axes.args, s), of_member(data.batches, axes.batches, s), data.first)


def of_member(tree: Any, axis: Any, s: int) -> Any:
    """The part of a pytree that member s sees, by `in_axes` of `jax.vmap`."""
    if axis is None:
        return tree
    if isinstance(axis, tuple):
        return tuple(of_member(part, a, s) for part, a in zip(tree, axis, strict=True))
    return jax.tree.map(lambda x: jnp.take(x, s, axis=axis), tree)
