"""The structure of a pytree as JSON: it is written to files, and two states are compared by it.

A node is described as `[kind, [[key, child], ...]]`, a leaf as "*", None as None. Lists, tuples, dicts and
named tuples come back from the disk as they were; any other node comes back as a `Node`, which has the
description of what it stands for.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import override

from eomdl import _devices
from eomdl._shards import StoredArray


LEAF = "*"
_PLAIN: dict[type, str] = {dict: "dict", list: "list", tuple: "tuple"}
# Named tuples of earlier versions, by their place in the package: where they are now, and their fields that have another name.
_MOVED: dict[str, tuple[str, dict[Any, str]]] = {
    "runs.continuous:FlowState": ("runs.ode:FlowState", {"looser": "coarse"}),
    "maps.ensemble:EnsembleState": ("runs.ensemble_dynamics:EnsembleState", {}),
}


@jax.tree_util.register_pytree_with_keys_class
class Node:
    """A node read from a file whose class JSON cannot name: its kind, and its children by key."""

    def __init__(self, kind: str, keys: list[Any], children: list[Any]):
        self.kind, self.keys, self.children = kind, keys, children

    def __getitem__(self, key: Any) -> Any:
        return self.children[self.keys.index(key)]

    @override
    def __repr__(self) -> str:
        return f"{self.kind}({dict(zip(self.keys, self.children, strict=True))})"

    def tree_flatten_with_keys(self) -> tuple:
        keys = [jax.tree_util.DictKey(key) for key in self.keys]
        return list(zip(keys, self.children, strict=True)), (self.kind, tuple(self.keys))

    @classmethod
    def tree_unflatten(cls, aux: tuple, children: Any) -> "Node":
        return cls(aux[0], list(aux[1]), list(children))


def describe(tree: Any) -> Any:
    """Return the structure in lists and strings that JSON keeps."""
    if tree is None:
        return None
    children, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    if len(children) == 1 and children[0][0] == ():
        return LEAF
    return [_kind(tree), [[_key(path[0]), describe(child)] for path, child in children]]


def _kind(node: Any) -> str:
    if isinstance(node, Node):
        return node.kind
    return _PLAIN.get(type(node), f"{type(node).__module__}:{type(node).__qualname__}")


class _Repr(str):
    """The `repr` of a key of a dict that has no other encoding in JSON."""


def _key(entry: Any) -> Any:
    return _encode(getattr(entry, "key", getattr(entry, "idx", getattr(entry, "name", None))))


def _encode(key: Any) -> Any:
    """Return a key as JSON: strings and integers as they are, others as `[type, value]`."""
    if isinstance(key, _Repr):
        return ["repr", str(key)]
    if isinstance(key, str):
        return str(key)
    if isinstance(key, int | np.integer):
        return int(key)
    if isinstance(key, bytes):
        return ["bytes", key.hex()]
    if isinstance(key, float):
        return ["float", key.hex()]
    if isinstance(key, tuple):
        return ["tuple", [_encode(k) for k in key]]
    return ["repr", repr(key)]


def _decode(encoded: Any) -> Any:
    """Return the key that `_encode` was given, or its `_Repr`."""
    if not isinstance(encoded, list):
        return encoded
    kind, value = encoded
    if kind == "tuple":
        return tuple(_decode(k) for k in value)
    decoders: dict[str, Callable[[str], Any]] = {
        "bytes": bytes.fromhex,
        "float": float.fromhex,
        "repr": _Repr,
    }
    return decoders[kind](value)


def unique(items: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return a dict of these items. **Raises:** `ValueError` for a key that comes twice."""
    items = list(items)
    found = dict(items)
    if len(found) != len(items):
        raise ValueError(f"a key twice in {[key for key, _ in items]!r:.200}")
    return found


def rebuild(description: Any, leaves: Sequence[Any]) -> Any:
    """Return the pytree of a description, its leaves taken in order. **Raises:** `ValueError` for more or fewer leaves."""
    remaining = iter(leaves)
    try:
        tree = _rebuild(description, remaining)
    except StopIteration:
        raise ValueError(f"more than {len(leaves)} leaves") from None
    if left := len(list(remaining)):
        raise ValueError(f"{left} of {len(leaves)} leaves have no place")
    return tree


