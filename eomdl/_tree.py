"""The pytree algebra: `optax.tree`, and the few functions that it does not have."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from optax.tree import add, norm, size, sub, zeros_like


__all__ = [
    "add",
    "combine",
    "dtype",
    "gram",
    "is_traced",
    "norm",
    "random_normal",
    "scale",
    "size",
    "sub",
    "unit",
    "vdot",
    "zeros_like",
]


def scale(a: ArrayLike, x: Any) -> Any:
    """$a x$ in the dtype of each leaf of $x$, whatever the dtype of the scalar."""
    if isinstance(a, float) and a == 1.0:
        return x
    return jax.tree.map(lambda leaf: jnp.asarray(a, leaf.dtype) * leaf, x)


def vdot(a: Any, b: Any) -> jax.Array:
    """The inner product of two vectors, over all axes of a leaf at once: `jnp.vdot` would gather what is spread, to flatten it."""

    def inner(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.tensordot(jnp.conj(x), y, jnp.ndim(x), precision=jax.lax.Precision.HIGHEST)

    return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(inner, a, b)))


def unit(x: Any) -> Any:
    """$x / |x|$; 0 for 0."""
    length = norm(x)
    return scale(jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0), x)


def gram(a: Any, b: Any) -> jax.Array:
    """The inner products of two stacks of vectors, shape (p, q): every leaf has a leading axis, p in a and q in b."""

    def inner(x: jax.Array, y: jax.Array) -> jax.Array:
        over = tuple(range(1, x.ndim))
        return jnp.tensordot(x, y, (over, over), precision=jax.lax.Precision.HIGHEST)

    return functools.reduce(jnp.add, map(inner, jax.tree.leaves(a), jax.tree.leaves(b)))


def combine(coefficients: jax.Array, stack: Any) -> Any:
    """Sums of the vectors of a stack, a row of coefficients for each: (m, p) of p vectors are m vectors, (p,) is one."""

    def total(leaf: jax.Array) -> jax.Array:
        return jnp.tensordot(coefficients.astype(leaf.dtype), leaf, 1, precision=jax.lax.Precision.HIGHEST)

    return jax.tree.map(total, stack)


def dtype(x: Any) -> jnp.dtype:
    """The narrowest floating-point dtype among the leaves: what limits the accuracy."""
    dtypes = {jnp.dtype(leaf.dtype) for leaf in jax.tree.leaves(x)}
    return max(dtypes, key=lambda d: float(jnp.finfo(d).eps))


def is_traced(*trees: Any) -> bool:
    """Whether a leaf is a tracer: under `jit`, `vmap` or `grad`, values are not known."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def random_normal(key: jax.Array, like: Any) -> Any:
    """Independent standard normal numbers in the shapes of `like`, from one key for each leaf.

    Leaves of one shape are drawn in one loop: the generator is long to compile.
    """
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    alike: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        alike.setdefault((leaf.shape, leaf.dtype), []).append(i)
    drawn: dict[int, jax.Array] = {}
    for (shape, kind), places in alike.items():
        some = jax.lax.map(lambda k, s=shape, d=kind: jax.random.normal(k, s, d), keys[np.array(places)])
        drawn |= {i: some[j] for j, i in enumerate(places)}
    return structure.unflatten([drawn[i] for i in range(len(leaves))])
