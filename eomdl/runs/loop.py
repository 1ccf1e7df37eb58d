"""The loop that `descend`, `iterate` and `solve` share: one on the host, one for traced runs.

A run is cut into stretches. One compiled program advances a stretch; between stretches the host moves the
rows out of device memory (which stays flat in the number of steps), shows progress, and can stop: at a
non-finite state or at the end of the batches. Inside `jit`, `vmap` or `grad` the whole run is one
stretch. Neither asks what kind of run it is, nor where its arrays live.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from eomdl import _processes
from eomdl._end import RESULTS, End, result_where, succeeded
from eomdl.runs.checkpoints import Checkpoints
from eomdl.runs.data import AbstractData
from eomdl.runs.dynamics import AbstractDynamics, AbstractWatch, Span
from eomdl.runs.leg import Leg, span_of
from eomdl.runs.plan import Plan, Stretch
from eomdl.runs.record import Record, recorded
from eomdl.runs.trajectory import Trajectory


@dataclasses.dataclass(frozen=True)
class Loop:
    """A run on the host."""

    plan: Plan
    record: Record
    data: AbstractData
    checkpoints: Checkpoints | None
    meter: diffrax.AbstractProgressMeter
    watch: AbstractWatch | None

    def pieces(self, dynamics: AbstractDynamics, begin: End) -> Iterator[Trajectory]:
        """The rows of every stretch, as soon as they are there: to the end of the plan, or as far as it goes.

        Checkpoints are written, and progress shown, when the next piece is asked for: whatever is raised then,
        the pieces so far are in the caller's hands.
        """
        end = begin
        with _Bar(self.meter, self.plan) as bar:
            for i in range(len(self.plan.stretches)):
                leg = self._leg(i, dynamics, end)
                dynamics = leg.dynamics
                table, good = leg.computed()
                yield self._kept(table, good & leg.stretch.saved)
                self._write(leg, table, good)
                end = table.end
                bar.show(int(end.step))
                self.data.raise_pending()
                if not succeeded(table.result):
                    break

    def _leg(self, i: int, dynamics: AbstractDynamics, begin: End) -> Leg:
        """The i-th stretch with its data, as far as there are any."""
        stretch = self.plan.stretches[i]
        with _processes.together("batches"):
            window, available = self.data.window(stretch.start, stretch.count, self.plan.num_steps)
        if not self.data.in_arrays:
            count = f"{available} from step {stretch.start}"
            count += f", then {self.data.pending!r}" if self.data.pending else ""
            _processes.agree("batches", count, *_processes.describe("", window.batches))
        dynamics = dynamics.prepared(begin.state, span_of(self.plan, stretch), window)
        if self.watch is not None and available and self.watch.is_due(stretch.start):
            self.watch.look(stretch.start, begin.state, window)
        return Leg(
            plan=self.plan,
            stretch=stretch.until(stretch.start + available),
            dynamics=dynamics,
            begin=dataclasses.replace(begin, stats=dynamics.stats(begin.stats)),
            window=window,
            observe=self.record.observe,
            per_member=self.record.per_member,
            keep_params=self._rows_wanted(stretch)
            or (self.checkpoints is not None and self.checkpoints.storage.gathers),
            is_whole=available >= stretch.count,
        )

    def _rows_wanted(self, stretch: Stretch) -> bool:
        """Whether parameters of its rows were asked for."""
        return self.record.save_params and bool(stretch.saved.any())

    def _kept(self, table: Trajectory, rows: np.ndarray) -> Trajectory:
        """The rows that were asked for."""
        if not self.record.save_params:
            table = dataclasses.replace(table, params=None)
        elif table.params is None:  # none of them is kept
            shapes = jax.tree.map(lambda x: np.empty((len(rows), *x.shape), x.dtype), table.end.params)
            table = dataclasses.replace(table, params=shapes)
        return table.rows(rows)

    def _write(self, leg: Leg, table: Trajectory, good: np.ndarray) -> None:
        """The checkpoints that are due in a stretch."""
        if self.checkpoints is None:
            return
        for i, events in self.checkpoints.due(np.asarray(table.steps), table.observables, good):
            step = int(table.steps[i])
            end = table.end if step == table.end.step else leg.end_at(step)
            if end is not None:
                row = dataclasses.replace(table.rows(slice(i, i + 1)), result=RESULTS.successful, end=end)
                self.checkpoints.write(row, events)


class _Bar:
    """A progress meter in use, closed whatever happens."""

    def __init__(self, meter: diffrax.AbstractProgressMeter, plan: Plan):
        self._meter, self._first = meter, plan.stretches[0].start
        self._length = max(plan.stretches[-1].end - self._first, 1)

    def __enter__(self) -> "_Bar":
        self._state = self._meter.init()
        return self

    def show(self, step: int) -> None:
        """That the run has come to a step."""
        self._state = self._meter.step(self._state, jnp.asarray((step - self._first) / self._length))

    def __exit__(self, *error: object) -> None:
        self._meter.close(self._state)


def run_traced(
    dynamics: AbstractDynamics, begin: End, plan: Plan, record: Record, data: AbstractData
) -> Trajectory:
    """The run inside `jit`, `vmap` or `grad`: one stretch, and nothing looked at."""
    (stretch,) = plan.stretches
    window, available = data.window(stretch.start, stretch.count, plan.num_steps)
    taken = stretch.until(stretch.start + available)
    span = Span(jnp.asarray(taken.start), jnp.asarray(taken.gaps), plan.single, reversible=plan.single)
    out = dynamics.advance(begin.state, span, window)
    wanted = jnp.ones(len(stretch.rows), bool)
    steps = jnp.asarray(stretch.rows)
    observed, finite, _ = recorded(record.observe, out.params, steps, wanted, window, out.state)
    ended = RESULTS.successful if taken.count == stretch.count else RESULTS.batches_exhausted
    result = result_where(jnp.all(finite), ended, RESULTS.nonfinite)
    result = result_where(out.result == RESULTS.successful, result, out.result)
    last = dynamics.params(out.state, taken.end, window)
    end = End(taken.end, out.state, last, dynamics.stats(begin.stats).plus(out.counts))
    keep = np.flatnonzero(stretch.saved)
    columns: Any = (out.params if record.save_params else None, observed | out.observables, out.ode_error)
    params, observed, error = jax.tree.map(lambda column: column[keep], columns)
    times = stretch.rows[keep] * dynamics.step_size
    return Trajectory(stretch.rows[keep], times, params, observed, error, result, end, record.per_member)
