"""One compiled program that carries a flow over a span: the only file that calls diffrax's solver."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any, cast

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from eomdl import _devices, _tree
from eomdl._end import RESULTS, result_where
from eomdl._types import Args, Params, State, StateObservable
from eomdl.flows.base import AbstractFlow
from eomdl.flows.stride import step_data
from eomdl.runs.data import Window
from eomdl.runs.dynamics import Span, as_row, scan_rows


class Integrator(eqx.Module):
    """How diffrax is to integrate.

    - `dt0`: the first ODE step tried, in steps.
    - `widen`: times this. No step is longer than this times half of the way there is: so where nothing else limits
        steps, those of a run with twice the number are longer. None to leave all that to the controller.
    - `flat`: as one vector, which compiles twice as fast where a state has hundreds of leaves, but takes two
        copies of it more, and gathers what is sharded.
    - `layout`: of the state, as `_devices.layout` gives it.
    """

    solver: diffrax.AbstractSolver
    adjoint: diffrax.AbstractAdjoint
    max_steps: int = eqx.field(static=True)
    dt0: jax.Array
    widen: jax.Array | None = None
    flat: bool = eqx.field(static=True, default=False)
    layout: tuple = ()


class _Problem(eqx.Module):
    """The ODE of a flow as the solver sees it.

    On the clock of steps from `base` on, in units in which the solver weighs its state, all of it in the widest of
    its dtypes; `unravel` takes the state out of one vector, each leaf in its own dtype (None where it is not flat).
    """

    flow: AbstractFlow
    integrator: Integrator
    controller: diffrax.AbstractStepSizeController
    units: State
    base: jax.Array
    unravel: Callable[[jax.Array], State] | None = eqx.field(static=True)
    dtypes: State = eqx.field(static=True)

    def field(self, s: Any, y: State, args: Args) -> State:
        h = self.flow.step_size
        velocity = self.flow((self.base + s) * h, self.from_solver(y), args)
        velocity = _devices.laid_out(velocity, self.integrator.layout)
        return _tree.scale(h, self.to_solver(velocity))

    def to_solver(self, x: State) -> State:
        y = x if self.units is None else jax.tree.map(jnp.multiply, self.units, x)
        if self.unravel is not None:
            return ravel_pytree(y)[0]
        widest = jnp.result_type(*jax.tree.leaves(y))
        return jax.tree.map(lambda leaf: leaf.astype(widest), y)

    def from_solver(self, y: State) -> State:
        if self.unravel is not None:
            x = self.unravel(y)
        else:
            x = jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), y, self.dtypes)
        return x if self.units is None else jax.tree.map(jnp.divide, x, self.units)

    def solve(self, x: State, s0: Any, s1: Any, args: Args, saveat: diffrax.SaveAt) -> diffrax.Solution:
        """From step base + s0 to base + s1."""
        time = _tree.dtype(x)
        first, controller = self.integrator.dt0, self.controller
        if self.integrator.widen is not None:
            longest = 0.5 * (s1 - s0)
            first = self.integrator.widen * jnp.minimum(first, longest)
            longest = (self.integrator.widen * longest).astype(time)
            controller = dataclasses.replace(cast(Any, controller), dtmax=longest)
        with _no_callbacks():
            return diffrax.diffeqsolve(
                diffrax.ODETerm(self.field),
                self.integrator.solver,
                jnp.asarray(s0, time),
                jnp.asarray(s1, time),
                first.astype(time),
                self.to_solver(x),
                args,
                saveat=saveat,
                stepsize_controller=controller,
                adjoint=self.integrator.adjoint,
                max_steps=self.integrator.max_steps,
                throw=False,
            )


@contextlib.contextmanager
def _no_callbacks() -> Iterator[None]:
    """Trace diffrax's checks of its own arguments without a callback to the host.

    A program with a callback is kept by no compilation cache and runs it on device 0. What would be checked is
    made here (steps in order, a first step forward); a check in a user's loss makes the state NaN, which the
    run reports. Equinox has no other way to say this than an environment variable that it reads at import.
    """
    errors = cast(Any, eqx)._errors
    before = errors.EQX_ON_ERROR
    if "EQX_ON_ERROR" not in os.environ:
        errors.EQX_ON_ERROR = "nan"
    try:
        yield
    finally:
        errors.EQX_ON_ERROR = before


@eqx.filter_jit
def integrate(
    flow: AbstractFlow,
    integrator: Integrator,
    controller: diffrax.AbstractStepSizeController,
    units: State,
    observe_state: dict[str, StateObservable],
    state: State,
    span: Span,
    window: Window,
) -> tuple[State, tuple, Any, dict[str, jax.Array]]:
    """Record, then integrate over the gap, for every gap: final state, R records, result, counts.

    Of a span of one row and a flow of stride 1 the record has no parameters: they are those of `state`.
    A flow of stride m is carried from one multiple of m to the next: `state` is that at
    the last multiple of m up to the start.
    """
    base = span.start - span.start % flow.stride
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, state)
    unravel = ravel_pytree(state)[1] if integrator.flat else None
    problem = _Problem(flow, integrator, controller, units, base, unravel, dtypes)
    if window.batches is None and not flow.refreshes:
        return _at_once(problem, observe_state, state, span, window)
    return _stride_by_stride(problem, observe_state, state, span, window)


def _at_once(
    problem: _Problem, observe_state: dict[str, StateObservable], state: State, span: Span, window: Window
) -> tuple[State, tuple, Any, dict[str, jax.Array]]:
    """One ODE problem, the rows interpolated."""
    flow, m = problem.flow, problem.flow.stride
    args = window.args
    time = _tree.dtype(state)
    plain = m == 1 and not observe_state

    def save(s: Any, y: State, args: Args) -> Any:
        return flow.params(problem.from_solver(y)) if plain else y

    steps = span.steps
    ts = (steps - steps % m - problem.base).astype(time)
    end = span.end - span.end % m - problem.base
    subs = [diffrax.SubSaveAt(t1=True)]
    if not span.is_one_row:  # else nothing is interpolated, which would keep all stages
        subs.append(diffrax.SubSaveAt(ts=ts, fn=save))
    solution = problem.solve(state, 0, end, args, diffrax.SaveAt(subs=subs))
    last, *saved = cast(list, solution.ys)
    final = problem.from_solver(jax.tree.map(lambda x: x[0], last))
    records: Any
    if span.is_one_row:
        records = as_row(_read(flow, observe_state, steps[0], state, window, span))
        return final, records, _result(solution), _counts(solution)
    # The solver saves the start when it has taken a step, and then as the step rounds it.
    first = save(None, problem.to_solver(state), args)
    rows = jax.tree.map(lambda row, x: row.at[0].set(x), saved[0], first)
    records = (rows, {})
    if not plain:
        records = jax.lax.map(
            lambda row: record(flow, observe_state, row[0], problem.from_solver(row[1]), window),
            (steps, rows),
        )
    return final, records, _result(solution), _counts(solution)


def _stride_by_stride(
    problem: _Problem, observe_state: dict[str, StateObservable], state: State, span: Span, window: Window
) -> tuple[State, tuple, Any, dict[str, jax.Array]]:
    """An ODE problem for every stride, with its own data."""
    flow, m = problem.flow, problem.flow.stride

    def step(k: jax.Array, carry: tuple) -> tuple:
        """The stride that step k is the last of."""
        x, result, counts = carry
        first = k + 1 - m
        data = window.stride(first, m)
        if flow.refreshes:
            x = flow.refresh(first * flow.step_size, x, data)
        s0 = first - problem.base
        solution = problem.solve(x, s0, s0 + m, data, diffrax.SaveAt(t1=True))
        # Once failed, non-finite from there on: the rows after it must not pass for a path.
        failed = solution.result != diffrax.RESULTS.successful
        new = problem.from_solver(jax.tree.map(lambda leaf: leaf[0], solution.ys))
        x = jax.tree.map(lambda leaf: jnp.where(failed, jnp.nan, leaf), new)
        result = result_where(result == RESULTS.successful, _result(solution), result)
        return x, result, jax.tree.map(jnp.add, counts, _counts(solution))

    def stride(k: jax.Array, carry: tuple) -> tuple:
        return step(k, carry) if m == 1 else jax.lax.cond(k % m == m - 1, step, lambda k, c: c, k, carry)

    zero = jnp.zeros((), jnp.asarray(0).dtype)
    carry = (state, jax.tree.map(jnp.asarray, RESULTS.successful), dict.fromkeys(_COUNTS, zero))
    (state, result, counts), records = scan_rows(
        stride, carry, lambda k, c: _read(flow, observe_state, k, c[0], window, span), span
    )
    return state, records, result, counts


def _read(
    flow: AbstractFlow,
    observe_state: dict[str, StateObservable],
    k: Any,
    x: State,
    window: Window,
    span: Span,
) -> tuple[Params | None, dict[str, jax.Array]]:
    """The record of a row, without parameters where they are those of the state that the program was given."""
    params, observed = record(flow, observe_state, k, x, window)
    return None if span.is_one_row and flow.stride == 1 else params, observed


def record(
    flow: AbstractFlow, observe_state: dict[str, StateObservable], k: Any, x: State, window: Window
) -> tuple[Params, dict[str, jax.Array]]:
    """The prediction of iterate k from the state at the multiple of m before it."""
    m = flow.stride
    args = window.stride(k - k % m, m)
    for n in range(m - 1):
        t, data = (k - k % m + n) * flow.step_size, step_data(args, n)
        # By cond, so that steps not taken cost nothing.
        x = jax.lax.cond(n < k % m, lambda x, t=t, d=data: flow.step(t, x, d), lambda x: x, x)
    return flow.params(x), {name: f(k * flow.step_size, x, args) for name, f in observe_state.items()}


@eqx.filter_jit
def params_at(flow: AbstractFlow, k: Any, x: State, window: Window) -> Params:
    """The parameters of iterate k from the state at the multiple of m before it."""
    return record(flow, {}, k, x, window)[0]


@eqx.filter_jit
def diagnostics_at(flow: AbstractFlow, k: Any, x: State, window: Window) -> dict[str, Any]:
    """The flow's diagnostics at the multiple of m before step k, with the data of the stride before it."""
    m = flow.stride
    here = k - k % m
    data = window.stride(jnp.maximum(here - m, window.first) if window.batches is not None else here, m)
    return flow.diagnostics(here * flow.step_size, x, data)


