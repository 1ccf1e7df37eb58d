"""The compiled programs that carry a flow over a chunk: the only file that calls diffrax's solver."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from eomdl import _costs, _devices, _tree
from eomdl._end import RESULTS, result_where
from eomdl._types import Args, Params, State, StateObservable
from eomdl._upstream import no_callbacks
from eomdl.flows.base import AbstractFlow, map_of
from eomdl.flows.stride import step_data
from eomdl.runs.chunk import Chunk
from eomdl.runs.data import ChunkData
from eomdl.runs.dynamics import first_record, scan_records


class OdeProblem(eqx.Module):
    """A flow, and how diffrax is to integrate it.

    - `dt0`: the first ODE step tried, in steps of the optimizer.
    - `flat`: as one vector, which compiles twice as fast where a state has hundreds of leaves, but takes two
        copies of it more, and gathers what is sharded.
    - `shardings`: of the state, as `_devices.shardings` gives them.
    - `scales`: a factor for each leaf by which the solver weighs its errors; None for 1 everywhere.
    - `observe_state`: recorded beside the parameters.
    - `records_state`: the records are of the flow's state, at the last multiple of the stride, in place of both.
    """

    flow: AbstractFlow
    solver: diffrax.AbstractSolver
    adjoint: diffrax.AbstractAdjoint
    max_steps: int = eqx.field(static=True)
    dt0: jax.Array
    flat: bool = eqx.field(static=True)
    shardings: tuple
    observe_state: dict[str, StateObservable]
    scales: State = None
    records_state: bool = eqx.field(static=True, default=False)


class StepControl(eqx.Module):
    """How the ODE steps are chosen.

    - `first_step_factor`: a factor of `dt0`; no step is longer than this times half of the way there is, so that where
        nothing else limits steps, those of a run with twice the factor are longer. None to leave all that to the
        controller.
    """

    controller: diffrax.AbstractStepSizeController
    first_step_factor: jax.Array | None = None


class _Integration(eqx.Module):
    """The ODE as the solver sees it, on the clock of steps from `base` on.

    The solver's state is the real part of the flow's, in its scales and in the widest of its dtypes. `rest` is the other
    part, counters and keys, which changes at the start of a stride only: a velocity may hold anything there. `unravel`
    takes the real part out of one vector, each leaf in its own dtype (None where it is not flat). Where it is not
    `active` the state rests.
    """

    problem: OdeProblem
    control: StepControl
    base: jax.Array
    active: Any
    rest: State
    is_real: State = eqx.field(static=True)
    dtypes: State = eqx.field(static=True)
    unravel: Callable[[jax.Array], State] | None = eqx.field(static=True)

    def field(self, s: Any, y: State, args: Args) -> State:
        h = self.problem.flow.step_size
        velocity = self.problem.flow((self.base + s) * h, self.from_solver(y), args)
        velocity = eqx.combine(eqx.filter(velocity, self.is_real), self.rest)
        velocity = _devices.with_shardings(velocity, self.problem.shardings)
        change = _tree.scale(h, self.to_solver(velocity))
        if self.active is True:
            return change
        return jax.tree.map(lambda leaf: jnp.where(self.active, leaf, 0), change)

    def to_solver(self, x: State) -> State:
        y = eqx.filter(x, self.is_real)
        if self.problem.scales is not None:
            y = jax.tree.map(jnp.multiply, self.problem.scales, y)
        if self.unravel is not None:
            return ravel_pytree(y)[0]
        widest = jnp.result_type(*jax.tree.leaves(y))
        return jax.tree.map(lambda leaf: leaf.astype(widest), y)

    def from_solver(self, y: State) -> State:
        if self.unravel is not None:
            x = self.unravel(y)
        else:
            x = jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), y, self.dtypes)
        if self.problem.scales is not None:
            x = jax.tree.map(jnp.divide, x, self.problem.scales)
        return eqx.combine(x, self.rest)

    def solve(self, x: State, s0: Any, s1: Any, args: Args, saveat: diffrax.SaveAt) -> diffrax.Solution:
        """From step base + s0 to base + s1."""
        time = _tree.dtype(x)
        first, controller = self.problem.dt0, self.control.controller
        factor = self.control.first_step_factor
        if factor is not None:
            longest = 0.5 * (s1 - s0)
            first = factor * jnp.minimum(first, longest)
            controller = dataclasses.replace(cast(Any, controller), dtmax=(factor * longest).astype(time))
        with no_callbacks():
            return diffrax.diffeqsolve(
                diffrax.ODETerm(self.field),
                self.problem.solver,
                jnp.asarray(s0, time),
                jnp.asarray(s1, time),
                first.astype(time),
                self.to_solver(x),
                args,
                saveat=saveat,
                stepsize_controller=controller,
                adjoint=self.problem.adjoint,
                max_steps=self.problem.max_steps,
                throw=False,
            )


class Integrated(eqx.Module):
    """The final state, what is recorded, result and counts.

    `records`: parameters (None for those of the start only) and observables, or states; leading axis R.
    """

    state: State
    records: Any
    result: Any
    counts: dict[str, jax.Array]


def integrator_for(problem: OdeProblem, chunk: Chunk) -> Callable[..., Integrated]:
    """The program `(problem, control, state, chunk) -> Integrated` for this flow and these data."""
    at_once = chunk.data.batches is None and problem.flow.refresh is None
    return integrate_at_once if at_once else integrate_by_strides


@eqx.filter_jit
def integrate_at_once(
    problem: OdeProblem, control: StepControl, state: State, chunk: Chunk, active: Any = True
) -> Integrated:
    """Integrate over a chunk as one ODE, its records interpolated. What is not `active` stays where it is.

    Of a chunk of one record and a flow of stride 1 no parameters are returned: they are those of `state`.
    A flow of stride m is carried from one multiple of m to the next: `state` is that at the last multiple of m up to
    the start.
    """
    flow, m, data = problem.flow, problem.flow.stride, chunk.data
    integration = _integration(problem, control, state, chunk, active)
    params_only = m == 1 and not problem.observe_state and not problem.records_state

    def save(s: Any, y: State, args: Args) -> Any:
        return flow.params(integration.from_solver(y)) if params_only else y

    steps = chunk.steps
    ts = jnp.asarray(steps - steps % m - integration.base, _tree.dtype(state))
    end = chunk.end - chunk.end % m - integration.base
    subs = [diffrax.SubSaveAt(t1=True)]
    if not chunk.has_one_record:  # else nothing is interpolated, which would keep all stages
        subs.append(diffrax.SubSaveAt(ts=ts, fn=save))
    solution = integration.solve(state, 0, end, data.args, diffrax.SaveAt(subs=subs))
    last, *saved = cast(list, solution.ys)
    final = integration.from_solver(jax.tree.map(lambda x: x[0], last))
    if chunk.has_one_record:
        return _integrated(problem, final, first_record(_read(problem, steps[0], state, chunk)), solution)
    # The solver saves the start when it has taken a step, and then as the step rounds it.
    first = save(None, integration.to_solver(state), data.args)
    rows = jax.tree.map(lambda row, x: row.at[0].set(x), saved[0], first)
    if params_only:
        return _integrated(problem, final, (rows, {}), solution)
    records = jax.lax.map(
        lambda at: _read(problem, at[0], integration.from_solver(at[1]), chunk), (steps, rows)
    )
    return _integrated(problem, final, records, solution)


@eqx.filter_jit
def integrate_by_strides(
    problem: OdeProblem, control: StepControl, state: State, chunk: Chunk, active: Any = True
) -> Integrated:
    """Integrate over a chunk as one ODE for every stride, with its own data; the rest as `integrate_at_once`."""
    flow, m, data = problem.flow, problem.flow.stride, chunk.data
    integration = _integration(problem, control, state, chunk, active)

    def step(k: jax.Array, carry: tuple) -> tuple:
        """The stride that step k is the last of."""
        x, result, counts = carry
        first = k + 1 - m
        args = data.stride(first, m)
        if flow.refresh is not None:
            x = flow.refresh(first * flow.step_size, x, args)
        here = dataclasses.replace(integration, rest=_without_real(x))
        s0 = first - integration.base
        solution = here.solve(x, s0, s0 + m, args, diffrax.SaveAt(t1=True))
        # Once failed, non-finite from there on: the records after it must not pass for a path.
        failed = solution.result != diffrax.RESULTS.successful
        new = here.from_solver(jax.tree.map(lambda leaf: leaf[0], solution.ys))
        new = jax.tree.map(
            lambda leaf: jnp.where(failed, jnp.nan, leaf) if eqx.is_inexact_array(leaf) else leaf, new
        )
        result = result_where(result == RESULTS.successful, _result(solution), result)
        return new, result, jax.tree.map(jnp.add, counts, _counts(problem, solution))

    def stride(k: jax.Array, carry: tuple) -> tuple:
        return step(k, carry) if m == 1 else jax.lax.cond(k % m == m - 1, step, lambda k, c: c, k, carry)

    def read(k: jax.Array, carry: tuple) -> Any:
        return _read(problem, k, carry[0], chunk)

    zeros = dict.fromkeys(_COUNTS, jnp.zeros((), jnp.asarray(0).dtype)) | {
        "gradient_evaluations": jnp.zeros(())
    }
    carry = (state, jax.tree.map(jnp.asarray, RESULTS.successful), zeros)
    (state, result, counts), records = scan_records(stride, carry, read, chunk)
    return Integrated(state, records, result, counts)


def _integration(
    problem: OdeProblem, control: StepControl, state: State, chunk: Chunk, active: Any
) -> _Integration:
    real = eqx.filter(state, eqx.is_inexact_array)
    return _Integration(
        problem,
        control,
        base=chunk.start - chunk.start % problem.flow.stride,
        active=active,
        rest=_without_real(state),
        is_real=jax.tree.map(eqx.is_inexact_array, state),
        dtypes=jax.tree.map(lambda leaf: leaf.dtype, real),
        unravel=ravel_pytree(real)[1] if problem.flat else None,
    )


def _without_real(state: State) -> State:
    return eqx.filter(state, eqx.is_inexact_array, inverse=True)


def _read(problem: OdeProblem, k: Any, x: State, chunk: Chunk) -> Any:
    """A record, without parameters where they are those of the state that the program was given."""
    if problem.records_state:
        return x
    params, observed = predict(problem, k, x, chunk.data)
    return None if chunk.has_one_record and problem.flow.stride == 1 else params, observed


def predict(problem: OdeProblem, k: Any, x: State, data: ChunkData) -> tuple[Params, dict[str, Any]]:
    """The prediction of iterate k from the state at the multiple of the stride before it."""
    flow, m = problem.flow, problem.flow.stride
    args = data.stride(k - k % m, m)
    for n in range(m - 1):
        here, own = jnp.asarray(k - k % m + n, jnp.result_type(float)), step_data(args, n)
        # By cond, so that steps not taken cost nothing.
        x = jax.lax.cond(n < k % m, lambda x, k=here, d=own: map_of(flow)(x, d, k), lambda x: x, x)
    observed = {name: f(k * flow.step_size, x, args) for name, f in problem.observe_state.items()}
    return flow.params(x), jax.tree.map(jnp.asarray, observed)


@eqx.filter_jit
def params_at(problem: OdeProblem, k: Any, x: State, data: ChunkData) -> Params:
    """The parameters of iterate k from the state at the multiple of the stride before it."""
    return predict(dataclasses.replace(problem, observe_state={}), k, x, data)[0]


@eqx.filter_jit
def diagnostics_at(flow: AbstractFlow, k: Any, x: State, data: ChunkData) -> dict[str, Any]:
    """The flow's diagnostics at the multiple of m before step k, with the data of the stride before it."""
    m = flow.stride
    here = k - k % m
    args = data.stride(jnp.maximum(here - m, data.first) if data.batches is not None else here, m)
    return flow.diagnostics(here * flow.step_size, x, args)


