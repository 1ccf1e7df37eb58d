"""Blocks of the parameters, by name or by function."""

import difflib
from collections.abc import Callable
from typing import Any, TypeAlias

import jax

from eomdl._types import Params


# A name, "hidden.w" for params["hidden"]["w"], or a function params -> subtree as in `equinox.tree_at`.
Where: TypeAlias = str | Callable[[Params], Any]


def names(params: Params) -> list[str]:
    """Return the names of all leaves: the keys of their paths, joined by dots."""
    return [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def select(params: Params, where: Where) -> Any:
    """Return the block: a leaf, a subtree, or for a name that several leaves begin with the tuple of them.

    **Raises:** `ValueError` that suggests the nearest names.
    """
    if callable(where):
        return where(params)
    if not isinstance(where, str):
        raise ValueError(f"block: expected a name or a function params -> block, got {where!r}")
    leaves = jax.tree_util.tree_leaves_with_path(params)
    found = [leaf for path, leaf in leaves if f"{_name(path)}.".startswith(f"{where}.")]
    if not found:
        every = names(params)
        nearest = difflib.get_close_matches(where, every, n=3, cutoff=0.5) or every[:8]
        raise ValueError(
            f"block: expected the name of a block of params, got {where!r}; the nearest are {nearest}"
        )
    return found[0] if len(found) == 1 else tuple(found)


def label(where: Where) -> str:
    """Return what a block is called in tables and pictures."""
    return where if isinstance(where, str) else getattr(where, "__name__", "block")


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
