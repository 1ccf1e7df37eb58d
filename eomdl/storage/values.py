"""Values of Python in a file: numbers, text, containers and known classes as JSON, arrays among the arrays.

A number, a text or None stands for itself; everything else is a list `[kind, content]`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from eomdl import _structure


class _Storable(NamedTuple):
    """A class that a file can hold, and how it becomes a value of other kinds and comes back."""

    kind: type
    pack: Callable[[Any], Any]
    unpack: Callable[[Any], Any]


_STORABLE: dict[str, _Storable] = {}


def fields(record: Any) -> dict[str, Any]:
    """Return the fields of a dataclass by name."""
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def make_storable(
    kind: type, pack: Callable[[Any], Any] = fields, unpack: Callable[[Any], Any] | None = None
) -> None:
    """Let files hold instances of a class: by default a dataclass, as its fields."""
    _STORABLE[kind.__name__] = _Storable(kind, pack, unpack or (lambda found: kind(**found)))


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


def decode(content: Any, arrays: Mapping[str, Any]) -> Any:
    """Return the value that `encode` was given."""
    if not isinstance(content, list):
        return content
    kind, inner = content
    if kind == "array":
        return arrays[inner]
    if kind == "record":
        name, packed = inner
        return _STORABLE[name].unpack(decode(packed, arrays))
    if kind == "dict":
        return {key: decode(item, arrays) for key, item in inner}
    if kind == "tree":
        description, names = inner
        return _structure.rebuild(description, iter([arrays[name] for name in names]))
    items: Iterable[Any] = (decode(item, arrays) for item in inner)
    return {"list": list, "tuple": tuple}[kind](items)


def _add(array: Any, arrays: dict[str, Any]) -> str:
    name = f"value{len(arrays)}"
    arrays[name] = array
    return name
