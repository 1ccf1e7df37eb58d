"""The largest eigenpairs of the Hessian."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from eomdl import _check, _tree
from eomdl._autodiff import hessian_operator
from eomdl._types import Args, Loss, Params
from eomdl.curvature import krylov


class Eigenpairs(eqx.Module):
    r"""The k largest eigenpairs of a Hessian, or of $P^{-1} H$, largest first.

    - `values`: shape (k,), $\lambda_1 \ge \dots \ge \lambda_k$.
    - `vectors`: a pytree like the parameters, with a leading axis k on every leaf: orthonormal, or $u_i^\top P u_j = \delta_{ij}$.
    - `residuals`: (k,), $|H u - \lambda u|$, or $|P^{-1/2} (H u - \lambda P u)|$. An eigenvalue lies within the residual of each value.
    - `converged`: (k,), whether the residual is at most `rtol` times the largest of the $|\lambda_i|$.
    - `matvecs`: the number of Hessian-vector products taken.

    Where the curvature is not finite, neither are the values, and nothing is converged.
    """

    values: Float[jax.Array, " k"]
    vectors: Params
    residuals: Float[jax.Array, " k"]
    converged: Bool[jax.Array, " k"]
    matvecs: Int[jax.Array, ""]


def eigenpairs(
    loss: Loss,
    params: Params,
    args: Args,
    k: int,
    *,
    start: Params | None = None,
    preconditioner: Params | None = None,
    num_matvecs: int = 16,
    rtol: ArrayLike = 1e-3,
) -> Eigenpairs:
    r"""The k largest eigenvalues of the Hessian $\nabla^2 L(\theta)$ and their eigenvectors.

    ```python
    top = eomdl.curvature.eigenpairs(loss, params, data, 2)
    next_ = eomdl.curvature.eigenpairs(loss, new_params, data, 2, start=top.vectors, num_matvecs=6)
    ```

    Block Lanczos with full reorthogonalization, on the pytree as it is. Cold it starts from k random vectors, warm from
    `start`: along a path, from the pairs of the step before. An eigenvalue that occurs up to k times is found as often.
    Works under `jit` and `vmap`. It has no derivative: for that of an eigenvalue see `eigenvalue_gradient`.

    **Arguments:**

    - `loss`, `params`, `args`: as in `eomdl.descend`; `k`: how many pairs.
    - `start`: a pytree like the parameters with a leading axis on every leaf, such as `Eigenpairs.vectors`. Fewer than k
        vectors are filled up with random ones; more than k are all used.
    - `preconditioner`: P, a pytree like the parameters of numbers > 0, the diagonal of a matrix. The pairs are then
        those of $P^{-1} H$, $H u = \lambda P u$.
    - `num_matvecs`: at most so many Hessian-vector products for each of the start vectors.
    - `rtol`: it stops when all residuals are below this part of the largest eigenvalue in modulus. The error of a value
        is about the square of its residual over the distance to the next eigenvalue.

    **Returns:** `eomdl.curvature.Eigenpairs`. Read `converged`: values that are not are lower bounds.
    A residual tells that there is an eigenvalue, not that none was missed.

    **Cost:** at most k times `num_matvecs` Hessian-vector products, about 1.5 gradients each, 0.6 for what they share, and the memory of
    k (`num_matvecs` + 1) copies of the parameters.

    **Raises:** `ValueError` for a wrong argument, and if k is larger than the number of parameters.
    """
    params = _check.params("params", params)
    _check.loss_is_scalar(loss, params, args)
    k = _check.integer("k", k, 1, _tree.size(params))
    num_matvecs = _check.integer("num_matvecs", num_matvecs, 1)
    rtol = _check.nonnegative_scalar("rtol", rtol)
    if start is not None:
        start = _check.stack("start", start, "params", params)
    if preconditioner is not None:
        preconditioner = _check.positive_like("preconditioner", preconditioner, "params", params)
    if preconditioner is None:
        return scaled_pairs(loss, params, args, k, start, None, num_matvecs, rtol)
    return preconditioned_pairs(loss, params, args, k, start, preconditioner, num_matvecs, rtol)


def preconditioned_pairs(
    loss: Loss,
    params: Params,
    args: Args,
    k: int,
    start: Params | None,
    preconditioner: Params,
    num_matvecs: int,
    rtol: ArrayLike,
    used: ArrayLike | None = None,
    beside: Params | None = None,
) -> Eigenpairs:
    """The pairs of P^-1 H. No argument is checked.

    `used`: only so many of the start vectors, a traced number; so many pairs are found, the others are 0. `beside`: a stack of vectors
    like those found; the pairs are those of H in what is left of the space without them.
    """
    scale = jax.tree.map(lambda x: 1 / jnp.sqrt(x), preconditioner)

    def scaled(vectors: Params | None) -> Params | None:
        return None if vectors is None else jax.vmap(lambda x: jax.tree.map(jnp.divide, x, scale))(vectors)

    found = scaled_pairs(
        loss, params, args, k, scaled(start), scale, num_matvecs, rtol, used=used, beside=scaled(beside)
    )
    return eqx.tree_at(lambda pairs: pairs.vectors, found, jax.vmap(_times, (None, 0))(scale, found.vectors))


@eqx.filter_jit
def scaled_pairs(
    loss: Loss,
    params: Params,
    args: Args,
    k: int,
    start: Params | None,
    scale: Params | None,
    num_matvecs: int,
    rtol: ArrayLike,
    *,
    used: ArrayLike | None = None,
    beside: Params | None = None,
) -> Eigenpairs:
    """The pairs of S H S, with S the diagonal matrix `scale` or the identity, and orthonormal vectors.

    Its eigenvalues are those of S S H, whose vectors are S times these. What is 0 in S is left out. No argument is checked.
    `used` and `beside` as in `preconditioned_pairs`.
    """
    params = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), params)
    block = _block(params, k, start)
    size = len(jax.tree.leaves(block)[0])

    hessian = hessian_operator(loss, params, args)

    def product(vector: Params) -> Params:
        return _without(beside, _times(scale, hessian(_times(scale, _without(beside, vector)))))

    dimension = _tree.size(params)
    bound = min(num_matvecs * size, dimension)
    part = None if used is None else krylov.Part(used, jnp.minimum(num_matvecs * used, dimension))
    found = krylov.largest(product, block, k, bound, jnp.asarray(rtol), part)
    return Eigenpairs(
        found.values, found.vectors, found.residuals, krylov.is_small(found, rtol), found.products
    )


def _block(params: Params, k: int, start: Params | None) -> Params:
    """The start vectors, at least k: rows of zeros are filled with random vectors later."""
    given = 0 if start is None else len(jax.tree.leaves(start)[0])
    rows = max(k, given)
    # Zeros that XLA does not know to be such: of constants it would compute the start vectors while it compiles.
    empty = jax.tree.map(lambda p: jnp.broadcast_to(0 * p, (rows, *p.shape)), params)
    if start is None:
        return empty
    return jax.tree.map(lambda x, zero: zero.at[:given].set(x.astype(zero.dtype)), start, empty)


def _without(beside: Params | None, vector: Params) -> Params:
    """What a vector has outside of the span of orthonormal ones; rows of zeros take nothing."""
    if beside is None:
        return vector
    within = _tree.gram(beside, jax.tree.map(lambda x: x[None], vector))[:, 0]
    return jax.tree.map(lambda a, b: a - b.astype(a.dtype), vector, _tree.combine(within, beside))


def _times(scale: Params | None, vector: Params) -> Any:
    if scale is None:
        return vector
    return jax.tree.map(lambda s, x: (s * x).astype(x.dtype), scale, vector)
