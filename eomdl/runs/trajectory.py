"""A path through weight space: the one type for real runs and for flows."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jaxtyping import Float, Int
from typing_extensions import override

from eomdl import _check, _structure, _tree
from eomdl._end import RESULTS, Diagnostic, End, Stats, require_end
from eomdl._result import AbstractResult, Note, Table, series_table
from eomdl._target import ITERATES, Target
from eomdl._types import STATIC, Array, Params, record_type
from eomdl.runs.lost import LOST, MAX_PART, WARMUP, is_lost
from eomdl.storage.files import Tree, read_meta, write_npz
from eomdl.storage.values import require_kinds


_COLUMN = {"column": True}


@record_type
class Trajectory(AbstractResult):
    r"""States of one run at its saved steps; step k of the optimizer sits at time $k\eta$.

    Columns, with one row for each of the n saved steps:

    - `steps`: saved step numbers, shape (n,).
    - `times`: the same in units of time, `steps * step_size`, shape (n,); nan where the
        optimizer's learning rate is not known.
    - `params`: the parameters, leaves with leading axis n, or None if they were not saved.
    - `observables`: `{name: array of shape (n, ...), or a pytree of them}`.
    - `ode_error`: for flows, an estimate of the ODE solver's own error in the parameters
        (Euclidean distance) at each saved step, shape (n,); None for real runs.

    And of the whole run:

    - `result`: an item of `eomdl.RESULTS`; `message` puts it in words.
    - `end`: an `eomdl.runs.End`, where the run is: the last state reached, from which `resume=`
        continues. `stats` and `final_params` are its `stats` and `params`.
    - `per_member`: names of the observables with an axis of the members of an `eomdl.Ensemble`, see
        `eomdl.runs.members`.

    A pytree: `jax.vmap` over `solve` gives a batch of them. Its table has one row for each saved step, with the observables (of an
    array the norm). Its picture shows the scalar observables against steps.

    ```python
    run = eomdl.descend(loss, params, optax.sgd(0.1), 100)
    run.at(50), run.steps, run.message
    ```
    """

    steps: Int[Array, "*batch n"] = dataclasses.field(metadata=_COLUMN)
    times: Float[Array, "*batch n"] = dataclasses.field(metadata=_COLUMN)
    params: Params | None = dataclasses.field(metadata=_COLUMN)
    observables: dict[str, Any] = dataclasses.field(metadata=_COLUMN)
    ode_error: Float[Array, "*batch n"] | None = dataclasses.field(metadata=_COLUMN)
    result: Any
    end: End
    per_member: tuple[str, ...] = dataclasses.field(metadata=STATIC, default=())

    _formats = (5,)

    @override
    def __str__(self) -> str:
        return repr(self)

    @override
    def __repr__(self) -> str:
        columns = ", ".join(["params"] * (self.params is not None) + list(self.observables))
        if _tree.is_traced(self.steps, self.result):
            return f"Trajectory({columns})"
        return f"Trajectory({columns}; steps={summary(self.steps)}; {self.message or 'successful'})"

    @property
    def stats(self) -> Stats:
        """What the run has cost, and its diagnostics."""
        return self.end.stats

    @property
    def final_params(self) -> Params:
        """The parameters at the end, saved or not."""
        return self.end.params

    @property
    def message(self) -> str:
        """The result in words: at which step, why, and what to do. Empty if successful."""
        if np.ndim(_index(self.result)) > 0:
            failed = bool(np.any(np.asarray(self.result != RESULTS.successful)))
            return cast(Any, RESULTS)[self.result] if failed else ""
        if bool(self.result == RESULTS.successful):
            return ""
        last = max([*self.steps, self.end.step])
        return f"Stopped after step {last}. {cast(Any, RESULTS)[self.result]}"

    @property
    @override
    def notes(self) -> tuple[Note, ...]:
        """What a reader must know: a run that stopped, a stride, a target, diagnostics that reached their limits (faults first)."""
        notes = [Note(self.message, is_fault=True)] if self.message else []
        stride, target = self.stats.stride, self.stats.target
        if stride > 1:
            multiples = f"a flow of stride {stride} predicts the multiples of {stride}"
            notes.append(Note(f"{multiples}; the steps between are those moved on by its map."))
        if target != ITERATES:
            notes.append(
                Note(f"the flow predicts the {target.name} of a real run, and is compared with that.")
            )
        if self.stats.warmup:
            notes.append(Note(WARMUP.format(self.stats.warmup)))
        if self.ode_error is not None and np.ndim(self.steps) == 1:
            largest = float(np.max(np.nan_to_num(self.ode_error, posinf=np.inf), initial=0.0))
            if self.params is not None and is_lost(largest, self.params):
                notes.append(Note(LOST.format(largest, MAX_PART), is_fault=True))
        found = sorted(self.stats.diagnostics.items(), key=lambda item: not item[1].is_fault)
        return (*notes, *(Note(d.note(name), d.is_fault) for name, d in found if d.exceeded))

    @override
    @_tree.nonfinite_is_data
    def _tables(self) -> tuple[Table, ...]:
        if np.ndim(self.steps) != 1:  # a batch of runs, from `jax.vmap`
            return ()
        columns = {"step": self.steps, "time": self.times}
        for name, values in self.observables.items():
            is_scalar = getattr(values, "ndim", None) == 1
            columns[name if is_scalar else f"{name} (norm)"] = (
                values if is_scalar else _tree.row_norms(values)
            )
        if self.ode_error is not None:
            columns["ODE error <="] = self.ode_error
        return (series_table("Saved steps", columns),)

    def map_columns(self, function: Callable[[Any], Any]) -> "Trajectory":
        """A function of arrays with leading axis n applied to every column."""
        _check.function("function", function, "a function of one array", takes=1)
        return dataclasses.replace(
            self, **{name: jax.tree.map(function, getattr(self, name)) for name in _COLUMNS}
        )

    def rows(self, index: Any) -> "Trajectory":
        """Only these rows: a slice, integers or booleans of shape (n,), as NumPy takes them."""
        try:
            is_column = np.arange(len(self.steps))[index].ndim == 1
        except (IndexError, TypeError, ValueError):
            is_column = False
        if not is_column:
            raise ValueError(
                f"index: expected a slice, integers or booleans of shape ({len(self.steps)},), got {_check.show(index)}"
            )
        return self.map_columns(lambda column: np.asarray(column)[index])

    def at(self, step: int) -> Params:
        """The parameters at a saved step. Raises `ValueError` if it was not saved."""
        if self.params is None:
            raise ValueError("params: expected saved parameters, got a run with save_params=False")
        step = _check.integer("step", step, 0)
        (index,) = np.nonzero(np.asarray(self.steps) == step)
        if len(index) == 0:
            raise ValueError(f"step: expected a saved step, {summary(self.steps)}, got {step}")
        return jax.tree.map(lambda leaf: leaf[index[0]], self.params)

    def smoothed(self, window: int = 2) -> "Trajectory":
        r"""Means over w = `window` consecutive steps: row k is the mean of $\theta_k, \dots, \theta_{k+w-1}$.

        What oscillates with a period of w steps drops out: at the edge of stability w = 2 leaves the
        path in the middle of the valley. Observables are averaged too, `ode_error` kept (the largest
        of the window); the last w - 1 steps drop out.

        **Raises:** `ValueError` if the saved steps have gaps or are fewer than w.
        """
        window = _check.integer("window", window, 1)
        steps = np.asarray(self.steps)
        if len(steps) < window or np.any(np.diff(steps) != 1):
            raise ValueError(
                f"window: expected an integer from 1 to the number of saved steps, all consecutive, got {window} "
                f"with saved {summary(steps)}"
            )

        return self.averaged(Target("means", tuple((j, 1 / window) for j in range(window))))

    @_tree.nonfinite_is_data
    def averaged(self, target: Target) -> "Trajectory":
        r"""The means of an `eomdl.flows.Target`: row k is $\sum_j a_j \theta_{k+j}$, observables likewise.

        `ode_error` is the largest of those in the mean. Rows whose neighbours were not saved drop out.

        **Raises:** `ValueError` for anything but a target.
        """
        _check.kind("target", target, Target, "an eomdl.flows.Target")
        steps = np.asarray(self.steps)
        kept = np.all([np.isin(steps + j, steps) for j, _ in target.weights], axis=0)
        # A list of row numbers for every term of the mean.
        places = [(np.searchsorted(steps, steps[kept] + j), a) for j, a in target.weights]

        def mean(x: Any) -> np.ndarray:
            x = np.asarray(x)
            return np.asarray(sum(a * x[at] for at, a in places), x.dtype)

        def largest(x: Any) -> np.ndarray:
            return np.max([np.asarray(x)[at] for at, _ in places], axis=0)

        return dataclasses.replace(
            self.rows(kept),
            params=jax.tree.map(mean, self.params),
            observables=jax.tree.map(mean, self.observables),
            ode_error=None if self.ode_error is None else largest(self.ode_error),
        )

    def as_interrupted(self) -> "Trajectory":
        """This run with the result `RESULTS.interrupted`, unless it has failed before."""
        if any(bool(self.result == failed) for failed in (RESULTS.nonfinite, RESULTS.max_steps_reached)):
            return self
        return dataclasses.replace(self, result=RESULTS.interrupted)

    def without_state(self) -> "Trajectory":
        """This run with what it carries beside the parameters dropped.

        `resume=` then begins at its last step and parameters with the state that a new run has there: with
        another optimizer, say.
        """
        return dataclasses.replace(self, end=self.end.without_state())

    @override
    def save(self, path: str | Path, events: Sequence[str] = ()) -> None:
        """Write one `.npz` file (NumPy arrays and JSON, no pickle), which replaces another as a whole.

        `events`: names to find it by, see `eomdl.Checkpoints`.
        """
        path = _check.path("path", path)
        events = _check.kind("events", events, list | tuple, "a list of names")
        for i, event in enumerate(events):
            _check.kind(f"events[{i}]", event, str, "a name")
        arrays, meta = self._contents()
        write_npz(path, arrays, meta | {"format": self._names()[-1], "events": list(events)})

    def _contents(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what a file keeps of the run, as arrays and JSON."""
        arrays: dict[str, Any] = {}
        meta: dict[str, Any] = {"result": int(_index(self.result))}
        meta["per_member"] = list(self.per_member)
        for name, tree in self._trees().items():
            Tree.write(name, tree, arrays, meta)
        stats = {f.name: getattr(self.stats, f.name) for f in dataclasses.fields(Stats)}
        diagnostics, target = stats.pop("diagnostics"), stats.pop("target")
        meta["target"] = [target.name, target.weights]
        meta["stats"] = {
            k: v if isinstance(v, str | None) else np.asarray(v).item() for k, v in stats.items()
        }
        meta["diagnostics"] = {name: [d.limit, d.meaning, d.is_fault] for name, d in diagnostics.items()}
        return arrays, meta

    @override
    def _pack(self) -> Any:
        return self._contents()

    @classmethod
    @override
    def _unpack(cls, found: Any) -> "Trajectory":
        return _read(*found)

    @classmethod
    @override
    def _from_file(cls, arrays: dict[str, Any], meta: Mapping[str, Any]) -> "Trajectory":
        return _read(arrays, meta)

    @staticmethod
    def events_in(path: str | Path) -> list[str]:
        """The events that a file was saved with; its arrays are not read."""
        return read_meta(path, *Trajectory._names())["events"]

    def _trees(self) -> dict[str, Any]:
        columns = {name: getattr(self, name) for name in _COLUMNS}
        end = {f"end.{name}": getattr(self.end, name) for name in ("step", "state", "params")}
        return columns | end | {"diagnostics values": {k: d.value for k, d in self.stats.diagnostics.items()}}

    @classmethod
    @override
    def load(cls, path: str | Path, like: Params | None = None) -> "Trajectory":
        """Read what `save` wrote.

        Dicts, lists, tuples and named tuples come back as they were. For parameters that are another
        pytree give one as `like`; without it its nodes come back as plain nodes with the children by key.
        The state in `end` is put in its own structure by `resume=`.

        **Raises:** `ValueError` naming the file if it is not such a file, is damaged (every array has a checksum),
        or does not fit `like`. No file unpacks to more than its size: a compressed one is refused.
        """
        trajectory = cls._read_file(path)
        if like is None:
            return trajectory
        end = dataclasses.replace(trajectory.end, params=_like("like", trajectory.end.params, like, path, 0))
        return dataclasses.replace(
            trajectory, end=end, params=_like("like", trajectory.params, like, path, 1)
        )


