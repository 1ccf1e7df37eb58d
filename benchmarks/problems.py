"""The problems that all benchmarks share."""

import dataclasses
from functools import cache

import jax

import eomdl
from benchmarks.aliases import Args, Loss, Params
from paper_repro import data, networks


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


# One object for all: the same loss compiles once.
LOSS = eomdl.WeightDecay(networks.loss(networks.mlp, networks.soft_cross_entropy), WEIGHT_DECAY)


@cache
def digits(num_examples: int) -> tuple[jax.Array, jax.Array]:
    """The first of scikit-learn's digits: 8 x 8 pixels scaled to [0, 1], labels one-hot."""
    images, labels = data.load(None, num_examples, seed=None)
    return images, jax.nn.one_hot(labels, 10, dtype=images.dtype)


@cache
def digits_mlp(width: int = 64, num_examples: int = 1000) -> Problem:
    """The MLP 64-width-width-10 (tanh) on digits: cross entropy and weight decay."""
    params = networks.zero_bias_init((64, width, width, 10))
    args = digits(num_examples)
    sharpness = float(jax.jit(eomdl.sharpness(LOSS))(params, args))
    return Problem(
        name=f"64-{width}-{width}-10, {num_examples} digits",
        loss=LOSS,
        params=params,
        args=args,
        learning_rate=float(f"{ETA_LAMBDA / sharpness:.2g}"),
        sharpness=sharpness,
    )
