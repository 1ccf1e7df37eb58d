"""The options that `descend`, `iterate` and `solve` share: declared, documented and checked once."""

import contextlib
import dataclasses
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypedDict

import diffrax
import jax
import numpy as np

from eomdl import _check, _devices, _processes, _structure, _tree
from eomdl._end import End, real_part
from eomdl._types import Args, Observable, Params, State
from eomdl.runs.checkpoints import Checkpoints
from eomdl.runs.data import AbstractData, open_data
from eomdl.runs.dynamics import AbstractDynamics, AbstractWatch
from eomdl.runs.identity import checksum
from eomdl.runs.loop import Loop, run_traced
from eomdl.runs.plan import plan, plan_at_once, saved_steps
from eomdl.runs.record import Record, column_shapes
from eomdl.runs.rows_on_disk import OpenRows, RowsOnDisk
from eomdl.runs.salvage import carry, interrupted, nothing_yet
from eomdl.runs.trajectory import Trajectory, concatenated, joined


class RunOptions(TypedDict, total=False):
    """Options of `eomdl.descend`, `eomdl.iterate` and `eomdl.solve`.

    - `args`: data, passed to the loss (unless there are `batches`) and to the observables.
    - `batches`: data for the loss, one batch for each step: a pytree of arrays with leading axis
        `num_steps`, or a list or iterator that yields one batch for each step.
    - `observe`: `{name: function (params, args) -> array}`, recorded at every saved step.
        With `batches` the observables still see `args`, the full data set, say; those made by
        `eomdl.on_batch` see the step's own batch.
    - `save_params`: False keeps only the observables; memory is then flat in `num_steps` but
        for them. An `eomdl.runs.RowsOnDisk` sends the parameters to files as they are computed.
    - `save_steps`: an integer n saves steps 0, n, 2n, ... and the last; a sequence saves
        these step numbers. (Reverse-mode `jax.grad` through the run needs n = 1.)
    - `progress`: True for a tqdm bar, or a diffrax progress meter.
    - `resume`: a run to go on from, to `num_steps` in all. Of a `Trajectory` the rows come first; of an
        `End` (`trajectory.end`, `Checkpoints.latest`) there are none, and the row of its step is recorded anew.
        What is changed in the call makes a branch: the learning rate, `batches`, the loss; with
        `resume.without_state()` another optimizer. (A rate that sits in the optimizer's state, as with
        `optax.inject_hyperparams`, stays the old one.) An iterator in `batches` must begin at the first
        step still to do.
    - `checkpoints`: an `eomdl.Checkpoints`, which writes the whole state to disk on its schedule.
    - `throw`: raise `RuntimeError` where the run fails instead of returning what it has.

    What is raised in a run (by the iterator in `batches`, an observable, a progress meter, a full disk) goes on as it
    is, with the rows computed so far as the exception's attribute `trajectory`, from which `resume=` goes on. At Ctrl-C
    the rows are returned, with the result `RESULTS.interrupted`; before the first rows it is raised.
    """

    args: Args
    batches: Any | Iterable[Any]
    observe: Mapping[str, Observable] | None
    save_params: bool | RowsOnDisk
    save_steps: int | Sequence[int]
    progress: bool | diffrax.AbstractProgressMeter
    resume: Trajectory | End | None
    checkpoints: Checkpoints | None
    throw: bool


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run that has been asked for, its options checked.

    - `begin`: where it goes on, or None for a new run.
    - `before`: the rows that come first, or None.
    - `disk`: where the rows of the parameters go, or None for memory.
    """

    params: Params
    num_steps: int
    data: AbstractData
    record: Record
    begin: End | None
    before: Trajectory | None
    checkpoints: Checkpoints | None
    meter: diffrax.AbstractProgressMeter
    throw: bool
    disk: RowsOnDisk | None

    @property
    def start(self) -> int:
        """The first step."""
        return 0 if self.begin is None else int(self.begin.step)

    @property
    def starting_params(self) -> Params:
        """Where the state begins: at `params`, or where an earlier run ended."""
        if self.begin is None:
            return self.params
        return _structure.restore("resume.end.params", self.begin.params, self.params)

    def run(
        self,
        dynamics: AbstractDynamics,
        state: State,
        state_columns: Iterable[str] = (),
        watch: AbstractWatch | None = None,
    ) -> Trajectory:
        """Carry the state on to `num_steps`; `state_columns` are what the dynamics records itself."""
        begin = End(self.start, state, None) if self.begin is None else self.begin
        begin = dataclasses.replace(begin, step=self.start, state=state, params=self.starting_params)
        self._check_joinable({*self.record.observe, *state_columns})
        if _tree.is_traced(dynamics, state, self.data.args, self.data.example):
            for name, given in (
                ("checkpoints", self.checkpoints),
                ("save_params", self.disk),
                ("telemetry", watch),
            ):
                if given is not None:
                    raise ValueError(f"{name}: expected a run outside jit, vmap and grad, got traced values")
            planned = plan_at_once(self.start, self.num_steps, self.record.steps)
            return self._whole(run_traced(dynamics, begin, planned, self.record, self.data))
        disk = self._rows_on_disk()
        pieces: list[Trajectory] = []
        try:
            # What `extend` has taken stays in the list, whatever is raised in the run.
            pieces.extend(self._pieces(dynamics, begin, disk, watch))
            return self._whole(self._joined(pieces, disk))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and pieces:
                return interrupted(self._joined(pieces, disk))
            carry(error, self._joined(pieces, disk) if pieces else self._nothing_yet(dynamics, begin))
            _processes.explain(error)
            raise

    def _rows_on_disk(self) -> OpenRows | None:
        """Files for all rows, those of an earlier run already in them."""
        if self.disk is None:
            return None
        before = 0 if self.before is None else len(self.before.steps)
        rows = self.disk.open(self.params, before + len(self.record.steps))
        if self.before is not None:
            rows.append(self.before.params)
        return rows

    def _nothing_yet(self, dynamics: AbstractDynamics, begin: End) -> Trajectory:
        return self.before or nothing_yet(begin, dynamics.step_size, self.record, self.data)

    def _pieces(
        self, dynamics: AbstractDynamics, begin: End, disk: OpenRows | None, watch: AbstractWatch | None
    ) -> Iterator[Trajectory]:
        """The run on the host, stretch by stretch; without the parameters, where they went to disk."""
        if self.checkpoints is not None:
            run = int(begin.stats.run) or _origin(dynamics, begin)
            stats = dataclasses.replace(begin.stats, run=run, data=self.data.fingerprint)
            begin = dataclasses.replace(begin, stats=stats)
        looks = [] if watch is None else [k for k in range(self.start, self.num_steps) if watch.is_due(k)]
        with self._writing(begin) as written:
            cuts = np.union1d(written, looks).astype(int)
            size = max(_tree.size(self.params), 1 if self.data.in_arrays else _tree.size(self.data.example))
            planned = plan(self.start, self.num_steps, self.record.steps, cuts, size, dynamics.max_rows)
            loop = Loop(planned, self.record, self.data, self.checkpoints, self.meter, watch)
            for piece in loop.pieces(dynamics, begin):
                if disk is not None:
                    disk.append(piece.params)
                yield piece if disk is None else dataclasses.replace(piece, params=None)

    def _joined(self, pieces: list[Trajectory], disk: OpenRows | None) -> Trajectory:
        before, whole = self.before, concatenated(pieces)
        if before is not None and disk is not None:
            before = dataclasses.replace(before, params=None)
        whole = whole if before is None else joined(before, whole)
        return whole if disk is None else dataclasses.replace(whole, params=disk.rows(len(whole.steps)))

    def _whole(self, trajectory: Trajectory) -> Trajectory:
        """The trajectory, or the error that it is asked to be."""
        if self.throw and not _tree.is_traced(trajectory.result._value) and trajectory.message:
            raise RuntimeError(trajectory.message)
        return trajectory

    @contextlib.contextmanager
    def _writing(self, begin: End) -> Iterator[np.ndarray]:
        """The steps at which checkpoints are due; the folder is this run's as long as it lasts."""
        if self.checkpoints is None:
            yield np.array([], int)
            return
        shapes = column_shapes(self.record.observe, begin.params, self.data.seen_by)
        with self.checkpoints.locked():
            yield self.checkpoints.begin(self.num_steps, begin, shapes)

    def _check_joinable(self, observed: set[str]) -> None:
        run, save_params = self.before, self.record.save_params
        if run is not None and ((run.params is not None) != save_params or set(run.observables) != observed):
            raise ValueError(
                "resume: expected a run with the same save_params and observe, got "
                f"save_params={run.params is not None}, observe={sorted(run.observables)}; "
                "go on from its end with `resume=run.end`"
            )


