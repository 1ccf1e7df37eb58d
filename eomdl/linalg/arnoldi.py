r"""The Arnoldi iteration on pytrees: an operator on the Krylov space of one vector, or of several.

$A V_m = V_{m+p} H$ with an orthonormal basis V. From p start vectors, one product at a time: product i gives the basis vector i + p
(Ruhe 1979, Math. Comp. 33: "band Lanczos"). With p = 1 this is the iteration of Arnoldi (1951); for a symmetric operator it is
Lanczos with full reorthogonalization.

Where the space ends ("breakdown": nothing but rounding is left of a product, as of a Hessian of low rank) a random vector takes the
next place, with coefficient 0 in H: the iteration continues in the rest of the space, and finds multiple eigenvalues.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from eomdl import _tree
from eomdl._types import Params
from eomdl.linalg.orthogonal import project_out, unit_outside


class Krylov(NamedTuple):
    """An operator on a space spanned by m of its products, of which `num_products` have been taken.

    - `vectors`: an orthonormal stack of m + p vectors; 0 in places still to come.
    - `products`: shape (m + p, m), the products with the first m vectors in this basis.
    - `num_products`; `lead`: by how many vectors the basis is ahead of the products, p or fewer.
    """

    vectors: Params
    products: jax.Array
    num_products: jax.Array
    lead: ArrayLike

    @property
    def basis(self) -> Params:
        """The vectors whose products there are: the first m."""
        return jax.tree.map(lambda leaf: leaf[: self.products.shape[1]], self.vectors)

    @property
    def matrix(self) -> jax.Array:
        """The operator in the basis, shape (m, m): upper Hessenberg for one start vector."""
        return self.products[: self.products.shape[1]]

    @property
    def matrix_of_start(self) -> jax.Array:
        """The matrix on what the products of a single start vector span: 0 beyond where the Krylov space ends.

        For functions of the operator times the start vector, which are in that space.
        """
        matrix = self.matrix
        goes_on = jnp.cumprod(jnp.diagonal(matrix, -1) != 0)
        inside = jnp.concatenate([jnp.ones(1, bool), goes_on.astype(bool)])
        return jnp.where(inside[:, None] & inside[None], matrix, 0)


def arnoldi(operator: Callable[[Params], Params], start: Params, num_products: int) -> Krylov:
    """Return an operator on the Krylov space of one vector, after `num_products` products, at most the dimension.

    **Cost:** the products, and `num_products` + 1 vectors of memory. Real or complex; it has derivatives in both modes.
    """
    empty = jax.tree.map(lambda leaf: jnp.zeros((num_products + 1, *leaf.shape), leaf.dtype), start)
    vectors = jax.tree.map(lambda leaf, x: leaf.at[0].set(x), empty, _tree.unit(start))
    products = jnp.zeros((num_products + 1, num_products), jnp.result_type(*jax.tree.leaves(start)))
    krylov = Krylov(vectors, products, jnp.asarray(0), 1)
    return jax.lax.fori_loop(0, num_products, lambda _, krylov: add_product(krylov, operator), krylov)


def start_basis(start: Params, num_products: int, num_active: ArrayLike) -> Krylov:
    """Return the basis of the first `num_active` vectors of a stack, made orthonormal, with room for the products.

    Random vectors take the places of those that depend on others.
    """
    num_vectors = num_products + len(jax.tree.leaves(start)[0])
    # Zeros that XLA does not know to be such: else they take their memory long before they are used.
    empty = jax.tree.map(lambda leaf: jnp.broadcast_to(0 * leaf[:1], (num_vectors, *leaf.shape[1:])), start)

    def add_start(i: jax.Array, vectors: Params) -> Params:
        return _add_vector(vectors, jax.tree.map(lambda leaf: leaf[i], start), i, _draw_normal)[0]

    # Not by a condition in a loop over all: that takes a copy of the basis.
    vectors = jax.lax.fori_loop(0, num_active, add_start, empty)
    products = jnp.zeros((num_vectors, num_products), jnp.result_type(*jax.tree.leaves(start)))
    return Krylov(vectors, products, jnp.asarray(0), num_active)


def add_product(krylov: Krylov, operator: Callable[[Params], Params]) -> Krylov:
    """Return the space with the next product, and with the basis vector that it gives."""
    i = krylov.num_products
    image = operator(jax.tree.map(lambda leaf: leaf[i], krylov.vectors))
    vectors, column = _add_vector(krylov.vectors, image, i + krylov.lead, _tree.hashed)
    return krylov._replace(vectors=vectors, products=krylov.products.at[:, i].set(column), num_products=i + 1)


def _add_vector(
    vectors: Params, new: Params, place: jax.Array, draw: Callable[[jax.Array, Params], Params]
) -> tuple[Params, jax.Array]:
    """Return the basis with `new` made orthonormal at the place, and the coefficients of `new` in it.

    At a breakdown the vector of `draw` takes the place, with coefficient 0; where the basis spans the whole space, 0 does.
    """
    one = jax.tree.map(lambda leaf: leaf[0], vectors)
    rest, within = project_out(vectors, new)
    unit, length = unit_outside(rest, new)
    has_room = place < _tree.size(one)

    def replace() -> Params:
        drawn = draw(place, one)
        unit, _ = unit_outside(project_out(vectors, drawn)[0], drawn)
        return _tree.scale(jnp.where(has_room, 1, 0), unit)

    # Where the product is not finite, the length is not positive: the column tells.
    is_new = (length > 0) & has_room
    unit = jax.lax.cond(is_new, lambda: unit, replace)
    vectors = jax.tree.map(lambda leaf, x: leaf.at[place].set(x), vectors, unit)
    return vectors, within.at[place].set(jnp.where(is_new, length, 0).astype(within.dtype))


def _draw_normal(place: jax.Array, like: Params) -> Params:
    """Return a vector of normal numbers."""
    return _tree.random_normal(jax.random.fold_in(jax.random.key(0), place), like)
