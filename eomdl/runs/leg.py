"""One stretch of a run on the host: computed, checked, and cut back to where it is sound."""

import dataclasses
from typing import Any

import numpy as np

from eomdl import _devices
from eomdl._end import RESULTS, End, is_finite, succeeded
from eomdl._types import Observable
from eomdl.runs.data import Window
from eomdl.runs.dynamics import AbstractDynamics, Span
from eomdl.runs.plan import Plan, Stretch
from eomdl.runs.record import recorded
from eomdl.runs.trajectory import Trajectory


# Steps: a look at the diagnostics costs many gradients, and stretches of large networks are short.
LOOK_EVERY = 64


def span_of(plan: Plan, stretch: Stretch) -> Span:
    """A stretch as compiled programs see it, with room for all rows of the plan."""
    # NumPy arrays, since a Python number would be a constant of the program: one compilation for each.
    return Span(np.asarray(stretch.start), stretch.padded_gaps(plan.num_rows), plan.single)


@dataclasses.dataclass(frozen=True)
class Leg:
    """A stretch to compute: how, from where, and with which data.

    - `is_whole`: there is data for all of its steps.
    - `per_member`: names of the observables with a value for each member.
    - `keep_params`: the parameters of its rows are wanted on the host.
    """

    plan: Plan
    stretch: Stretch
    dynamics: AbstractDynamics
    begin: End
    window: Window
    observe: dict[str, Observable]
    per_member: tuple[str, ...]
    keep_params: bool
    is_whole: bool

    def computed(self) -> tuple[Trajectory, np.ndarray]:
        """All its rows with the end it comes to, and which of them were reached and are finite."""
        out = self.dynamics.advance(self.begin.state, span_of(self.plan, self.stretch), self.window)
        rows = self.stretch.rows
        steps = np.pad(rows, (0, self.plan.num_rows - len(rows)), mode="edge")
        wanted = np.arange(self.plan.num_rows) < len(rows)
        observed, finite, ok = recorded(self.observe, out.params, steps, wanted, self.window, out.state)
        # Rows go to the host, the state stays where it is.
        columns = (out.params if self.keep_params else None, observed, out.observables, out.ode_error, finite)
        columns = _devices.rows_on_host(columns, len(rows))
        params, observed, of_state, error, finite = columns
        ok, counts = _devices.on_host((ok, out.counts))
        reached = rows <= self.stretch.end
        good = np.cumprod(finite & reached).astype(bool)
        end, result = self.begin, RESULTS.nonfinite if succeeded(out.result) else out.result
        if succeeded(out.result) and ok and np.all(good | ~reached):
            end = self._diagnosed(self._end(self.stretch.end, out.state, counts))
            result = RESULTS.successful if self.is_whole else RESULTS.batches_exhausted
        else:
            # Back to the last good row, so that the run can go on from what its rows end with.
            last = self.end_at(int(rows[good][-1])) if good.any() else None
            end = self._diagnosed(last or self.begin)
        times = rows * np.asarray(self.dynamics.step_size)
        return Trajectory(rows, times, params, observed | of_state, error, result, end, self.per_member), good

    def end_at(self, step: int) -> End | None:
        """Where the run is at a row, by computing up to there again; None where it is not finite."""
        if step == self.stretch.start:
            return self.begin
        span = span_of(self.plan, self.stretch.until(step))
        out = self.dynamics.advance(self.begin.state, span, self.window)
        return (
            self._end(step, out.state, _devices.on_host(out.counts)) if bool(is_finite(out.state)) else None
        )

    def _end(self, step: int, state: Any, counts: dict[str, Any]) -> End:
        params = self.dynamics.params(state, step, self.window)
        return End(step, state, params, self.begin.stats.plus(counts))

    def _diagnosed(self, end: End) -> End:
        """With the diagnostics at the start of the run, every so many steps, and where it ends."""
        moved = int(end.step) > self.stretch.start
        is_last = end.step == self.plan.stretches[-1].end or end.step < self.stretch.end
        is_due = is_last or end.step // LOOK_EVERY > self.stretch.start // LOOK_EVERY
        ends = [self.begin] * (self.stretch.start == 0) + [end] * (moved and is_due)
        stats = end.stats
        for there in ends:
            stats = stats.diagnosed(self.dynamics.diagnose(there.state, int(there.step), self.window))
        return dataclasses.replace(end, stats=stats)
