r"""The Lanczos iteration on pytrees: a symmetric operator on the Krylov space of one vector, as a tridiagonal matrix.

$A q_i = \beta_{i-1} q_{i-1} + \alpha_i q_i + \beta_i q_{i+1}$ from a unit vector $q_0$ (Lanczos 1950). It needs the last two vectors
only, and does not reorthogonalize: eigenvalues that have converged may appear once more, which harms neither the largest one
(Paige 1976) nor a function of A times $q_0$ (Druskin & Knizhnerman 1991). For several eigenvectors see `eomdl.linalg.symmetric`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from eomdl import _tree
from eomdl._types import Params
from eomdl.linalg.orthogonal import unit_outside


class Tridiagonal(NamedTuple):
    """A symmetric operator on a Krylov space of dimension `num_products`.

    - `diagonal`, `coupling`: shape (depth,), the alpha and beta of the iteration, 0 from `num_products` on. The last beta leads out of the
        space: 0 where the space ends.
    - `num_products`: how many products were taken.
    """

    diagonal: jax.Array
    coupling: jax.Array
    num_products: jax.Array

    @property
    def matrix(self) -> jax.Array:
        """The matrix of shape (depth, depth). Its places from `num_products` on are decoupled, with an eigenvalue below all others."""
        places = jnp.arange(len(self.diagonal))
        beside = jnp.where(places < self.num_products - 1, self.coupling, 0)[:-1]
        low = -2 * (jnp.max(jnp.abs(self.diagonal)) + jnp.max(self.coupling))
        diagonal = jnp.where(places < self.num_products, self.diagonal, low)
        return jnp.diag(diagonal) + jnp.diag(beside, 1) + jnp.diag(beside, -1)

    @property
    def residual(self) -> jax.Array:
        """The last beta: the length of what the last product has outside of the space."""
        return self.coupling[self.num_products - 1]


class _Carry(NamedTuple):
    vector: Params
    before: Params
    matrix: Tridiagonal
    is_done: jax.Array


def lanczos(
    operator: Callable[[Params], Params],
    start: Params,
    depth: int,
    is_enough: Callable[[Tridiagonal], jax.Array] | None = None,
    *,
    keep_basis: bool = False,
) -> tuple[Tridiagonal, Params | None]:
    """Return the matrix of a symmetric operator on the Krylov space of `start`, and the basis if it is kept.

    It ends before `depth` products where the space does, or where `is_enough` is true of the matrix. The basis is a stack of `depth`
    vectors, 0 after the end of the space.

    **Cost:** one product for each vector, none after the end; memory for 3 vectors, and for the basis. It has derivatives in both modes.
    """
    zeros = jnp.zeros(depth, jnp.result_type(*jax.tree.leaves(start)))

    def advance(carry: _Carry) -> _Carry:
        q, before, (diagonal, coupling, i), _ = carry
        image = operator(q)
        alpha, last = _tree.vdot(q, image), jnp.where(i > 0, coupling[i - 1], 0)
        rest = jax.tree.map(lambda w, q, p: (w - alpha * q - last * p).astype(w.dtype), image, q, before)
        following, beta = unit_outside(rest, image)
        matrix = Tridiagonal(diagonal.at[i].set(alpha), coupling.at[i].set(beta), i + 1)
        is_done = beta == 0
        if is_enough is not None:
            is_done = is_done | is_enough(matrix)
        return _Carry(following, q, matrix, is_done)

    def step(carry: _Carry, _: None) -> tuple[_Carry, Params | None]:
        # By a condition, so that products after the end cost nothing; a scan can be reversed by `jax.grad`.
        following = jax.lax.cond(carry.is_done, lambda carry: carry, advance, carry)
        return following, carry.vector if keep_basis else None

    first = _tree.unit(start)
    empty = Tridiagonal(zeros, zeros, jnp.asarray(0))
    end, basis = jax.lax.scan(
        step, _Carry(first, _tree.zeros_like(first), empty, jnp.asarray(False)), length=depth
    )
    return end.matrix, basis
