"""Compare models with the real run, step by step."""

import dataclasses
import functools
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, Shaped

from eomdl import _check
from eomdl._target import ITERATES, Target
from eomdl._types import Params
from eomdl.runs.files import read_npz, write_npz
from eomdl.runs.rows_on_disk import block_length
from eomdl.runs.trajectory import Trajectory, summary


_FORMAT = "eomdl.Comparison 1"


@dataclasses.dataclass(frozen=True)
class Comparison:
    r"""Errors of models against a reference run at the n steps that all of them saved.

    ```python
    comparison = eomdl.compare(gd, {"gradient flow": path})
    print(comparison.table())
    error = comparison.relative_distance["gradient flow"][-1]
    ```

    - `steps`, `times`: shape (n,).
    - `travelled`: distance of the reference from its start, $|\theta_k - \theta_0|$, (n,).
    - `distance`: `{model: (n,)}`, $|\theta^{model}_k - \theta_k|$ over all parameters.
    - `block_distance`: `{model: {block: (n,)}}`, the same for each top-level block.
    - `ode_error`: `{model: (n,)}`, estimate of the ODE solver's share of `distance`; the
        rest is the model's own. Absent for a model without an estimate.
    - `differences`: `{model: {observable: (n, ...)}}`, model minus reference.
    - `notes`: runs that failed, models outside their validity.

    Distances are empty where a run was made with `save_params=False`.
    """

    steps: Int[np.ndarray, " n"]
    times: Float[np.ndarray, " n"]
    travelled: Float[np.ndarray, " n"]
    distance: dict[str, Float[np.ndarray, " n"]]
    block_distance: dict[str, dict[str, Float[np.ndarray, " n"]]]
    ode_error: dict[str, Float[np.ndarray, " n"]]
    differences: dict[str, dict[str, Shaped[np.ndarray, "n ..."]]]
    notes: tuple[str, ...]

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models, in the order given."""
        return tuple(self.differences)

    @property
    def relative_distance(self) -> dict[str, Float[np.ndarray, " n"]]:
        """`distance / travelled`; NaN where the reference has not moved."""
        moved = np.where(self.travelled > 0, self.travelled, np.nan)
        return {model: d / moved for model, d in self.distance.items()}

    def at_multiples_of(self, stride: int) -> "Comparison":
        """The comparison at the multiples of `stride`, the steps that a strided flow predicts itself.

        **Raises:** `ValueError` if there are none.
        """
        stride = _check.integer("stride", stride, 1)
        keep = self.steps % stride == 0
        if not keep.any():
            raise ValueError(f"stride: expected a divisor of a saved step, got {stride} with {self.steps}")
        arrays = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "notes"}
        return dataclasses.replace(self, **jax.tree.map(lambda x: x[keep], arrays))

    def table(self) -> str:
        """The comparison as text: one row per model, then the notes."""
        # rich takes a tenth of the package's own import time, and most users of the package never print.
        from rich.console import Console
        from rich.table import Table

        at = np.unique(np.linspace(0, len(self.steps) - 1, 4).round().astype(int))[1:]
        if len(self.steps) == 1:
            at = np.array([0])
        table = Table(title="Distance to the reference run")
        table.add_column("model")
        if self.distance:
            for i in at:
                table.add_column(f"step {self.steps[i]}", justify="right")
            table.add_column("largest", justify="right")
            table.add_column("largest / travelled", justify="right")
            table.add_column("ODE error <=", justify="right")
        names = sorted({name for d in self.differences.values() for name in d})
        for name in names:
            table.add_column(f"largest |{name} difference|", justify="right")
        for model in self.models:
            cells = []
            if model in self.distance:
                d = self.distance[model]
                cells += [f"{d[i]:.2e}" for i in at]
                cells += [f"{d.max():.2e}", f"{d.max() / max(self.travelled.max(), 1e-300):.1e}"]
                cells.append(f"{self.ode_error[model].max():.1e}" if model in self.ode_error else "-")
            elif self.distance:
                cells += ["-"] * (len(at) + 3)
            for name in names:
                difference = self.differences[model].get(name)
                cells.append("-" if difference is None else f"{np.abs(difference).max():.2e}")
            table.add_row(model, *cells)
        text = io.StringIO()
        console = Console(file=text, width=30 + 22 * len(table.columns), legacy_windows=False)
        console.print(table)
        return text.getvalue() + "".join(f"! {note}\n" for note in self.notes)

    def to_frame(self) -> Any:
        """A pandas DataFrame with one row per model and step. Needs `pandas`."""
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
                    flat = difference.reshape(len(difference), -1)
                    columns[f"difference {name} (norm)"] = np.linalg.norm(flat, axis=1)
            frames.append(pd.DataFrame(columns))
        return pd.concat(frames, ignore_index=True)

    def plot(self) -> Any:
        """Distance against steps with the ODE error below it, as a matplotlib figure."""
        from eomdl.plotting import plot_comparison

        return plot_comparison(self)

    def save(self, path: str | Path) -> None:
        """Write one `.npz` file: arrays and JSON, no pickle."""
        arrays = {"steps": self.steps, "times": self.times, "travelled": self.travelled}
        index: dict[str, list[tuple[str, str]]] = {}
        for field, group in _flat_groups(self).items():
            index[field] = list(group)
            arrays |= {f"{field}:{i}": value for i, value in enumerate(group.values())}
        write_npz(
            path,
            arrays,
            {"format": _FORMAT, "models": self.models, "index": index, "notes": self.notes},
        )

    @staticmethod
    def load(path: str | Path) -> "Comparison":
        """Read what `save` wrote; `ValueError` if the file is something else or truncated."""
        arrays, meta = read_npz(path, _FORMAT)
        nested: dict[str, dict[str, dict[str, np.ndarray]]] = {
            field: {model: {} for model in meta["models"]} for field in ("block_distance", "differences")
        }
        flat: dict[str, dict[str, np.ndarray]] = {"distance": {}, "ode_error": {}}
        for field, keys in meta["index"].items():
            for i, (model, name) in enumerate(keys):
                value = arrays[f"{field}:{i}"]
                if field in flat:
                    flat[field][model] = value
                else:
                    nested[field][model][name] = value
        blocks = {model: b for model, b in nested["block_distance"].items() if model in flat["distance"]}
        return Comparison(
            steps=arrays["steps"],
            times=arrays["times"],
            travelled=arrays["travelled"],
            block_distance=blocks,
            differences=nested["differences"],
            notes=tuple(meta["notes"]),
            **flat,
        )


def _flat_groups(c: Comparison) -> dict[str, dict[tuple[str, str], np.ndarray]]:
    return {
        "distance": {(m, ""): d for m, d in c.distance.items()},
        "ode_error": {(m, ""): d for m, d in c.ode_error.items()},
        "block_distance": {(m, b): d for m, group in c.block_distance.items() for b, d in group.items()},
        "differences": {(m, n): d for m, group in c.differences.items() for n, d in group.items()},
    }


def compare(reference: Trajectory, trajectories: Mapping[str, Trajectory], *, smooth: int = 1) -> Comparison:
    """Errors of `trajectories` (models, usually flows) against the `reference` run.

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

    A run without rows, since it failed at once, is compared as NaN, with a note of why.

    **Returns:** `eomdl.Comparison`: distances over all parameters and per top-level block,
    relative to the distance travelled; differences of every observable that both have;
    and the ODE solver's own error.

    **Raises:** `ValueError` if the runs have no saved step in common, or parameters that
    differ in structure or shape. **Warns** where a model left its validity on its path according to its own
    diagnostics (`Trajectory.warnings`).
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
    travelled = np.zeros(len(steps))
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
    """The steps that all runs saved, those beside them too where a model predicts means."""
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
    """Squared distance of two runs in every leaf, shape (n,), a few rows in memory at a time; NaN where a run has no rows."""
    if not len(run.steps):
        return jax.tree.map(lambda _: np.full(len(steps), np.nan), run.params)
    here = np.searchsorted(np.asarray(run.steps), steps)
    there = np.searchsorted(np.asarray(other.steps), other_steps)

    def of(a: Any, b: Any) -> np.ndarray:
        a, b, step = np.asarray(a), np.asarray(b), block_length(a)
        squares = []
        for i in range(0, len(steps), step):
            apart = a[here[i : i + step]] - b[there[i : i + step]]
            squares.append(np.sum(np.square(apart.reshape(len(apart), -1)), axis=1))
        return np.concatenate(squares)

    return jax.tree.map(of, run.params, other.params)


