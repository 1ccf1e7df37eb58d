"""How a state is carried on: all in which a real run, an ODE and an SDE differ."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from eomdl._end import Diagnostic, Stats
from eomdl._types import STATIC, Params, State, record_type
from eomdl.runs.data import Window


@record_type
class Span:
    """A stretch of a run, as a compiled program sees it: R rows, each recorded before its gap.

    - `start`: the first step.
    - `gaps`: steps after each row, shape (R,).
    - `single`: no gap is longer than one step.
    - `reversible`: `jax.grad` may be asked to go back through it.
    """

    start: Any
    gaps: Any
    single: bool = dataclasses.field(metadata=STATIC)
    reversible: bool = dataclasses.field(default=False, metadata=STATIC)

    @property
    def is_one_row(self) -> bool:
        """Whether its only row is the start: a program then gives none, since it would be a copy of what it was given."""
        return len(self.gaps) == 1

    @property
    def steps(self) -> jax.Array:
        """The step number of every row."""
        return self.start + jnp.cumsum(self.gaps) - self.gaps

    @property
    def end(self) -> jax.Array:
        """The number of steps taken at the end of the span."""
        return self.start + jnp.sum(self.gaps)


class Advanced(NamedTuple):
    """What advancing over a span gives.

    - `state` at its end.
    - `params`: of every row, leading axis R; `observables` of the whole state, `{name: (R, ...)}`.
    - `ode_error`: (R,), or None.
    - `result`: an item of `RESULTS`.
    - `counts`: what it has cost, by the names in `Stats`.
    """

    state: State
    params: Params
    observables: dict[str, jax.Array]
    ode_error: jax.Array | None
    result: Any
    counts: dict[str, jax.Array]


class AbstractDynamics(abc.ABC):
    """A state and how it is carried on. The loop asks nothing else of a run.

    `max_rows`: of a stretch, a power of two.
    """

    max_rows: ClassVar[int] = 256

    @property
    @abc.abstractmethod
    def step_size(self) -> Any:
        """Time of a step; nan where it is not known."""

    @property
    @abc.abstractmethod
    def identity(self) -> str:
        """What the state is carried on by, in a word that survives the disk."""

    @abc.abstractmethod
    def advance(self, state: State, span: Span, window: Window) -> Advanced:
        """The rows of a span, and the state at its end."""

    @abc.abstractmethod
    def params(self, state: State, step: int, window: Window) -> Params:
        """The parameters at the end of a stretch."""

    def prepared(self, state: State, span: Span, window: Window) -> "AbstractDynamics":
        """Itself with what is measured on the host before the first step: tolerances, units."""
        del state, span, window
        return self

    def diagnose(self, state: State, step: int, window: Window) -> dict[str, Diagnostic]:
        """Whether the model is valid here."""
        del state, step, window
        return {}

    def stats(self, stats: Stats) -> Stats:
        """The numbers of the run so far, with those of the dynamics in their place."""
        return stats


def as_row(params: Params) -> Params:
    """The only row of a stretch."""
    return jax.tree.map(lambda x: x[None], params)


class AbstractWatch(abc.ABC):
    """What looks at a run on the host from outside, between two stretches, and changes nothing."""

    @abc.abstractmethod
    def is_due(self, step: int) -> bool:
        """Whether there is a look before this step."""

    @abc.abstractmethod
    def look(self, step: int, state: State, window: Window) -> None:
        """Look at the state before a step, with the data of the steps that follow."""


def scan_rows(
    step: Callable[[jax.Array, Any], Any],
    state: Any,
    read: Callable[[jax.Array, Any], Any],
    span: Span,
) -> tuple[Any, Any]:
    """For every gap: record `read(k, state)`, then apply `step(k, state)` gap times.

    Gaps of 0 are the last ones; rows after the first of them are zeros.
    """
    if span.reversible:
        return _reversible_rows(step, state, read, span)

    def advanced(i: jax.Array, k: jax.Array, state: Any) -> Any:
        return step(k, state) if span.single else jax.lax.fori_loop(k, k + gaps[i], step, state)

    def row(i: jax.Array, carry: tuple) -> tuple:
        k, state, rows = carry
        return k + gaps[i], advanced(i, k, state), kept(rows, i, read(k, state))

    def kept(rows: Any, i: jax.Array, new: Any) -> Any:
        return jax.tree.map(lambda row, x: row.at[i].set(x, mode="drop"), rows, new)

    gaps = jnp.asarray(span.gaps)
    k = jnp.asarray(span.start, gaps.dtype)
    # By `vmap`, so that rows are spread over devices as what is read is.
    rows = jax.vmap(lambda _: jax.tree.map(jnp.zeros_like, read(k, state)))(gaps)
    count = jnp.sum(gaps > 0)
    k, state, rows = jax.lax.fori_loop(0, count, row, (k, state, rows))
    return state, kept(rows, count, read(k, state))


def _reversible_rows(
    step: Callable[[jax.Array, Any], Any], state: Any, read: Callable[[jax.Array, Any], Any], span: Span
) -> tuple[Any, Any]:
    """The same for gaps of 0 and 1, by a loop that `jax.grad` can reverse; it looks at every gap."""

    def row(carry: tuple, gap: jax.Array) -> tuple:
        k, state = carry
        return (k + gap, jax.lax.cond(gap > 0, step, lambda k, state: state, k, state)), read(k, state)

    gaps = jnp.asarray(span.gaps)
    records: Any
    (_, state), records = jax.lax.scan(row, (jnp.asarray(span.start, gaps.dtype), state), gaps)
    return state, records
