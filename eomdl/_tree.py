"""The pytree algebra: `optax.tree`, and the few functions that it does not have."""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike
from optax.tree import add, norm, size, sub, zeros_like


Function = TypeVar("Function", bound=Callable)

__all__ = [
    "add",
    "combine",
    "dtype",
    "gram",
    "hashed",
    "is_traced",
    "nonfinite_is_data",
    "norm",
    "random_normal",
    "row_norms",
    "rows",
    "scale",
    "size",
    "sub",
    "sum_over_basis",
    "unit",
    "vdot",
    "zeros_like",
]


def nonfinite_is_data(function: Function) -> Function:
    """Decorate a function on the host that takes runs which may have diverged: infinities and NaN are results, not warnings."""
    return np.errstate(over="ignore", invalid="ignore", divide="ignore")(function)


def scale(a: ArrayLike, x: Any) -> Any:
    """Return $a x$ in the dtype of each leaf of $x$, whatever the dtype of the scalar."""
    if isinstance(a, float) and a == 1.0:
        return x
    return jax.tree.map(lambda leaf: jnp.asarray(a, leaf.dtype) * leaf, x)


def vdot(a: Any, b: Any) -> jax.Array:
    """Return the inner product of two vectors."""

    # Over all axes of a leaf at once: `jnp.vdot` would gather a sharded leaf to flatten it.
    def inner(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.tensordot(jnp.conj(x), y, jnp.ndim(x), precision=jax.lax.Precision.HIGHEST)

    return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(inner, a, b)))


def unit(x: Any) -> Any:
    """Return $x / |x|$; 0 for 0."""
    length = norm(x)
    return scale(jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0), x)


def gram(a: Any, b: Any) -> jax.Array:
    """Return the inner products of two stacks of vectors, shape (p, q): every leaf has a leading axis, p in a and q in b."""

    def inner(x: jax.Array, y: jax.Array) -> jax.Array:
        over = tuple(range(1, x.ndim))
        return jnp.tensordot(jnp.conj(x), y, (over, over), precision=jax.lax.Precision.HIGHEST)

    return functools.reduce(jnp.add, map(inner, jax.tree.leaves(a), jax.tree.leaves(b)))


def combine(coefficients: jax.Array, stack: Any) -> Any:
    """Return m sums of the p vectors of a stack, for coefficients of shape (m, p); one sum for shape (p,)."""

    def total(leaf: jax.Array) -> jax.Array:
        return jnp.tensordot(coefficients.astype(leaf.dtype), leaf, 1, precision=jax.lax.Precision.HIGHEST)

    return jax.tree.map(total, stack)


def dtype(x: Any) -> jnp.dtype:
    """Return the narrowest floating-point dtype among the leaves, which limits the accuracy."""
    leaves = jax.tree.leaves(x)
    dtypes = {jnp.dtype(leaf.dtype) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)}
    return max(dtypes, key=lambda d: float(jnp.finfo(d).eps))


def rows(stack: Any, dtype: Any = None) -> np.ndarray:
    """Return a stack of vectors (a leading axis n on every leaf) as one matrix, shape (n, size of a vector)."""
    return np.concatenate([_matrix(leaf) for leaf in jax.tree.leaves(stack)], axis=1, dtype=dtype)


def row_norms(stack: Any) -> np.ndarray:
    """Return the Euclidean norms of a stack of vectors, shape (n,), without the matrix of `rows`."""
    squares = [np.sum(np.square(_matrix(leaf)), axis=1) for leaf in jax.tree.leaves(stack)]
    return np.sqrt(np.sum(squares, axis=0))


def _matrix(leaf: Any) -> np.ndarray:
    return np.reshape(np.asarray(leaf), (len(leaf), math.prod(np.shape(leaf)[1:])))


def sum_over_basis(function: Callable[[Any], Any], like: Any) -> Any:
    """Return the sum of a function over the unit vectors in the shapes of `like`, one after the other."""
    flat, unravel = ravel_pytree(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like))
    unit_vector = lambda j: unravel(flat.at[j].set(1))
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, unravel(flat)))

    def add_next(total: Any, j: jax.Array) -> tuple[Any, None]:
        return add(total, function(unit_vector(j))), None

    return jax.lax.scan(add_next, start, jnp.arange(flat.size))[0]


def is_traced(*trees: Any) -> bool:
    """Whether a leaf is a tracer: under `jit`, `vmap` or `grad`, values are not known."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def random_normal(key: jax.Array, like: Any) -> Any:
    """Return independent standard normal numbers in the shapes of `like`, from one key for each leaf.

    Leaves of one shape are drawn in one loop, since the generator is slow to compile.
    """
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    by_shape: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        by_shape.setdefault((leaf.shape, leaf.dtype), []).append(i)
    drawn: dict[int, jax.Array] = {}
    for (shape, dtype), indices in by_shape.items():
        stack = jax.lax.map(lambda k, s=shape, d=dtype: jax.random.normal(k, s, d), keys[np.array(indices)])
        drawn |= {i: stack[j] for j, i in enumerate(indices)}
    return structure.unflatten([drawn[i] for i in range(len(leaves))])


def hashed(salt: ArrayLike, like: Any) -> Any:
    """Return a vector of numbers between -1 and 1 in no order, a hash of the index of each and of an integer.

    For what is to be a random vector where it costs no time to compile: JAX's generator takes seconds.
    """
    salt = jnp.asarray(salt).astype(jnp.uint32)

    def hash_leaf(number: int, leaf: jax.Array) -> jax.Array:
        x = (salt + np.uint32(number << 16)) * np.uint32(0x9E3779B9)
        for axis in range(leaf.ndim):
            index = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
            x = (x ^ index) * np.uint32(0x7FEB352D)
            x = x ^ (x >> 15)
        x = x * np.uint32(0x846CA68B)
        x = x ^ (x >> 16)
        return (x.astype(leaf.real.dtype) / 2.0**31 - 1).astype(leaf.dtype)

    leaves, structure = jax.tree.flatten(like)
    return structure.unflatten([hash_leaf(i, leaf) for i, leaf in enumerate(leaves)])
