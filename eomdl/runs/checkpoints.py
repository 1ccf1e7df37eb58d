"""Checkpoints of a run on disk: on a schedule, at events, to continue or branch from."""

import contextlib
import dataclasses
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from tqdm import tqdm

from eomdl import _check, _devices, _processes, _structure, _warn
from eomdl._end import End
from eomdl._types import Args, Observable, Params
from eomdl.observe.base import is_per_member
from eomdl.runs.chunk import saved_steps
from eomdl.runs.storage import OneFile, Sharded
from eomdl.runs.trajectory import Trajectory, concatenate, summary
from eomdl.storage.files import DamagedFile


def logarithmic_steps(num_steps: int, per_decade: int = 8) -> np.ndarray:
    """Step numbers 0, 1, ... `num_steps`, evenly spaced in their logarithm, `per_decade` to a factor of 10.

    For `save_steps` and for the `schedule` of `Checkpoints`: most of what happens, happens early.

    **Raises:** `ValueError` if an argument is not an integer >= 1.
    """
    num_steps = _check.integer("num_steps", num_steps, 1)
    per_decade = _check.integer("per_decade", per_decade, 1)
    count = int(np.ceil(np.log10(num_steps) * per_decade)) + 1
    spread = np.geomspace(1, num_steps, count).round().astype(int)
    return np.unique(np.concatenate([[0], spread, [num_steps]]))


