"""Rows of parameters that go to files as they are computed."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from typing_extensions import override

from eomdl import _check, _processes
from eomdl._types import Array, Params
from eomdl.storage.files import naming


_BLOCK = 2**22  # numbers that are copied at once


class RowsOnDisk:
    r"""A folder for the saved parameters of one run, in place of the host's memory.

    ```python
    store = eomdl.runs.RowsOnDisk("rows")
    run = eomdl.descend(loss, params, optimizer, 1000, save_steps=10, save_params=store)
    eomdl.compare(run, {"gradient flow": path})  # a few rows in memory at a time
    ```

    `trajectory.params` then are NumPy arrays mapped from the files `leaf0.npy`, `leaf1.npy`, ... (one for each leaf, in the order
    of `jax.tree.leaves`, shape (rows, ...)), read when they are used. `steps.npy` has the step number of each row. What takes rows by
    a slice copies nothing; `compare` works in blocks. The files have room for all rows from the start, on most file systems
    without taking it. The shape in a file counts its whole rows, also after a crash of the process: `numpy.load` gives those.
    (After a power failure the last ones may be missing: they are not waited for.)

    **Arguments:** `folder`: a path, made if it is not there. It must hold no rows when a new run begins. The rows of a run that
    continues (`resume=`) where the folder has some go to a folder `from-K` inside, K the step at which it begins, so that the same
    line begins a run and continues a killed one. The rows of a `Trajectory` in `resume=` are copied there too. Of several processes the
    first writes, and all map the files: the folder is one that all see.

    **Raises:** `ValueError` if the folder is no path; by a run, before its first step, if it holds rows, and under `jit`, `vmap` or
    `grad`. `OSError` that names the file from a full disk or a folder that is gone, with the rows written so far.
    """

    def __init__(self, folder: str | Path):
        self.folder = _check.path("folder", folder)

    @override
    def __repr__(self) -> str:
        return f"RowsOnDisk({str(self.folder)!r})"

    def open(self, params: Params, num_rows: int, start: int | None) -> "OpenRows":
        """Return files with room for so many rows of parameters like these, of a run that continues at `start`, or of a new one."""
        leaves, structure = jax.tree.flatten(params)
        # The number of each step in front: one array of int64.
        like = [np.zeros((), np.int64), *leaves]
        shapes = [jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype) for leaf in like]
        with _processes.barrier("save_params"):
            if _processes.is_first():
                self._make(shapes, num_rows, start)
        *_, folder = itertools.takewhile(_holds_rows, self._places(start))
        return OpenRows(_paths(folder, len(like)), shapes, num_rows, structure)

    def _places(self, start: int | None) -> Iterator[Path]:
        """Return the folders where rows may go, in order: the first free one is taken."""
        yield self.folder
        if start is not None:
            for i in itertools.count(1):
                yield self.folder / f"from-{start}{f'-{i}' if i > 1 else ''}"

    def _make(self, leaves: list, num_rows: int, start: int | None) -> None:
        free = next(itertools.dropwhile(_holds_rows, self._places(start)), None)
        if free is None:
            raise ValueError(
                f"save_params: expected a folder without rows, got {self.folder} with {_describe(self.folder)}; give each run a "
                "folder of its own, or continue that run with `resume=`"
            )
        free.mkdir(parents=True, exist_ok=True)
        for path, leaf in zip(_paths(free, len(leaves)), leaves, strict=True):
            with naming(path), open(path, "xb") as file:
                _write_header(file, leaf, 0)
                file.truncate(file.tell() + num_rows * _num_bytes(leaf))


class OpenRows:
    """The rows of one run, written one after the other.

    They are mapped from the start, so that those written can be read also where the folder is removed.
    """

    def __init__(self, paths: list[Path], leaves: list, num_rows: int, structure: Any):
        self._paths, self._leaves, self._structure = paths, leaves, structure
        self._maps = [
            np.memmap(path, leaf.dtype, "r", np.load(path, mmap_mode="r").offset, (num_rows, *np.shape(leaf)))
            for path, leaf in zip(paths, leaves, strict=True)
        ]
        self.count = 0

    def append(self, steps: Array, params: Params) -> None:
        """Write rows behind those there are; they count once all their leaves are written."""
        leaves = [np.asarray(steps, np.int64), *jax.tree.leaves(params)]
        with _processes.barrier("save_params"):
            if _processes.is_first():
                self._write(leaves)
        self.count += len(steps)

    def _write(self, leaves: list) -> None:
        for path, room, like, leaf in zip(self._paths, self._maps, self._leaves, leaves, strict=True):
            # Not through a mapping, whose pages would stay in memory.
            with naming(path), open(path, "r+b") as file:
                file.seek(room.offset + self.count * _num_bytes(like))
                step = block_length(leaf)
                for i in range(0, len(leaf), step):
                    file.write(np.ascontiguousarray(leaf[i : i + step]).tobytes())
        for path, leaf in zip(self._paths, self._leaves, strict=True):
            with naming(path), open(path, "r+b") as file:
                _write_header(file, leaf, self.count + len(leaves[0]))

    def rows(self, count: int) -> Params:
        """Return the first rows, mapped into memory."""
        return self._structure.unflatten([room[:count] for room in self._maps[1:]])


def _paths(folder: Path, count: int) -> list[Path]:
    return [folder / "steps.npy", *(folder / f"leaf{i}.npy" for i in range(count - 1))]


def _holds_rows(folder: Path) -> bool:
    return any(folder.glob("leaf*.npy"))


def _describe(folder: Path) -> str:
    """Return how many whole rows are in a folder, in words."""
    try:
        count = min(len(np.load(path, mmap_mode="r")) for path in folder.glob("leaf*.npy"))
        steps = np.load(folder / "steps.npy", mmap_mode="r")[:count]
    except (OSError, ValueError):
        return "leaf0.npy"
    return f"{count} whole rows, the last one of step {steps[-1]}" if count else "files without rows"


def _num_bytes(leaf: Any) -> int:
    """Return the bytes of one row."""
    return math.prod(np.shape(leaf)) * leaf.dtype.itemsize


def _write_header(file: IO[bytes], leaf: Any, count: int) -> None:
    """Write the header of a file of so many rows; it has the same length for every count."""
    descr = np.lib.format.dtype_to_descr(np.dtype(leaf.dtype))
    shape = (count, *np.shape(leaf))
    np.lib.format.write_array_header_1_0(file, dict(descr=descr, fortran_order=False, shape=shape))


def block_length(leaf: Any) -> int:
    """How many rows of an array are worked on at once."""
    return max(1, _BLOCK // max(1, int(np.prod(np.shape(leaf)[1:]))))