_COUNTS = ("num_steps", "num_accepted_steps", "num_rejected_steps")


def _integrated(problem: OdeProblem, final: State, records: Any, solution: diffrax.Solution) -> Integrated:
    return Integrated(final, records, _result(solution), _counts(problem, solution))


def _counts(problem: OdeProblem, solution: diffrax.Solution) -> dict[str, jax.Array]:
    counts = {name: jnp.asarray(solution.stats[name], jnp.asarray(0).dtype) for name in _COUNTS}
    evaluations = _costs.field_evaluations(problem.solver, counts["num_steps"])
    gradients = jnp.asarray(evaluations * problem.flow.gradient_cost, jnp.zeros(()).dtype)
    return counts | {"gradient_evaluations": gradients}


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


def tolerance_control(rtol: Any, atol: Any, dtype: Any, first_step_factor: float) -> StepControl:
    """Root mean square errors; a step that has to be cut to nothing (4096 roundings of a step) ends the run."""
    controller = diffrax.PIDController(
        jnp.asarray(rtol, dtype),
        jnp.asarray(atol, dtype),
        norm=_error_norm,
        dtmin=jnp.asarray(4096 * jnp.finfo(dtype).eps, dtype),
        force_dtmin=False,
    )
    # An array, since a number would be a constant of the program: one compilation for each.
    return StepControl(controller, jnp.asarray(first_step_factor))
