"""Which steps are recorded, and in which stretches a run is computed. NumPy only."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from eomdl import _check


MAX_STEPS = 1024  # in a stretch: the work between two looks at the clock
MAX_SCALARS = 2**22  # in the rows of a stretch, so that they fit in memory


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Rows to record, and after each of them a gap of steps to take.

    - `rows`: step numbers, increasing, shape (r,).
    - `gaps`: steps from each row to the next, from the last one to the end of the stretch, shape (r,).
    - `saved`: which rows were asked for, shape (r,); the others are looked at and dropped.
    """

    rows: np.ndarray
    gaps: np.ndarray
    saved: np.ndarray

    @property
    def start(self) -> int:
        """The first row's step number."""
        return int(self.rows[0])

    @property
    def count(self) -> int:
        """The number of steps."""
        return int(self.gaps.sum())

    @property
    def end(self) -> int:
        """The step number at which the next stretch begins."""
        return self.start + self.count

    def until(self, step: int) -> "Stretch":
        """The same rows, but no step after the given one is taken."""
        return Stretch(self.rows, np.clip(step - self.rows, 0, self.gaps), self.saved)

    def padded_gaps(self, length: int) -> np.ndarray:
        """The gaps with zeros behind them: every stretch of a run is one compiled program."""
        return np.pad(self.gaps, (0, length - len(self.gaps)))


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run in stretches.

    - `stretches`: one after the other, from the first step to the last.
    - `num_rows`: rows that a compiled program has room for: of a stretch of one row too.
    - `num_steps`: steps that a window of data has room for.
    - `single`: no gap is longer than one step.
    """

    stretches: tuple[Stretch, ...]
    num_rows: int
    num_steps: int
    single: bool


def saved_steps(name: str, num_steps: int, steps: int | Sequence[int] | np.ndarray) -> np.ndarray:
    """The step numbers that an integer (every n-th, and the last) or a sequence stands for."""
    if np.ndim(steps) == 0:
        every = _check.integer(name, steps, 1)
        return np.unique(np.append(np.arange(0, num_steps + 1, every), num_steps))
    array = np.asarray(steps)
    if (
        array.ndim != 1
        or array.size == 0
        or not np.issubdtype(array.dtype, np.integer)
        or array.min() < 0
        or array.max() > num_steps
    ):
        raise ValueError(
            f"{name}: expected a positive integer n (every n-th step) or step numbers from 0 to "
            f"num_steps = {num_steps}, got {steps!r}"
        )
    return np.unique(array)


def plan(
    start: int, num_steps: int, saved: np.ndarray, cuts: np.ndarray, row_size: int, max_rows: int
) -> Plan:
    """Stretches from `start` to `num_steps` with the saved steps among their rows.

    A new stretch begins at every cut: there the state is at hand. `row_size` is how many numbers are in a row
    (and in a batch that is streamed). The room for rows, at most `max_rows`, depends on it only, so that runs
    of another length find their program compiled.
    """
    num_rows = min(max_rows, 1 << (max(MAX_SCALARS // row_size, 1).bit_length() - 1))
    # Rows between saved ones bound the work between two looks at the clock; they are dropped.
    rows = np.unique(
        np.concatenate([saved, cuts, np.arange(start, num_steps, MAX_STEPS), [start, num_steps]])
    )
    rows = rows[rows >= start]
    gaps = np.diff(rows, append=rows[-1])
    is_saved, is_cut = np.isin(rows, saved), np.isin(rows, cuts)
    stretches: list[Stretch] = []
    i = 0
    while i < len(rows):
        part = slice(i, i + num_rows)
        here, ends = rows[part], rows[part] + gaps[part]
        # The first gap always fits; a cut is the first row of a stretch.
        fits = np.cumprod((ends - here[0] <= MAX_STEPS) & ~is_cut[part] | (here == here[0]))
        part = slice(i, i + int(fits.sum()))
        stretches.append(Stretch(rows[part], gaps[part], is_saved[part]))
        i = part.stop
    longest = max(s.count for s in stretches)
    # A power of two, so that streamed runs of about the same length share a program too.
    room = 1 << (max(longest, 1) - 1).bit_length()
    return Plan(tuple(stretches), num_rows, room, bool(np.all(gaps <= 1)))


def plan_at_once(start: int, num_steps: int, saved: np.ndarray) -> Plan:
    """One stretch with just the saved steps: inside `jit`, `vmap` and `grad` nobody looks at the clock."""
    rows = np.union1d(saved, [start, num_steps])
    gaps = np.diff(rows, append=rows[-1])
    return Plan(
        (Stretch(rows, gaps, np.isin(rows, saved)),), len(rows), int(gaps.sum()), bool(np.all(gaps <= 1))
    )
