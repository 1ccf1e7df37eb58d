"""Rows of parameters that go to files as they are computed."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from eomdl import _check
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
    `resume=` are copied into it.

    **Raises:** `ValueError` if the folder is no path; by a run, before its first step, if it holds rows, and under `jit`, `vmap`,
    `grad` or in several processes. `OSError` from a full disk, with the rows written so far.
    """

    def __init__(self, folder: str | Path):
        self.folder = _check.path("folder", folder)

    def open(self, params: Params, num_rows: int) -> "OpenRows":
        """Files with room for so many rows of parameters like these."""
        if jax.process_count() > 1:
            raise ValueError(f"save_params: expected a run in one process, got {jax.process_count()}")
        self.folder.mkdir(parents=True, exist_ok=True)
        if there := sorted(self.folder.glob("leaf*.npy")):
            raise ValueError(
                f"save_params: expected a folder without rows, got {self.folder} with {there[0].name}; give each run a "
                "folder of its own"
            )
        leaves, structure = jax.tree.flatten(params)
        paths = [self.folder / f"leaf{i}.npy" for i in range(len(leaves))]
        starts = []
        for path, leaf in zip(paths, leaves, strict=True):
            shape = (num_rows, *np.shape(leaf))
            made = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(leaf.dtype), shape=shape)
            starts.append(made.offset)
        return OpenRows(paths, starts, structure)


class OpenRows:
    """The rows of one run, written one after the other."""

    def __init__(self, paths: list[Path], starts: list[int], structure: Any):
        self._paths, self._starts, self._structure = paths, starts, structure
        self.count = 0

    def append(self, params: Params) -> None:
        """Write rows behind those there are; they count once all their leaves are written."""
        leaves = jax.tree.leaves(params)
        for path, start, leaf in zip(self._paths, self._starts, leaves, strict=True):
            # Not through a mapping, whose pages would stay in memory.
            with open(path, "r+b") as file:
                file.seek(start + self.count * leaf[:1].nbytes)
                step = block_length(leaf)
                for i in range(0, len(leaf), step):
                    file.write(np.ascontiguousarray(leaf[i : i + step]).tobytes())
        self.count += len(leaves[0])

    def rows(self, count: int) -> Params:
        """The first rows, mapped into memory."""
        return self._structure.unflatten([np.load(path, mmap_mode="r")[:count] for path in self._paths])


def block_length(leaf: Any) -> int:
    """How many rows of an array are worked on at once."""
    return max(1, _BLOCK // max(1, int(np.prod(np.shape(leaf)[1:]))))
