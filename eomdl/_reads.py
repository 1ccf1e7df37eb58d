"""What a function reads beside its arguments: values that change between two calls are found.

JAX keeps the programs of a function with the values that it has read when they were compiled. A global that is set again in a
notebook, or an attribute of the object of a bound method, then counts in some programs and not in others.
"""

import contextlib
import dis
import functools
import types
import weakref
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from eomdl import _tree


_DEPTH = 6  # of functions and objects within each other
_WRITES = {"STORE_GLOBAL", "STORE_DEREF", "STORE_ATTR", "STORE_SUBSCR"}
_of_jax_arrays: dict[int, tuple[Any, Any]] = {}  # by id, each with a weak reference to its array
_first: weakref.WeakKeyDictionary[Any, dict[Any, dict[str, Any]]] = weakref.WeakKeyDictionary()


def assert_unchanged(name: str, model: Any) -> None:
    """Raise if a function, or one in a Module, reads another value than when it was first seen."""
    for leaf in jax.tree.leaves(model):
        found = changed_since_first_seen(leaf) if callable(leaf) else None
        if found is not None:
            what, old, new = found
            raise ValueError(
                f"{name}: expected a function that reads the same values in every call, got `{what}` = {new} after {old}: "
                "programs that are compiled keep the old value; pass it in `args`, or define the function again"
            )


def changed_since_first_seen(f: Any) -> tuple[str, Any, Any] | None:
    """Return the name, the old and the new value of something that a Python function reads, if it was another before.

    Numbers, text, arrays and tuples and dicts of them count, in globals, closures, defaults and the attributes that the code
    names, also of the functions that it calls. Code that writes such values itself (a counter) is left out.
    """
    if not isinstance(f, types.FunctionType | types.MethodType | functools.partial):
        f = f.__call__
    # Another object for a method at each time that it is read: it is known by its owner.
    key, method = (f.__self__, f.__func__) if isinstance(f, types.MethodType) else (f, None)
    now = dict(_values(f))
    try:
        before = _first.setdefault(key, {}).setdefault(method, now)
    except TypeError:  # no weak reference to it, or no hash
        return None
    for name, value in now.items():
        if name in before and repr(before[name]) != repr(value):
            return name, before[name], value
    return None


def _values(f: Any, depth: int = _DEPTH, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the names and values that a function reads; of arrays a checksum."""
    if isinstance(f, functools.partial):
        f = f.func
    owner = getattr(f, "__self__", None)
    f = getattr(f, "__func__", f)
    if not isinstance(f, types.FunctionType) or depth == 0 or _is_library(f.__module__):
        return
    names = _names_read(f.__code__)
    if names is None:
        return
    found = {name: f.__globals__[name] for name in names if name in f.__globals__}
    for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
        if name in names:
            with contextlib.suppress(ValueError):  # not filled yet
                found[name] = cell.cell_contents
    if owner is not None:
        found["self"] = owner
    for name, value in found.items():
        yield from _parts(f"{prefix}{name}", value, names, depth - 1)


def _parts(name: str, value: Any, names: set[str], depth: int) -> Iterator[tuple[str, Any]]:
    if depth == 0 or isinstance(value, type | types.ModuleType) or _tree.is_traced(value):
        return
    if isinstance(value, bool | int | float | complex | str | None):
        yield name, value
    elif isinstance(value, np.ndarray | np.generic | jax.Array):
        yield name, _checksum(value)
    elif isinstance(value, types.FunctionType | types.MethodType | functools.partial):
        yield from _values(value, depth, f"{name}: ")
    else:
        for inner, part in _items(name, value, names):
            yield from _parts(inner, part, names, depth - 1)


def _items(name: str, value: Any, names: set[str]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, tuple):
        yield from ((f"{name}[{i}]", part) for i, part in enumerate(value))
    elif isinstance(value, Mapping):
        yield from ((f"{name}[{key!r}]", part) for key, part in value.items())
    elif not _is_library(type(value).__module__):
        attributes = getattr(value, "__dict__", {})
        yield from ((f"{name}.{key}", part) for key, part in attributes.items() if key in names)


@functools.lru_cache(256)
def _names_read(code: types.CodeType) -> set[str] | None:
    """Return the names in a function's code and in the functions inside of it, without those that it writes; None for items."""
    read: set[str] = set(code.co_names) | set(code.co_freevars)
    written = {i.argval for i in dis.get_instructions(code) if i.opname in _WRITES}
    for inner in (c for c in code.co_consts if isinstance(c, types.CodeType)):
        names = _names_read(inner)
        if names is None:
            return None
        read |= names
    if any(i.opname == "STORE_SUBSCR" for i in dis.get_instructions(code)):
        return None
    return read - written


def _is_library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in (
        "jax",
        "jaxlib",
        "numpy",
        "optax",
        "equinox",
        "diffrax",
        "eomdl",
        "builtins",
    )


def _checksum(array: Any) -> Any:
    """Return a number as it is, and a checksum of an array: of one of JAX, which nothing changes in place, it is made once."""
    if not isinstance(array, jax.Array):
        return _checksum_of_numpy(array)
    if not array.is_fully_addressable or jax.dtypes.issubdtype(array.dtype, jax.dtypes.extended):
        return None
    key = id(array)
    of, checksum = _of_jax_arrays.get(key, (None, None))
    if of is None or of() is not array:
        checksum = _checksum_of_numpy(array)
        _of_jax_arrays[key] = weakref.ref(array, lambda _: _of_jax_arrays.pop(key, None)), checksum
    return checksum


def _checksum_of_numpy(array: Any) -> Any:
    array = np.asarray(array)
    if array.ndim == 0 and array.dtype.kind in "fiub":
        return float(array)
    flat = np.ascontiguousarray(array).reshape(-1)
    content = zlib.crc32(flat.tobytes() if array.dtype.hasobject else flat.view(np.uint8))
    return f"array {array.shape} #{content:08x}"