_DEFAULTS = RunOptions(
    args=None,
    batches=None,
    observe=None,
    save_params=True,
    save_steps=1,
    progress=False,
    resume=None,
    checkpoints=None,
    throw=False,
)


def set_up(verb: str, params: Params, num_steps: int, options: RunOptions, stride: int = 1) -> Setup:
    """The options of a run, checked. **Raises:** `ValueError`; `TypeError` for an option there is none of."""
    unknown = sorted(set(options) - set(_DEFAULTS))
    if unknown:
        raise TypeError(
            f"{verb}() got an unexpected keyword argument {unknown[0]!r}; there is {list(_DEFAULTS)}"
        )
    given: Any = {**_DEFAULTS, **options}
    num_steps = _check.integer("num_steps", num_steps, 1)
    params = _check.params("params", params)
    begin, before = _resumed(given["resume"], num_steps)
    start = 0 if begin is None else begin.step
    data = open_data(given["args"], given["batches"], num_steps, start, stride)
    steps = saved_steps("save_steps", num_steps, given["save_steps"])
    if not _tree.is_traced(params, data.args, data.example):
        _processes.agree(
            verb,
            f"{num_steps} steps from step {start}",
            f"save_steps #{zlib.crc32(steps.tobytes()):08x}, save_params {given['save_params']}",
            *_processes.describe("params", params),
            *_processes.describe("args", data.args),
            *_processes.describe("the first of batches", None if data.in_arrays else data.example),
        )
    last = start - 1 if before is None else max(before.steps, default=-1)
    checkpoints = given["checkpoints"]
    _check.kind("checkpoints", checkpoints, Checkpoints | None, "an eomdl.Checkpoints")
    save_params = given["save_params"]
    disk = save_params if isinstance(save_params, RowsOnDisk) else None
    return Setup(
        params=params,
        num_steps=num_steps,
        data=data,
        record=Record(
            _check.observables(given["observe"], params, data.seen_by),
            steps[steps > last],
            disk is not None or _check.flag("save_params", save_params),
        ),
        begin=begin,
        before=before,
        checkpoints=checkpoints,
        meter=_meter(given["progress"]),
        throw=_check.flag("throw", given["throw"]),
        disk=disk,
    )


