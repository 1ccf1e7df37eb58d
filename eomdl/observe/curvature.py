"""Curvature of the loss, matrix-free."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Float
from matfree import decomp

from eomdl import _check, _tree
from eomdl._autodiff import hessian_vector_product
from eomdl._types import Args, Loss, Observable, Params
from eomdl.observe.base import AbstractObservable


class _Sharpness(AbstractObservable):
    """A module, not a closure, so that two of the same loss share a compiled program."""

    loss: Loss
    num_matvecs: int = eqx.field(static=True)

    def __call__(self, params: Params, args: Args) -> Float[jax.Array, ""]:
        params = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), params)
        # One flat vector: with a vector of many leaves Lanczos compiles several times as long.
        flat_params, unravel = ravel_pytree(params)
        start, _ = ravel_pytree(_tree.random_normal(jax.random.key(0), params))
        lanczos = decomp.tridiag_sym(min(self.num_matvecs, start.size), custom_vjp=False, materialize=True)

        def matvec(v: jax.Array) -> jax.Array:
            return hessian_vector_product(lambda x, args: self.loss(unravel(x), args), flat_params, args, v)

        eigenvalues = jnp.linalg.eigvalsh(lanczos(matvec, start).J_small)
        # Lanczos divides by |H v|: where that is 0 (a loss linear in params) so is H.
        flat = jnp.linalg.norm(matvec(start)) == 0
        return jnp.where(flat, 0.0, jnp.max(eigenvalues))


def sharpness(loss: Loss, num_matvecs: int = 16) -> Observable:
    r"""Observable $\lambda_{max}(\nabla^2 L)$, the largest Hessian eigenvalue.

    ```python
    observe = {"sharpness": eomdl.sharpness(loss)}
    run = eomdl.descend(loss, params, optimizer, 100, args=data, observe=observe)
    ```

    Lanczos with full reorthogonalization (`matfree`) from one fixed random vector. The result is a
    lower bound of the exact value; on networks whose top eigenvalue is well separated it is within
    about 0.1 % after `num_matvecs` iterations.

    **Cost:** `num_matvecs` Hessian-vector products, about 2.7 gradients each.

    **Raises:** `ValueError` if `num_matvecs` is not an integer >= 1.
    """
    return _Sharpness(_check.function("loss", loss), _check.integer("num_matvecs", num_matvecs, 1))
