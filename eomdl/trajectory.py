"""A path through weight space: the one type for real runs and for flows."""

import dataclasses
import json
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import equinox as eqx
import jax
import numpy as np

from eomdl._types import Params, State


class RESULTS(eqx.Enumeration):
    """How a run ended. Each message names the remedy."""

    successful = ""
    nonfinite = (
        "The state became infinite or NaN, so the run stopped there. Use a smaller learning rate, or "
        "float64 (jax.config.update('jax_enable_x64', True)); what was computed up to then is returned."
    )
    max_steps_reached = (
        "The ODE solver used up its step limit, so the run stopped there. Raise `max_steps`, loosen `rtol` "
        "and `atol`, or lower the order: past eta*lambda_max = 1 the terms grow without bound. An optimizer's "
        "first steps may be too rough for any flow: start after them (`resume=` a real run)."
    )
    interrupted = "Interrupted from the keyboard. Continue with `resume=` this trajectory."
    batches_exhausted = (
        "`batches` ended before the run did. Give as many batches as steps, then continue with `resume=` "
        "this trajectory."
    )


def result_where(condition: Any, this: Any, other: Any) -> Any:
    """`this` item of `RESULTS` where the condition holds, else the `other`."""
    return RESULTS.where(condition, this, other)


class Trajectory(eqx.Module):
    """States of one run at its saved steps; step k of the optimizer sits at time $k\\eta$.

    - `steps`: saved step numbers, shape (n,).
    - `times`: the same in units of time, `steps * step_size`, shape (n,); nan where the
        optimizer's learning rate is not known.
    - `params`: the parameters, leaves with leading axis n, or None if they were not saved.
    - `observables`: `{name: array of shape (n, ...)}`.
    - `ode_error`: for flows, an estimate of the ODE solver's own error in the parameters
        (Euclidean distance) at each saved step, shape (n,); None for real runs.
    - `result`: an item of `eomdl.RESULTS`; `message` puts it in words.
    - `stats`: counts and diagnostics of the run, `{name: array}`.
    - `final`: the last state reached (parameters and what else the run carries), from
        which `resume=` continues.
    - `final_step`: its step number.
    - `final_params`: the parameters in it, saved steps or not.

    A pytree: `jax.vmap` over `solve` gives a batch of them.
    """

    steps: Any
    times: Any
    params: Params | None
    observables: dict[str, Any]
    ode_error: Any
    result: Any
    stats: dict[str, Any]
    final: State
    final_step: Any
    final_params: Params

    @property
    def message(self) -> str:
        """The result in words: at which step, why, and what to do. Empty if successful."""
        if np.ndim(self.result._value) > 0:
            return cast(Any, RESULTS)[self.result]
        if bool(self.result == RESULTS.successful):
            return ""
        last = max([*self.steps, self.final_step])
        return f"Stopped after step {last}. {cast(Any, RESULTS)[self.result]}"

    def at(self, step: int) -> Params:
        """The parameters at a saved step. Raises `ValueError` if it was not saved."""
        if self.params is None:
            raise ValueError("params: expected saved parameters, got a run with save_params=False")
        (index,) = np.nonzero(np.asarray(self.steps) == step)
        if len(index) == 0:
            raise ValueError(f"step: expected a saved step, {_summary(self.steps)}, got {step}")
        return jax.tree.map(lambda leaf: leaf[index[0]], self.params)

    def smoothed(self, window: int = 2) -> "Trajectory":
        """Means over w = `window` consecutive steps: row k is the mean of $\\theta_k, \\dots, \\theta_{k+w-1}$.

        What oscillates with a period of w steps drops out: at the edge of stability w = 2 leaves the
        path in the middle of the valley. Observables are averaged too, `ode_error` kept (the largest
        of the window); the last w - 1 steps drop out.

        **Raises:** `ValueError` if the saved steps have gaps or are fewer than w.
        """
        window = operator.index(window)
        steps = np.asarray(self.steps)
        if window < 1 or len(steps) < window or np.any(np.diff(steps) != 1):
            raise ValueError(
                f"window: expected an integer from 1 to the number of saved steps, all consecutive, got {window} "
                f"with saved {_summary(steps)}"
            )

        def windows(x: Any) -> np.ndarray:
            return np.lib.stride_tricks.sliding_window_view(np.asarray(x), window, axis=0)

        def mean(x: Any) -> np.ndarray:
            return np.mean(windows(x), axis=-1, dtype=np.asarray(x).dtype)

        rows = len(steps) - window + 1
        return Trajectory(
            steps=steps[:rows],
            times=np.asarray(self.times)[:rows],
            params=jax.tree.map(mean, self.params),
            observables=jax.tree.map(mean, self.observables),
            ode_error=None if self.ode_error is None else np.max(windows(self.ode_error), axis=-1),
            result=self.result,
            stats=self.stats,
            final=self.final,
            final_step=self.final_step,
            final_params=self.final_params,
        )

    def without_state(self) -> "Trajectory":
        """This run with what it carries beside the parameters dropped.

        `resume=` then begins at its last step and parameters with the state that a new run has there: with
        another optimizer, say.
        """
        return dataclasses.replace(self, final=None)

    def save(self, path: str | Path) -> None:
        """Write one `.npz` file (NumPy arrays and JSON, no pickle), replacing it as a whole."""
        arrays: dict[str, np.ndarray] = {"steps": self.steps, "times": self.times}
        meta: dict[str, Any] = {
            "format": _FORMAT,
            "result": int(self.result._value),
            "final_step": int(self.final_step),
            "params": None if self.params is None else _describe(self.params),
            "final": None if self.final is None else len(jax.tree.leaves(self.final)),
            "final_params": _describe(self.final_params),
        }
        if self.params is not None:
            arrays |= _numbered("params", self.params)
        if self.ode_error is not None:
            arrays["ode_error"] = self.ode_error
        arrays |= _numbered("final", self.final) | _numbered("final_params", self.final_params)
        arrays |= {f"observable:{name}": value for name, value in self.observables.items()}
        arrays |= {f"stat:{name}": value for name, value in self.stats.items()}
        write_npz(path, arrays, meta)

    @staticmethod
    def load(path: str | Path, like: Params | None = None) -> "Trajectory":
        """Read what `save` wrote.

        Parameters made of dicts, lists and tuples come back as they were. For any other
        pytree give one as `like`; without it they come back as a dict from key path to array.
        The state in `final` comes back as a flat list, which `resume=` puts in order.

        Raises `ValueError` if the file is not such a file, is truncated, or does not fit `like`.
        """
        arrays, meta = read_npz(path, _FORMAT)
        params = None
        if meta["params"] is not None:
            leaves = [arrays[f"params:{i}"] for i in range(len(meta["params"]))]
            params = _rebuild(meta["params"], leaves, like, path, rows=1)
        end = [arrays[f"final_params:{i}"] for i in range(len(meta["final_params"]))]
        return Trajectory(
            steps=arrays["steps"],
            times=arrays["times"],
            params=params,
            observables=_with_prefix(arrays, "observable:"),
            ode_error=arrays.get("ode_error"),
            result=_result_from_index(meta["result"]),
            stats=_with_prefix(arrays, "stat:"),
            final=None if meta["final"] is None else [arrays[f"final:{i}"] for i in range(meta["final"])],
            final_step=meta["final_step"],
            final_params=_rebuild(meta["final_params"], end, like, path, rows=0),
        )


