"""The loop that `descend`, `iterate` and `solve` share: one on the host, one for traced runs.

A run is cut into stretches. One compiled program advances a stretch; between stretches the host moves the
rows out of device memory (which stays flat in the number of steps), shows progress, and can stop: at a
non-finite state, at the end of the batches, or at Ctrl-C. Inside `jit`, `vmap` or `grad` the whole run is one
stretch. Neither asks what kind of run it is, nor where its arrays live.
"""

import dataclasses
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from eomdl._end import RESULTS, End, is_finite, result_where, succeeded
from eomdl._types import State
from eomdl.runs.checkpoints import Checkpoints
from eomdl.runs.data import AbstractData, Window
from eomdl.runs.dynamics import AbstractDynamics, Advanced, Span
from eomdl.runs.plan import Plan, Stretch
from eomdl.runs.record import Record, recorded
from eomdl.runs.trajectory import Trajectory, concatenated


class _Stretched(NamedTuple):
    """A stretch that has been computed, on the host.

    - `table`: all its rows, at the end of the stretch.
    - `good`: which rows were reached and are finite, from the first on.
    - `broken`: whether the run ends here.
    """

    table: Trajectory
    good: np.ndarray
    broken: bool


@dataclasses.dataclass(frozen=True)
class Loop:
    """A run on the host."""

    plan: Plan
    record: Record
    data: AbstractData
    checkpoints: Checkpoints | None
    meter: diffrax.AbstractProgressMeter

    def run(self, dynamics: AbstractDynamics, begin: End) -> Trajectory:
        """From `begin` to the end of the plan, or as far as it goes."""
        pieces: list[Trajectory] = []
        end = begin
        bar = self.meter.init()
        first, last = self.plan.stretches[0].start, self.plan.stretches[-1].end
        try:
            for stretch in self.plan.stretches:
                window, available = self.data.window(stretch.start, stretch.count, self.plan.num_steps)
                dynamics = dynamics.prepared(end.state, self._span(stretch), window)
                end = dataclasses.replace(end, stats=dynamics.stats(end.stats))
                done = self._stretch(dynamics, end, stretch, stretch.until(stretch.start + available), window)
                # From here on it is kept, whatever comes.
                pieces.append(self._kept(done, stretch.saved))
                if self.checkpoints is not None:
                    self._write(dynamics, end, done, stretch, window)
                end = done.table.end
                bar = self.meter.step(bar, jnp.asarray((end.step - first) / max(last - first, 1)))
                self.data.raise_pending()
                if not succeeded(done.table.result):
                    break
        except KeyboardInterrupt:
            if not pieces:
                raise
            pieces[-1] = dataclasses.replace(pieces[-1], result=RESULTS.interrupted)
        self.meter.close(bar)
        return concatenated(pieces)

    def _stretch(
        self, dynamics: AbstractDynamics, begin: End, planned: Stretch, stretch: Stretch, window: Window
    ) -> _Stretched:
        """All rows of a stretch, and the end it comes to."""
        out, observed, finite, ok = self._advance(dynamics, begin.state, stretch, window)
        failed = not succeeded(out.result)
        good = np.cumprod(finite & (stretch.rows <= stretch.end)).astype(bool)
        reached = stretch.rows <= stretch.end
        broken = failed or not ok or not np.all(good | ~reached)
        table = self._table(dynamics, stretch, out, observed)
        if broken:
            result = out.result if failed else RESULTS.nonfinite
            return _Stretched(
                self._rolled_back(dynamics, begin, table, good, result, window, stretch), good, True
            )
        # At the start of the run, and at the end of every stretch.
        found = dynamics.diagnose(out.state, stretch.end, window)
        stats = begin.stats
        if stretch.start == self.plan.stretches[0].start == 0:
            stats = stats.diagnosed(dynamics.diagnose(begin.state, stretch.start, window))
        stats = stats.diagnosed(found).plus(out.counts)
        end = End(stretch.end, out.state, dynamics.params(out.state, stretch.end, window), stats)
        result = RESULTS.successful if stretch.count == planned.count else RESULTS.batches_exhausted
        return _Stretched(dataclasses.replace(table, result=result, end=end), good, False)

    def _advance(
        self, dynamics: AbstractDynamics, state: State, stretch: Stretch, window: Window
    ) -> tuple[Advanced, Any, np.ndarray, bool]:
        out = dynamics.advance(state, self._span(stretch), window)
        room = self.plan.num_rows - len(stretch.rows)
        steps = np.pad(stretch.rows, (0, room), mode="edge")
        wanted = np.arange(self.plan.num_rows) < len(stretch.rows)
        checked = recorded(self.record.observe, out.params, steps, wanted, window, out.state)
        observed, finite, ok = checked
        # Rows go to the host, the state stays where it is.
        rows = (out.params if self._params_kept else None, observed, out.observables, out.ode_error)
        (params, observed, of_state, error), finite, ok, counts = jax.device_get(
            (rows, finite, ok, out.counts)
        )
        out = out._replace(params=params, ode_error=error, counts=counts)
        return out, observed | of_state, finite[: len(stretch.rows)], bool(ok)

    def _span(self, stretch: Stretch) -> Span:
        # NumPy arrays, since a Python number would be a constant of the program: one compilation for each.
        return Span(np.asarray(stretch.start), stretch.padded_gaps(self.plan.num_rows), self.plan.single)

    @property
    def _params_kept(self) -> bool:
        return self.record.save_params or self.checkpoints is not None

    def _table(
        self, dynamics: AbstractDynamics, stretch: Stretch, out: Advanced, observed: dict[str, Any]
    ) -> Trajectory:
        count = len(stretch.rows)
        params, observed, error = jax.tree.map(lambda x: x[:count], (out.params, observed, out.ode_error))
        times = stretch.rows * np.asarray(dynamics.step_size)
        return Trajectory(
            stretch.rows, times, params, observed, error, RESULTS.successful, End(0, None, None)
        )

    def _rolled_back(
        self,
        dynamics: AbstractDynamics,
        begin: End,
        table: Trajectory,
        good: np.ndarray,
        result: Any,
        window: Window,
        stretch: Stretch,
    ) -> Trajectory:
        """The table with the state of its last good row, so that the run can go on from what its rows end with."""
        step = int(table.steps[max(int(good.sum()) - 1, 0)])
        end = dataclasses.replace(begin, step=stretch.start)
        if step > stretch.start:
            end = self._end_at(dynamics, begin, stretch, step, window) or end
        return dataclasses.replace(table, result=result, end=end)

    def _end_at(
        self, dynamics: AbstractDynamics, begin: End, stretch: Stretch, step: int, window: Window
    ) -> End | None:
        """Where the run is at a row of a stretch, by computing up to there again; None where it is not finite."""
        part = dynamics.advance(begin.state, self._span(stretch.until(step)), window)
        if not bool(is_finite(part.state)):
            return None
        stats = begin.stats.plus(jax.device_get(part.counts))
        return End(step, part.state, dynamics.params(part.state, step, window), stats)

    def _kept(self, done: _Stretched, saved: np.ndarray) -> Trajectory:
        """The rows that were asked for."""
        table = done.table
        if not self.record.save_params:
            table = dataclasses.replace(table, params=None)
        return table.rows(done.good & saved)

    def _write(
        self, dynamics: AbstractDynamics, begin: End, done: _Stretched, stretch: Stretch, window: Window
    ) -> None:
        """The checkpoints that are due in a stretch."""
        assert self.checkpoints is not None
        table = done.table
        for i, events in self.checkpoints.due(table.steps, table.observables, done.good):
            step = int(table.steps[i])
            end: End | None = dataclasses.replace(begin, step=step)
            if step == table.end.step:
                end = table.end
            elif step != stretch.start:
                end = self._end_at(dynamics, begin, stretch, step, window)
            if end is not None:
                row = table.rows(slice(i, i + 1))
                self.checkpoints.write(dataclasses.replace(row, result=RESULTS.successful, end=end), events)


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
    return Trajectory(stretch.rows[keep], times, params, observed, error, result, end)
