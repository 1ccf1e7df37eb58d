"""The loop that `descend`, `iterate` and `solve` share: one on the host, one for traced runs.

A run is cut into chunks. One compiled program advances a chunk; between chunks the host moves the records out of device
memory (which stays flat in the number of steps), shows progress, and can stop: at a non-finite state or at the end of
the batches. Inside `jit`, `vmap` or `grad` the whole run is one chunk. Neither asks what kind of run it is, nor where its
arrays are.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from eomdl import _devices, _processes
from eomdl._end import RESULTS, End, is_finite, result_where, succeeded
from eomdl.runs.checkpoints import Checkpoints
from eomdl.runs.chunk import Chunk, data_length
from eomdl.runs.data import AbstractData
from eomdl.runs.dynamics import AbstractDynamics, AbstractPreparation, Advanced
from eomdl.runs.monitor import AbstractMonitor
from eomdl.runs.record import Record, evaluate_records, observable_shapes
from eomdl.runs.rows_on_disk import OpenRows
from eomdl.runs.trajectory import Trajectory


# Steps: diagnostics cost many gradients, and chunks of large networks are short.
DIAGNOSE_EVERY = 64


@dataclasses.dataclass(frozen=True)
class Loop:
    """What a run sees and keeps on its way.

    `disk`: where the parameters of the saved steps go, or None for memory.
    """

    data: AbstractData
    record: Record
    monitors: tuple[AbstractMonitor, ...]
    checkpoints: Checkpoints | None
    meter: diffrax.AbstractProgressMeter
    disk: OpenRows | None = None

    def run(self, chunks: Sequence[Chunk], prepared: AbstractPreparation, begin: End) -> Iterator[Trajectory]:
        """Yield the saved steps of every chunk, as soon as they are computed: to the end, or as far as the run goes.

        Checkpoints are written, and progress shown, when the next chunk is asked for: whatever is raised then, the
        chunks so far are in the caller's hands.
        """
        end, dynamics, length = begin, None, data_length(chunks)
        with _Progress(self.meter, chunks) as progress:
            for planned in chunks:
                chunk, available = _load(self.data, planned, length)
                dynamics = prepared.prepare(end.state, chunk) if dynamics is None else dynamics
                if available:
                    self._measure(dynamics, end, chunk)
                begin = dataclasses.replace(end, stats=dynamics.stats(end.stats))
                taken = chunk.until(int(chunk.start) + available)
                part = _Part(self, dynamics, begin, taken, planned, end_of_run=int(chunks[-1].end))
                trajectory, good = part.check(dynamics.advance(begin.state, taken))
                yield self._select(trajectory, good & planned.of_records(planned.is_saved))
                with self._after_pending():
                    part.write_checkpoints(trajectory, good)
                end = trajectory.end
                progress.show(int(end.step))
                self.data.raise_pending()
                if not succeeded(trajectory.result):
                    break

    def _measure(self, dynamics: AbstractDynamics, end: End, chunk: Chunk) -> None:
        """Let the monitors that are due before a chunk measure."""
        step = int(chunk.start)
        for monitor in self.monitors:
            if monitor.is_due(step):
                params = dynamics.params(end.state, step, chunk.data)
                monitor.measure(step, params, dynamics.monitor_state(end.state), chunk.data.at(chunk.start))

    @contextlib.contextmanager
    def _after_pending(self) -> Iterator[None]:
        """Where a disk fails after a source of batches has, raise what was raised first; it has the other as its context."""
        try:
            yield
        except OSError:
            self.data.raise_pending()
            raise

    def _select(self, trajectory: Trajectory, rows: np.ndarray) -> Trajectory:
        """The steps that were asked for, without the parameters where they go to disk."""
        if not self.record.save_params:
            trajectory = dataclasses.replace(trajectory, params=None)
        elif trajectory.params is None:  # none of them is kept
            params = trajectory.end.params
            empty = jax.tree.map(lambda x: np.empty((len(rows), *x.shape), x.dtype), params)
            trajectory = dataclasses.replace(trajectory, params=empty)
        trajectory = trajectory.rows(rows)
        if self.disk is None:
            return trajectory
        with self._after_pending():
            self.disk.append(trajectory.steps, trajectory.params)
        return dataclasses.replace(trajectory, params=None)


def _load(data: AbstractData, chunk: Chunk, length: int) -> tuple[Chunk, int]:
    """A chunk with its data, and of how many of its steps there are any."""
    with _processes.barrier("batches"):
        loaded, available = data.load(int(chunk.start), chunk.count, length)
    if not data.in_arrays:
        count = f"{available} from step {int(chunk.start)}"
        count += f", then {data.pending!r}" if data.pending else ""
        _processes.assert_equal_across_processes("batches", count, *_processes.describe("", loaded.batches))
    return chunk.with_data(loaded), available


@dataclasses.dataclass(frozen=True)
class _Part:
    """One chunk of a run: by what it is advanced, and from where.

    `chunk` has those of the `planned` steps that there are data for.
    """

    loop: Loop
    dynamics: AbstractDynamics
    begin: End
    chunk: Chunk
    planned: Chunk
    end_of_run: int

    @property
    def keeps_params(self) -> bool:
        """Whether the parameters of its records are wanted on the host."""
        checkpoints = self.loop.checkpoints
        is_written = checkpoints is not None and checkpoints.storage.gathers
        return is_written or (self.loop.record.save_params and bool(np.any(self.chunk.is_saved)))

    def check(self, out: Advanced) -> tuple[Trajectory, np.ndarray]:
        """All its records with the end it comes to, and which of them were reached and are finite."""
        chunk, record = self.chunk, self.loop.record
        observed, finite, ok = evaluate_records(record.observe, out.params, chunk, out.state)
        # Records go to the host, the state stays where it is.
        columns = (
            out.params if self.keeps_params else None,
            observed,
            out.observables,
            out.ode_error,
            finite,
        )
        columns = _devices.rows_on_host(columns, int(chunk.num_records))
        params, observed, of_state, error, finite = columns
        ok, counts = _devices.on_host((ok, out.counts))
        steps = self.planned.of_records(self.planned.steps)
        reached = steps <= int(chunk.end)
        good = np.cumprod(finite & reached).astype(bool)
        end, result = self.begin, RESULTS.nonfinite if succeeded(out.result) else out.result
        if succeeded(out.result) and ok and np.all(good | ~reached):
            end = self._diagnose(self._end(int(chunk.end), out.state, counts))
            result = RESULTS.successful if chunk.count == self.planned.count else RESULTS.batches_exhausted
        else:
            # Back to the last good record, so that a run can continue where its saved steps end.
            last = self.end_at(int(steps[good][-1])) if good.any() else None
            end = self._diagnose(last or self.begin)
        times = steps * np.asarray(self.dynamics.step_size)
        per_member = record.per_member + (tuple(of_state) if self.dynamics.has_members else ())
        return Trajectory(steps, times, params, observed | of_state, error, result, end, per_member), good

    def end_at(self, step: int) -> End | None:
        """Where the run is at a record, by computing up to there again; None where it is not finite."""
        if step == int(self.chunk.start):
            return self.begin
        out = self.dynamics.advance(self.begin.state, self.chunk.until(step))
        if not bool(is_finite(out.state)):
            return None
        return self._end(step, out.state, _devices.on_host(out.counts))

    def write_checkpoints(self, trajectory: Trajectory, good: np.ndarray) -> None:
        """Write the checkpoints that are due in the chunk."""
        checkpoints = self.loop.checkpoints
        if checkpoints is None:
            return
        for i, events in checkpoints.due(np.asarray(trajectory.steps), trajectory.observables, good):
            step = int(trajectory.steps[i])
            end = trajectory.end if step == trajectory.end.step else self.end_at(step)
            if end is not None:
                row = trajectory.rows(slice(i, i + 1))
                checkpoints.write(dataclasses.replace(row, result=RESULTS.successful, end=end), events)

    def _end(self, step: int, state: Any, counts: dict[str, Any]) -> End:
        params = self.dynamics.params(state, step, self.chunk.data)
        return End(step, state, params, self.begin.stats.with_counts(counts))

    def _diagnose(self, end: End) -> End:
        """With the diagnostics at the start of the run, every so many steps, and where it ends."""
        start = int(self.chunk.start)
        moved = int(end.step) > start
        is_last = end.step == self.end_of_run or end.step < int(self.chunk.end)
        is_due = is_last or end.step // DIAGNOSE_EVERY > start // DIAGNOSE_EVERY
        stats = end.stats
        for there in [self.begin] * (start == 0) + [end] * (moved and is_due):
            found = self.dynamics.diagnose(there.state, int(there.step), self.chunk.data)
            stats = stats.with_diagnostics(found)
        return dataclasses.replace(end, stats=stats)


class _Progress:
    """A progress meter in use, closed whatever happens."""

    def __init__(self, meter: diffrax.AbstractProgressMeter, chunks: Sequence[Chunk]):
        self._meter, self._first = meter, int(chunks[0].start)
        self._length = max(int(chunks[-1].end) - self._first, 1)

    def __enter__(self) -> "_Progress":
        self._state = self._meter.init()
        return self

    def show(self, step: int) -> None:
        """Show that the run has come to a step."""
        self._state = self._meter.step(self._state, jnp.asarray((step - self._first) / self._length))

    def __exit__(self, *error: object) -> None:
        self._meter.close(self._state)


def run_traced(loop: Loop, planned: Chunk, prepared: AbstractPreparation, begin: End) -> Trajectory:
    """The run inside `jit`, `vmap` or `grad`: one chunk, and nothing tested on the host."""
    record = loop.record
    data, available = loop.data.load(int(planned.start), planned.count, planned.count)
    chunk = planned.with_data(data).until(int(planned.start) + available)
    dynamics = prepared.prepare(begin.state, chunk)
    out = dynamics.advance(begin.state, chunk)
    observed, finite, _ = evaluate_records(record.observe, out.params, chunk, out.state)
    ended = RESULTS.successful if chunk.count == planned.count else RESULTS.batches_exhausted
    result = result_where(jnp.all(finite), ended, RESULTS.nonfinite)
    result = result_where(out.result == RESULTS.successful, result, out.result)
    last = dynamics.params(out.state, int(chunk.end), data)
    end = End(int(chunk.end), out.state, last, dynamics.stats(begin.stats).with_counts(out.counts))
    keep = np.flatnonzero(planned.is_saved)
    columns: Any = (out.params if record.save_params else None, observed | out.observables, out.ode_error)
    params, observed, error = jax.tree.map(lambda column: column[keep], columns)
    steps = planned.steps[keep]
    times = steps * dynamics.step_size
    per_member = record.per_member + (tuple(out.observables) if dynamics.has_members else ())
    return Trajectory(steps, times, params, observed, error, result, end, per_member)


# ------------------------------------------------------- what is there when something is raised


def attach_partial_result(error: BaseException, trajectory: Trajectory) -> None:
    """Give an exception the trajectory as its attribute `trajectory`, and a note that says so (PEP 678)."""
    note = (
        f"{len(trajectory.steps)} saved steps up to step {int(trajectory.end.step)} are in this exception's attribute "
        "`trajectory`, from which `resume=` continues"
    )
    with contextlib.suppress(AttributeError, TypeError):  # an exception that takes no attributes
        error.trajectory = trajectory  # type: ignore[attr-defined]
        error.add_note(note)


def empty_trajectory(begin: End, step_size: float, record: Record, data: AbstractData) -> Trajectory:
    """A run before its first chunk: the record of its start, or none where its observables raise."""
    # Of several processes none can count on the others now.
    rows = 0 if _processes.is_distributed() else int(begin.step in record.steps)
    try:
        # Not compiled: nobody wants to wait for that now.
        values = {name: f(begin.params, data.seen_by(f)) for name, f in record.observe.items()}
        observables = jax.tree.map(lambda x: np.asarray(x)[None][:rows], values)
    except Exception:
        rows = 0
        shapes = observable_shapes(record.observe, begin.params, data.seen_by)
        observables = jax.tree.map(lambda x: np.zeros((0, *x.shape)), shapes)
    steps = np.full(rows, begin.step)
    row = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype) if rows == 0 else np.asarray(x), begin.params)
    params = jax.tree.map(lambda x: np.repeat(x[None], rows, axis=0), row)
    times = steps * np.asarray(step_size)
    kept = params if record.save_params else None
    return Trajectory(steps, times, kept, observables, None, RESULTS.interrupted, begin, record.per_member)