_COUNTS = ("num_steps", "num_accepted_steps", "num_rejected_steps")


def _counts(solution: diffrax.Solution) -> dict[str, jax.Array]:
    return {name: jnp.asarray(solution.stats[name], jnp.asarray(0).dtype) for name in _COUNTS}


def _result(solution: diffrax.Solution) -> Any:
    ok = solution.result == diffrax.RESULTS.successful
    # Steps are cut where a trial step is not finite: down to none where the velocity itself is not.
    stuck = solution.result == diffrax.RESULTS.dt_min_reached
    failed = result_where(stuck, RESULTS.nonfinite, RESULTS.max_steps_reached)
    return result_where(ok, RESULTS.successful, failed)


_rms = diffrax.PIDController(rtol=1.0, atol=1.0).norm


def _error_norm(error: State) -> jax.Array:
    """Infinite where the error is NaN: diffrax's controller cuts an infinite step, and never recovers from NaN."""
    norm = _rms(error)
    return jnp.where(jnp.isnan(norm), jnp.inf, norm)


def default_controller(rtol: Any, atol: Any, dtype: Any) -> diffrax.PIDController:
    """Root mean square errors; a step that has to be cut to nothing (4096 roundings of a step) ends the run."""
    return diffrax.PIDController(
        jnp.asarray(rtol, dtype),
        jnp.asarray(atol, dtype),
        norm=_error_norm,
        dtmin=jnp.asarray(4096 * jnp.finfo(dtype).eps, dtype),
        force_dtmin=False,
    )
