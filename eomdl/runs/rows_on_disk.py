"""Rows of parameters that go to files as they are computed."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from eomdl import _check, _processes
from eomdl._types import Params


_BLOCK = 2**22  # numbers that are copied at once


class RowsOnDisk:
    r"""A folder for the saved parameters of one run, in place of the host's memory.

    ```python
    store = eomdl.runs.RowsOnDisk("rows")
    run = eomdl.descend(loss, params, optimizer, 1000, save_steps=10, save_params=store)
    eomdl.compare(run, {"gradient flow": path})  # a few rows in memory at a time
    ```

    `trajectory.params` then are NumPy arrays mapped from the files `leaf0.npy`, `leaf1.npy`, ... (one for each leaf, in the order
    of `jax.tree.leaves`, shape (rows, ...)), read when they are used. What takes rows by a slice copies nothing; `compare` works
    in blocks. The files have room for all rows from the start, on most file systems without taking it; rows that were
    not reached are zeros.

    **Arguments:** `folder`: a path, made if it is not there. It must hold no rows when a run begins. The rows of a `Trajectory` in
    `resume=` are copied into it. Of several processes the first writes, and all map the files: the folder is one that all see.

    **Raises:** `ValueError` if the folder is no path; by a run, before its first step, if it holds rows, and under `jit`, `vmap` or
    `grad`. `OSError` from a full disk, with the rows written so far.
    """

    def __init__(self, folder: str | Path):
        self.folder = _check.path("folder", folder)

    def __repr__(self) -> str:
        return f"RowsOnDisk({str(self.folder)!r})"

    def open(self, params: Params, num_rows: int) -> "OpenRows":
        """Files with room for so many rows of parameters like these."""
        leaves, structure = jax.tree.flatten(params)
        paths = [self.folder / f"leaf{i}.npy" for i in range(len(leaves))]
        with _processes.barrier("save_params"):
            if _processes.is_first():
                self._make(paths, leaves, num_rows)
        return OpenRows(paths, [np.load(path, mmap_mode="r").offset for path in paths], structure)

    def _make(self, paths: list[Path], leaves: list, num_rows: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if there := sorted(self.folder.glob("leaf*.npy")):
            raise ValueError(
                f"save_params: expected a folder without rows, got {self.folder} with {there[0].name}; give each run a "
                "folder of its own"
            )
        for path, leaf in zip(paths, leaves, strict=True):
            shape = (num_rows, *np.shape(leaf))
            np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(leaf.dtype), shape=shape)


class OpenRows:
    """The rows of one run, written one after the other."""

    def __init__(self, paths: list[Path], starts: list[int], structure: Any):
        self._paths, self._starts, self._structure = paths, starts, structure
        self.count = 0

    def append(self, params: Params) -> None:
        """Write rows behind those there are; they count once all their leaves are written."""
        leaves = jax.tree.leaves(params)
        with _processes.barrier("save_params"):
            if _processes.is_first():
                self._write(leaves)
        self.count += len(leaves[0])

    def _write(self, leaves: list) -> None:
        for path, start, leaf in zip(self._paths, self._starts, leaves, strict=True):
            # Not through a mapping, whose pages would stay in memory.
            with open(path, "r+b") as file:
                file.seek(start + self.count * leaf[:1].nbytes)
                step = block_length(leaf)
                for i in range(0, len(leaf), step):
                    file.write(np.ascontiguousarray(leaf[i : i + step]).tobytes())

    def rows(self, count: int) -> Params:
        """The first rows, mapped into memory."""
        return self._structure.unflatten([np.load(path, mmap_mode="r")[:count] for path in self._paths])


def block_length(leaf: Any) -> int:
    """How many rows of an array are worked on at once."""
    return max(1, _BLOCK // max(1, int(np.prod(np.shape(leaf)[1:]))))