def _read(arrays: dict[str, Any], meta: Mapping[str, Any]) -> Trajectory:
    """Return the trajectory from the contents of its file. **Raises:** whatever is wrong with them."""
    trees = {name: Tree.read(name, arrays, meta) for name in _TREES}
    if arrays:
        raise ValueError(f"arrays {sorted(arrays)} have no place")
    values = trees.pop("diagnostics values")
    diagnostics = {
        name: require_kinds(Diagnostic(values[name], *meta["diagnostics"][name])) for name in values
    }
    stats = Stats(**meta["stats"], diagnostics=diagnostics, target=Target(*meta["target"]))
    end = End(int(trees.pop("end.step")), trees.pop("end.state"), trees.pop("end.params"), stats)
    named = tuple(meta["per_member"])
    return _valid(Trajectory(**trees, result=_result_from_index(meta["result"]), end=end, per_member=named))


def _valid(run: Trajectory) -> Trajectory:
    """The trajectory, if its columns have one length and its numbers are numbers."""
    require_kinds(run)
    steps = run.steps
    if steps.ndim != 1 or np.any(np.diff(steps) <= 0) or np.any(steps < 0):
        raise ValueError(f"steps: expected increasing integers >= 0, got {summary(steps)}")
    columns = [getattr(run, name) for name in _COLUMNS]
    shapes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(columns)}
    if shapes != {steps.shape}:
        raise ValueError(f"columns: expected {len(steps)} rows, got leading axes {sorted(shapes)}")
    _check.floating("params", run.params)
    if not set(run.per_member) <= set(run.observables):
        raise ValueError(f"per_member: expected names of observables, got {run.per_member}")
    require_end("end", run.end)
    return run


