r"""The largest eigenpairs of a symmetric operator on pytrees, by block Lanczos with full reorthogonalization.

From p start vectors, one product at a time (Ruhe 1979, Math. Comp. 33: "band Lanczos"): product i gives the basis vector i + p.
With p = 1 this is Lanczos. It has the accuracy of LOBPCG or better for the same products: LOBPCG searches a part of
the same Krylov space. (`matfree` flattens all vectors, and gives NaN where a Krylov space ends, as that of a Hessian of
low rank does; JAX's LOBPCG needs n > 5k.)
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from eomdl import _tree
from eomdl._types import Params


ROUNDING = 8  # what is left of a product after orthogonalization is rounding below so many units of it


class Ritz(NamedTuple):
    """Approximate eigenpairs, largest first: `vectors` as coefficients in the basis, shape (m, k)."""

    values: jax.Array
    vectors: jax.Array
    residuals: jax.Array


class Found(NamedTuple):
    """What `largest` found: stacks of vectors have a leading axis k."""

    values: jax.Array
    vectors: Params
    residuals: jax.Array
    products: jax.Array  # how many were taken


class Part(NamedTuple):
    """How much is used of what there is room for, as traced numbers: start vectors, and products at most."""

    block: ArrayLike
    num_products: ArrayLike


class Basis(NamedTuple):
    """An orthonormal stack of m + p vectors, and the products with the first of them in it, shape (m + p, m)."""

    vectors: Params
    products: jax.Array
    known: jax.Array  # how many
    block: ArrayLike  # how many vectors the products are ahead: p, or fewer


def largest(
    product: Callable[[Params], Params],
    start: Params,
    k: int,
    num_products: int,
    rtol: jax.Array,
    part: Part | None = None,
) -> Found:
    """The k largest eigenpairs from a stack of p >= k start vectors, in at most `num_products` products.

    `num_products` is at least k and at most the dimension. It stops where all residuals are at most `rtol` of the largest
    eigenvalue in modulus; this is looked at after every p products. Of a `part` of the block as many pairs are found as
    it has vectors, and the others are 0.
    """
    if part is None:
        part = Part(len(jax.tree.leaves(start)[0]), num_products)
    basis = _started(start, num_products, part.block)

    def pairs(basis: Basis) -> Ritz:
        there = jnp.arange(k) < part.block
        return jax.tree.map(lambda x: jnp.where(there, x, 0), ritz(basis, k))

    def goes_on(carry: tuple[Basis, jax.Array]) -> jax.Array:
        basis, enough = carry
        return (basis.known < part.num_products) & ~enough

    def advanced(carry: tuple[Basis, jax.Array]) -> tuple[Basis, jax.Array]:
        basis = _with_product(carry[0], product)
        whole = basis.known % basis.block == 0
        enough = jax.lax.cond(
            whole, lambda: jnp.all(is_small(pairs(basis), rtol)), lambda: jnp.asarray(False)
        )
        return basis, enough

    basis, _ = jax.lax.while_loop(goes_on, advanced, (basis, jnp.asarray(False)))
    found = pairs(basis)
    some = jax.tree.map(lambda leaf: leaf[:num_products], basis.vectors)
    return Found(found.values, _tree.combine(found.vectors.T, some), found.residuals, basis.known)


def spectrum(
    product: Callable[[Params], Params], start: Params, num_products: int
) -> tuple[jax.Array, jax.Array]:
    """All eigenvalues of the operator in the Krylov space of one start vector, and their vectors as coefficients.

    The first coefficients squared are the weights that the eigenvalues have in the start vector.
    """
    basis = jax.lax.fori_loop(
        0, num_products, lambda i, basis: _with_product(basis, product), _started(start, num_products, 1)
    )
    found = ritz(basis, num_products)
    return found.values, found.vectors


def is_small(found: Ritz | Found, rtol: ArrayLike) -> jax.Array:
    """Whether each residual is small against the largest eigenvalue in modulus. False where it is not finite."""
    return found.residuals <= rtol * jnp.max(jnp.abs(found.values))


def ritz(basis: Basis, k: int) -> Ritz:
    """The k largest eigenpairs of the operator in the span of the vectors whose products are known.

    A residual needs no product: it is what the products have outside of that span.
    """
    m = basis.products.shape[1]
    inside = jnp.arange(m) < basis.known
    matrix = basis.products[:m]
    matrix = jnp.where(inside[:, None] & inside[None], (matrix + matrix.T) / 2, 0)
    # In the places still to come, an eigenvalue below all others.
    low = -2 * jnp.max(jnp.sum(jnp.abs(matrix), axis=1)) - 1
    values, vectors = jnp.linalg.eigh(matrix + jnp.diag(jnp.where(inside, 0, low)))
    values, vectors = values[::-1][:k], vectors[:, ::-1][:, :k]
    outside = jnp.where(jnp.arange(len(basis.products))[:, None] < basis.known, 0, basis.products)
    left = jnp.matmul(outside, vectors, precision=jax.lax.Precision.HIGHEST)
    return Ritz(values, vectors, jnp.linalg.norm(left, axis=0))


def _started(start: Params, num_products: int, used: ArrayLike) -> Basis:
    """The start vectors made orthonormal; random ones in place of those that depend on others."""
    block = len(jax.tree.leaves(start)[0])
    rows = num_products + block
    # Zeros that XLA does not know to be such: else they take their memory long before they are used.
    empty = jax.tree.map(lambda leaf: jnp.broadcast_to(0 * leaf[:1], (rows, *leaf.shape[1:])), start)

    def with_next(i: jax.Array, vectors: Params) -> Params:
        return _extended(vectors, jax.tree.map(lambda leaf: leaf[i], start), i)[0]

    # Not by a condition in a loop over all: that takes a copy of the basis.
    vectors = jax.lax.fori_loop(0, used, with_next, empty)
    products = jnp.zeros((rows, num_products), jnp.result_type(*jax.tree.leaves(start)))
    return Basis(vectors, products, jnp.asarray(0), used)


def _with_product(basis: Basis, product: Callable[[Params], Params]) -> Basis:
    i = basis.known
    image = product(jax.tree.map(lambda leaf: leaf[i], basis.vectors))
    vectors, column = _extended(basis.vectors, image, i + basis.block)
    return basis._replace(vectors=vectors, products=basis.products.at[:, i].set(column), known=i + 1)


def _extended(vectors: Params, new: Params, place: jax.Array) -> tuple[Params, jax.Array]:
    """The basis with `new` made orthonormal at the place, and the coefficients of `new` in it.

    Where nothing but rounding is left of `new`, a random vector takes the place, with coefficient 0; where the basis
    spans the whole space, 0 does.
    """
    one = jax.tree.map(lambda leaf: leaf[0], vectors)
    rest, within = _orthogonal(vectors, new)
    length = _tree.norm(rest)
    rounding = ROUNDING * jnp.finfo(_tree.dtype(one)).eps * _tree.norm(new)
    is_new = (length > rounding) & (place < _tree.size(one))

    def drawn() -> Params:
        draw = _tree.random_normal(jax.random.fold_in(jax.random.key(0), place), one)
        rest, _ = _orthogonal(vectors, draw)
        room = place < _tree.size(one)
        return _tree.scale(jnp.where(room, 1 / _tree.norm(rest), 0), rest)

    unit = jax.lax.cond(is_new, lambda: _tree.scale(1 / jnp.where(is_new, length, 1), rest), drawn)
    vectors = jax.tree.map(lambda leaf, x: leaf.at[place].set(x), vectors, unit)
    return vectors, within.at[place].set(jnp.where(is_new, length, 0).astype(within.dtype))


def _orthogonal(vectors: Params, new: Params) -> tuple[Params, jax.Array]:
    """What is left of a vector outside of the span, and its coefficients within: Gram-Schmidt, twice."""

    def left(new: Params) -> tuple[Params, jax.Array]:
        within = _tree.gram(vectors, jax.tree.map(lambda leaf: leaf[None], new))[:, 0]
        return _tree.sub(new, _tree.combine(within, vectors)), within

    new, first = left(new)
    new, second = left(new)
    return new, first + second
