"""Eigenpairs of a symmetric operator on pytrees: Rayleigh-Ritz in the Krylov space of one start vector, or of several.

The basis is fully orthogonalized (`eomdl.linalg.arnoldi`). It has the accuracy of LOBPCG or better for the same products: LOBPCG
searches a part of the same space, and that of JAX needs a dimension of more than 5 k.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from eomdl import _tree
from eomdl._types import Params
from eomdl.linalg.arnoldi import Krylov, add_product, arnoldi, start_basis


class RitzPairs(NamedTuple):
    """Approximate eigenpairs, largest first, with the lengths of their residuals.

    `vectors` is a stack of k, or the coefficients of the k vectors in a basis of m, shape (m, k).
    """

    values: jax.Array
    vectors: Params
    residuals: jax.Array


def largest_eigenpairs(
    operator: Callable[[Params], Params],
    start: Params,
    k: int,
    num_rounds: int,
    rtol: ArrayLike,
    num_active: ArrayLike | None = None,
) -> tuple[RitzPairs, jax.Array]:
    """Return the k largest eigenpairs from a stack of p >= k start vectors, and how many products they took.

    A round is one product for each start vector. After each round it stops where all residuals are at most `rtol` of the largest
    eigenvalue in modulus, and after `num_rounds` at the latest. With `num_active`, a traced number, only that many of the start vectors
    are used, and as many pairs are found: the others are 0.
    """
    block = len(jax.tree.leaves(start)[0])
    dimension = _tree.size(start) // block
    room = min(num_rounds * block, dimension)
    num_active = block if num_active is None else num_active
    limit = jnp.minimum(num_rounds * num_active, dimension)

    def compute_pairs(krylov: Krylov) -> RitzPairs:
        is_active = jnp.arange(k) < num_active
        return jax.tree.map(lambda x: jnp.where(is_active, x, 0), ritz_pairs(krylov, k))

    def goes_on(carry: tuple[Krylov, jax.Array]) -> jax.Array:
        krylov, is_enough = carry
        return (krylov.num_products < limit) & ~is_enough

    def advance(carry: tuple[Krylov, jax.Array]) -> tuple[Krylov, jax.Array]:
        krylov = add_product(carry[0], operator)
        is_enough = jax.lax.cond(
            krylov.num_products % num_active == 0,
            lambda: jnp.all(are_converged(compute_pairs(krylov), rtol)),
            lambda: jnp.asarray(False),
        )
        return krylov, is_enough

    begin = start_basis(start, room, num_active), jnp.asarray(False)
    krylov, _ = jax.lax.while_loop(goes_on, advance, begin)
    pairs = compute_pairs(krylov)
    return pairs._replace(vectors=_tree.combine(pairs.vectors.T, krylov.basis)), krylov.num_products


def ritz_quadrature(
    operator: Callable[[Params], Params], start: Params, num_products: int
) -> tuple[jax.Array, jax.Array]:
    """Return all eigenvalues of the operator in the Krylov space of one vector, and the weights that they have in it.

    The weights are the squared components of the unit vector along `start`: they sum to 1.
    """
    pairs = ritz_pairs(arnoldi(operator, start, num_products), num_products)
    return pairs.values, pairs.vectors[0] ** 2


def are_converged(pairs: RitzPairs, rtol: ArrayLike) -> jax.Array:
    """Whether each residual is small against the largest eigenvalue in modulus: false where it is not finite."""
    return pairs.residuals <= rtol * jnp.max(jnp.abs(pairs.values))


def ritz_pairs(krylov: Krylov, k: int) -> RitzPairs:
    """Return the k largest eigenpairs of a symmetric operator in the span of the vectors whose products are known.

    A residual needs no product: it is what the products have outside of that span.
    """
    products, matrix = krylov.products, krylov.matrix
    is_known = jnp.arange(len(matrix)) < krylov.num_products
    matrix = jnp.where(is_known[:, None] & is_known[None], (matrix + matrix.T) / 2, 0)
    # In the places still to come, an eigenvalue below all others.
    low = -2 * jnp.max(jnp.sum(jnp.abs(matrix), axis=1)) - 1
    values, vectors = jnp.linalg.eigh(matrix + jnp.diag(jnp.where(is_known, 0, low)))
    values, vectors = values[::-1][:k], vectors[:, ::-1][:, :k]
    outside = jnp.where(jnp.arange(len(products))[:, None] < krylov.num_products, 0, products)
    left = jnp.matmul(outside, vectors, precision=jax.lax.Precision.HIGHEST)
    return RitzPairs(values, vectors, jnp.linalg.norm(left, axis=0))
