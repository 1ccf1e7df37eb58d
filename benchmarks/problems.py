"""The problems that all benchmarks share."""

import dataclasses
from functools import cache
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

import eomdl
from eomdl._types import Args, Loss, Params


jax.config.update("jax_enable_x64", True)

WEIGHT_DECAY = 1e-3
ETA_LAMBDA = 0.5  # the learning rate is chosen so that eta * lambda_max is this at the start


@dataclasses.dataclass(frozen=True)
class Problem:
    """A loss, where to start, the data, and a learning rate; float64."""

    name: str
    loss: Loss
    params: Params
    args: Args
    learning_rate: float
    sharpness: float  # lambda_max at the start

    @property
    def num_params(self) -> int:
        """The number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    @property
    def eta_lambda(self) -> float:
        r"""$\eta \lambda_{max}$ at the start."""
        return self.learning_rate * self.sharpness


def mlp(params: Params, x: jax.Array) -> jax.Array:
    """Outputs of a network of dense layers with tanh between them."""
    *hidden, last = params
    for layer in hidden:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]


def cross_entropy(params: Params, data: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Mean cross entropy of the network's softmax against one-hot labels."""
    x, y = data
    return -jnp.mean(jnp.sum(y * jax.nn.log_softmax(mlp(params, x)), axis=1))


# One object for all: the same loss compiles once.
LOSS = eomdl.WeightDecay(cross_entropy, WEIGHT_DECAY)


def init_mlp(widths: tuple[int, ...], seed: int = 0) -> list[dict[str, jax.Array]]:
    """Normal weights of variance 1 / (inputs of the layer), and biases 0."""
    rng = np.random.default_rng(seed)
    return [
        {"w": jnp.asarray(rng.normal(size=(m, n)) / np.sqrt(m)), "b": jnp.zeros(n)}
        for m, n in pairwise(widths)
    ]


@cache
def digits(num_examples: int) -> tuple[jax.Array, jax.Array]:
    """scikit-learn's digits: 8 x 8 pixels scaled to [0, 1], labels one-hot."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return jnp.asarray(x[:num_examples] / 16.0), jnp.asarray(np.eye(10)[y[:num_examples]])


@cache
def digits_mlp(width: int = 64, num_examples: int = 1000) -> Problem:
    """The MLP 64-width-width-10 (tanh) on digits: cross entropy and weight decay."""
    params = init_mlp((64, width, width, 10))
    data = digits(num_examples)
    sharpness = float(jax.jit(eomdl.sharpness(LOSS))(params, data))
    return Problem(
        name=f"64-{width}-{width}-10, {num_examples} digits",
        loss=LOSS,
        params=params,
        args=data,
        learning_rate=float(f"{ETA_LAMBDA / sharpness:.2g}"),
        sharpness=sharpness,
    )
