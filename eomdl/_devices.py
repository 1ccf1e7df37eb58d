"""Where arrays live: on one device or spread over several, of this process or of others too."""

from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, NamedSharding


def on_host(tree: Any) -> Any:
    """Every array of a tree, whole, in host memory.

    What is spread over processes is gathered one leaf at a time, on their devices first: all processes must call it.
    """
    return jax.device_get(jax.tree.map(lambda x: x if _is_addressable(x) else _gather(x), tree))


def rows_on_host(tree: Any, count: int) -> Any:
    """The first rows of arrays with a leading axis of rows; of what is spread over processes one row at a time."""

    def rows(x: Any) -> Any:
        return x if _is_addressable(x) else np.stack([_gather(x[i]) for i in range(count)])

    return jax.tree.map(lambda x: x[:count], jax.device_get(jax.tree.map(rows, tree)))


def _is_addressable(x: Any) -> bool:
    return not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated


def _gather(x: jax.Array) -> np.ndarray:
    return process_allgather(x, tiled=True)


def put(array: Any, sharding: Any) -> jax.Array:
    """An array of the host on the devices of a sharding: each gets its part, none the whole."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def shardings(tree: Any) -> tuple[NamedSharding | None, ...]:
    """The sharding of every leaf spread over several devices of an Auto mesh, None for others; () if there is none."""
    found = tuple(map(_spread, jax.tree.leaves(tree)))
    return found if any(found) else ()


def _spread(x: Any) -> NamedSharding | None:
    if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer):
        return None
    sharding = x.sharding
    if not isinstance(sharding, NamedSharding) or len(sharding.device_set) == 1:
        return None
    # The types of an Explicit mesh say it already.
    return sharding if all(kind == AxisType.Auto for kind in sharding.mesh.axis_types) else None


def require_auto(name: str, tree: Any) -> None:
    """Raise `ValueError` for a leaf that is spread over an Explicit mesh: the ODE solver's buffers have no sharding."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        sharding = jax.typeof(leaf).sharding
        if AxisType.Explicit in sharding.mesh.axis_types and any(axis is not None for axis in sharding.spec):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)}: expected an array on a mesh with AxisType.Auto, got one spread over "
                f"Explicit axes, {sharding.spec}: jax.make_mesh(..., axis_types=(AxisType.Auto,)) makes an Auto one, which "
                "needs no `out_sharding=` in the loss"
            )


def with_shardings(tree: Any, shardings: tuple[NamedSharding | None, ...]) -> Any:
    """Return a tree in a compiled program with these shardings, which the compiler otherwise chooses itself."""
    if not shardings:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    held = [
        x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)
        for x, sharding in zip(leaves, shardings, strict=True)
    ]
    return structure.unflatten(held)
