"""Random reshuffling against sampling with replacement (Smith et al. 2021)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

import eomdl
from paper_repro import data, models
from paper_repro.reproduction import Claim, Config, Reproduction


RATES = (0.02, 0.01, 0.005, 0.0025)
LOSS = models.mlp_loss


def mean_loss(params, batches) -> jax.Array:
    """The loss of an epoch: the mean over its minibatches."""
    return jnp.mean(jax.lax.map(lambda batch: LOSS(params, batch), batches))


MODELS = {
    "gradient flow": lambda eta: eomdl.GradientFlow(mean_loss, eta),
    "modified by |grad L|^2": lambda eta: eomdl.GradientFlow(
        eomdl.losses.GradientPenalty(mean_loss, eta / 4), eta
    ),
    "modified by mean |grad L_k|^2": lambda eta: eomdl.flows.ReshufflingFlow(LOSS, eta),
}
SAMPLINGS = {
    "random reshuffling": lambda m: itertools.permutations(range(m)),
    "with replacement": lambda m: itertools.product(range(m), repeat=m),
}


def run(config: Config) -> tuple[dict[str, pd.DataFrame], list[Claim]]:
    """The mean of SGD over all orders of an epoch, enumerated, against three flows."""
    count = 3 if config.smoke else 4
    images, labels = data.load(config.data, config.subset or (24 if config.smoke else 64))
    size = len(images) // count
    batches = jax.tree.map(lambda x: x[: size * count].reshape(count, size, *x.shape[1:]), (images, labels))
    net = models.mlp_init(jax.random.key(0), (images.shape[1], 16, 10))
    rows = []
    for eta in tqdm(RATES[:3] if config.smoke else RATES, desc="learning rates"):
        ends = {
            name: eomdl.solve(
                make(eta), net, count, args=batches, rtol=1e-9, atol=1e-12, save_steps=[count]
            ).at(count)
            for name, make in MODELS.items()
        }
        for sampling, orders in SAMPLINGS.items():
            mean = _mean_end(net, batches, eta, np.array(list(orders(count))))
            for model, end in ends.items():
                distance = float(optax.tree.norm(optax.tree.sub(mean, end)))
                rows.append((sampling, model, eta, distance))
    table = pd.DataFrame(rows, columns=["sampling", "model", "learning rate", "distance"])
    orders = [
        (*key, eomdl.errors.observed_order(some["learning rate"][-3:], some["distance"][-3:]))
        for key, some in table.groupby(["sampling", "model"], sort=False)
    ]
    order_table = pd.DataFrame(orders, columns=["sampling", "model", "observed order"])
    return {"orders": order_table, "distances": table}, _claims(order_table, table)


def _mean_end(net, batches, eta: float, orders: np.ndarray):
    optimizer = optax.sgd(eta)

    @jax.jit
    def end(order: jax.Array):
        epoch = jax.tree.map(lambda leaf: leaf[order], batches)
        steps = len(orders[0])
        path = eomdl.descend(LOSS, net, optimizer, steps, batches=epoch, save_steps=[steps])
        return jax.tree.map(lambda leaf: leaf[-1], path.params)

    ends = jax.lax.map(end, jnp.asarray(orders))
    return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), ends)


def _claims(orders: pd.DataFrame, table: pd.DataFrame) -> list[Claim]:
    order = orders.set_index(["sampling", "model"])["observed order"]
    finest = table[table["learning rate"] == table["learning rate"].min()]
    distance = finest.set_index(["sampling", "model"])["distance"]
    gradient_flow, plain, variance = MODELS
    claims = []
    for sampling, right, wrong in (
        ("random reshuffling", variance, plain),
        ("with replacement", plain, variance),
    ):
        some = [order[sampling, model] for model in (right, wrong, gradient_flow)]
        gain = distance[sampling, wrong] / distance[sampling, right]
        claims.append(
            Claim(
                f"SGD, {sampling}: the mean after an epoch follows the loss {right}, to third order in the "
                "learning rate; the two others only to second.",
                f"Observed orders {some[0]:.2f}, {some[1]:.2f} and {some[2]:.2f} (gradient flow); at the smallest "
                f"learning rate the right one is {gain:.0f} times nearer than the wrong one.",
                bool(abs(some[0] - 3) < 0.25 and max(abs(s - 2) for s in some[1:]) < 0.25 and gain > 2),
            )
        )
    return claims


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, Figure]:
    """Distance of the mean iterate to each flow against the learning rate, a panel a sampling."""
    table, orders = tables["distances"], tables["orders"].set_index(["sampling", "model"])["observed order"]
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    for axes, (sampling, some) in zip(
        figure.subplots(1, 2, sharey=True), table.groupby("sampling", sort=False), strict=True
    ):
        for color, (model, line) in enumerate(some.groupby("model", sort=False)):
            label = f"{model}: order {orders[sampling, model]:.2f}"
            axes.loglog(line["learning rate"], line["distance"], f"C{color}o-", label=label)
        axes.set(xlabel="learning rate", title=sampling)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("distance of the mean after an epoch")
    return {"random-reshuffling": figure}


REPRODUCTION = Reproduction(
    name="random-reshuffling",
    title="The mean of SGD over an epoch: reshuffled, and with replacement",
    source="Smith et al. 2021 (arXiv 2101.12176), modified losses of the two samplings.",
    setting=(
        "A tanh network with 16 hidden units, cross entropy, 64 images in 4 minibatches. The mean iterate after one "
        "epoch is exact: all 24 orders, or all 256 sequences with replacement, are run. Against gradient flow on the "
        "loss L, on L + eta/4 |grad L|^2 and on L + eta/(4m) sum_k |grad L_k|^2."
    ),
    seconds=25,
    run=run,
    plot=plot,
)
