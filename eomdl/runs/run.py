"""A run, from its checked options to its trajectory."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator

import jax
import numpy as np

from eomdl import _devices, _processes, _structure, _tree
from eomdl._end import End, real_part
from eomdl._fingerprint import checksum
from eomdl._types import Args, Params, State
from eomdl.runs.chunk import Chunk, plan_chunks, plan_one_chunk
from eomdl.runs.data import AbstractData
from eomdl.runs.dynamics import AbstractPreparation
from eomdl.runs.loop import Loop, attach_partial_result, empty_trajectory, run_traced
from eomdl.runs.record import observable_shapes
from eomdl.runs.rows_on_disk import OpenRows, RowsOnDisk
from eomdl.runs.trajectory import Trajectory, concatenate, join


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as it was asked for, its options checked.

    - `begin`: where it continues, or None for a new run.
    - `before`: the saved steps that come first, or None.
    - `disk`: where the parameters of the saved steps go, or None for memory.
    """

    params: Params
    num_steps: int
    loop: Loop
    begin: End | None
    before: Trajectory | None
    disk: RowsOnDisk | None
    throw: bool

    @property
    def data(self) -> AbstractData:
        """The data of every step."""
        return self.loop.data

    @property
    def start(self) -> int:
        """The number of the step at which the run begins."""
        return 0 if self.begin is None else int(self.begin.step)

    @functools.cached_property
    def starting_params(self) -> Params:
        """Where the state begins: at `params`, or where an earlier run ended."""
        if self.begin is None:
            return self.params
        return _structure.restore("resume.end.params", self.begin.params, self.params)

    def until(self, step: int) -> "Run":
        """The first steps of this run only, in memory and without checkpoints."""
        record = dataclasses.replace(
            self.loop.record, steps=self.loop.record.steps[self.loop.record.steps <= step]
        )
        loop = dataclasses.replace(self.loop, record=record, checkpoints=None)
        return dataclasses.replace(self, num_steps=step, loop=loop, disk=None)

    def after(self, first: Trajectory, keep_saved: bool) -> "Run":
        """The rest of this run, after its first steps; their saved ones come first, or are left out."""
        step, record = int(first.end.step), self.loop.record
        rest = record.steps[record.steps > step if keep_saved else record.steps >= step]
        loop = dataclasses.replace(self.loop, record=dataclasses.replace(record, steps=rest))
        return dataclasses.replace(self, loop=loop, begin=first.end, before=first if keep_saved else None)

    def run(
        self, prepared: AbstractPreparation, state: State, state_columns: Iterable[str] = ()
    ) -> Trajectory:
        """Carry the state to `num_steps`; `state_columns` are what the dynamics records itself."""
        begin = End(self.start, state, None) if self.begin is None else self.begin
        begin = dataclasses.replace(begin, step=self.start, state=state, params=self.starting_params)
        self._check_joinable({*self.loop.record.observe, *state_columns})
        if _tree.is_traced(prepared, state, self.data.args, self.data.example):
            return self._run_traced(prepared, begin)
        disk = self._open_disk()
        loop = dataclasses.replace(self.loop, disk=disk)
        parts: list[Trajectory] = []
        try:
            with self._begin_writing(prepared, begin) as (begin, chunks):
                # What `extend` has taken stays in the list, whatever is raised in the run.
                parts.extend(loop.run(chunks, prepared, begin))
            return self._or_raise(self._join(parts, disk))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and parts:
                return self._join(parts, disk).as_interrupted()
            partial = self._join(parts, disk) if parts else self.before
            step_size = prepared.step_size
            attach_partial_result(
                error, partial or empty_trajectory(begin, step_size, self.loop.record, self.data)
            )
            _processes.explain(error)
            raise

    def _run_traced(self, prepared: AbstractPreparation, begin: End) -> Trajectory:
        for name, given in (
            ("checkpoints", self.loop.checkpoints),
            ("save_params", self.disk),
            ("monitors", self.loop.monitors or None),
        ):
            if given is not None:
                raise ValueError(f"{name}: expected a run outside jit, vmap and grad, got traced values")
        chunk = plan_one_chunk(self.start, self.num_steps, self.loop.record.steps)
        return self._or_raise(run_traced(self.loop, chunk, prepared, begin))

    def _open_disk(self) -> OpenRows | None:
        """Files for the parameters of all saved steps, those of an earlier run already in them."""
        if self.disk is None:
            return None
        before = 0 if self.before is None else len(self.before.steps)
        start = None if self.begin is None else self.start
        rows = self.disk.open(self.params, before + len(self.loop.record.steps), start)
        if self.before is not None:
            rows.append(self.before.steps, self.before.params)
        return rows

    @contextlib.contextmanager
    def _begin_writing(
        self, prepared: AbstractPreparation, begin: End
    ) -> Iterator[tuple[End, tuple[Chunk, ...]]]:
        """Plan the chunks; the folder of checkpoints is this run's as long as it lasts."""
        steps = range(self.start, self.num_steps if self.loop.monitors else self.start)
        due = [k for k in steps if any(monitor.is_due(k) for monitor in self.loop.monitors)]
        if self.loop.checkpoints is None:
            yield begin, self._plan(prepared, np.array(due, int))
            return
        run = int(begin.stats.run) or _checksum_of_start(prepared, begin, self.data.example)
        stats = dataclasses.replace(begin.stats, run=run, data=self.data.fingerprint)
        begin = dataclasses.replace(begin, stats=stats)
        shapes = observable_shapes(self.loop.record.observe, begin.params, self.data.seen_by)
        with self.loop.checkpoints.locked():
            written = self.loop.checkpoints.begin(self.num_steps, begin, shapes)
            yield begin, self._plan(prepared, np.union1d(written, due).astype(int))

    def _plan(self, prepared: AbstractPreparation, cuts: np.ndarray) -> tuple[Chunk, ...]:
        size = max(_tree.size(self.params), 1 if self.data.in_arrays else _tree.size(self.data.example))
        return plan_chunks(
            self.start, self.num_steps, self.loop.record.steps, cuts, size, prepared.max_records
        )

    def _join(self, parts: list[Trajectory], disk: OpenRows | None) -> Trajectory:
        before, whole = self.before, concatenate(parts)
        if before is not None and disk is not None:
            before = dataclasses.replace(before, params=None)
        whole = whole if before is None else join(before, whole)
        return whole if disk is None else dataclasses.replace(whole, params=disk.rows(len(whole.steps)))

    def _or_raise(self, trajectory: Trajectory) -> Trajectory:
        """The trajectory, or the error that it is asked to be."""
        if self.throw and not _tree.is_traced(trajectory.result) and trajectory.message:
            raise RuntimeError(trajectory.message)
        return trajectory

    def _check_joinable(self, observed: set[str]) -> None:
        before, save_params = self.before, self.loop.record.save_params
        if before is None or not len(before.steps):
            return
        if (before.params is not None) != save_params or set(before.observables) != observed:
            raise ValueError(
                "resume: expected a run with the same save_params and observe, got "
                f"save_params={before.params is not None}, observe={sorted(before.observables)}; "
                "continue from its end with `resume=run.end`"
            )


def _checksum_of_start(prepared: AbstractPreparation, begin: End, args: Args) -> int:
    """A run in a number, made of where it began and how it is carried."""
    leaves = jax.tree.leaves(real_part(begin.state))
    arrays = (np.asarray(_devices.on_host(leaf)).tobytes() for leaf in leaves)
    return checksum(prepared.fingerprint(begin.params, args).encode(), str(begin.step).encode(), *arrays)
