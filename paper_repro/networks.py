"""The networks and losses of the reproductions: functions of `(params, (inputs, labels))`."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


SMALL = 0.577  # of the usual scale, so that the sharpness has far to rise


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


def soft_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean softmax cross entropy to probabilities, such as one-hot labels, shape (batch, classes)."""
    return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(logits), axis=1))


def loss(network: Callable, criterion: Callable = cross_entropy) -> Callable:
    """The loss of a network: `criterion(network(params, inputs), labels)`."""

    def of_params(params: Any, data: Any) -> jax.Array:
        inputs, labels = data
        return criterion(network(params, inputs), labels)

    return of_params


mlp_loss = loss(mlp)


def normalized_init(key: jax.Array, pixels: int, hidden: int, classes: int) -> dict[str, jax.Array]:
    """`hidden` (pixels, hidden) feeds a normalization; `head` (hidden, classes) the softmax."""
    hidden_key, head_key = jax.random.split(key)
    return {
        "hidden": pixels**-0.5 * jax.random.normal(hidden_key, (pixels, hidden)),
        "head": hidden**-0.5 * jax.random.normal(head_key, (hidden, classes)),
    }


def two_layer_init(key: jax.Array, pixels: int, hidden: int, classes: int) -> list[dict[str, jax.Array]]:
    """`mlp_init` with one hidden layer."""
    return mlp_init(key, (pixels, hidden, classes))


def hidden(params: Any) -> jax.Array:
    """The scale-invariant block of `normalized_init`: the weights before the normalization."""
    return params["hidden"]


def hidden_gradient_norm(loss: Callable) -> Callable:
    """Observable |grad f| over that block."""
    return lambda params, args: jnp.linalg.norm(hidden(jax.grad(loss)(params, args)))


