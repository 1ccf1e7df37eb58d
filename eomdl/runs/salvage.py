"""What a run has computed when something is raised in it."""

import contextlib
import dataclasses

import jax
import numpy as np

from eomdl import _processes
from eomdl._end import RESULTS, End
from eomdl.runs.data import AbstractData
from eomdl.runs.record import Record, column_shapes
from eomdl.runs.trajectory import Trajectory


def carry(error: BaseException, trajectory: Trajectory) -> None:
    """Give an exception the trajectory as its attribute `trajectory`, and a note that says so (PEP 678)."""
    note = (
        f"{len(trajectory.steps)} rows up to step {int(trajectory.end.step)} have been computed: they are in this "
        "exception's attribute `trajectory`, from which `resume=` goes on"
    )
    with contextlib.suppress(AttributeError, TypeError):  # an exception that takes no attributes
        error.trajectory = trajectory  # type: ignore[attr-defined]
        error.add_note(note)


def interrupted(trajectory: Trajectory) -> Trajectory:
    """With that as its result, unless it has failed before."""
    if any(bool(trajectory.result == r) for r in (RESULTS.nonfinite, RESULTS.max_steps_reached)):
        return trajectory
    return dataclasses.replace(trajectory, result=RESULTS.interrupted)


def nothing_yet(begin: End, step_size: float, record: Record, data: AbstractData) -> Trajectory:
    """A run before its first stretch: the row of its start, or no row where its observables raise."""
    observables: dict[str, np.ndarray] = {}
    # Of several processes none can count on the others now.
    rows = 0 if _processes.several() else int(begin.step in record.steps)
    try:
        # Not compiled: nobody wants to wait for that now.
        for name, f in record.observe.items():
            observables[name] = np.asarray(f(begin.params, data.seen_by(f)))[None][:rows]
    except Exception:
        rows = 0
        shapes = column_shapes(record.observe, begin.params, data.seen_by)
        observables = {name: np.zeros((0, *shape)) for name, shape in shapes.items()}
    steps = np.full(rows, begin.step)
    row = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype) if rows == 0 else np.asarray(x), begin.params)
    params = jax.tree.map(lambda x: np.repeat(x[None], rows, axis=0), row)
    times = steps * np.asarray(step_size)
    kept = params if record.save_params else None
    return Trajectory(steps, times, kept, observables, None, RESULTS.interrupted, begin, record.per_member)
