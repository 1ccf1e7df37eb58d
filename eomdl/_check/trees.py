"""Checks of pytrees: parameters, data, and their structure."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eomdl import _tree
from eomdl._check.values import positive_numbers, show, wrong
from eomdl._types import Params


RAGGED = (  # what to do about it
    "let the loader leave out a last batch that is smaller (`drop_last=True` in PyTorch, `drop_remainder=True` in tf.data), which "
    "is a step less, or fill it up with examples whose weight in the loss is 0"
)


_COMPLEX = (
    "; give real and imaginary part as two real arrays, as optax.contrib.split_real_and_imaginary does: "
    "lambda p, args: loss(jax.lax.complex(*p), args)"
)


def params(name: str, value: Params) -> Params:
    """Return a pytree of real floating-point arrays; Python floats become arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(value)
    expected = "a pytree of real floating-point arrays"
    if not leaves:
        raise wrong(name, expected, f"no leaves in {show(value)}")
    for path, leaf in leaves:
        where = f"{name}{jax.tree_util.keystr(path)}"
        if isinstance(leaf, float):
            continue
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            hint = "; keep the rest out with equinox.partition(model, equinox.is_inexact_array)"
            raise wrong(where, expected, f"{type(leaf).__name__}{hint}")
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise wrong(where, expected, f"dtype {leaf.dtype}{_COMPLEX * jnp.iscomplexobj(leaf)}")
    return jax.tree.map(jnp.asarray, value)


def floating(name: str, value: Any) -> None:
    """Raise for a leaf that is no real floating-point number or array; none is read or moved."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(value):
        dtype = getattr(leaf, "dtype", None) or np.asarray(leaf).dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            where = f"{name}{jax.tree_util.keystr(path)}"
            raise wrong(where, "real floating-point arrays", f"dtype {dtype}")


def wide_enough(name: str, state: Any) -> None:
    """Raise for a floating-point leaf of 16 bits or less, whose rounding is larger than an ODE solver's steps."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and jnp.finfo(leaf.dtype).bits < 32:
            where = f"{name}{jax.tree_util.keystr(path)}"
            raise wrong(where, "float32 or float64 to integrate in", f"{leaf.dtype}; cast it before `solve`")


def num_examples(name: str, value: Any) -> int:
    """Return the length that the leading axes of all leaves have in common, at least 1."""
    expected = "arrays whose leading axis counts the examples"
    leaves = jax.tree_util.tree_leaves_with_path(value)
    if not leaves:
        raise wrong(name, expected, f"none in {show(value)}; was the data not passed?")
    lengths = {f"{name}{jax.tree_util.keystr(path)}": np.shape(leaf)[:1] for path, leaf in leaves}
    for place, length in lengths.items():
        if not length or length[0] == 0:
            hint = "what belongs to no example is a field of the loss (an equinox.Module)"
            raise wrong(place, expected, "no examples" if length else f"a scalar; {hint}")
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{place}: {length}" for place, (length,) in lengths.items())
        raise wrong(name, f"{expected}, as many in each", f"{counts:.200}")
    return next(iter(lengths.values()))[0]


def stacked(name: str, batches: Any) -> Any:
    """Return batches in arrays with one leading axis that counts them; a list has one batch after the other, as in a run."""
    if not isinstance(batches, list):
        return batches
    try:
        return jax.tree.map(lambda *leaves: jnp.stack(list(map(jnp.asarray, leaves))), *batches)
    except (TypeError, ValueError) as error:
        raise wrong(
            name, "batches of one structure and shape", f"others ({error!s:.200}); {RAGGED}"
        ) from error


def same_structure(name: str, value: Any, like_name: str, like: Any) -> None:
    """Raise unless both have the same pytree structure and leaf shapes."""
    if jax.tree.structure(value) != jax.tree.structure(like):
        raise wrong(
            name,
            f"the structure of {like_name}, {show(jax.tree.structure(like), 200)}",
            show(jax.tree.structure(value), 200),
        )
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(value), jax.tree.leaves(like), strict=True):
        if jnp.shape(a) != jnp.shape(b):
            raise wrong(
                f"{name}{jax.tree_util.keystr(path)}",
                f"the shape in {like_name}, {jnp.shape(b)}",
                jnp.shape(a),
            )


def stack(name: str, value: Any, like_name: str, like: Any) -> Any:
    """Return a stack of vectors like a pytree, at most as many as its dimension: a leading axis on every leaf counts them."""
    value = params(name, value)
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(value)}
    if len(lengths) != 1 or lengths & {(), (0,)} or max(lengths)[0] > _tree.size(like):
        expected = f"vectors like {like_name}, in leaves with one leading axis that counts them, at most {_tree.size(like)}"
        raise wrong(name, expected, f"shapes {show([jnp.shape(leaf) for leaf in jax.tree.leaves(value)])}")
    same_structure(f"one of {name}", jax.tree.map(lambda leaf: leaf[0], value), like_name, like)
    return value


def positive_like(name: str, value: Any, like_name: str, like: Any) -> Any:
    """Return a pytree like another, of finite numbers > 0."""
    value = params(name, value)
    same_structure(name, value, like_name, like)
    for path, leaf in jax.tree_util.tree_leaves_with_path(value):
        positive_numbers(f"{name}{jax.tree_util.keystr(path)}", leaf)
    return value
