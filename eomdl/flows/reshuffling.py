"""The mean of SGD over the orders of its minibatches."""

from typing import TYPE_CHECKING, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from typing_extensions import override

from eomdl import _check
from eomdl._autodiff import DescentField
from eomdl._types import Args, Loss, Params
from eomdl.flows.base import Differentiated
from eomdl.flows.descent import AbstractDescentFlow
from eomdl.flows.penalized import penalized_descent
from eomdl.maps.gradient_descent import GradientDescentStep
from eomdl.maps.step_map import StepMap


_ORDERS = 4  # and their reverses: all of them up to m = 3


class ReshufflingFlow(AbstractDescentFlow):
    r"""The mean of SGD over all orders of the m minibatches of an epoch (random reshuffling).

    $$\dot\theta = -\nabla \Big( L + \frac{\eta}{4m} \sum_{k=1}^{m} |\nabla L_k|^2 \Big), \qquad
    L = \frac1m \sum_k L_k.$$

    After an epoch, time $m\eta$, the mean iterate is at a distance of $O((m\eta)^3)$; this needs
    $m\eta\lambda_{max} \ll 1$. With replacement the mean follows L plus $\frac{\eta}{4} |\nabla L|^2$ instead, without
    the variance of the minibatch gradients. Models of the law with independent batches, as
    `eomdl.flows.StochasticModifiedFlow`, are of order 1 only for reshuffled ones.

    **Arguments:** `loss`; `learning_rate` $\eta$, a leaf of the pytree. `args` are the m minibatches, stacked: arrays
    with leading axis m.

    **Cost** of one evaluation: about 2.7 gradients of every minibatch. **Raises:** `ValueError` for a
    wrong argument.

    Source: Smith et al. 2021 (arXiv 2101.12176), eq. 1.
    """

    references: ClassVar[tuple[str, ...]] = ("smith2021",)

    loss: Loss = eqx.field(converter=lambda f: _check.function("loss", f))
    learning_rate: jax.Array = eqx.field(converter=lambda x: _check.positive_scalar("learning_rate", x))

    if TYPE_CHECKING:  # a checker knows no converters, and takes an AbstractVar for an argument

        def __init__(self, loss: Loss, learning_rate: ArrayLike) -> None: ...

    @property
    @override
    def map(self) -> "_EpochStep":
        return _EpochStep(GradientDescentStep(self.loss, self.learning_rate))

    @override
    def __call__(self, t: ArrayLike, state: Params, args: Args) -> Params:
        del t
        velocities = jax.lax.map(
            lambda batch: penalized_descent(self.loss, self.learning_rate / 2, state, batch), args
        )
        return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), velocities)

    @override
    def differentiated(self, state: Params) -> Differentiated:
        return Differentiated(_MeanField(DescentField(self.loss)), state)

    @override
    def validate(self, params: Params, args: Args) -> None:
        lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(args)}
        if len(lengths) != 1 or () in lengths:
            raise ValueError(
                "args: expected the minibatches of an epoch stacked, arrays with one leading axis, got leading "
                f"axes {sorted(lengths)}"
            )
        _check.loss_is_scalar(self.loss, params, jax.tree.map(lambda leaf: leaf[0], args))


class _MeanField(eqx.Module):
    """The mean of a field over the minibatches of an epoch."""

    field: DescentField

    def __call__(self, params: Params, args: Args) -> Params:
        velocities = jax.lax.map(lambda batch: self.field(params, batch), args)
        return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), velocities)


class _EpochStep(StepMap):
    r"""The mean of an epoch over a few orders of its minibatches: up to $O(\eta^3)$ that over all orders.

    Every order comes with its reverse, so that each minibatch is before each other one in half of them.
    """

    is_model: ClassVar[bool] = True

    step: GradientDescentStep

    @override
    def __call__(self, state: Params, args: Args, k: ArrayLike) -> Params:
        count = self.num_steps(args)
        starts = np.arange(0, count, max(count // _ORDERS, 1))
        orders = (np.arange(count) + starts[:, None]) % count

        def epoch(order: jax.Array) -> Params:
            def one(x: Params, i: jax.Array) -> tuple[Params, None]:
                batch = jax.tree.map(lambda leaf: leaf[i], args)
                return self.step(x, batch, k), None

            return jax.lax.scan(one, state, order)[0]

        ends = jax.lax.map(epoch, jnp.asarray(np.concatenate([orders, orders[:, ::-1]])))
        return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), ends)

    @override
    def num_steps(self, args: Args) -> int:
        return len(jax.tree.leaves(args)[0])
