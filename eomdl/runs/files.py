"""Arrays and JSON in one file, no pickle."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from eomdl import _structure


def write_npz(path: str | Path, arrays: Mapping[str, Any], meta: dict[str, Any]) -> None:
    """Arrays and JSON in one file, written aside and moved into place: never half a file."""
    path = Path(path)
    aside = path.with_name(path.name + ".part")
    with open(aside, "wb") as file:
        whole: Any = {name: np.asarray(a) for name, a in arrays.items()}
        np.savez(file, meta=np.array(json.dumps(meta)), **whole)
    aside.replace(path)


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


def read_meta(path: str | Path, format: str) -> dict[str, Any]:
    """The JSON in a file, none of its arrays read."""
    with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
        meta = json.loads(str(file["meta"]))
    if meta.get("format") != format:
        raise ValueError(f"path: expected a file of format {format!r}, got {meta.get('format')!r} in {path}")
    return meta


class Tree:
    """A pytree in a file: its leaves among the arrays, its structure among the JSON."""

    @staticmethod
    def write(name: str, tree: Any, arrays: dict[str, Any], meta: dict[str, Any]) -> None:
        """Put it there."""
        meta[name] = _structure.describe(tree)
        arrays |= {f"{name}:{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}

    @staticmethod
    def read(name: str, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Any:
        """Take it out."""
        prefix = f"{name}:"
        count = sum(key.startswith(prefix) for key in arrays)
        return _structure.rebuild(meta[name], iter([arrays[f"{prefix}{i}"] for i in range(count)]))
