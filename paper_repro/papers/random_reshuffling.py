"""The mean of SGD over an epoch: reshuffled, and with replacement.

A tanh network with 16 hidden units, cross entropy, 64 images in 4 minibatches. The mean iterate after one epoch is exact: all 24 orders, or
all 256 sequences with replacement, are run. Against gradient flow on the loss L, on L + eta/4 |grad L|^2 and on
L + eta/(4m) sum_k |grad L_k|^2.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

import eomdl
from paper_repro import claims as made, networks, pictures as draw, runs
from paper_repro.harness import Images, Tables


SOURCE = "Smith et al. 2021 (arXiv 2101.12176), modified losses of the two samplings."
SECONDS = 25
LOSS = networks.mlp_loss
SAMPLINGS: dict[str, Any] = {
    "random reshuffling": lambda m: itertools.permutations(range(m)),
    "with replacement": lambda m: itertools.product(range(m), repeat=m),
}


def mean_loss(params: Any, batches: Any) -> jax.Array:
    """The loss of an epoch: the mean over its minibatches."""
    return jnp.mean(jax.lax.map(lambda batch: LOSS(params, batch), batches))


FLOW, PLAIN, VARIANCE = "gradient flow", "modified by |grad L|^2", "modified by mean |grad L_k|^2"
MODELS: dict[str, Any] = {
    FLOW: lambda eta: eomdl.GradientFlow(mean_loss, eta),
    PLAIN: lambda eta: eomdl.GradientFlow(eomdl.losses.GradientPenalty(mean_loss, eta / 4), eta),
    VARIANCE: lambda eta: eomdl.flows.ReshufflingFlow(LOSS, eta),
}
FOLLOWED = {"random reshuffling": VARIANCE, "with replacement": PLAIN}  # the claims


class Size(NamedTuple):
    """Images, minibatches in an epoch, learning rates."""

    images: int = 64
    minibatches: int = 4
    rates: tuple[float, ...] = (0.02, 0.01, 0.005, 0.0025)


SMOKE = Size(images=24, minibatches=3, rates=(0.02, 0.01, 0.005))


def measure(size: Size, images: Images) -> Tables:
    """The mean of SGD over all orders of an epoch, enumerated, against three flows."""
    data, count = images(size.images), size.minibatches
    each = len(data[1]) // count
    batches = jax.tree.map(lambda x: x[: each * count].reshape(count, each, *x.shape[1:]), data)
    net = networks.mlp_init(jax.random.key(0), (data[0].shape[1], 16, 10))
    options: dict[str, Any] = {"args": batches, "rtol": 1e-9, "atol": 1e-12, "save_steps": [count]}
    rows = []
    for eta in tqdm(size.rates, desc="learning rates"):
        paths = runs.solve_all({name: make(eta) for name, make in MODELS.items()}, net, count, **options)
        for sampling, orders in SAMPLINGS.items():
            mean = _mean_end(net, batches, eta, np.array(list(orders(count))))
            for model, path in paths.items():
                distance = float(optax.tree.norm(optax.tree.sub(mean, path.at(count))))
                rows.append((sampling, model, eta, distance, np.max(np.asarray(path.ode_error))))
    columns = ["sampling", "model", "learning rate", "distance", "ODE error"]
    return {"distances": pd.DataFrame(rows, columns=columns)}


def _mean_end(net: Any, batches: Any, eta: float, orders: np.ndarray) -> Any:
    optimizer, steps = optax.sgd(eta), len(orders[0])

    @jax.jit
    def end(order: jax.Array) -> Any:
        epoch = jax.tree.map(lambda leaf: leaf[order], batches)
        path = eomdl.descend(LOSS, net, optimizer, steps, batches=epoch, save_steps=[steps])
        return jax.tree.map(lambda leaf: leaf[-1], path.params)

    ends = jax.lax.map(end, jnp.asarray(orders))
    return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), ends)


def claims(tables: Tables) -> list[made.Claim]:
    """Each sampling follows its own modified loss, one order better than the others."""
    found = []
    for sampling, some in tables["distances"].groupby("sampling", sort=False):
        right = FOLLOWED[str(sampling)]
        wrong = PLAIN if right == VARIANCE else VARIANCE
        finest = runs.by(some[some["learning rate"] == some["learning rate"].min()], "model", "distance")
        text = f"SGD, {sampling}: the mean after an epoch follows the loss {right}, "
        found += [
            made.orders(
                text + "to third order in the learning rate; the two others only to second.",
                runs.observed_orders(some, "distance", last=3),
                {name: 3 if name == right else 2 for name in MODELS},
                within=0.25,
            ),
            made.gain(
                text + "and ends nearer to it than to the other sampling's.",
                finest[right],
                finest[wrong],
                least=2,
            ),
        ]
    return found


def pictures(tables: Tables) -> dict[str, Figure]:
    """Distance of the mean iterate to each flow against the learning rate."""
    figures = {}
    for sampling, some in tables["distances"].groupby("sampling", sort=False):
        orders = runs.observed_orders(some, "distance", last=3)
        figures[str(sampling).replace(" ", "-")] = draw.errors(
            some,
            "learning rate",
            "distance",
            ode="ODE error",
            label=draw.named(orders, "order"),
            ylabel="distance of the mean after an epoch",
            title=str(sampling),
        )
    return figures
