"""A flow as dynamics: what was asked of it, how it is integrated, and as one member of an ensemble."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import override

from eomdl import _tree
from eomdl._end import RESULTS, Diagnostic, Stats, is_finite
from eomdl._types import STATIC, Args, Params, State, record_type
from eomdl.flows.base import map_of
from eomdl.runs.chunk import Chunk
from eomdl.runs.data import ChunkData
from eomdl.runs.dynamics import AbstractDynamics, AbstractPreparation, Advanced, first_record
from eomdl.runs.ensemble_dynamics import EnsembleState
from eomdl.runs.integrator import (
    OdeProblem,
    StepControl,
    diagnostics_at,
    integrator_for,
    params_at,
    predict,
    tolerance_control,
)
from eomdl.runs.tolerances import (
    Measured,
    default_tolerances,
    derivative_diagnostics,
    distances,
    jump_at,
    measure_scales,
    measure_tolerances,
)


_DEPARTURE = "error in the first step / that step"
_MEANING = (
    "The model is farther from the optimizer after its first step than the optimizer moves in it, so it says nothing about "
    "this run: lower the learning rate or the order, or begin where the optimizer's steps change little from one to the next."
)
TOLERANCE_FACTOR = 16.0  # of the second run: about twice as long steps of a solver of order 5


class FlowState(NamedTuple):
    """The state of a flow's run: of the run itself, and of the one with larger tolerances that estimates its error (or None)."""

    flow: State
    coarse: State


@record_type
class _OfFlow(AbstractPreparation):
    """A flow and how it is integrated. `name`: the flow's fingerprint."""

    problem: OdeProblem
    name: str = dataclasses.field(metadata=STATIC)

    @property
    @override
    def step_size(self) -> Any:
        return self.problem.flow.step_size

    @override
    def fingerprint(self, params: Params, args: Args) -> str:
        return self.name


@record_type
class OdeRequest(_OfFlow):
    """What was asked of a flow: `controller`, `rtol` and `atol` are None where they are to be measured.

    - `before`: the numbers of an earlier run; one of the same flow has tolerances already.
    - `is_member`: the state is that of one member of an ensemble.
    """

    controller: diffrax.AbstractStepSizeController | None
    rtol: Any
    atol: Any
    diagnosed: bool = dataclasses.field(metadata=STATIC)
    before: Stats | None
    is_member: bool = dataclasses.field(metadata=STATIC, default=False)

    @override
    def as_member(self) -> "OdeRequest":
        return dataclasses.replace(self, is_member=True)

    @override
    def prepare(self, state: Any, chunk: Chunk) -> AbstractDynamics:
        flow_state = state.members.flow if self.is_member else state.flow
        scales = measure_scales(self.problem.flow, flow_state, chunk)
        problem = dataclasses.replace(self.problem, scales=scales)
        rtol, atol = self._given_tolerances()
        dtype, measured = _tree.dtype(flow_state), None
        if self.controller is None and (rtol is None or atol is None):
            measured = measure_tolerances(problem, flow_state, chunk)
            rtol, atol = (
                jnp.asarray(default if given is None else given, dtype)
                for given, default in zip((rtol, atol), measured[:2], strict=True)
            )
        dynamics = self._dynamics(problem, rtol, atol, dtype)
        is_continued = self.before is not None and self.before.flow == self.name
        if self.diagnosed and not is_continued:
            at_start = derivative_diagnostics(problem.flow, flow_state, chunk)
            dynamics = dataclasses.replace(dynamics, at_start=at_start)
        if not self.is_member:
            return dataclasses.replace(dynamics, start=int(chunk.start), measured=measured)
        # A length is of one member, and compared with nothing.
        of_member = None if measured is None else measured._replace(step_length=None)
        return dataclasses.replace(dynamics, measured=of_member).as_member()

    def with_default_tolerances(self, params: Params) -> "OdeDynamics":
        """The dynamics with the tolerances that they have where nothing can be measured."""
        dtype = _tree.dtype(params)
        rtol, atol = (
            jnp.asarray(default) if given is None else given
            for default, given in zip(default_tolerances(dtype), (self.rtol, self.atol), strict=True)
        )
        return self._dynamics(self.problem, rtol, atol, dtype)

    def _given_tolerances(self) -> tuple[Any, Any]:
        """Those of the call, else those of an earlier run of the same flow."""
        before = self.before
        if before is None or before.flow != self.name or before.rtol is None:
            return self.rtol, self.atol
        return (
            jnp.asarray(before.rtol) if self.rtol is None else self.rtol,
            jnp.asarray(before.atol) if self.atol is None else self.atol,
        )

    def _dynamics(self, problem: OdeProblem, rtol: Any, atol: Any, dtype: Any) -> "OdeDynamics":
        if self.controller is not None:
            control = coarse = StepControl(self.controller)
        else:
            control, coarse = _controls(rtol, atol, dtype)
        return OdeDynamics(problem, self.name, control, coarse, rtol, atol, self.diagnosed)


