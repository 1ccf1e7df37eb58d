"""How a state is carried over a chunk: all in which a real run, an ODE, an SDE and an ensemble differ."""

import abc
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from typing_extensions import override

from eomdl._end import Diagnostic, Stats
from eomdl._types import Args, Params, State
from eomdl.runs.chunk import Chunk
from eomdl.runs.data import ChunkData


class Advanced(NamedTuple):
    """What advancing over a chunk gives.

    - `state`: at its end.
    - `params`: of every record, leading axis R. `observables`: of the whole state, `{name: leading axis R}`.
    - `ode_error`: (R,), or None.
    - `result`: an item of `RESULTS`.
    - `counts`: what it has cost, by the names in `Stats`.
    """

    state: State
    params: Params
    observables: dict[str, Any]
    ode_error: jax.Array | None
    result: Any
    counts: dict[str, jax.Array]


class AbstractPreparation(abc.ABC):
    """What a run was asked to be carried by, before anything is measured.

    - `max_records`: of a chunk, a power of two.
    - `step_size`: the time of a step; nan where it is not known.
    """

    max_records: ClassVar[int] = 256
    step_size: Any

    @abc.abstractmethod
    def fingerprint(self, params: Params, args: Args) -> str:
        """The fingerprint of what carries the state; `params` and `args` are an example."""

    @abc.abstractmethod
    def as_member(self) -> "AbstractPreparation":
        """The same for one member of an ensemble.

        Its state is an `EnsembleState` of one, which stays where it was last finite: nothing that it does ends a run.
        """

    @abc.abstractmethod
    def prepare(self, state: State, chunk: Chunk) -> "AbstractDynamics":
        """The dynamics, with what is measured on the host before the first step: tolerances, scales."""


class AbstractDynamics(AbstractPreparation):
    """A state and how it is carried over a chunk. The loop asks nothing else of a run.

    `has_members`: its observables of the state have an axis of members.
    """

    has_members: ClassVar[bool] = False

    @abc.abstractmethod
    def advance(self, state: State, chunk: Chunk) -> Advanced:
        """The records of a chunk, and the state at its end."""

    @abc.abstractmethod
    def params(self, state: State, step: int, data: ChunkData) -> Params:
        """The parameters at a step, from the state there and the data of its chunk."""

    @override
    def prepare(self, state: State, chunk: Chunk) -> "AbstractDynamics":
        return self

    def for_all(self, others: Sequence["AbstractDynamics"]) -> "AbstractDynamics":
        """One dynamics for all members of an ensemble, from those prepared for some."""
        del others
        return self

    def without_labels(self) -> "AbstractDynamics":
        """The same without what only the host reads, so that it makes no other compiled program."""
        return self

    def monitor_state(self, state: State) -> State:
        """The part of the state that a monitor sees beside the parameters."""
        return state

    def diagnose(self, state: State, step: int, data: ChunkData) -> dict[str, Diagnostic]:
        """Numbers that tell whether the model is valid here."""
        del state, step, data
        return {}

    def stats(self, stats: Stats) -> Stats:
        """The numbers of the run so far, with those of the dynamics in their place."""
        return stats


def first_record(params: Params) -> Params:
    """The only record of a chunk: the parameters at its start, with an axis of records."""
    return jax.tree.map(lambda x: x[None], params)


def scan_records(
    step: Callable[[jax.Array, Any], Any],
    state: Any,
    read: Callable[[jax.Array, Any], Any],
    chunk: Chunk,
) -> tuple[Any, Any]:
    """For every record of a chunk: keep `read(k, state)`, then apply `step(k, state)` up to the next one.

    Zeros in `steps_between` are the last ones; records after the first of them are zeros.
    """
    if chunk.reversible:
        return _scan_reversibly(step, state, read, chunk)

    def advance(i: jax.Array, k: jax.Array, state: Any) -> Any:
        return step(k, state) if chunk.single_steps else jax.lax.fori_loop(k, k + between[i], step, state)

    def keep(records: Any, i: jax.Array, new: Any) -> Any:
        return jax.tree.map(lambda column, x: column.at[i].set(x, mode="drop"), records, new)

    def record(i: jax.Array, carry: tuple) -> tuple:
        k, state, records = carry
        return k + between[i], advance(i, k, state), keep(records, i, read(k, state))

    between = jnp.asarray(chunk.steps_between)
    k = jnp.asarray(chunk.start, between.dtype)
    # By `vmap`, so that records are sharded over devices as what is read is.
    records = jax.vmap(lambda _: jax.tree.map(jnp.zeros_like, read(k, state)))(between)
    count = jnp.sum(between > 0)
    k, state, records = jax.lax.fori_loop(0, count, record, (k, state, records))
    return state, keep(records, count, read(k, state))


def _scan_reversibly(
    step: Callable[[jax.Array, Any], Any], state: Any, read: Callable[[jax.Array, Any], Any], chunk: Chunk
) -> tuple[Any, Any]:
    """The same for 0 and 1 steps between records, by a loop that `jax.grad` can reverse; it tests every record."""

    def record(carry: tuple, between: jax.Array) -> tuple:
        k, state = carry
        moved = jax.lax.cond(between > 0, step, lambda k, state: state, k, state)
        return (k + between, moved), read(k, state)

    between = jnp.asarray(chunk.steps_between)
    records: Any
    (_, state), records = jax.lax.scan(record, (jnp.asarray(chunk.start, between.dtype), state), between)
    return state, records
