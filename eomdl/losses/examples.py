"""Losses made from the losses of examples: their mean, and sums with weights."""

from collections.abc import Callable
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp

from eomdl import _check
from eomdl._types import Args, Loss, Params


Losses: TypeAlias = Callable[[Params, Args], jax.Array]  # -> one real number for each example, shape (N,)
PER_EXAMPLE = "a function (params, args) -> losses of the N examples in args, shape (N,)"


def evaluate_losses(losses: Losses, params: Params, args: Args) -> jax.Array:
    """Return the losses of the N examples, shape (N,). **Raises:** `ValueError` for another shape or dtype."""
    values = losses(params, args)
    count = _check.num_examples("args", args)
    if jnp.shape(values) != (count,) or not jnp.issubdtype(jnp.result_type(values), jnp.floating):
        got = (
            f"shape {jnp.shape(values)}, dtype {jnp.result_type(values)}"
            if hasattr(values, "shape")
            else _check.show(values)
        )
        hint = "; take no mean: the mean is made by eomdl.losses.mean_loss(losses)" * (
            jnp.shape(values) == ()
        )
        raise ValueError(f"losses: expected {PER_EXAMPLE}, here ({count},), got {got}{hint}")
    return values


class MeanLoss(eqx.Module):
    """The loss that `mean_loss` returns."""

    losses: Losses

    def __call__(self, params: Params, args: Args) -> jax.Array:
        """Return the mean."""
        return jnp.mean(evaluate_losses(self.losses, params, args))


class WeightedLoss(eqx.Module):
    r"""The loss $\sum_i w_i \ell_i$: linear in the weights, and so is its gradient."""

    losses: Losses
    weights: jax.Array

    def __call__(self, params: Params, args: Args) -> jax.Array:
        """Return the sum."""
        values = evaluate_losses(self.losses, params, args)
        return jnp.vdot(self.weights.astype(values.dtype), values)


def mean_loss(losses: Losses) -> Loss:
    r"""Return the loss $L = \frac1N \sum_i \ell_i$ of the losses of the examples.

    ```python
    def losses(params, args):  # one number for each example
        images, labels = args
        return optax.softmax_cross_entropy(network(params, images), labels)

    loss = eomdl.losses.mean_loss(losses)
    run = eomdl.descend(loss, params, optax.sgd(0.1), 100, args=(images, labels))
    ```

    What is given by example serves for the noise of minibatches too (`eomdl.noise.MinibatchNoise`). In the memory of one
    chunk: `MeanOverChunks(mean_loss(losses), 1000)`.

    **Arguments:** `losses`: function `(params, args) -> (N,)`, where the leading axis of every leaf of `args` counts the N examples.

    **Raises:** `ValueError` for a wrong argument; when called, for losses of another shape.
    """
    return MeanLoss(_check.function("losses", losses, PER_EXAMPLE))