def _controls(rtol: Any, atol: Any, dtype: Any) -> tuple[StepControl, StepControl]:
    """Of the run, and of the one with larger tolerances that estimates its error."""
    # Twice the first step and the longest one for that: with the same ones, what neither run rejects would be the same
    # to the last bit, and no error would show.
    coarse = tolerance_control(rtol * TOLERANCE_FACTOR, atol * TOLERANCE_FACTOR, dtype, 2.0)
    return tolerance_control(rtol, atol, dtype, 1.0), coarse


@record_type
class OdeDynamics(_OfFlow, AbstractDynamics):
    """A flow and how it is integrated; `coarse` is the control of the run that estimates the error.

    - `at_start`: diagnostics that were measured before the first step, and are not measured again.
    - `measured`: what was measured at the step `start`, where tolerances were.
    """

    control: StepControl
    coarse: StepControl
    rtol: Any
    atol: Any
    diagnosed: bool = dataclasses.field(metadata=STATIC)
    at_start: dict[str, Diagnostic] = dataclasses.field(default_factory=dict)
    start: int = dataclasses.field(metadata=STATIC, default=0)
    measured: Measured | None = dataclasses.field(metadata=STATIC, default=None)

    @override
    def as_member(self) -> "MemberOde":
        return MemberOde(self)

    @override
    def advance(self, state: FlowState, chunk: Chunk) -> Advanced:
        integrate, flow = integrator_for(self.problem, chunk), self.problem.flow
        fine = integrate(self.problem, self.control, state.flow, chunk)
        params, observed = fine.records
        params = first_record(flow.params(state.flow)) if params is None else params
        if state.coarse is None:
            return Advanced(FlowState(fine.state, None), params, observed, None, fine.result, fine.counts)
        coarse = integrate(self.problem, self.coarse, state.coarse, chunk)
        other = coarse.records[0]
        other = first_record(flow.params(state.coarse)) if other is None else other
        counts = jax.tree.map(jnp.add, fine.counts, coarse.counts)
        end = FlowState(fine.state, coarse.state)
        return Advanced(end, params, observed, distances(params, other), fine.result, counts)

    @override
    def params(self, state: FlowState, step: int, data: ChunkData) -> Params:
        # Between two strides, by steps of the discrete map from the last one.
        if step % self.problem.flow.stride == 0:
            return self.problem.flow.params(state.flow)
        return params_at(self.problem, np.asarray(step), state.flow, data)

    @override
    def monitor_state(self, state: FlowState) -> State:
        return state.flow

    @override
    def diagnose(self, state: FlowState, step: int, data: ChunkData) -> dict[str, Diagnostic]:
        if not self.diagnosed:
            return {}
        flow = self.problem.flow
        found = diagnostics_at(flow, np.asarray(step), state.flow, data)
        if self.measured is None or not self.measured.is_constant:
            return found
        return found | jump_at(flow, np.asarray(step), state.flow, data)

    @override
    def stats(self, stats: Stats) -> Stats:
        # Diagnostics of another flow are dropped.
        if stats.flow != self.name:
            stats = dataclasses.replace(stats, diagnostics={})
        stats = dataclasses.replace(stats, diagnostics={**self.at_start, **stats.diagnostics})
        flow, measured = self.problem.flow, self.measured
        stats = dataclasses.replace(stats, flow=self.name, rtol=self.rtol, atol=self.atol)
        stats = dataclasses.replace(stats, stride=flow.stride, target=flow.target)
        if measured is None:
            return stats
        if measured.step_length is not None and not map_of(flow).is_model:
            stats = dataclasses.replace(stats, first_step=self.start, first_length=measured.step_length)
        departure = Diagnostic(np.atleast_1d(measured.departure), limit=1.0, meaning=_MEANING)
        if self.diagnosed and departure.exceeded:
            stats = dataclasses.replace(stats, diagnostics=stats.diagnostics | {_DEPARTURE: departure})
        return stats