_COLUMNS = tuple(f.name for f in dataclasses.fields(Trajectory) if f.metadata.get("column"))
_TREES = (*_COLUMNS, "end.step", "end.state", "end.params", "diagnostics values")


def join(first: Trajectory, second: Trajectory) -> Trajectory:
    """One trajectory from a run and its continuation."""
    if second.ode_error is not None and first.ode_error is None:
        first = dataclasses.replace(first, ode_error=np.full(len(first.steps), np.nan))
    if second.ode_error is None:
        first = dataclasses.replace(first, ode_error=None)
    return concatenate([first, second])


def concatenate(runs: list[Trajectory]) -> Trajectory:
    """The rows of all, one after the other; the rest is that of the last."""
    last, runs = runs[-1], [run for run in runs if len(run.steps)] or runs[-1:]
    if len(runs) == 1:
        return dataclasses.replace(last, **{name: getattr(runs[0], name) for name in _COLUMNS})
    xp = jax.numpy if _tree.is_traced(runs) else np
    columns = {
        name: jax.tree.map(lambda *parts: xp.concatenate(parts), *(getattr(run, name) for run in runs))
        for name in _COLUMNS
    }
    return dataclasses.replace(last, **columns)


def summary(steps: Any) -> str:
    """Return a few of the step numbers as text."""
    return np.array2string(np.asarray(steps), threshold=8, edgeitems=3)


def _index(result: Any) -> Any:
    """Return the number of an item of `RESULTS`: the leaf of which it is a pytree."""
    return jax.tree.leaves(result)[0]


def _result_from_index(index: int) -> Any:
    if index not in range(len(cast(Any, RESULTS))):
        raise ValueError(f"result: expected one of {len(cast(Any, RESULTS))}, got number {index}")
    return jax.tree.structure(RESULTS.successful).unflatten([np.array(index, np.int32)])


def _like(name: str, tree: Any, like: Params, path: str | Path, leading: int) -> Any:
    """The tree in the structure of `like`, whose shapes it has after `leading` axes."""
    if tree is None:
        return None
    shapes = [np.shape(leaf)[leading:] for leaf in jax.tree.leaves(tree)]
    found = _structure.difference(_structure.describe(tree), _structure.describe(like))
    if found or shapes != [np.shape(leaf) for leaf in jax.tree.leaves(like)]:
        raise ValueError(
            f"{name}: expected leaves of shapes {shapes} in the structure of {path}, got "
            f"{jax.tree.structure(like)} {found or ''}"
        )
    return jax.tree.structure(like).unflatten(jax.tree.leaves(tree))
