"""How a checkpoint is kept on disk: in one file, or with a folder beside it for what is spread over devices."""

import abc
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
from typing_extensions import override

from eomdl import _shards
from eomdl._shards import StoredArray
from eomdl.runs.trajectory import Trajectory


class AbstractStorage(abc.ABC):
    """Where one row of a run with its whole state goes; `Trajectory.load` reads it.

    `gathers`: the row's parameters are wanted in host memory.
    """

    gathers: ClassVar[bool]

    @abc.abstractmethod
    def write(self, path: Path, checkpoint: Trajectory, events: Sequence[str]) -> None:
        """Write it, so that the file `path` is there only if all of it is. All processes of the run call it."""


class OneFile(AbstractStorage):
    """Everything in the file, gathered in the memory of the first process."""

    gathers = True

    @override
    def write(self, path: Path, checkpoint: Trajectory, events: Sequence[str]) -> None:
        checkpoint.save(path, events)


class Sharded(AbstractStorage):
    """Arrays spread over devices in a folder beside the file, by orbax; in the file is where they are.

    The folder is written first: without its file it is no checkpoint.
    """

    gathers = False

    def __init__(self) -> None:
        _shards.orbax()

    @override
    def write(self, path: Path, checkpoint: Trajectory, events: Sequence[str]) -> None:
        """Write the folder, then the file."""
        folder = path.with_suffix(".arrays")
        names: dict[int, str] = {}  # the parameters are in the state too: written once
        arrays: dict[str, jax.Array] = {}

        def away(leaf: Any) -> Any:
            if not _shards.is_spread(leaf):
                return leaf
            name = names.setdefault(id(leaf), f"array{len(names)}")
            arrays[name] = leaf
            return StoredArray(folder, name, leaf.shape, leaf.dtype)

        state, params = jax.tree.map(away, (checkpoint.end.state, checkpoint.end.params))
        if arrays:
            _shards.write(folder, arrays)
        end = dataclasses.replace(checkpoint.end, state=state, params=params)
        dataclasses.replace(checkpoint, params=None, end=end).save(path, events)