def _root(squares: Params) -> Float[np.ndarray, " n"]:
    """Distances over all leaves."""
    return np.sqrt(np.sum(jax.tree.leaves(squares), axis=0))


def _at_steps(run: Trajectory, steps: np.ndarray) -> Trajectory:
    """The rows at these steps; NaN where a run that failed at once has none."""
    if len(run.steps):
        return run.rows(np.searchsorted(np.asarray(run.steps), steps))
    filled = run.map_columns(lambda x: np.full((len(steps), *np.shape(x)[1:]), np.nan))
    return dataclasses.replace(filled, steps=steps)


def _check_runs(reference: Trajectory, trajectories: Mapping[str, Trajectory]) -> None:
    _check.kind("reference", reference, Trajectory, "an eomdl.Trajectory")
    if not isinstance(trajectories, Mapping) or not trajectories:
        raise ValueError(f"trajectories: expected a dict {{name: eomdl.Trajectory}}, got {trajectories!r}")
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
    """Model minus reference of every observable that both have."""
    found = {}
    for key in run.observables.keys() & real.observables.keys():
        value, expected = run.observables[key], real.observables[key]
        if value.shape != expected.shape:
            raise ValueError(
                f"trajectories[{name!r}].observables[{key!r}]: expected the reference's shape, "
                f"{expected.shape[1:]} per step, got {value.shape[1:]}"
            )
        found[key] = value - expected
    return {key: found[key] for key in run.observables if key in found}


def _notes(reference: Trajectory, trajectories: Mapping[str, Trajectory]) -> tuple[str, ...]:
    """The notes of every run; warns of the models that left their validity."""
    notes = [f"reference: {reference.message}"] if reference.message else []
    for name, run in trajectories.items():
        notes += [f"{name}: {note}" for note in run.notes]
        for warning in run.warnings:
            warnings.warn(f"{name}: {warning}", stacklevel=3)
    return tuple(notes)


def row_norms(tree: Any) -> Float[np.ndarray, " n"]:
    """Euclidean norm of every row over all leaves."""
    squares = [np.sum(np.square(x.reshape(len(x), -1)), axis=1) for x in jax.tree.leaves(tree)]
    return np.sqrt(np.sum(squares, axis=0))


def top_level_blocks(params: Params) -> dict[str, Params]:
    """The parts of the pytree by name: the children of its root, or of the first node below that has several."""
    found = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: x is not params)[0]
    while len(found) == 1:
        ((path, only),) = found
        below = jax.tree_util.tree_flatten_with_path(only, is_leaf=lambda x, top=only: x is not top)[0]
        if not below or below[0][0] == ():  # a leaf
            break
        found = [((*path, *more), child) for more, child in below]
    return {jax.tree_util.keystr(path, simple=True, separator="."): child for path, child in found}