def scaled(data: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Images to a root mean square norm of 4, that of the digits, so that one learning rate fits any data."""
    inputs, labels = data
    return 4.0 * inputs / np.sqrt(np.mean(np.sum(np.square(inputs), axis=1))), labels


def _normalized_loss(axis: int) -> Callable:
    def loss(params: Any, data: Any) -> jax.Array:
        inputs, labels = data
        features = inputs @ params["hidden"]
        # No epsilon and no affine parameters: the scale invariance is exact.
        centred = features - jnp.mean(features, axis=axis, keepdims=True)
        normal = centred / jnp.sqrt(jnp.mean(centred**2, axis=axis, keepdims=True))
        return cross_entropy(jnp.tanh(normal) @ params["head"], labels)

    return loss


layer_norm_loss = _normalized_loss(axis=1)  # over the features of one input
batch_norm_loss = _normalized_loss(axis=0)  # over the batch, in training mode


def two_parameter_loss(params: Any, data: Any) -> jax.Array:
    r"""$\frac12 (y - a b x)^2$: the smallest model whose flat minima differ in sharpness."""
    x, y = data
    return 0.5 * (y - params["a"] * params["b"] * x) ** 2


def squared_error(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Half the squared distance to one-hot labels, mean over images."""
    return 0.5 * jnp.mean(jnp.sum((outputs - jax.nn.one_hot(labels, outputs.shape[1])) ** 2, axis=1))


def small_mlp_init(pixels: int) -> list[dict[str, jax.Array]]:
    """64-32-32-10 at `SMALL` scale."""
    return zero_bias_init((pixels, 32, 32, 10), SMALL)


def small_cnn_init(pixels: int, channels: int = 6) -> dict[str, dict[str, jax.Array]]:
    """A 3 x 3 convolution, 2 x 2 average pooling, a hidden layer of 32 and a head; same scale."""
    rng = np.random.default_rng(0)
    return {
        "conv": _layer(rng, 9, channels, SMALL),
        "hidden": _layer(rng, pixels // 4 * channels, 32, SMALL),
        "head": _layer(rng, 32, 10, SMALL),
    }


def zero_bias_init(sizes: Sequence[int], scale: float = 1.0, seed: int = 0) -> list[dict[str, jax.Array]]:
    """Layers as of `mlp_init` from NumPy's generator; weights normal with standard deviation `scale`/sqrt(in)."""
    rng = np.random.default_rng(seed)
    return [_layer(rng, fan_in, fan_out, scale) for fan_in, fan_out in pairwise(sizes)]


def _layer(rng: np.random.Generator, fan_in: int, fan_out: int, scale: float) -> dict[str, jax.Array]:
    weights = scale * rng.normal(size=(fan_in, fan_out)) / np.sqrt(fan_in)
    return {"w": jnp.asarray(weights, jnp.result_type(float)), "b": jnp.zeros(fan_out)}


def patches(inputs: jax.Array) -> jax.Array:
    """The 3 x 3 neighbourhood of every pixel of square images, shape (batch, pixels, 9).

    A convolution is a product with them: XLA's own is slow inside loops on CPU.
    """
    side = math.isqrt(inputs.shape[1])
    images = jnp.pad(inputs.reshape(-1, side, side), ((0, 0), (1, 1), (1, 1)))
    shifted = [images[:, i : i + side, j : j + side] for i in range(3) for j in range(3)]
    return jnp.stack(shifted, axis=-1).reshape(len(inputs), side * side, 9)


def cnn(params: Any, inputs: jax.Array) -> jax.Array:
    """Outputs of the convolutional network, shape (batch, classes)."""
    side = math.isqrt(inputs.shape[1])
    stacked = patches(inputs).reshape(len(inputs), side, side, 9)
    features = jnp.tanh(stacked @ params["conv"]["w"] + params["conv"]["b"])
    half = side // 2
    pooled = features.reshape(-1, half, 2, half, 2, features.shape[-1]).mean((2, 4))
    hidden = jnp.tanh(pooled.reshape(len(pooled), -1) @ params["hidden"]["w"] + params["hidden"]["b"])
    return hidden @ params["head"]["w"] + params["head"]["b"]


def relu_activations(layers: Any, inputs: jax.Array) -> list[jax.Array]:
    """What each layer of the ReLU network hands on, input first."""
    out = [inputs]
    for layer in layers[:-1]:
        out.append(jax.nn.relu(out[-1] @ layer["w"] + layer["b"]))
    return out


def relu_preactivations(layers: Any, inputs: jax.Array) -> list[jax.Array]:
    """Inputs of every ReLU."""
    hidden = relu_activations(layers, inputs)[:-1]
    return [x @ layer["w"] + layer["b"] for x, layer in zip(hidden, layers[:-1], strict=True)]


def relu(layers: Any, inputs: jax.Array) -> jax.Array:
    """Logits of the ReLU network, shape (batch, classes)."""
    return relu_activations(layers, inputs)[-1] @ layers[-1]["w"] + layers[-1]["b"]


relu_loss = loss(relu)


def _norm_and_head(features: jax.Array, params: Any, labels: jax.Array) -> jax.Array:
    """Batch norm with gain and shift, ReLU, mean over positions if there are any, softmax."""
    axes = tuple(range(features.ndim - 1))
    centred = features - jnp.mean(features, axis=axes, keepdims=True)
    normal = centred / jnp.sqrt(jnp.mean(centred**2, axis=axes, keepdims=True))
    hidden = jax.nn.relu(normal * params["norm"]["gain"] + params["norm"]["shift"])
    if hidden.ndim == 3:
        hidden = hidden.reshape(len(hidden), 4, -1, hidden.shape[-1]).mean(2).reshape(len(hidden), -1)
    head = params["head"]["w"]
    return cross_entropy(hidden @ head.reshape(-1, head.shape[-1]) + params["head"]["b"], labels)


def normalized_mlp_loss(params: Any, data: Any) -> jax.Array:
    """Linear, batch norm with gain and shift, ReLU, linear."""
    images, labels = data
    return _norm_and_head(images @ params["first"], params, labels)


def normalized_cnn_loss(params: Any, data: Any) -> jax.Array:
    """Convolution, batch norm with gain and shift, ReLU, mean over four bands of the image, linear."""
    images, labels = data
    return _norm_and_head(patches(images) @ params["first"], params, labels)


def normalized_start(network: str, pixels: int) -> dict[str, Any]:
    """Of "MLP" or "CNN": weights normal with variance 1/fan-in; units along axis 1 of `first`, along axis -2 of `head`."""
    rng = np.random.default_rng(0)
    fan_in, units, bands = (pixels, 24, 1) if network == "MLP" else (9, 8, 4)

    def array(*shape: int, scale: float = 1.0, mean: float = 0.0) -> jax.Array:
        return jnp.asarray(mean + scale * rng.normal(size=shape), jnp.result_type(float))

    head = array(*([bands] if bands > 1 else []), units, 10, scale=(units * bands) ** -0.5)
    return {
        "first": array(fan_in, units, scale=fan_in**-0.5),
        "norm": {"gain": array(units, scale=0.2, mean=1.0), "shift": array(units, scale=0.2)},
        "head": {"w": head, "b": array(10, scale=0.3)},
    }
