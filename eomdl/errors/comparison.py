"""Compare models with the real run, step by step."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, Shaped
from typing_extensions import override

from eomdl import _check, _tree, _warn
from eomdl._result import AbstractResult, Note, Table
from eomdl._target import ITERATES, Target
from eomdl._types import Params
from eomdl.runs.rows_on_disk import block_length
from eomdl.runs.trajectory import Trajectory, summary
from eomdl.storage.values import decode, require_kinds


_SAME_STEP = 1e-4  # relative difference of two lengths of a step that rounding explains, also of float32 and of schedules


@dataclasses.dataclass(frozen=True)
class Comparison(AbstractResult):
    r"""Errors of models against a reference run at the n steps that all of them saved.

    ```python
    comparison = eomdl.compare(gd, {"gradient flow": path})
    print(comparison.table())
    error = comparison.relative_distance["gradient flow"][-1]
    ```

    - `steps`, `times`: shape (n,).
    - `travelled`: distance of the reference from its start, $|\theta_k - \theta_0|$, (n,); NaN without its parameters.
    - `distance`: `{model: (n,)}`, $|\theta^{model}_k - \theta_k|$ over all parameters.
    - `block_distance`: `{model: {block: (n,)}}`, the same for each top-level block.
    - `ode_error`: `{model: (n,)}`, estimate of the ODE solver's part of `distance`; the
        rest is the model's own. Absent for a model without an estimate.
    - `differences`: `{model: {observable: (n, ...)}}`, model minus reference.
    - `notes`: runs that stopped early, models outside their validity.

    Distances are empty where a run was made with `save_params=False`. Its table has one row for each model. Its picture shows the
    distance against steps, with the ODE error below it, and one panel for each scalar observable.
    """

    _formats = (1, 2)

    steps: Int[np.ndarray, " n"]
    times: Float[np.ndarray, " n"]
    travelled: Float[np.ndarray, " n"]
    distance: dict[str, Float[np.ndarray, " n"]]
    block_distance: dict[str, dict[str, Float[np.ndarray, " n"]]]
    ode_error: dict[str, Float[np.ndarray, " n"]]
    differences: dict[str, dict[str, Shaped[np.ndarray, "n ..."]]]
    notes: tuple[Note, ...]

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models, in the order given."""
        return tuple(self.differences)

    @property
    @_tree.nonfinite_is_data
    def relative_distance(self) -> dict[str, Float[np.ndarray, " n"]]:
        """`distance / travelled`; NaN where the reference has not moved."""
        moved = np.where(self.travelled > 0, self.travelled, np.nan)
        return {model: d / moved for model, d in self.distance.items()}

    def at_multiples_of(self, stride: int) -> "Comparison":
        """Return the comparison at the multiples of `stride`, the steps that a strided flow predicts itself.

        **Raises:** `ValueError` if there are none.
        """
        stride = _check.integer("stride", stride, 1)
        keep = self.steps % stride == 0
        if not keep.any():
            saved = summary(self.steps)
            raise ValueError(f"stride: expected a divisor of a saved step, got {stride} with {saved}")
        arrays = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "notes"}
        return dataclasses.replace(self, **jax.tree.map(lambda x: x[keep], arrays))

    @override
    @_tree.nonfinite_is_data
    def _tables(self) -> tuple[Table, ...]:
        # One row for each model: a few steps, and the largest of all.
        at = np.unique(np.linspace(0, len(self.steps) - 1, 4).round().astype(int))[
            min(1, len(self.steps) - 1) :
        ]
        names = sorted({name for found in self.differences.values() for name in found})
        columns = ["model"]
        if self.distance:
            columns += [f"step {self.steps[i]}" for i in at]
            columns += ["largest", "largest / travelled", "ODE error <="]
        columns += [f"largest |{name} difference|" for name in names]
        rows = [(model, *self._distances(model, at), *self._largest(model, names)) for model in self.models]
        return (Table(tuple(columns), tuple(rows), title="Distance to the reference run"),)

    def _distances(self, model: str, at: np.ndarray) -> list[float | None]:
        """Return the cells of a model's distances: at some steps, the largest, its part of the way, and the ODE error."""
        if not self.distance:
            return []
        if model not in self.distance:
            return [None] * (len(at) + 3)
        distance, ode_error = self.distance[model], self.ode_error.get(model)
        largest = float(distance.max())
        part = largest / max(float(self.travelled.max()), 1e-300)
        return [
            *distance[at].tolist(),
            largest,
            part,
            None if ode_error is None else float(ode_error.max()),
        ]

    def _largest(self, model: str, names: list[str]) -> list[float | None]:
        """Return the cells of a model's differences in the observables of these names."""
        found = self.differences[model]
        return [float(np.abs(found[name]).max()) if name in found else None for name in names]

    @override
    @_tree.nonfinite_is_data
    def to_frame(self) -> Any:
        """Return a pandas DataFrame with one row for each model and step; of an array observable the norm of the difference."""
        import pandas as pd

        frames = []
        for model in self.models:
            columns: dict[str, Any] = {"model": model, "step": self.steps, "time": self.times}
            if model in self.distance:
                columns |= {
                    "distance": self.distance[model],
                    "relative_distance": self.relative_distance[model],
                }
                columns |= {f"distance {b}": d for b, d in self.block_distance[model].items()}
            if model in self.ode_error:
                columns["ode_error"] = self.ode_error[model]
            for name, difference in self.differences[model].items():
                if difference.ndim == 1:
                    columns[f"difference {name}"] = difference
                else:
                    columns[f"difference {name} (norm)"] = _tree.row_norms(difference)
            frames.append(pd.DataFrame(columns))
        return pd.concat(frames, ignore_index=True)

    @classmethod
    @override
    def _from_file(cls, arrays: dict[str, Any], meta: Mapping[str, Any]) -> "Comparison":
        is_first = meta["format"] == cls._names()[0]
        return cls._unpack(_from_first_format(arrays, meta) if is_first else decode(meta["value"], arrays))

    @classmethod
    @override
    def _unpack(cls, found: Any) -> "Comparison":
        result = require_kinds(cls(**found))
        models = set(result.models)
        if set(result.distance) != set(result.block_distance) or not models >= {
            *result.distance,
            *result.ode_error,
        }:
            raise ValueError(
                f"distance: expected models of differences, {sorted(models)}, got {sorted(result.distance)}"
            )
        return result


