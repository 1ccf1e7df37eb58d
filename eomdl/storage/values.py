"""Values of Python in a file: numbers, text, containers and known classes as JSON, arrays among the arrays.

A number, a text or None stands for itself; everything else is a list `[kind, content]`.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import jaxtyped

from eomdl import _structure


class _Storable(NamedTuple):
    """A class that a file can hold, and how it becomes a value of other kinds and comes back."""

    kind: type
    pack: Callable[[Any], Any]
    unpack: Callable[[Any], Any]


_STORABLE: dict[str, _Storable] = {}
_Record = TypeVar("_Record")


def fields(record: Any) -> dict[str, Any]:
    """Return the fields of a dataclass by name."""
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def make_storable(
    kind: type, pack: Callable[[Any], Any] = fields, unpack: Callable[[Any], Any] | None = None
) -> None:
    """Let files hold instances of a class: by default a dataclass, as its fields."""
    _STORABLE[kind.__name__] = _Storable(kind, pack, unpack or (lambda found: require_kinds(kind(**found))))


def require_kinds(record: _Record) -> _Record:
    """Return the dataclass, if each field is what its annotation says; axes of one name are of one length.

    **Raises:** `ValueError` that names the field.
    """
    hints = typing.get_type_hints(type(record))
    with jaxtyped("context"):  # type: ignore[call-overload]
        for name, value in fields(record).items():
            if not _is_kind(value, hints[name]):
                got = f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else repr(value)
                raise ValueError(f"{name}: expected {hints[name]}, got {got:.200}")
    return record


def _is_kind(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation says: a class, a container, a union, an array of a dtype and a shape."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, TypeVar):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_is_kind(value, part) for part in parts)
    if origin in (dict, Mapping):
        items = value.items() if isinstance(value, Mapping) else [(None, None)]
        return all(_is_kind(key, parts[0]) and _is_kind(item, parts[1]) for key, item in items)
    if origin is tuple and parts[-1] is not Ellipsis:
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_is_kind, value, parts))
    if origin in (tuple, list):
        return isinstance(value, origin) and all(_is_kind(item, parts[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def encode(value: Any, where: str, arrays: dict[str, Any]) -> Any:
    """Return the JSON of a value; its arrays are added to `arrays`.

    **Raises:** `ValueError` that names the place (`where`) of something that no file can hold, such as a function.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray | jax.Array):
        return ["array", _add(value, arrays)]
    storable = _STORABLE.get(type(value).__name__)
    if storable is not None and type(value) is storable.kind:
        return ["record", [type(value).__name__, encode(storable.pack(value), where, arrays)]]
    if type(value) is dict and all(type(key) in (int, str) for key in value):
        return ["dict", [[key, encode(item, f"{where}.{key}", arrays)] for key, item in value.items()]]
    if type(value) in (list, tuple):
        items = [encode(item, f"{where}[{i}]", arrays) for i, item in enumerate(value)]
        return [type(value).__name__, items]
    leaves = jax.tree.leaves(value)
    if leaves and all(isinstance(leaf, np.ndarray | jax.Array) for leaf in leaves):
        return ["tree", [_structure.describe(value), [_add(leaf, arrays) for leaf in leaves]]]
    raise ValueError(
        f"{where}: expected numbers, text and arrays, which a file can hold, got {type(value).__name__}"
    )


def decode(content: Any, arrays: dict[str, Any]) -> Any:
    """Return the value that `encode` was given, its arrays taken out of `arrays`. **Raises:** whatever is wrong with it."""
    if not isinstance(content, list):
        return content
    kind, inner = content
    if kind == "array":
        return arrays.pop(inner)
    if kind == "record":
        name, packed = inner
        return _STORABLE[name].unpack(decode(packed, arrays))
    if kind == "dict":
        return _structure.unique([(key, decode(item, arrays)) for key, item in inner])
    if kind == "tree":
        description, names = inner
        return _structure.rebuild(description, [arrays.pop(name) for name in names])
    items: Iterable[Any] = (decode(item, arrays) for item in inner)
    return {"list": list, "tuple": tuple}[kind](items)


def _add(array: Any, arrays: dict[str, Any]) -> str:
    name = f"value{len(arrays)}"
    arrays[name] = array
    return name