def _resumed(resume: Any, num_steps: int) -> tuple[End | None, Trajectory | None]:
    """Where to go on, and the rows that come first."""
    if resume is None:
        return None, None
    _check.kind("resume", resume, Trajectory | End, "an eomdl.Trajectory, an eomdl.runs.End or None")
    end = resume.end if isinstance(resume, Trajectory) else resume
    end = dataclasses.replace(end, step=int(end.step))
    if end.step > num_steps:
        raise ValueError(f"resume: expected a run of at most num_steps = {num_steps} steps, got {end.step}")
    if not isinstance(resume, Trajectory):
        return end, None
    # Not the rows behind the state: those of a run that failed there.
    behind = np.asarray(resume.steps) > end.step
    return end, resume.rows(~behind) if behind.any() else resume


def _origin(dynamics: AbstractDynamics, begin: End) -> int:
    """A run in a number, made of where it began and how it goes on."""
    leaves = jax.tree.leaves(real_part(begin.state))
    arrays = (np.asarray(_devices.on_host(leaf)).tobytes() for leaf in leaves)
    return checksum(dynamics.identity.encode(), str(begin.step).encode(), *arrays)


def _meter(progress: bool | diffrax.AbstractProgressMeter) -> diffrax.AbstractProgressMeter:
    if isinstance(progress, diffrax.AbstractProgressMeter):
        return progress if _processes.is_first() else diffrax.NoProgressMeter()
    if not isinstance(progress, bool | np.bool_):
        raise ValueError(
            f"progress: expected True, False or a diffrax.AbstractProgressMeter, got {progress!r:.80}"
        )
    shown = progress and _processes.is_first()
    return diffrax.TqdmProgressMeter(refresh_steps=1) if shown else diffrax.NoProgressMeter()