def _from_first_format(arrays: dict[str, Any], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a comparison from a file of the format of version 0.1, in which every mapping has a list of its keys."""
    nested: dict[str, dict[str, dict[str, np.ndarray]]] = {
        field: {model: {} for model in meta["models"]} for field in ("block_distance", "differences")
    }
    flat: dict[str, dict[str, np.ndarray]] = {"distance": {}, "ode_error": {}}
    for field, keys in meta["index"].items():
        for i, (model, name) in enumerate(keys):
            value = arrays.pop(f"{field}:{i}")
            if field in flat:
                flat[field][model] = value
            else:
                nested[field][model][name] = value
    blocks = nested.pop("block_distance")
    columns = {name: arrays.pop(name) for name in ("steps", "times", "travelled")}
    return {
        **(columns | flat | nested),
        "block_distance": {model: b for model, b in blocks.items() if model in flat["distance"]},
        "notes": tuple(Note(note) for note in meta["notes"]),
    }


@_tree.nonfinite_is_data
def compare(reference: Trajectory, trajectories: Mapping[str, Trajectory], *, smooth: int = 1) -> Comparison:
    """Return the errors of `trajectories` (models, usually flows) against the `reference` run.

    ```python
    comparison = eomdl.compare(gd, {"gradient flow": path})
    print(comparison.table())
    ```

    All errors are taken at the steps that all runs saved. A flow of stride m predicts every m-th
    step by itself, and the steps between by its map; the notes say so, and
    `Comparison.at_multiples_of` keeps the steps that it predicts by itself.

    **Arguments:**

    - `reference`: the real run. `trajectories`: `{name: trajectory}` of the models.
        Each model is measured against what it predicts of the real run (`eomdl.flows.Target`, in its `stats`): the
        iterates, or means of them, with the observables averaged likewise; for that the reference needs the steps
        beside those compared.
    - `smooth`: compare means over this many consecutive steps (`Trajectory.smoothed`), of the reference
        and of the models. Past the edge of stability `smooth=2` compares the middle of the oscillation.

    A run without saved steps, since it failed at once, is compared as NaN, with a note of why.

    **Returns:** `eomdl.Comparison`: distances over all parameters and per top-level block,
    relative to the distance travelled; differences of every observable that both have;
    and the ODE solver's own error.

    **Raises:** `ValueError` if the runs have no saved step in common, or parameters that
    differ in structure or shape. **Warns** where a model left its validity on its path according to its own
    diagnostics (`Trajectory.notes` that are faults).
    """
    smooth = _check.integer("smooth", smooth, 1)
    _check_runs(reference, trajectories)
    runs = dict(trajectories)
    # The real run once more for each thing that is predicted of it.
    targets = {ITERATES, *(run.stats.target for run in runs.values())}
    reals = {target: reference.averaged(target) if target != ITERATES else reference for target in targets}
    if smooth > 1:
        runs = {name: run.smoothed(smooth) for name, run in runs.items()}
        reals = {target: run.smoothed(smooth) for target, run in reals.items()}
    steps = _common_steps(reals, runs)
    # Without parameters, whose rows may be on disk: those are taken a few at a time.
    real, *others = (
        _at_steps(dataclasses.replace(run, params=None), steps) for run in (reals[ITERATES], *runs.values())
    )
    models = dict(zip(runs, others, strict=True))
    whole, predicted = reals[ITERATES], {name: reals[run.stats.target] for name, run in runs.items()}
    apart = {
        name: _squares(run, predicted[name], steps, steps)
        for name, run in runs.items()
        if run.params is not None and whole.params is not None
    }
    known_times = [run.times for run in (real, *others) if not np.all(np.isnan(run.times))]
    travelled = np.full(len(steps), np.nan)
    if whole.params is not None:
        travelled = _root(_squares(whole, whole, steps, np.full(len(steps), whole.steps[0])))
    return Comparison(
        steps=steps,
        times=np.asarray(known_times[0] if known_times else real.times),
        travelled=travelled,
        distance={name: _root(squares) for name, squares in apart.items()},
        block_distance={
            name: {block: _root(part) for block, part in top_level_blocks(squares).items()}
            for name, squares in apart.items()
        },
        ode_error={
            name: np.asarray(run.ode_error) for name, run in models.items() if run.ode_error is not None
        },
        differences={
            name: _differences(name, run, _at_steps(dataclasses.replace(predicted[name], params=None), steps))
            for name, run in models.items()
        },
        notes=_notes(reference, trajectories),
    )


def _common_steps(
    reals: Mapping[Target, Trajectory], runs: Mapping[str, Trajectory]
) -> Int[np.ndarray, " n"]:
    """Return the steps that all runs saved, those beside them too where a model predicts means."""
    named = {f"reference, {target.name}": run for target, run in reals.items()}
    named |= {f"trajectories[{name!r}]": run for name, run in runs.items() if len(run.steps)}
    steps = functools.reduce(np.intersect1d, (np.asarray(run.steps) for run in named.values()))
    if len(steps) == 0:
        raise ValueError(
            "trajectories: expected a saved step in common, got "
            + ", ".join(f"{name}: {summary(run.steps)}" for name, run in named.items())
        )
    return steps


def _squares(run: Trajectory, other: Trajectory, steps: np.ndarray, other_steps: np.ndarray) -> Params:
    """Return the squared distance of two runs in every leaf, shape (n,), a few steps in memory at a time; NaN where a run has none."""
    if not len(run.steps):
        return jax.tree.map(lambda _: np.full(len(steps), np.nan), run.params)
    here = np.searchsorted(np.asarray(run.steps), steps)
    there = np.searchsorted(np.asarray(other.steps), other_steps)

    def in_leaf(a: Any, b: Any) -> np.ndarray:
        a, b, step = np.asarray(a), np.asarray(b), block_length(a)
        squares = []
        for i in range(0, len(steps), step):
            apart = a[here[i : i + step]] - b[there[i : i + step]]
            squares.append(np.sum(np.square(_tree.rows(apart)), axis=1))
        return np.concatenate(squares)

    return jax.tree.map(in_leaf, run.params, other.params)


def _root(squares: Params) -> Float[np.ndarray, " n"]:
    """Return the distances over all leaves."""
    return np.sqrt(np.sum(jax.tree.leaves(squares), axis=0))


def _at_steps(run: Trajectory, steps: np.ndarray) -> Trajectory:
    """Return the run at these steps; NaN where a run that failed at once has none."""
    if len(run.steps):
        return run.rows(np.searchsorted(np.asarray(run.steps), steps))
    filled = run.map_columns(lambda x: np.full((len(steps), *np.shape(x)[1:]), np.nan))
    return dataclasses.replace(filled, steps=steps)


def _check_runs(reference: Trajectory, trajectories: Mapping[str, Trajectory]) -> None:
    _check.kind("reference", reference, Trajectory, "an eomdl.Trajectory")
    _check.mapping("trajectories", trajectories, object, "eomdl.Trajectory")
    if len(reference.steps) == 0:
        raise ValueError(f"reference: expected a run with saved steps, got none. {reference.message}")
    for key, run in trajectories.items():
        name = f"trajectories[{key!r}]"
        _check.kind(name, run, Trajectory, "an eomdl.Trajectory")
        if reference.params is not None and run.params is not None:
            first, expected = (
                jax.tree.map(lambda x: np.empty(np.shape(x)[1:]), r.params) for r in (run, reference)
            )
            _check.same_structure(f"{name}.params", first, "reference.params", expected)


def _differences(name: str, run: Trajectory, real: Trajectory) -> dict[str, np.ndarray]:
    """Model minus reference of every observable that both have, a pytree leaf by leaf."""
    found, real_columns = {}, _columns(real)
    for key, value in _columns(run).items():
        expected = real_columns.get(key)
        if expected is None:
            continue
        if value.shape != expected.shape:
            raise ValueError(
                f"trajectories[{name!r}].observables[{key!r}]: expected the reference's shape, "
                f"{expected.shape[1:]} per step, got {value.shape[1:]}"
            )
        found[key] = value - expected
    return found


def _columns(run: Trajectory) -> dict[str, np.ndarray]:
    """The observables by name, the leaves of one that is a pytree by their place in it."""
    return {
        f"{name}{jax.tree_util.keystr(place)}": leaf
        for name, value in run.observables.items()
        for place, leaf in jax.tree_util.tree_leaves_with_path(value)
    }


def _notes(reference: Trajectory, trajectories: Mapping[str, Trajectory]) -> tuple[Note, ...]:
    """Return the notes of every run; warn of the models that left their validity."""
    notes = [Note(reference.message, is_fault=True).about("reference")] if reference.message else []
    for name, run in trajectories.items():
        found = [note.about(name) for note in (*run.notes, *_mismatches(reference, run))]
        notes += found
        for note in found:
            if note.is_fault and note != f"{name}: {run.message}":
                _warn.warn(note)
    return tuple(notes)


def _mismatches(reference: Trajectory, run: Trajectory) -> list[Note]:
    """Return what tells that a model is not of the reference: other steps of the optimizer, another length."""
    notes = []
    last, expected = int(run.end.step), int(reference.end.step)
    if last != expected and not run.message and not reference.message:
        notes.append(
            Note(f"it has {last} steps and the reference {expected}; the steps that both have are compared.")
        )
    first, length = run.stats.first_step, run.stats.first_length
    steps = np.asarray(reference.steps)
    there = [] if first is None else [int(first), int(first) + run.stats.stride]
    if first is None or reference.params is None or not np.isin(there, steps).all():
        return notes
    a, b = (reference.at(k) for k in there)
    real, size = float(_tree.norm(_tree.sub(b, a))), float(_tree.norm(a))
    eps = float(np.finfo(_tree.dtype(a)).eps)
    if abs(real - length) > _SAME_STEP * max(real, length) + 100 * eps * size:
        notes.append(
            Note(
                f"it is of another run: from step {there[0]} its optimizer moves by {length:.3g}, the reference by {real:.3g} "
                f"to step {there[1]}. The learning rate, the optimizer, the loss, the data or the start differ."
            )
        )
    return notes


def top_level_blocks(params: Params) -> dict[str, Params]:
    """Return the parts of the pytree by name: the children of its root, or of the first node below that has several."""
    found = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: x is not params)[0]
    while len(found) == 1:
        ((path, only),) = found
        below = jax.tree_util.tree_flatten_with_path(only, is_leaf=lambda x, top=only: x is not top)[0]
        if not below or below[0][0] == ():  # a leaf
            break
        found = [((*path, *more), child) for more, child in below]
    return {jax.tree_util.keystr(path, simple=True, separator="."): child for path, child in found}
