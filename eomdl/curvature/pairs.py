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
from eomdl.linalg.symmetric import are_converged, largest_eigenpairs


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
    r"""Return the k largest eigenvalues of the Hessian $\nabla^2 L(\theta)$ and their eigenvectors.

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
    - `rtol`: the iteration stops when all residuals are below this part of the largest eigenvalue in modulus. The error of a value
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
    num_active: ArrayLike | None = None,
    deflate: Params | None = None,
) -> Eigenpairs:
    """Return the pairs of P^-1 H. No argument is checked.

    `num_active`: a traced number; only so many of the start vectors are used and so many pairs found, the others are 0.
    `deflate`: a stack of vectors like those that are found; the pairs are those of H in the space without them.
    """
    scale = jax.tree.map(lambda x: 1 / jnp.sqrt(x), preconditioner)

    def divide(vectors: Params | None) -> Params | None:
        return None if vectors is None else jax.vmap(lambda x: jax.tree.map(jnp.divide, x, scale))(vectors)

    pairs = scaled_pairs(
        loss,
        params,
        args,
        k,
        divide(start),
        scale,
        num_matvecs,
        rtol,
        num_active=num_active,
        deflate=divide(deflate),
    )
    return eqx.tree_at(lambda pairs: pairs.vectors, pairs, jax.vmap(_times, (None, 0))(scale, pairs.vectors))


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
    num_active: ArrayLike | None = None,
    deflate: Params | None = None,
) -> Eigenpairs:
    """Return the pairs of S H S, with S the diagonal matrix `scale` or the identity, and orthonormal vectors.

    Its eigenvalues are those of S S H, whose vectors are S times these. What is 0 in S is left out. No argument is checked.
    `num_active` and `deflate` are as in `preconditioned_pairs`.
    """
    params = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), params)
    hessian = hessian_operator(loss, params, args)

    def operator(vector: Params) -> Params:
        return _project_out(deflate, _times(scale, hessian(_times(scale, _project_out(deflate, vector)))))

    block, rtol = _block(params, k, start), jnp.asarray(rtol)
    pairs, matvecs = largest_eigenpairs(operator, block, k, num_matvecs, rtol, num_active)
    return Eigenpairs(pairs.values, pairs.vectors, pairs.residuals, are_converged(pairs, rtol), matvecs)


def _block(params: Params, k: int, start: Params | None) -> Params:
    """Return the start vectors, at least k: random vectors take the place of zeros later."""
    given = 0 if start is None else len(jax.tree.leaves(start)[0])
    rows = max(k, given)
    # Zeros that XLA does not know to be such: of constants it would compute the start vectors while it compiles.
    empty = jax.tree.map(lambda p: jnp.broadcast_to(0 * p, (rows, *p.shape)), params)
    if start is None:
        return empty
    return jax.tree.map(lambda x, zero: zero.at[:given].set(x.astype(zero.dtype)), start, empty)


def _project_out(deflate: Params | None, vector: Params) -> Params:
    """Return what a vector has outside of the span of orthonormal ones; zeros take nothing."""
    if deflate is None:
        return vector
    within = _tree.gram(deflate, jax.tree.map(lambda x: x[None], vector))[:, 0]
    return jax.tree.map(lambda a, b: a - b.astype(a.dtype), vector, _tree.combine(within, deflate))


def _times(scale: Params | None, vector: Params) -> Any:
    if scale is None:
        return vector
    return jax.tree.map(lambda s, x: (s * x).astype(x.dtype), scale, vector)
