"""How a state is carried on: all in which a real run, an ODE and an SDE differ."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
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
    """

    start: Any
    gaps: Any
    single: bool = dataclasses.field(metadata=STATIC)

    @property
    def steps(self) -> jax.Array:
        """The step number of every row."""
        return self.start + jnp.cumsum(self.gaps) - self.gaps

    @property
    def end(self) -> jax.Array:
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


class AbstractDynamics(eqx.Module):
    """A state and how it is carried on. The loop asks nothing else of a run."""

    @property
    @abc.abstractmethod
    def step_size(self) -> Any:
        """Time of a step; nan where it is not known."""

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


def scan_rows(
    step: Callable[[jax.Array, Any], Any],
    state: Any,
    read: Callable[[jax.Array, Any], Any],
    span: Span,
) -> tuple[Any, Any]:
    """For every gap: record `read(k, state)`, then apply `step(k, state)` gap times.

    With `span.single` the loop is one that `jax.grad` can reverse.
    """

    def row(carry: tuple, gap: jax.Array) -> tuple:
        k, state = carry
        if span.single:
            new = jax.lax.cond(gap > 0, step, lambda k, state: state, k, state)
        else:
            new = jax.lax.fori_loop(k, k + gap, step, state)
        return (k + gap, new), read(k, state)

    first = (jnp.asarray(span.start, span.gaps.dtype), state)
    records: Any
    (_, state), records = jax.lax.scan(row, first, span.gaps)
    return state, records