def _rebuild(description: Any, leaves: Iterator[Any]) -> Any:
    if description is None:
        return None
    if description == LEAF:
        return next(leaves)
    kind, items = description
    keys = [_decode(key) for key, _ in items]
    if kind.removeprefix("eomdl.") in _MOVED:
        place, renamed = _MOVED[kind.removeprefix("eomdl.")]
        kind, keys = f"eomdl.{place}", [renamed.get(key, key) for key in keys]
    children = [_rebuild(child, leaves) for _, child in items]
    if kind == "dict":
        return unique(zip(keys, children, strict=True))
    if kind in ("list", "tuple"):
        return children if kind == "list" else tuple(children)
    found = _named_tuple(kind)
    if found is not None and list(found._fields) == keys:
        return found._make(children)
    return Node(kind, keys, children)


def _named_tuple(kind: str) -> Any:
    """Return the class if it is a named tuple of a module that is imported already: reading a file imports nothing."""
    module, _, name = kind.partition(":")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        # Not `getattr`, by which some modules import their submodules.
        found = getattr(found, "__dict__", {}).get(part)
    is_named = isinstance(found, type) and issubclass(found, tuple) and hasattr(found, "_fields")
    return found if is_named else None


def difference(a: Any, b: Any, where: str = "") -> str | None:
    """Return the first place at which two descriptions differ, in words; None if they are the same."""
    if a == b:
        return None
    if not isinstance(a, list) or not isinstance(b, list) or a[0] != b[0]:
        return f"{_class_name(a)} in place of {_class_name(b)}{f' at {where}' if where else ''}"
    if [key for key, _ in a[1]] != [key for key, _ in b[1]]:
        keys = [[key for key, _ in x[1]] for x in (a, b)]
        return f"children {keys[0]} in place of {keys[1]}{f' at {where}' if where else ''}"
    for (key, x), (_, y) in zip(a[1], b[1], strict=True):
        found = difference(x, y, f"{where}.{key}" if where else str(key))
        if found:
            return found
    raise AssertionError("two descriptions differ, but in no place")


def _class_name(description: Any) -> str:
    if description is None:
        return "nothing"
    return "an array" if description == LEAF else f"a {description[0].partition(':')[2] or description[0]}"


def restore(name: str, saved: Any, like: Any, hint: str = "") -> Any:
    """Return `saved` in the structure and the dtypes of `like`; arrays from the disk are put on its devices.

    **Raises:** `ValueError` naming the first place where structure or shape differ, with the hint.
    """
    require(name, saved, like, hint)
    leaves = zip(jax.tree.leaves(saved), jax.tree.leaves(like), strict=True)
    return jax.tree.structure(like).unflatten([_place(old, new) for old, new in leaves])


def require(name: str, saved: Any, like: Any, hint: str = "") -> None:
    """Raise as `restore` does, without reading or moving an array."""
    hint = f"; {hint}" if hint else ""
    found = difference(describe(saved), describe(like))
    if found:
        raise ValueError(f"{name}: expected the structure of this run's, got {found}{hint}")
    for (path, new), old in zip(
        jax.tree_util.tree_leaves_with_path(like), jax.tree.leaves(saved), strict=True
    ):
        if np.shape(old) != np.shape(new):
            where = jax.tree_util.keystr(path)
            raise ValueError(f"{name}{where}: expected shape {np.shape(new)}, got {np.shape(old)}{hint}")
        if _is_key(old) != _is_key(new):
            where = jax.tree_util.keystr(path)
            raise ValueError(f"{name}{where}: expected dtype {new.dtype}, got {jnp.result_type(old)}{hint}")


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _place(saved: Any, like: Any) -> jax.Array:
    """Return an array in the dtype of `like`, and on its devices if it was committed to them."""
    if _is_key(like):
        return saved
    dtype = jnp.result_type(like)
    from_disk = not isinstance(saved, jax.Array)
    put = isinstance(like, jax.Array) and not isinstance(like, jax.core.Tracer) and like.committed
    if not (from_disk and put):
        return jnp.asarray(np.asarray(saved) if isinstance(saved, StoredArray) else saved, dtype)
    if isinstance(saved, StoredArray):
        return saved.read(like.sharding).astype(dtype)
    return _devices.put(np.asarray(saved, dtype), like.sharding)
