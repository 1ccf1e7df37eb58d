"""The networks and losses of the reproductions: functions of `(params, (inputs, labels))`."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
import optax


def mlp_init(key: jax.Array, sizes: Sequence[int]) -> list[dict[str, jax.Array]]:
    """Layers `{"w": (in, out), "b": (out,)}`; weights normal with variance 1/in, biases too.

    The biases do not start at 0, so that their symmetric component has something to decay.
    """
    layers = []
    for fan_in, fan_out in pairwise(sizes):
        key, w_key, b_key = jax.random.split(key, 3)
        scale = fan_in**-0.5
        layers.append(
            {
                "w": scale * jax.random.normal(w_key, (fan_in, fan_out)),
                "b": scale * jax.random.normal(b_key, (fan_out,)),
            }
        )
    return layers


def mlp(layers: list[dict[str, jax.Array]], inputs: jax.Array) -> jax.Array:
    """Logits of a tanh network, shape (batch, classes)."""
    for layer in layers[:-1]:
        inputs = jnp.tanh(inputs @ layer["w"] + layer["b"])
    return inputs @ layers[-1]["w"] + layers[-1]["b"]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean softmax cross entropy."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def mlp_loss(params, data) -> jax.Array:
    """Cross entropy of the tanh network."""
    inputs, labels = data
    return cross_entropy(mlp(params, inputs), labels)


def normalized_init(key: jax.Array, pixels: int, hidden: int, classes: int) -> dict[str, jax.Array]:
    """`hidden` (pixels, hidden) feeds a normalization; `head` (hidden, classes) the softmax."""
    hidden_key, head_key = jax.random.split(key)
    return {
        "hidden": pixels**-0.5 * jax.random.normal(hidden_key, (pixels, hidden)),
        "head": hidden**-0.5 * jax.random.normal(head_key, (hidden, classes)),
    }


def _normalized_loss(axis: int) -> Callable:
    def loss(params, data) -> jax.Array:
        inputs, labels = data
        features = inputs @ params["hidden"]
        # No epsilon and no affine parameters: the scale invariance is exact.
        centred = features - jnp.mean(features, axis=axis, keepdims=True)
        normal = centred / jnp.sqrt(jnp.mean(centred**2, axis=axis, keepdims=True))
        return cross_entropy(jnp.tanh(normal) @ params["head"], labels)

    return loss


layer_norm_loss = _normalized_loss(axis=1)  # over the features of one input
batch_norm_loss = _normalized_loss(axis=0)  # over the batch, in training mode
