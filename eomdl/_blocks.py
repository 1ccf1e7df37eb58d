"""Blocks of the parameters, by name or by function."""

import collections
import difflib
from collections.abc import Callable
from typing import Any, TypeAlias

import jax

from eomdl import _check
from eomdl._types import Params


# A name, "hidden.w" for params["hidden"]["w"], or a function params -> subtree as in `equinox.tree_at`.
Where: TypeAlias = str | Callable[[Params], Any]


def names(params: Params) -> list[str]:
    """Return the names of all leaves: the keys of their paths, joined by dots; as JAX writes them where two would be the same."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    count = collections.Counter(map(_name, paths))
    return [_name(path) if count[_name(path)] == 1 else jax.tree_util.keystr(path) for path in paths]


def select(params: Params, where: Where) -> Any:
    """Return the block: a leaf, a subtree, or for a name that several leaves begin with the tuple of them.

    **Raises:** `ValueError` that suggests the nearest names.
    """
    if callable(where):
        return where(params)
    if not isinstance(where, str):
        raise ValueError(f"block: expected a name or a function params -> block, got {_check.show(where)}")
    every = names(params)
    leaves = zip(every, jax.tree_util.tree_leaves_with_path(params), strict=True)
    found = [
        leaf
        for name, (path, leaf) in leaves
        if where in (name, *(_name(path[:i]) for i in range(1, len(path))))
    ]
    if not found:
        nearest = difflib.get_close_matches(where, every, n=3, cutoff=0.5) or every[:8]
        raise ValueError(
            f"block: expected the name of a block of params, got {_check.show(where)}; the nearest are {nearest}"
        )
    return found[0] if len(found) == 1 else tuple(found)


def label(where: Where) -> str:
    """Return what a block is called in tables and pictures."""
    return where if isinstance(where, str) else getattr(where, "__name__", "block")


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
