"""First-order modified flows that are gradient flows of a modified loss."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from eomdl import _check, _tree
from eomdl._autodiff import descent_field
from eomdl._types import Args, Loss, Params
from eomdl.flows.base import AbstractFlow


class MomentumFlow(AbstractFlow):
    """Gradient descent with momentum, on the loss that its memory modifies.

    $$\\dot\\theta = -\\nabla \\big( L + \\tfrac{h}{4} (1 + 2 a) |\\nabla L|^2 \\big), \\qquad
    h = \\frac{\\eta}{1 - \\beta},$$

    where a is the mean age in steps of the gradients in an update: $\\beta/(1-\\beta)$ for heavy ball, which
    gives the factor $(1+\\beta)/(1-\\beta)$ of Ghosh et al. 2023 (arXiv 2302.00849), and
    $\\beta^2/(1-\\beta)$ for Nesterov as `optax.sgd(..., nesterov=True)` has it. $\\beta = 0$ is implicit gradient
    regularization (Barrett & Dherin 2021). Holds after the transient of about $1/(1-\\beta)$
    steps in which the memory fills: defect $O(h^3)$ there, $O(h)$ in the transient.

    **Arguments:** `loss`; `learning_rate` $\\eta$ and `momentum` $0 \\le \\beta < 1$ as in `optax.sgd`, leaves of
    the pytree; `nesterov`.

    **Time:** a step of the optimizer takes $h = \\eta/(1-\\beta)$ (`step_size`).

    **Cost** of one evaluation: about 2.7 gradients. **Raises:** `ValueError` for a wrong argument.
    """

    loss: Loss
    learning_rate: jax.Array = eqx.field(converter=lambda x: _check.positive_scalar("learning_rate", x))
    momentum: jax.Array = eqx.field(default=0.9, converter=lambda x: _check.fraction("momentum", x))
    nesterov: bool = eqx.field(default=False, static=True)

    # Equinox lets a property fill an AbstractVar; mypy does not know.
    @property  # type: ignore[misc]
    def step_size(self) -> jax.Array:
        return self.learning_rate / (1 - self.momentum)

    def __call__(self, t: ArrayLike, state: Params, args: Args) -> Params:
        del t
        age = self.momentum ** (2 if self.nesterov else 1) / (1 - self.momentum)
        return penalized_descent(self.loss, self.step_size * (1 + 2 * age) / 2, state, args)

    def validate(self, params: Params, args: Args) -> None:
        _check.loss_is_scalar(self.loss, params, args)


class ReshufflingFlow(AbstractFlow):
    """The mean of SGD over all orders of the m minibatches of an epoch (random reshuffling).

    $$\\dot\\theta = -\\nabla \\Big( L + \\frac{\\eta}{4m} \\sum_{k=1}^{m} |\\nabla L_k|^2 \\Big), \\qquad
    L = \\frac1m \\sum_k L_k.$$

    After an epoch, time $m\\eta$, the mean iterate is at a distance of $O((m\\eta)^3)$; needs
    $m\\eta\\lambda_{max} \\ll 1$. With replacement the mean follows L plus $\\frac{\\eta}{4} |\\nabla L|^2$ instead: the
    variance of the minibatch gradients drops out of it.

    **Arguments:** `loss`; `learning_rate` $\\eta$, a leaf. `args` are the m minibatches, stacked: arrays with
    leading axis m.

    **Cost** of one evaluation: about 2.7 gradients of every minibatch. **Raises:** `ValueError` for a
    wrong argument.

    Source: Smith et al. 2021 (arXiv 2101.12176), eq. 1.
    """

    loss: Loss
    learning_rate: jax.Array = eqx.field(converter=lambda x: _check.positive_scalar("learning_rate", x))

    @property  # type: ignore[misc]
    def step_size(self) -> jax.Array:
        return self.learning_rate

    def __call__(self, t: ArrayLike, state: Params, args: Args) -> Params:
        del t
        velocities = jax.lax.map(
            lambda batch: penalized_descent(self.loss, self.learning_rate / 2, state, batch), args
        )
        return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), velocities)

    def validate(self, params: Params, args: Args) -> None:
        lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(args)}
        if len(lengths) != 1 or () in lengths:
            raise ValueError(
                "args: expected the minibatches of an epoch stacked, arrays with one leading axis, got leading "
                f"axes {sorted(lengths)}"
            )
        _check.loss_is_scalar(self.loss, params, jax.tree.map(lambda leaf: leaf[0], args))


def penalized_descent(loss: Loss, coefficient: jax.Array, params: Params, args: Args) -> Params:
    """$-\\nabla (L + \\frac{c}{2} |\\nabla L|^2) = -g - c H g$, gradient and product in one pass."""
    field = descent_field(loss, args)
    f = field(params)
    _, hf = jax.jvp(field, (params,), (f,))  # f'f = H g
    return _tree.sub(f, _tree.scale(coefficient, hf))
