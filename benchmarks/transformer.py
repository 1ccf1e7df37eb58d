"""A small language model, character by character, on the descriptions of scikit-learn's data sets."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import datasets

from paper_repro.networks import cross_entropy


HEADS = 6


def text(context: int, count: int) -> tuple[jax.Array, jax.Array, int]:
    """Characters and those that follow them, each (count, context), and how many different ones there are."""
    loaders = (datasets.load_digits, datasets.load_iris, datasets.load_wine, datasets.load_breast_cancer)
    whole = "".join(load().DESCR for load in loaders)
    letters, numbers = np.unique(list(whole), return_inverse=True)
    starts = np.linspace(0, len(numbers) - context - 1, count).astype(int)
    rows = np.stack([numbers[start : start + context + 1] for start in starts])
    return jnp.asarray(rows[:, :-1]), jnp.asarray(rows[:, 1:]), len(letters)


def init(key: jax.Array, letters: int, context: int, width: int, layers: int) -> dict[str, Any]:
    """Weights normal with variance 1/in; what goes into the residual stream is smaller by the depth."""
    keys = iter(jax.random.split(key, 3 + 4 * layers))

    def normal(shape: tuple[int, int], scale: float) -> jax.Array:
        return scale * jax.random.normal(next(keys), shape, jnp.float32)

    inner, into = width**-0.5, (2 * layers * width) ** -0.5
    blocks = [
        {
            "qkv": normal((width, 3 * width), inner),
            "out": normal((width, width), into),
            "up": normal((width, 4 * width), inner),
            "down": normal((4 * width, width), into / 2),
        }
        for _ in range(layers)
    ]
    return {
        "letters": normal((letters, width), 1.0),
        "places": normal((context, width), 0.1),
        "blocks": blocks,
        "head": normal((width, letters), 0.1 * inner),
    }


def _normalized(x: jax.Array) -> jax.Array:
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5)


def _attention(block: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    rows, context, width = x.shape
    qkv = (x @ block["qkv"]).reshape(rows, context, 3, HEADS, width // HEADS)
    q, k, v = (qkv[:, :, i] for i in range(3))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(width // HEADS)
    scores = jnp.where(np.tri(context, dtype=bool), scores, -1e9)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    return mixed.reshape(x.shape) @ block["out"]


def loss(params: dict[str, Any], args: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Mean cross entropy of the next character."""
    inputs, following = args
    x = params["letters"][inputs] + params["places"]
    for block in params["blocks"]:
        x = x + _attention(block, _normalized(x))
        x = x + jax.nn.gelu(_normalized(x) @ block["up"]) @ block["down"]
    return cross_entropy(_normalized(x) @ params["head"], following)
