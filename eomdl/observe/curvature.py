"""Curvature of the loss, matrix-free."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float
from typing_extensions import override

from eomdl import _check, _tree
from eomdl._autodiff import hessian_operator
from eomdl._types import Args, Loss, Observable, Params
from eomdl.linalg.lanczos import Tridiagonal, lanczos
from eomdl.observe.base import AbstractObservable


class Sharpness(AbstractObservable):
    """The observable that `sharpness` returns: a module, not a closure, so that two of the same loss share a compiled program."""

    loss: Loss
    num_matvecs: int = eqx.field(static=True)
    rtol: ArrayLike | None

    @override
    def __call__(self, params: Params, args: Args) -> Float[jax.Array, ""]:
        return jnp.max(jnp.linalg.eigvalsh(self.tridiagonal(params, args).matrix))

    def tridiagonal(self, params: Params, args: Args) -> Tridiagonal:
        """Return the Hessian on a Krylov space; its `num_products` is the number of products that were taken."""
        params = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), params)
        start = _tree.random_normal(jax.random.key(0), params)
        depth = min(self.num_matvecs, _tree.size(params))
        is_enough = None if self.rtol is None else self._is_enough
        return lanczos(hessian_operator(self.loss, params, args), start, depth, is_enough)[0]

    def _is_enough(self, found: Tridiagonal) -> jax.Array:
        r"""Whether the residual of the largest Ritz value is below `rtol` of it.

        An eigenvalue lies within $\beta_j |s_j|$ of the largest Ritz value, with s its vector in the small matrix
        (Parlett 1998, ch. 13). There may be a larger one that has not shown yet.
        """
        values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(found.matrix))
        bound = found.residual * jnp.abs(vectors[found.num_products - 1, -1])
        return jnp.asarray(bound <= jnp.asarray(self.rtol) * jnp.abs(values[-1]))


def sharpness(loss: Loss, num_matvecs: int = 16, rtol: ArrayLike | None = None) -> Observable:
    r"""Return the observable $\lambda_{max}(\nabla^2 L)$, the largest Hessian eigenvalue.

    ```python
    observe = {"sharpness": eomdl.sharpness(loss)}
    run = eomdl.descend(loss, params, optimizer, 100, args=data, observe=observe)
    ```

    Lanczos from one fixed random vector. The result is a lower bound of the exact value; on networks
    whose top eigenvalue is well separated it is within about 0.1 % after 16 products. There is no reorthogonalization,
    which would keep all vectors, and which the largest eigenvalue does not need (Paige 1976).

    **Arguments:** `num_matvecs`: how many Hessian-vector products at most. `rtol`: none after the one at which the
    residual is below this part of the value. Above 0.02 the value may be far too low: eigenvalues near the largest may not have
    shown yet.

    **Cost:** at most `num_matvecs` Hessian-vector products, about 1.5 gradients each (MLP 784-700-600-10), and 0.6 for what
    they share: the loss is evaluated once. Memory for 4 copies of the parameters beside those of a product.

    **Raises:** `ValueError` if `num_matvecs` is not an integer >= 1, or `rtol` no finite number >= 0.
    """
    return Sharpness(
        _check.function("loss", loss),
        _check.integer("num_matvecs", num_matvecs, 1),
        None if rtol is None else _check.nonnegative_scalar("rtol", rtol),
    )
