"""The mean of SGD over the orders of its minibatches."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from eomdl import _check, _tree
from eomdl._types import Args, Loss, Params
from eomdl.flows.descent import AbstractDescentFlow
from eomdl.flows.gradient import gradient_descent_step
from eomdl.flows.penalized import penalized_descent


class ReshufflingFlow(AbstractDescentFlow):
    r"""The mean of SGD over all orders of the m minibatches of an epoch (random reshuffling).

    $$\dot\theta = -\nabla \Big( L + \frac{\eta}{4m} \sum_{k=1}^{m} |\nabla L_k|^2 \Big), \qquad
    L = \frac1m \sum_k L_k.$$

    After an epoch, time $m\eta$, the mean iterate is at a distance of $O((m\eta)^3)$; this needs
    $m\eta\lambda_{max} \ll 1$. With replacement the mean follows L plus $\frac{\eta}{4} |\nabla L|^2$ instead, without
    the variance of the minibatch gradients.

    **Arguments:** `loss`; `learning_rate` $\eta$, a leaf of the pytree. `args` are the m minibatches, stacked: arrays
    with leading axis m.

    **Cost** of one evaluation: about 2.7 gradients of every minibatch. **Raises:** `ValueError` for a
    wrong argument.

    Source: Smith et al. 2021 (arXiv 2101.12176), eq. 1.
    """

    loss: Loss
    learning_rate: jax.Array = eqx.field(converter=lambda x: _check.positive_scalar("learning_rate", x))

    def __call__(self, t: ArrayLike, state: Params, args: Args) -> Params:
        del t
        velocities = jax.lax.map(
            lambda batch: penalized_descent(self.loss, self.learning_rate / 2, state, batch), args
        )
        return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), velocities)

    def step(self, t: ArrayLike, state: Params, args: Args) -> Params:
        r"""The mean of an epoch in one order and in the reverse: that over all orders, up to $O(\eta^3)$."""
        del t

        def one(x: Params, batch: Args) -> tuple[Params, None]:
            return gradient_descent_step(self.loss, self.learning_rate, x, batch), None

        ends = [jax.lax.scan(one, state, args, reverse=reverse)[0] for reverse in (False, True)]
        return _tree.scale(0.5, _tree.add(*ends))

    def step_span(self, args: Args) -> int:
        """The number of minibatches in an epoch."""
        return len(jax.tree.leaves(args)[0])

    def validate(self, params: Params, args: Args) -> None:
        lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(args)}
        if len(lengths) != 1 or () in lengths:
            raise ValueError(
                "args: expected the minibatches of an epoch stacked, arrays with one leading axis, got leading "
                f"axes {sorted(lengths)}"
            )
        _check.loss_is_scalar(self.loss, params, jax.tree.map(lambda leaf: leaf[0], args))