_FORMAT = "eomdl.Trajectory 2"


def _summary(steps: Any) -> str:
    return np.array2string(np.asarray(steps), threshold=8, edgeitems=3)


def _result_from_index(index: int) -> Any:
    (item,) = [item for item in RESULTS._name_to_item.values() if int(item._value) == index]
    return item


def _numbered(prefix: str, tree: Any) -> dict[str, np.ndarray]:
    return {f"{prefix}:{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}


def _with_prefix(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}


def write_npz(path: str | Path, arrays: Mapping[str, Any], meta: dict[str, Any]) -> None:
    """Arrays and JSON in one file, written aside and moved into place: never half a file."""
    path = Path(path)
    aside = path.with_name(path.name + ".part")
    with open(aside, "wb") as file:
        whole: Any = {name: np.asarray(a) for name, a in arrays.items()}
        np.savez(file, meta=np.array(json.dumps(meta)), **whole)
    aside.replace(path)


def names_in_npz(path: str | Path) -> list[str]:
    """Names of the arrays in a file, none of them read."""
    with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
        return list(file.files)


def read_npz(path: str | Path, format: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What `write_npz` wrote; `ValueError` if it is something else."""
    try:
        # Opened here, since `np.load` leaves a damaged file open.
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = dict(file)
        meta = json.loads(str(arrays.pop("meta")))
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"path: expected a whole file of format {format!r}, got {path} ({type(error).__name__})"
        ) from error
    if meta.get("format") != format:
        raise ValueError(f"path: expected a file of format {format!r}, got {meta.get('format')!r} in {path}")
    return arrays, meta


def _describe(tree: Params) -> list[list[list[Any]]]:
    """Key path of every leaf, [["d", key], ["l", index, length], ["t", index, length], ...].

    What JSON cannot say (other pytree nodes, empty containers) is described by the key
    path's text alone, [["?", text]].
    """
    flat = jax.tree_util.tree_leaves_with_path(tree)
    try:
        paths = [_describe_path(tree, path) for path, _ in flat]
        if jax.tree.structure(_nest(list(zip(paths, range(len(flat)), strict=True)))) == jax.tree.structure(
            tree
        ):
            return paths
    except (AttributeError, KeyError, TypeError):
        pass
    return [[["?", jax.tree_util.keystr(path)]] for path, _ in flat]


def _describe_path(node: Any, path: Any) -> list[list[Any]]:
    described: list[list[Any]] = []
    for entry in path:
        if type(node) is dict:
            described.append(["d", entry.key])
            node = node[entry.key]
        else:
            described.append(["l" if type(node) is list else "t", entry.idx, len(node)])
            node = node[entry.idx]
    return described


def _rebuild(paths: list, leaves: list, like: Params | None, path: str | Path, rows: int) -> Params:
    """The tree of the leaves, whose shapes are those of `like` after `rows` leading axes."""
    if like is not None:
        structure = jax.tree.structure(like)
        shapes = [leaf.shape[rows:] for leaf in leaves]
        if [np.shape(leaf) for leaf in jax.tree.leaves(like)] != shapes:
            raise ValueError(f"like: expected leaves of shapes {shapes} as in {path}, got {structure}")
        return structure.unflatten(leaves)
    items = list(zip(paths, leaves, strict=True))
    if any(described[0][0] == "?" for described, _ in items if described):
        return {described[0][1]: leaf for described, leaf in items}
    return _nest(items)


def _nest(items: list[tuple[list, Any]]) -> Params:
    first, leaf = items[0]
    if not first:
        return leaf
    groups: dict[Any, list] = {}
    for described, value in items:
        groups.setdefault(described[0][1], []).append((described[1:], value))
    if first[0][0] == "d":
        return {key: _nest(group) for key, group in groups.items()}
    children = [_nest(groups[i]) for i in range(first[0][2])]
    return children if first[0][0] == "l" else tuple(children)
