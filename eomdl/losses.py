"""Losses made from losses."""

import equinox as eqx
import jax
import jax.numpy as jnp

from eomdl import _check, _tree
from eomdl._types import Args, Loss, Params


class WeightDecay(eqx.Module):
    """$L(\\theta) = f(\\theta) + \\frac{\\lambda}{2} |\\theta|^2$: L2 weight decay as part of the loss.

    All of the theory that eomdl computes is about the gradient of the whole loss, so decay
    belongs here and not in the optimizer. The decay $\\lambda$ is a leaf of the pytree.

    **Arguments:** `loss` f; `weight_decay` $\\lambda \\ge 0$.

    **Raises:** `ValueError` if the decay is not a finite number >= 0.
    """

    loss: Loss
    weight_decay: jax.Array = eqx.field(converter=lambda x: _check.nonnegative_scalar("weight_decay", x))

    def __call__(self, params: Params, args: Args) -> jax.Array:
        value = self.loss(params, args)
        square = sum(jnp.vdot(x, x) for x in jax.tree.leaves(params))
        return value + (0.5 * self.weight_decay * square).astype(value.dtype)


class GradientPenalty(eqx.Module):
    """$\\tilde L(\\theta) = L(\\theta) + c \\, |\\nabla L(\\theta)|^2$: the modified loss.

    With $c = \\eta/4$ gradient flow on it is the first-order modified flow of gradient descent (Barrett &
    Dherin 2021, arXiv 2009.11162, eq. 7); training on it makes that regularization explicit. The
    coefficient is a leaf of the pytree.

    **Arguments:** `loss` L; `coefficient` $c \\ge 0$.

    **Cost** of its gradient: about 2.7 gradients of L (one Hessian-vector product).

    **Raises:** `ValueError` if the coefficient is not a finite number >= 0.
    """

    loss: Loss
    coefficient: jax.Array = eqx.field(converter=lambda x: _check.nonnegative_scalar("coefficient", x))

    def __call__(self, params: Params, args: Args) -> jax.Array:
        value, gradient = jax.value_and_grad(self.loss)(params, args)
        square = _tree.vdot(gradient, gradient)
        return value + (self.coefficient * square).astype(value.dtype)
