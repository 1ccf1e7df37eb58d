"""Gram-Schmidt on pytrees, and the one rule by which a Krylov space is seen to end."""

import jax
import jax.numpy as jnp

from eomdl import _tree
from eomdl._types import Params


BREAKDOWN = (
    8  # what orthogonalization leaves of a vector is rounding below so many rounding units of the vector
)


def project_out(stack: Params, vector: Params) -> tuple[Params, jax.Array]:
    """Return what a vector has outside of the span of an orthonormal stack, and its coefficients within.

    This is classical Gram-Schmidt, done twice. Zeros in the stack take nothing.
    """

    def project(vector: Params) -> tuple[Params, jax.Array]:
        within = _tree.gram(stack, jax.tree.map(lambda leaf: leaf[None], vector))[:, 0]
        return _tree.sub(vector, _tree.combine(within, stack)), within

    rest, first = project(vector)
    rest, second = project(rest)
    return rest, first + second


def unit_outside(rest: Params, vector: Params) -> tuple[Params, jax.Array]:
    """Return the unit vector along `rest`, which orthogonalization left of `vector`, and its length.

    Where `rest` is only rounding (a Krylov space ends: "breakdown"), unit vector and length are 0. A vector that is not finite
    has a length of NaN. The derivative is finite at 0, too.
    """
    square = _tree.norm(rest, squared=True)
    length = jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))
    rounding = jnp.finfo(_tree.dtype(rest)).eps * jax.lax.stop_gradient(_tree.norm(vector))
    length = jnp.where(length <= BREAKDOWN * rounding, 0, length)
    return _tree.scale(jnp.where(length == 0, 0, 1 / jnp.where(length == 0, 1, length)), rest), length
