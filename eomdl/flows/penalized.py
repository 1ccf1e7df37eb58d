"""Descent on a loss with a gradient penalty: what first-order modified flows are made of."""

from jax.typing import ArrayLike

from eomdl import _tree
from eomdl._autodiff import descent_field, jvp
from eomdl._types import Args, Loss, Params


def penalized_descent(loss: Loss, coefficient: ArrayLike, params: Params, args: Args) -> Params:
    r"""Return $-\nabla (L + \frac{c}{2} |\nabla L|^2) = -g - c H g$, gradient and product in one pass."""
    field = descent_field(loss, args)
    f = field(params)
    _, hf = jvp(field, params, f)  # f'f = H g
    return _tree.sub(f, _tree.scale(coefficient, hf))
