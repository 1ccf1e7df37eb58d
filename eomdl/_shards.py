"""Arrays that are spread over devices, on disk: each process writes and reads the part on its own devices."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_spread(x: Any) -> bool:
    """Whether no device has the whole array."""
    is_plain = isinstance(x, jax.Array) and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return is_plain and not x.is_fully_replicated


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array in a folder of its own that is not read yet.

    It is a leaf of a pytree. `numpy.asarray` reads it whole; `read` reads it onto the devices of a sharding.
    """

    folder: Path
    name: str
    shape: tuple[int, ...]
    dtype: Any

    def read(self, sharding: Any) -> jax.Array:
        """Return the array on these devices, each process reading its part. All their processes must call it."""
        return self._restore(orbax().ArrayRestoreArgs(sharding=sharding, dtype=self.dtype))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy
        return np.asarray(self._restore(orbax().RestoreArgs(restore_type=np.ndarray)), dtype)

    def _restore(self, how: Any) -> Any:
        ocp = orbax()
        wanted = jax.ShapeDtypeStruct(self.shape, self.dtype)
        arguments = ocp.args.PyTreeRestore({self.name: wanted}, {self.name: how}, partial_restore=True)
        with ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.restore(self.folder.absolute(), arguments)[self.name]


def write(folder: Path, arrays: Mapping[str, jax.Array]) -> None:
    """Write arrays into a folder, which appears when all are written. All their processes must call it."""
    ocp = orbax()
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), ocp.args.PyTreeSave(dict(arrays)), force=True)


def orbax() -> Any:
    """Return the library `orbax.checkpoint`. **Raises:** `ImportError` that names the extra."""
    # Imported here: an extra, and long to import.
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError(
            "a sharded checkpoint needs orbax-checkpoint: python -m pip install 'eomdl[distributed]'"
        ) from error
    return ocp
