"""Gradient flow."""

import equinox as eqx
import jax
from jax.typing import ArrayLike

from eomdl import _check, _tree
from eomdl._autodiff import descent_field
from eomdl._types import Args, Loss, Params
from eomdl.flows.base import AbstractFlow


class GradientFlow(AbstractFlow):
    """Gradient flow $\\dot\\theta = -\\nabla L(\\theta)$.

    The learning rate $\\eta$ sets the clock alone: step k of gradient descent sits at time
    $k \\eta$. One-step error against gradient descent $O(\\eta^2)$, error at fixed time
    $O(\\eta)$. Cost: one gradient. The learning rate is a leaf of the pytree.

    **Raises:** `ValueError` if the learning rate is not a finite number > 0.
    """

    loss: Loss
    learning_rate: jax.Array = eqx.field(converter=lambda x: _check.positive_scalar("learning_rate", x))

    # Equinox lets a property fill an AbstractVar; mypy does not know.
    @property  # type: ignore[misc]
    def step_size(self) -> jax.Array:
        return self.learning_rate

    def __call__(self, t: ArrayLike, state: Params, args: Args) -> Params:
        del t
        return descent_field(self.loss, args)(state)

    def step(self, t: ArrayLike, state: Params, args: Args) -> Params:
        del t
        return gradient_descent_step(self.loss, self.learning_rate, state, args)

    def validate(self, params: Params, args: Args) -> None:
        _check.loss_is_scalar(self.loss, params, args)


def gradient_descent_step(loss: Loss, learning_rate: jax.Array, params: Params, args: Args) -> Params:
    """$\\theta - \\eta \\nabla L(\\theta)$."""
    return _tree.add(params, _tree.scale(learning_rate, descent_field(loss, args)(params)))
