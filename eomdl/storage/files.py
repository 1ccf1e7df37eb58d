"""Arrays and JSON in one file: no pickle, a checksum for every array, never half a file."""

import contextlib
import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eomdl import _devices, _processes, _structure
from eomdl._shards import StoredArray


class DamagedFile(ValueError):
    """A file that is not what `save` of a result writes, or is no longer."""


def write_npz(path: str | Path, arrays: Mapping[str, Any], meta: dict[str, Any]) -> None:
    """Write a file aside, then move it into place: a full or read-only disk leaves nothing behind.

    All processes must call this; the first one writes.

    **Raises:** `OSError` naming the file.
    """
    with _processes.barrier(f"writing {path}"):
        arrays = {name: _make_addressable(value) for name, value in arrays.items()}
        if _processes.is_first():
            _write(Path(path), arrays, meta)


def _write(path: Path, arrays: Mapping[str, Any], meta: dict[str, Any]) -> None:
    aside = path.with_name(path.name + ".part")
    members: dict[str, Any] = {}
    listed: dict[str, Any] = {}
    for i, (name, value) in enumerate(arrays.items()):
        array, kind = _encode(value)
        members[f"array{i}"] = array
        listed[name] = [f"array{i}", kind, _checksum(array.tobytes())]
    text = json.dumps({"arrays": listed, "meta": meta}).encode()
    members |= {"text": np.frombuffer(text, np.uint8), "checksum": np.frombuffer(_digest(text), np.uint8)}
    try:
        with open(aside, "wb") as file:
            np.savez(file, **members)
        aside.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise


def read_npz(path: str | Path, *formats: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arrays and the JSON that `write_npz` wrote, in one of these formats.

    **Raises:** `DamagedFile` if the file is something else, `FileNotFoundError`.
    """
    with _open(path, *formats) as file:
        listed, meta = _read_text(file, *formats)
        expected = {"text", "checksum", *(member for member, _, _ in listed.values())}
        if set(file.files) != expected:
            raise ValueError(f"members {sorted(set(file.files) ^ expected)} missing or not listed")
        arrays = {}
        for name, (member, kind, checksum) in listed.items():
            array = file[member]
            if _checksum(array.tobytes()) != checksum:
                raise ValueError(f"checksum of {name!r}")
            arrays[name] = _decode(array, kind, Path(path))
        return arrays, meta


def read_meta(path: str | Path, *formats: str) -> dict[str, Any]:
    """Return the JSON of a file without reading its arrays. **Raises:** as `read_npz`."""
    with _open(path, *formats) as file:
        return _read_text(file, *formats)[1]


@contextlib.contextmanager
def _open(path: str | Path, *formats: str) -> Iterator[Any]:
    with open(path, "rb") as raw:  # here, since `np.load` leaves a damaged file open
        try:
            _require_uncompressed(raw)
            with np.load(raw, allow_pickle=False) as file:
                yield file
        except Exception as error:
            raise DamagedFile(
                f"path: expected a whole file of format {' or '.join(map(repr, formats))}, got {path} ({type(error).__name__}: {error})"
            ) from error


def _require_uncompressed(raw: Any) -> None:
    """Raise if a member is compressed: `write_npz` does not compress, so no file unpacks to more than its own size."""
    with zipfile.ZipFile(raw) as archive:
        packed = [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise ValueError(f"compressed members {packed}")
    raw.seek(0)


def _read_text(file: Any, *formats: str) -> tuple[dict[str, Any], dict[str, Any]]:
    text = file["text"].tobytes()
    if _digest(text) != file["checksum"].tobytes():
        raise ValueError("checksum of the text")
    whole = json.loads(text)
    found = whole["meta"]["format"]
    if found not in formats:
        raise ValueError(f"format {found!r}")
    return whole["arrays"], whole["meta"]


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _checksum(data: bytes) -> str:
    return _digest(data).hex()


def _make_addressable(leaf: Any) -> Any:
    """Return the leaf, in host memory where this process holds only a part of it."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return _devices.on_host(leaf)
    return leaf


def _encode(leaf: Any) -> tuple[np.ndarray, str]:
    """Return a leaf as an array of NumPy's own dtypes, and what it was where that is something else."""
    if isinstance(leaf, StoredArray):
        return np.asarray(leaf.shape, int), f"elsewhere {leaf.folder.name} {leaf.name} {leaf.dtype}"
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(leaf)), f"key {jax.random.key_impl(leaf)}"
    array = np.asarray(leaf)
    if array.dtype.kind == "V":  # bfloat16 and its kin
        return array.view(f"u{array.dtype.itemsize}"), array.dtype.name
    return array, ""


def _decode(array: np.ndarray, kind: str, path: Path) -> Any:
    """Return the leaf that `_encode` was given."""
    if kind.startswith("elsewhere "):
        _, folder, name, dtype = kind.split()
        return StoredArray(path.with_name(folder), name, tuple(array.tolist()), jnp.dtype(dtype))
    if kind.startswith("key "):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=kind.removeprefix("key "))
    return array.view(jnp.dtype(kind)) if kind else array


class Tree:
    """A pytree in a file: its leaves among the arrays, its structure among the JSON."""

    @staticmethod
    def write(name: str, tree: Any, arrays: dict[str, Any], meta: dict[str, Any]) -> None:
        """Add the tree to the arrays and the JSON of a file."""
        meta[name] = _structure.describe(tree)
        arrays |= {f"{name}:{i}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}

    @staticmethod
    def read(name: str, arrays: Mapping[str, Any], meta: Mapping[str, Any]) -> Any:
        """Return the tree of that name."""
        prefix = f"{name}:"
        count = sum(key.startswith(prefix) for key in arrays)
        return _structure.rebuild(meta[name], iter([arrays[f"{prefix}{i}"] for i in range(count)]))
