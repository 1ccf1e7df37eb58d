"""A loss with a penalty: on the weights, on the gradient."""

from typing import TYPE_CHECKING

import equinox as eqx
import jax
from jax.typing import ArrayLike

from eomdl import _check, _tree
from eomdl._types import Args, Loss, Params


class WeightDecay(eqx.Module):
    r"""A loss with L2 weight decay: $L(\theta) = f(\theta) + \frac{\lambda}{2} |\theta|^2$.

    ```python
    decayed = eomdl.WeightDecay(loss, 1e-3)
    run = eomdl.descend(decayed, params, optax.sgd(0.1), 100, args=data)
    ```

    Gradient descent on it is `optax.sgd` with weight decay $\lambda$ (coupled, not that
    of AdamW). As the decay is part of the loss, every derivative contains it, and the counter
    terms are those of the run with decay.

    **Arguments:**

    - `loss`: function `(params, args) -> scalar`.
    - `weight_decay`: $\lambda$, a finite number >= 0, in units of 1/time. It is a leaf of the
        pytree: another value does not recompile.

    **Raises:** `ValueError` if `weight_decay` is negative or not finite.
    """

    loss: Loss = eqx.field(converter=lambda f: _check.function("loss", f))
    weight_decay: jax.Array = eqx.field(converter=lambda x: _check.nonnegative_scalar("weight_decay", x))

    if TYPE_CHECKING:  # a checker knows no converters, and takes an AbstractVar for an argument

        def __init__(self, loss: Loss, weight_decay: ArrayLike) -> None: ...

    def __call__(self, params: Params, args: Args) -> jax.Array:
        r"""Return $f(\theta) + \frac{\lambda}{2} |\theta|^2$."""
        value = self.loss(params, args)
        penalty = _tree.vdot(params, params)
        return value + (0.5 * self.weight_decay * penalty).astype(value.dtype)


class GradientPenalty(eqx.Module):
    r"""A loss with a penalty on its gradient, the modified loss $\tilde L(\theta) = L(\theta) + c \, |\nabla L(\theta)|^2$.

    With $c = \eta/4$ gradient flow on it is the first-order modified flow of gradient descent (Barrett &
    Dherin 2021, arXiv 2009.11162, eq. 7); training on it makes that regularization explicit.

    **Arguments:** `loss` L; `coefficient` $c \ge 0$, a leaf of the pytree.

    **Cost** of its gradient: about 2.7 gradients of L (one Hessian-vector product).

    **Raises:** `ValueError` if the coefficient is not a finite number >= 0.
    """

    loss: Loss = eqx.field(converter=lambda f: _check.function("loss", f))
    coefficient: jax.Array = eqx.field(converter=lambda x: _check.nonnegative_scalar("coefficient", x))

    if TYPE_CHECKING:  # a checker knows no converters, and takes an AbstractVar for an argument

        def __init__(self, loss: Loss, coefficient: ArrayLike) -> None: ...

    def __call__(self, params: Params, args: Args) -> jax.Array:
        r"""Return $L(\theta) + c \, |\nabla L(\theta)|^2$."""
        value, gradient = jax.value_and_grad(self.loss)(params, args)
        square = _tree.vdot(gradient, gradient)
        return value + (self.coefficient * square).astype(value.dtype)