class Crossing:
    r"""An event: a recorded scalar observable passes a level between two saved steps.

    At the first recorded step k with $o_{k-1} < c \le o_k$ (`rising`), or $o_{k-1} > c \ge o_k$; every time. A
    run that begins on the far side has no event until it has come back. Recorded are the saved steps, those of
    the schedule, and every 1024th step.

    **Arguments:** `observable`, its name in `observe`; `level` c, such as $2/\eta$ for the sharpness; `rising`.

    **Raises:** `ValueError` for a wrong argument.
    """

    def __init__(self, observable: str, level: float, rising: bool = True):
        self.observable = _check.kind("observable", observable, str, "the name of an observable")
        self.rising = _check.flag("rising", rising)
        self.level = float(_check.finite_scalar("level", level))

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Whether the event is at each of the values, shape (n,) -> (n - 1,): not known of the first.

        NaN is no value: what comes after it is compared with the last one that is.
        """
        values = np.asarray(_check.numbers("values", values, "numbers, shape (n,)", lambda x: True, ndim=1))
        sign = 1.0 if self.rising else -1.0
        last = _filled(np.asarray(values, float))[:-1]
        return (sign * values[1:] >= sign * self.level) & (sign * last < sign * self.level)


class Checkpoints:
    """A folder of checkpoints, each the whole state of a run at one step.

    ```python
    store = eomdl.Checkpoints("folder", 100)
    run = eomdl.descend(loss, params, optimizer, 1000, checkpoints=store, resume=store.latest)
    ```

    Pass it to `descend`, `iterate` or `solve` as `checkpoints=`; the run writes the steps of the schedule
    and of the events. A checkpoint is a `Trajectory` of one row, in a file of its own that is written
    aside and moved into place: a killed process leaves the earlier ones readable.

    - `store.at(k)` reads one; `resume=store.at(k).end` continues from it, and with something changed in the call
        makes a branch. With nothing changed a real run is reproduced bit for bit, a flow to
        within its ODE error. (Optimizers that compute in float32 inside under x64, such as `MultiSteps`, `adafactor` and
        `inject_hyperparams`, may come to differ by float32's rounding.)
    - `store.latest` is where the last whole one is, an `eomdl.runs.End`, or None, so that
        `descend(..., resume=store.latest, checkpoints=store)` begins a run and continues a killed one. Where a later
        file is damaged a warning names it.
    - `store.steps`, `len(store)`, iteration (one in memory at a time), `store.events`.

    **Arguments:**

    - `folder`: made if it does not exist.
    - `schedule`: an integer n for steps 0, n, 2n, ... and the last; or step numbers, such as
        `eomdl.runs.logarithmic_steps(num_steps)`.
    - `events`: `{name: eomdl.runs.Crossing}`, looked for at the recorded steps.
    - `like`: parameters of the structure to read, where it is not of dicts, lists and tuples.
    - `sharded`: what is spread over devices goes into a folder beside the checkpoint's file, each process writing its
        part (orbax, `eomdl[distributed]`): no memory has the whole state. It is read when a run continues from it, onto the
        devices that the run's parameters are on, whatever their number; `numpy.asarray` reads a leaf of `end` whole. Else
        the first process gathers the whole state in host memory, into one file.

    **Cost:** of a checkpoint, writing the state; of an event, at most one more chunk of the run (up to 256 saved
    steps), which is repeated to have the state there.

    One folder is for one run: a run locks it, for as long as it lasts or its process lives, and its checkpoints
    carry a checksum of what it began with. What has the name of a checkpoint from the start of a run on and is none (a damaged
    file, a run saved by hand, a folder, a broken link) is moved aside (`.npz.aside`), with a warning. Data on the host
    (`eomdl.losses.OnHost`) are read once for their checksum, and a run that continues with others is refused.

    **Raises:** `ValueError` for a wrong argument; `ImportError` for `sharded` without orbax. A run raises `ValueError`
    before its first step, and nothing is overwritten, where another run writes to the folder, or the folder holds
    checkpoints later than its start, of another run, or of other parameters.
    """

    def __init__(
        self,
        folder: str | Path,
        schedule: int | Sequence[int] | np.ndarray = 100,
        *,
        events: Mapping[str, Crossing] | None = None,
        like: Params | None = None,
        sharded: bool = False,
    ):
        self.folder = _check.path("folder", folder)
        if _check.makes_array(schedule) and np.ndim(schedule) == 0:
            _check.integer("schedule", schedule, 1)
        else:
            _check.step_numbers("schedule", schedule)
        if like is not None:
            _check.params("like", like)
        if events is not None and not (
            isinstance(events, Mapping) and all(isinstance(e, Crossing) for e in events.values())
        ):
            raise ValueError(
                f"events: expected a dict {{name: eomdl.runs.Crossing}}, got {_check.show(events)}"
            )
        self._schedule, self._events, self._like = schedule, dict(events or {}), like
        self._before: dict[str, float] = {}  # the last value of each event's observable
        self.storage = Sharded() if _check.flag("sharded", sharded) else OneFile()

    @property
    def steps(self) -> np.ndarray:
        """Step numbers of the checkpoints there are, increasing."""
        return np.array([step for step in self._named() if self._path(step).is_file()], int)

    def _named(self) -> list[int]:
        """Return the step numbers of all that has the name of a checkpoint: files, folders, links and pipes."""
        found = (re.fullmatch(r"step-([0-9]{10})\.npz", path.name) for path in self.folder.glob("step-*.npz"))
        return sorted(int(match[1]) for match in found if match)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Trajectory]:
        return (self.at(int(step)) for step in self.steps)

    @property
    def latest(self) -> End | None:
        """Where the last whole checkpoint is, or None where there is none. Warns of what is none after it."""
        found, damaged = self._last_whole()
        if damaged:
            on = "none before is whole" if found is None else f"continuing from step {found.step}"
            _warn.warn(f"no whole checkpoints, {on}: {'; '.join(damaged)}")
        return found

    def _last_whole(self) -> tuple[End | None, list[str]]:
        """Return where the last whole checkpoint is, and what is wrong with those after it."""
        damaged: list[str] = []
        for step in self.steps[::-1]:
            try:
                return self.at(int(step)).end, damaged
            except DamagedFile as error:
                damaged.append(str(error))
        return None, damaged

    @property
    def events(self) -> dict[str, np.ndarray]:
        """`{event: step numbers}` of the checkpoints that are there for an event."""
        found: dict[str, list[int]] = {}
        for step in self.steps:
            for name in Trajectory.events_in(self._path(step)):
                found.setdefault(name, []).append(int(step))
        return {name: np.array(steps) for name, steps in found.items()}

    def at(self, step: int) -> Trajectory:
        """The checkpoint of a step.

        **Raises:** `ValueError` if there is none, or its file is damaged or does not fit `like`.
        """
        step = _check.integer("step", step, 0)
        path = self._path(step)
        if not path.is_file():
            raise ValueError(
                f"step: expected one of the checkpoints {summary(self.steps)} in {self.folder}, got {step}"
            )
        checkpoint = Trajectory.load(path, self._like)
        if checkpoint.end.step != step:
            raise DamagedFile(
                f"path: expected a checkpoint of step {step}, got step {checkpoint.end.step} in {path}"
            )
        if len(checkpoint.steps) != 1 or not checkpoint.stats.run:
            raise DamagedFile(
                f"path: expected a checkpoint of step {step}, got a run that was saved there, in {path}; "
                "`eomdl.Trajectory.load` reads it"
            )
        return checkpoint

    def observe(
        self, observe: Mapping[str, Observable], args: Args = None, *, progress: bool = False
    ) -> Trajectory:
        """Observables at every checkpoint, read one at a time: memory is flat in their number.

        **Returns:** a `Trajectory` without parameters. **Cost:** the observables, once a checkpoint.
        """
        progress = _check.flag("progress", progress)
        steps = self.steps
        if len(steps) == 0:
            raise ValueError(f"folder: expected checkpoints, got none in {self.folder}")
        functions = _check.observables(observe, self._params(self.at(steps[0])), lambda f: args)
        rows = []
        for step in tqdm(steps, desc="checkpoints", disable=not progress):
            row = self.at(step)
            values = _devices.on_host(_observed(functions, self._params(row), args))
            observables = jax.tree.map(lambda value: np.asarray(value)[None], values)
            row = dataclasses.replace(row, params=None, observables=observables, ode_error=None)
            rows.append(
                dataclasses.replace(
                    row, per_member=tuple(n for n, f in functions.items() if is_per_member(f))
                )
            )
        return concatenate(rows)

    def _params(self, checkpoint: Trajectory) -> Params:
        """The parameters of a checkpoint, where those of `like` are."""
        if checkpoint.params is not None:
            return checkpoint.at(int(checkpoint.end.step))
        saved = checkpoint.end.params
        if self._like is None:
            return jax.tree.map(np.asarray, saved)
        return _structure.restore("like", saved, self._like)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:010d}.npz"

    # ------------------------------------------------------- what a run calls

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """The folder as one run's own. The system takes the lock back from a process that dies."""
        # Imported here: it brings asyncio along.
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder / ".lock", timeout=0)
        with _processes.barrier("checkpoints"):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                if _processes.is_first():
                    lock.acquire()
            except Timeout:
                raise ValueError(
                    f"checkpoints: expected a folder that no other run is writing to, got {self.folder}, which is "
                    "locked; give each run a folder of its own"
                ) from None
        try:
            yield
        finally:
            lock.release()

    def _set_aside(self, start: int) -> None:
        """Move away what has the name of a checkpoint from the start on and is none.

        It must not pass for a checkpoint of this run, nor keep it from writing.
        """
        moved = []
        for step in self._named():
            path = self._path(step)
            try:
                if step < start or (path.is_file() and self.at(step)):
                    continue
            except DamagedFile:
                pass
            names = (f"{path.name}.aside{i or ''}" for i in itertools.count())
            aside = next(p for p in map(path.with_name, names) if not os.path.lexists(p))
            path.rename(aside)
            moved.append(aside.name)
        if moved:
            _warn.warn(f"no whole checkpoints, moved aside in {self.folder}: {', '.join(moved)}")
        for part in self.folder.glob("step-*.npz.*.part"):  # of a process that was killed in writing
            part.unlink()

    def begin(self, num_steps: int, start: End, shapes: Mapping[str, Any]) -> np.ndarray:
        """Raise if a run from `start` must not write here; the steps of its schedule."""
        for name, event in self._events.items():
            if event.observable not in shapes:
                raise ValueError(
                    f"events: expected the name of an observable in observe, {sorted(shapes)}, got "
                    f"{_check.show(event.observable)}"
                )
            shape = getattr(shapes[event.observable], "shape", "a pytree")
            if shape != ():
                raise ValueError(
                    f"events[{name!r}]: expected a scalar observable, got {_check.show(event.observable)} of shape {shape}"
                )
        with _processes.barrier("checkpoints"):
            if _processes.is_first():
                self._refuse_others(start)
                self._set_aside(int(start.step))
        # All processes see the same files: none writes before all have come here.
        with _processes.barrier("checkpoints"):
            self._there = set(self.steps.tolist())
        self._before = {}
        steps = saved_steps("schedule", num_steps, self._schedule)
        self._fixed = steps[(steps >= start.step) & ~np.isin(steps, list(self._there))]
        return self._fixed

    def _refuse_others(self, start: End) -> None:
        """Raise where the folder holds what a run from `start` would overwrite, or is not of that run."""
        last, _ = self._last_whole()
        if last is None:
            return
        if last.step > start.step:
            raise ValueError(
                f"checkpoints: expected a folder without checkpoints after step {start.step}, where the run begins, "
                f"got {summary(self.steps)} in {self.folder}; nothing was overwritten: continue with resume=store.latest, or give a "
                "branch a folder of its own"
            )
        hint = (
            f"the checkpoints in {self.folder} are of other parameters or another optimizer; "
            "nothing was overwritten"
        )
        _structure.require("checkpoints", last.state, start.state, hint)
        if int(last.stats.run) != int(start.stats.run):
            raise ValueError(
                f"checkpoints: expected a folder of this run, got {self.folder} with checkpoints of another run (it "
                "began elsewhere, or with another optimizer or flow); nothing was overwritten"
            )
        if last.stats.data != start.stats.data:
            raise ValueError(
                f"checkpoints: expected the data on the host that the run in {self.folder} has seen so far "
                f"(fingerprint {last.stats.data!r}), got others ({start.stats.data!r}); nothing was overwritten: give a "
                "branch a folder of its own"
            )

    def due(
        self, steps: np.ndarray, observables: Mapping[str, np.ndarray], good: np.ndarray
    ) -> list[tuple[int, list[str]]]:
        """(row, events there) of the rows to write."""
        rows: dict[int, list[str]] = {int(i): [] for i in np.flatnonzero(good & np.isin(steps, self._fixed))}
        for name, event in self._events.items():
            values = np.asarray(observables[event.observable], float)
            known = np.append(self._before.get(name, np.nan), values)
            for i in np.flatnonzero(event(known) & good):
                rows.setdefault(int(i), []).append(name)
            self._before[name] = float(_filled(known)[-1])
        return sorted(rows.items())

    def write(self, checkpoint: Trajectory, events: list[str]) -> None:
        """Write one row, unless it is there."""
        step = int(checkpoint.end.step)
        if step not in self._there:
            self.storage.write(self._path(step), checkpoint, events)
            self._there.add(step)


def _filled(values: np.ndarray) -> np.ndarray:
    """Each NaN replaced by the last value before it that is none."""
    known = np.maximum.accumulate(np.where(np.isnan(values), 0, np.arange(len(values))))
    return values[known]


@eqx.filter_jit
def _observed(observe: dict[str, Observable], params: Params, args: Args) -> dict[str, Any]:
    return {name: f(params, args) for name, f in observe.items()}
