"""The options that `descend`, `iterate` and `solve` share: declared, documented and checked once."""

import dataclasses
import difflib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from eomdl import _check, _processes, _tree
from eomdl._end import End, require_end
from eomdl._shards import StoredArray
from eomdl._types import Args, Observable, Params
from eomdl.runs.checkpoints import Checkpoints
from eomdl.runs.chunk import saved_steps
from eomdl.runs.data import Batches, open_data
from eomdl.runs.loop import Loop
from eomdl.runs.monitor import AbstractMonitor
from eomdl.runs.record import Record
from eomdl.runs.rows_on_disk import RowsOnDisk
from eomdl.runs.run import Run
from eomdl.runs.trajectory import Trajectory


class RunOptions(TypedDict, total=False):
    """Options of `eomdl.descend`, `eomdl.iterate` and `eomdl.solve`.

    - `args`: data, passed to the loss (unless there are `batches`) and to the observables.
    - `batches`: data for the loss, one batch for each step: a pytree of arrays with leading axis
        `num_steps`, or a list or iterator that yields one batch for each step. `eomdl.runs.stacked` and
        `eomdl.runs.stream` say which of both it is; arrays are stacked and lists are streamed without them.
    - `observe`: `{name: function (params, args) -> array or pytree of arrays}`, recorded at every saved step.
        With `batches` the observables still see `args`, the full data set, say; those made by
        `eomdl.on_batch` see the step's own batch.
    - `monitors`: a sequence of `eomdl.runs.AbstractMonitor`, which measure between the steps at which they are due.
    - `save_params`: False keeps only the observables; memory is then flat in `num_steps` but
        for them. An `eomdl.runs.RowsOnDisk` sends the parameters to files as they are computed.
    - `save_steps`: an integer n saves steps 0, n, 2n, ... and the last; a sequence saves
        these step numbers. (Reverse-mode `jax.grad` through the run needs n = 1.)
    - `progress`: True for a tqdm bar, or a diffrax progress meter.
    - `resume`: a run to continue, to `num_steps` in all. The saved steps of a `Trajectory` come first; an
        `End` (`trajectory.end`, `Checkpoints.latest`) has none, and its step is recorded again.
        What is changed in the call makes a branch: the learning rate, `batches`, the loss; with
        `resume.without_state()` another optimizer. (A rate that sits in the optimizer's state, as with
        `optax.inject_hyperparams`, stays the old one.) An iterator in `batches` must begin at the first
        step still to do.
    - `checkpoints`: an `eomdl.Checkpoints`, which writes the whole state to disk on its schedule.
    - `throw`: raise `RuntimeError` where the run fails instead of returning what it has.

    What is raised in a run (by the iterator in `batches`, an observable, a monitor, a full disk) is raised as it is, with
    the steps computed so far as the exception's attribute `trajectory`, from which `resume=` continues. At Ctrl-C they
    are returned, with the result `RESULTS.interrupted`; before the first saved step it is raised.
    """

    args: Args
    batches: Batches | Any | Iterable[Any]
    observe: Mapping[str, Observable] | None
    monitors: Sequence[AbstractMonitor]
    save_params: bool | RowsOnDisk
    save_steps: int | Sequence[int]
    progress: bool | diffrax.AbstractProgressMeter
    resume: Trajectory | End | None
    checkpoints: Checkpoints | None
    throw: bool


_DEFAULTS = RunOptions(
    args=None,
    batches=None,
    observe=None,
    monitors=(),
    save_params=True,
    save_steps=1,
    progress=False,
    resume=None,
    checkpoints=None,
    throw=False,
)


# What other libraries call these options.
_MEANT = {
    "data": "args",
    "batch": "batches",
    "loader": "batches",
    "callbacks": "monitors",
    "save_every": "save_steps",
}


def set_up(verb: str, params: Params, num_steps: int, options: RunOptions, stride: int = 1) -> Run:
    """The options of a run, checked. **Raises:** `ValueError`; `TypeError` for an option there is none of."""
    _processes.require_own_threads()
    unknown = sorted(set(options) - set(_DEFAULTS))
    if unknown:
        meant = _MEANT.get(unknown[0]) or next(iter(difflib.get_close_matches(unknown[0], _DEFAULTS)), None)
        raise TypeError(
            f"{verb}() got an unexpected keyword argument {unknown[0]!r}; "
            + (f"did you mean {meant!r}?" if meant else f"there is {list(_DEFAULTS)}")
        )
    given: Any = {**_DEFAULTS, **options}
    num_steps = _check.integer("num_steps", num_steps, 1)
    params = _check.params("params", params)
    begin, before = _resumed(given["resume"], num_steps)
    start = 0 if begin is None else begin.step
    data = open_data(given["args"], given["batches"], num_steps, start, stride)
    steps = saved_steps("save_steps", num_steps, given["save_steps"])
    if not _tree.is_traced(params, data.args, data.example):
        _processes.assert_equal_across_processes(
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
    record = Record(
        _check.observables(given["observe"], params, data.seen_by),
        steps[steps > last],
        disk is not None or _check.flag("save_params", save_params),
    )
    return Run(
        params=params,
        num_steps=num_steps,
        loop=Loop(data, record, _monitors(given["monitors"]), checkpoints, _meter(given["progress"])),
        begin=begin,
        before=before,
        disk=disk,
        throw=_check.flag("throw", given["throw"]),
    )


def _resumed(resume: Any, num_steps: int) -> tuple[End | None, Trajectory | None]:
    """Where the run continues, and the saved steps that come first."""
    if resume is None:
        return None, None
    _check.kind("resume", resume, Trajectory | End, "an eomdl.Trajectory, an eomdl.runs.End or None")
    end = resume.end if isinstance(resume, Trajectory) else resume
    require_end("resume" if end is resume else "resume.end", end)
    if end.state is None and not _tree.is_traced(end.params):
        leaves = [leaf for leaf in jax.tree.leaves(end.params) if not isinstance(leaf, StoredArray)]
        if not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in leaves):
            raise ValueError("resume.params: expected finite parameters, got NaN or infinity in them")
    end = dataclasses.replace(end, step=int(end.step))
    if end.step > num_steps:
        raise ValueError(f"resume: expected a run of at most num_steps = {num_steps} steps, got {end.step}")
    if not isinstance(resume, Trajectory):
        return end, None
    # Without the saved steps behind the state: those of a run that failed there.
    behind = np.asarray(resume.steps) > end.step
    return end, resume.rows(~behind) if behind.any() else resume


def _monitors(monitors: Any) -> tuple[AbstractMonitor, ...]:
    is_sequence = isinstance(monitors, Sequence) and not isinstance(monitors, str)
    if not is_sequence or not all(isinstance(monitor, AbstractMonitor) for monitor in monitors):
        raise ValueError(
            f"monitors: expected a sequence of eomdl.runs.AbstractMonitor, got {_check.show(monitors)}"
        )
    return tuple(monitors)


def _meter(progress: bool | diffrax.AbstractProgressMeter) -> diffrax.AbstractProgressMeter:
    if isinstance(progress, diffrax.AbstractProgressMeter):
        return progress if _processes.is_first() else diffrax.NoProgressMeter()
    if not isinstance(progress, bool | np.bool_):
        raise ValueError(
            f"progress: expected True, False or a diffrax.AbstractProgressMeter, got {_check.show(progress)}"
        )
    shown = progress and _processes.is_first()
    return diffrax.TqdmProgressMeter(refresh_steps=1) if shown else diffrax.NoProgressMeter()
