"""Arrays and JSON in one file: no pickle, a checksum for every array, never half a file."""

import contextlib
import hashlib
import json
import os
import secrets
import stat
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

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
    members: dict[str, Any] = {}
    listed: dict[str, Any] = {}
    for i, (name, value) in enumerate(arrays.items()):
        array, kind = _encode(value)
        members[f"array{i}"] = array
        listed[name] = [f"array{i}", kind, _checksum(array.tobytes())]
    text = json.dumps({"arrays": listed, "meta": meta}).encode()
    members |= {"text": np.frombuffer(text, np.uint8), "checksum": np.frombuffer(_digest(text), np.uint8)}
    with replacing(path) as file:
        np.savez(file, **members)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a new file that takes the place of `path` as a whole when the block ends; what is raised in the block leaves nothing.

    The file has a fresh name in the same folder: two writers of one path do not meet, and no link is followed. It is on the
    disk before it has the name, so that a power failure leaves the old file or the new one.
    """
    aside = path.with_name(f"{path.name[:50]}.{secrets.token_hex(8)}.part")
    with naming(path):
        try:
            with open(aside, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in an `OSError` that names none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error


def read_npz(path: str | Path, *formats: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arrays and the JSON that `write_npz` wrote, in one of these formats.

    **Raises:** `DamagedFile` if the file is something else, `FileNotFoundError`.
    """
    with _open(path, *formats) as file:
        listed, meta = _read_text(file, *formats)
        members = [member for member, _, _ in listed.values()]
        if sorted(file.files) != sorted(["text", "checksum", *members]):
            raise ValueError(f"members {sorted(file.files)}, listed {sorted(members)}")
        arrays = {}
        for name, (member, kind, checksum) in listed.items():
            array = file[member]
            if array.dtype.kind not in "biufc":
                raise ValueError(f"{name!r}: expected numbers, got dtype {array.dtype}")
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
    _require_regular(path)
    with open(path, "rb") as raw:  # here, since `np.load` leaves a damaged file open
        try:
            _require_disjoint(raw)
            with np.load(raw, allow_pickle=False) as file:
                yield file
        except Exception as error:
            raise DamagedFile(
                f"path: expected a whole file of format {' or '.join(map(repr, formats))}, got {path} ({type(error).__name__}: {error})"
            ) from error


def _require_regular(path: str | Path) -> None:
    """Raise for what is there and no file: a pipe would be waited for."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise DamagedFile(f"path: expected a file, got {path}, which is {kind}")


def _require_disjoint(raw: IO[bytes]) -> None:
    """Raise if a member is compressed or shares its bytes with another: so no file unpacks to more than its own size."""
    with zipfile.ZipFile(raw) as archive:
        members = archive.infolist()
    if packed := [info.filename for info in members if info.compress_type != zipfile.ZIP_STORED]:
        raise ValueError(f"compressed members {packed}")
    if sum(max(info.file_size, info.compress_size) for info in members) > raw.seek(0, os.SEEK_END):
        raise ValueError("members that overlap")
    if len({info.filename for info in members}) != len(members):
        raise ValueError("two members of one name")
    raw.seek(0)


def _read_text(file: Any, *formats: str) -> tuple[dict[str, Any], dict[str, Any]]:
    text = file["text"].tobytes()
    if _digest(text) != file["checksum"].tobytes():
        raise ValueError("checksum of the text")
    whole = json.loads(text, object_pairs_hook=_structure.unique)
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
    if not kind:
        return array
    short = jnp.dtype(kind)
    if short.kind != "V" or array.dtype != f"u{short.itemsize}":
        raise ValueError(f"kind {kind!r} of an array of dtype {array.dtype}")
    return array.view(short)


class Tree:
    """A pytree in a file: its leaves among the arrays, its structure among the JSON."""

    @staticmethod
    def write(name: str, tree: Any, arrays: dict[str, Any], meta: dict[str, Any]) -> None:
        """Add the tree to the arrays and the JSON of a file."""
        meta[name] = _structure.describe(tree)
        arrays |= {f"{name}:{i}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}

    @staticmethod
    def read(name: str, arrays: dict[str, Any], meta: Mapping[str, Any]) -> Any:
        """Return the tree of that name, its leaves taken out of the arrays."""
        prefix = f"{name}:"
        count = sum(key.startswith(prefix) for key in arrays)
        return _structure.rebuild(meta[name], [arrays.pop(f"{prefix}{i}") for i in range(count)])
