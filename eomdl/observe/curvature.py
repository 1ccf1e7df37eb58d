"""Curvature of the loss, matrix-free."""

import equinox as eqx
import jax
import jax.numpy as jnp
from matfree import decomp, eig

from eomdl import _check, _tree
from eomdl._autodiff import hessian_vector_product
from eomdl._types import Args, Loss, Observable, Params


class _Sharpness(eqx.Module):
    """A module, not a closure, so that two of the same loss share a compiled program."""

    loss: Loss
    num_matvecs: int = eqx.field(static=True)

    def __call__(self, params: Params, args: Args) -> jax.Array:
        depth = min(self.num_matvecs, _tree.size(params))
        eigh = eig.eigh_partial(decomp.tridiag_sym(depth, custom_vjp=False))
        start = _tree.random_normal(jax.random.key(0), params)

        def matvec(v: Params) -> Params:
            return hessian_vector_product(self.loss, params, args, v)

        eigenvalues, _ = eigh(matvec, start)
        # Lanczos divides by |H v|: where that is 0 (a loss linear in params) so is H.
        flat = _tree.norm(matvec(start)) == 0
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
