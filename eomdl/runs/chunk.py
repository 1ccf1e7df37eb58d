"""The chunks of a run: what one compiled program computes at a time, planned on the host."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from eomdl import _check
from eomdl._types import STATIC, Array, record_type
from eomdl.runs.data import ChunkData, no_batches


MAX_STEPS = 1024  # of the optimizer in a chunk: the work until the host can show progress or stop
MAX_SCALARS = 2**22  # in the parameters that a chunk records, so that they fit in memory
NO_DATA = no_batches(None)


@record_type
class Chunk:
    """One compiled piece of a run: R records, and after each of them the steps up to the next.

    The same class is planned on the host, where its arrays are NumPy's, and passed to compiled programs. All chunks of
    a run have room for the same number R of records, so that they are one program: behind the last record
    `steps_between` is 0.

    - `start`: the number of the first step.
    - `steps_between`: steps taken after each record, shape (R,).
    - `is_saved`: which records were asked for, shape (R,); the others bound the work between two records and are
        dropped.
    - `num_records`: how many of the R records there are.
    - `data`: the data of its steps; none in a plan.
    - `single_steps`: no record is followed by more than one step.
    - `reversible`: `jax.grad` may be asked to go back through it.
    """

    start: Any
    steps_between: Any
    is_saved: Any
    num_records: Any
    data: ChunkData = NO_DATA
    single_steps: bool = dataclasses.field(metadata=STATIC, default=False)
    reversible: bool = dataclasses.field(metadata=STATIC, default=False)

    @property
    def steps(self) -> Array:
        """The step number of every record, shape (R,)."""
        return self.start + self.steps_between.cumsum() - self.steps_between

    @property
    def end(self) -> Any:
        """The step number at which the next chunk begins."""
        return self.start + self.steps_between.sum()

    @property
    def count(self) -> int:
        """The number of steps, on the host."""
        return int(self.steps_between.sum())

    @property
    def has_one_record(self) -> bool:
        """Whether there is room for the record of the start only: a program then returns none, for it would be a copy."""
        return len(self.steps_between) == 1

    @property
    def is_record(self) -> Array:
        """Which of the R records there are, shape (R,)."""
        return jnp.arange(len(self.steps_between)) < self.num_records

    def of_records(self, column: Array) -> Array:
        """The part of a host array of shape (R, ...) that belongs to records that there are."""
        return column[: int(self.num_records)]

    def until(self, step: int) -> "Chunk":
        """The same records, but no step after the given one is taken."""
        taken = np.clip(step - self.steps, 0, self.steps_between)
        return dataclasses.replace(self, steps_between=taken)

    def with_data(self, data: ChunkData) -> "Chunk":
        """This chunk with the data of its steps."""
        return dataclasses.replace(self, data=data)


def saved_steps(name: str, num_steps: int, steps: int | Sequence[int] | np.ndarray) -> np.ndarray:
    """The step numbers that an integer (every n-th, and the last) or a sequence stands for."""
    array = np.asarray(steps if _check.makes_array(steps) else ())
    if array.ndim == 0:
        every = _check.integer(name, steps, 1)
        return np.unique(np.append(np.arange(0, num_steps + 1, every), num_steps))
    if (
        array.ndim != 1
        or array.size == 0
        or not np.issubdtype(array.dtype, np.integer)
        or array.min() < 0
        or array.max() > num_steps
    ):
        raise ValueError(
            f"{name}: expected a positive integer n (every n-th step) or step numbers from 0 to "
            f"num_steps = {num_steps}, got {_check.show(steps)}"
        )
    return np.unique(array)


def plan_chunks(
    start: int, num_steps: int, saved: np.ndarray, cuts: np.ndarray, record_size: int, max_records: int
) -> tuple[Chunk, ...]:
    """The chunks from `start` to `num_steps`, with the saved steps among their records.

    A new chunk begins at every cut: there the host has the state. `record_size` is how many numbers are in a record
    (and in a batch that is streamed). The room R for records, at most `max_records`, depends on it only, so that runs
    of another length find their program compiled.
    """
    room = min(max_records, 1 << (max(MAX_SCALARS // record_size, 1).bit_length() - 1))
    probes = np.arange(start, num_steps, MAX_STEPS)
    steps = np.unique(np.concatenate([saved, cuts, probes, [start, num_steps]]))
    steps = steps[steps >= start]
    between = np.diff(steps, append=steps[-1])
    is_saved, is_cut = np.isin(steps, saved), np.isin(steps, cuts)
    single_steps = bool(np.all(between <= 1))
    chunks: list[Chunk] = []
    i = 0
    while i < len(steps):
        part = slice(i, i + room)
        here, ends = steps[part], steps[part] + between[part]
        # The first steps between always fit; a cut is the first record of a chunk.
        fits = np.cumprod((ends - here[0] <= MAX_STEPS) & ~is_cut[part] | (here == here[0]))
        part = slice(i, i + int(fits.sum()))
        chunks.append(_chunk(steps[part], between[part], is_saved[part], room, single_steps))
        i = part.stop
    return tuple(chunks)


def plan_one_chunk(start: int, num_steps: int, saved: np.ndarray) -> Chunk:
    """A run in one chunk with just the saved steps: inside `jit`, `vmap` and `grad` the host sees nothing."""
    steps = np.union1d(saved, [start, num_steps])
    between = np.diff(steps, append=steps[-1])
    single_steps = bool(np.all(between <= 1))
    chunk = _chunk(steps, between, np.isin(steps, saved), len(steps), single_steps)
    return dataclasses.replace(chunk, reversible=single_steps)


def data_length(chunks: Sequence[Chunk]) -> int:
    """Steps that the data of each chunk have room for: a power of two, so that runs of about the same length share a program."""
    longest = max(chunk.count for chunk in chunks)
    return 1 << (max(longest, 1) - 1).bit_length()


def _chunk(
    steps: np.ndarray, between: np.ndarray, is_saved: np.ndarray, room: int, single_steps: bool
) -> Chunk:
    behind = (0, room - len(steps))
    # NumPy arrays, since a Python number would be a constant of the program: one compilation for each.
    return Chunk(
        np.asarray(steps[0]),
        np.pad(between, behind),
        np.pad(is_saved, behind),
        np.asarray(len(steps)),
        single_steps=single_steps,
    )