@record_type
class MemberOde(AbstractDynamics):
    """A flow as one member of an ensemble: where it fails, it stays at its last record that is finite."""

    ode: OdeDynamics

    @property
    @override
    def step_size(self) -> Any:
        return self.ode.step_size

    @override
    def fingerprint(self, params: Params, args: Args) -> str:
        return self.ode.name

    @override
    def as_member(self) -> "MemberOde":
        return self

    @override
    def for_all(self, others: Sequence[AbstractDynamics]) -> "MemberOde":
        dynamics = [cast(MemberOde, other).ode for other in others]
        farthest = max((d.measured for d in dynamics if d.measured), key=_departure, default=None)
        at_start = _largest([d.at_start for d in dynamics])
        own = dataclasses.replace(self.ode, at_start=at_start, measured=farthest)
        if own.control.first_step_factor is None:  # the user's own controller
            return MemberOde(own)
        rtol, atol = (
            jnp.min(jnp.stack(values)) for values in zip(*((d.rtol, d.atol) for d in dynamics), strict=True)
        )
        scales = [d.problem.scales for d in dynamics]
        if all(scale is not None for scale in scales):
            problem = dataclasses.replace(
                self.ode.problem, scales=jax.tree.map(lambda *x: jnp.max(jnp.stack(x)), *scales)
            )
        else:
            problem = self.ode.problem
        control, coarse = _controls(rtol, atol, cast(Any, self.ode.control.controller).dtmin.dtype)
        ode = dataclasses.replace(own, problem=problem, control=control, coarse=coarse, rtol=rtol, atol=atol)
        return MemberOde(ode)

    @override
    def without_labels(self) -> "MemberOde":
        return MemberOde(dataclasses.replace(self.ode, name="", diagnosed=False, at_start={}, measured=None))

    @override
    def advance(self, state: EnsembleState, chunk: Chunk) -> Advanced:
        ode, own, active = self.ode, state.members, state.alive > 0.5
        problem = dataclasses.replace(ode.problem, records_state=True)
        integrate, flow = integrator_for(problem, chunk), problem.flow
        both = [integrate(problem, ode.control, own.flow, chunk, active)]
        if own.coarse is not None:
            both.append(integrate(problem, ode.coarse, own.coarse, chunk, active))
        ends, records = ([getattr(x, name) for x in both] for name in ("state", "records"))
        starts = [own.flow, own.coarse][: len(both)]
        good = active & (jnp.cumprod(jax.vmap(is_finite)(records)) > 0)
        sound = jnp.all(good | ~chunk.is_record) & is_finite(ends)
        alive = active & (both[0].result == RESULTS.successful) & sound
        filled = _fill(records, starts, good & chunk.is_record)
        stay = jax.tree.map(lambda x: x[-1], filled)
        rows = [
            jax.lax.map(lambda at: predict(ode.problem, at[0], at[1], chunk.data), (chunk.steps, x))
            for x in filled
        ]
        params = [row[0] for row in rows]
        # Between two strides the map itself may have led out of what is finite.
        params = _fill(params, [*map(flow.params, starts)], good & jax.vmap(is_finite)(params))
        steps = jnp.asarray(chunk.steps)
        last = steps[jnp.maximum(jnp.sum(good & chunk.is_record) - 1, 0)]
        step = jnp.where(alive, chunk.end, last - last % flow.stride).astype(state.reached.dtype)
        members = jax.tree.map(lambda a, b: jnp.where(alive, a, b), ends, stay)
        reason = jnp.where(both[0].result == RESULTS.max_steps_reached, -1, 0)
        kind = jnp.where(active, jnp.where(alive, 1, reason), state.alive).astype(state.alive.dtype)
        coarse = members[1] if own.coarse is not None else None
        end = EnsembleState(FlowState(members[0], coarse), kind, jnp.where(active, step, state.reached))
        error = distances(*params) if own.coarse is not None else None
        counts = jax.tree.map(lambda *n: sum(n), *(x.counts for x in both))
        return Advanced(end, params[0], rows[0][1], error, RESULTS.successful, counts)

    @override
    def params(self, state: EnsembleState, step: int, data: ChunkData) -> Params:
        # A frozen member stays at a multiple of the stride.
        here, there = self.ode.params(state.members, step, data), self.ode.params(state.members, 0, data)
        return jax.tree.map(lambda a, b: jnp.where(state.alive > 0.5, a, b), here, there)

    @override
    def monitor_state(self, state: EnsembleState) -> State:
        return state.members.flow

    @override
    def diagnose(self, state: EnsembleState, step: int, data: ChunkData) -> dict[str, Diagnostic]:
        return self.ode.diagnose(state.members, step, data)

    @override
    def stats(self, stats: Stats) -> Stats:
        return self.ode.stats(stats)


def _departure(measured: Measured) -> float:
    return np.inf if np.isnan(measured.departure) else measured.departure


def _largest(found: Sequence[dict[str, Diagnostic]]) -> dict[str, Diagnostic]:
    """The diagnostics of several members, of each the largest value."""
    every = {name: d for members in found for name, d in members.items()}
    values = {name: [members[name].value for members in found if name in members] for name in every}
    return {name: dataclasses.replace(d, value=np.max(values[name], axis=0)) for name, d in every.items()}


def _fill(rows: Any, starts: Any, good: jax.Array) -> Any:
    """Records that are good, behind each the last one that is; the start where there is none before."""
    last = jax.lax.cummax(jnp.where(good, jnp.arange(len(good)), -1))

    def fill(x: jax.Array, start: jax.Array) -> jax.Array:
        is_there = (last >= 0).reshape(-1, *[1] * start.ndim)
        return jnp.where(is_there, x[jnp.maximum(last, 0)], start)

    return jax.tree.map(fill, rows, starts)
