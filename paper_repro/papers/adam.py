"""Adam's flow, its first-order correction, and the interpolating flow.

A tanh network with 16 hidden units, cross entropy, full batch of 128 images; Adam with b1 = 0.9, b2 = 0.99, eps = 1e-4 under the root.
Flows start from the real run at time 0.4 (1,000 to 4,000 steps) and run to 0.48; largest distance to Adam over all parameters, learning
rates 4e-4 to 1e-4.
"""

from typing import NamedTuple

import jax
import optax
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

import eomdl
from paper_repro import claims as made, networks, pictures as draw, runs
from paper_repro.harness import Images, Tables


SOURCE = "Cattaneo, Klusowski & Shigida 2024 (arXiv 2309.00079)."
SECONDS = 60
B1, B2, EPS = 0.9, 0.99, 1e-4  # eps under the root, as in the paper: of the size of the squared gradients
WARMUP, TIME = 0.4, 0.08
CLOSED = ("without correction", "first-order correction")
ORDERS = {CLOSED[0]: 1, CLOSED[1]: 2, "1 points": 1, "2 points": 2}  # expected


class Size(NamedTuple):
    """Images, hidden units, learning rates, and the points of the interpolating flows."""

    images: int = 128
    hidden: int = 16
    rates: tuple[float, ...] = (4e-4, 2e-4, 1e-4)
    points: tuple[int, ...] = (1, 2)


SMOKE = Size(images=64, hidden=8, rates=(2e-4, 1e-4), points=(2,))


def measure(size: Size, images: Images) -> Tables:
    """Distances of three kinds of flow to Adam after the transient, against the learning rate."""
    inputs, loss = images(size.images), networks.mlp_loss
    net = networks.mlp_init(jax.random.key(0), (inputs[0].shape[1], size.hidden, 10))
    rows = []
    for eta in tqdm(size.rates, desc="learning rates"):
        optimizer = optax.adam(eta, B1, B2, eps=0.0, eps_root=EPS)
        begin, end = round(WARMUP / eta), round((WARMUP + TIME) / eta)
        warm = eomdl.descend(loss, net, optimizer, begin, args=inputs, save_steps=[begin])
        saved = list(range(begin, end + 1, max((end - begin) // 50, 1)))
        real = eomdl.descend(loss, net, optimizer, end, args=inputs, save_steps=saved, resume=warm)
        step = eomdl.optimizer_step(loss, optimizer)
        flows: dict[str, eomdl.AbstractFlow] = {
            name: eomdl.flows.AdamFlow(loss, eta, B1, B2, eps=0.0, eps_root=EPS, order=order)
            for order, name in enumerate(CLOSED)
        }
        flows |= {f"{k} points": eomdl.InterpolatingFlow(step, eta, k) for k in size.points}
        paths = runs.solve_all(
            flows, net, end, args=inputs, save_steps=saved, resume=warm, rtol=1e-10, atol=1e-12
        )
        rows.append(runs.summary(eomdl.compare(real, paths)).assign(**{"learning rate": eta}))
    return {"errors": pd.concat(rows)}


def claims(tables: Tables) -> list[made.Claim]:
    """Orders and gains of the correction and of the interpolating flow."""
    table = tables["errors"]
    observed = runs.observed_orders(table, "largest distance")
    error = {name: some["largest distance"].to_numpy() for name, some in table.groupby("model", sort=False)}
    points = [name for name in observed if name not in CLOSED]
    return [
        made.orders(
            "The trajectory error of Adam's flow is of first order in the learning rate without correction, of second "
            "with the correction of Cattaneo et al.",
            observed,
            {name: ORDERS[name] for name in CLOSED},
            within=0.25,
        ),
        made.gain(
            "The correction brings the flow nearer to Adam at every learning rate.",
            error[CLOSED[1]],
            error[CLOSED[0]],
            least=2,
        ),
        made.orders(
            "The interpolating flow in the space of parameters and averages has the order of its points.",
            observed,
            {name: ORDERS[name] for name in points},
            within=0.25,
        ),
        made.gain(
            "With 2 points the interpolating flow is far nearer to Adam than the correction.",
            error["2 points"],
            error[CLOSED[1]],
            least=10,
        ),
    ]


def pictures(tables: Tables) -> dict[str, Figure]:
    """Largest error along the path against the learning rate."""
    table = tables["errors"]
    orders = runs.observed_orders(table, "largest distance")
    return {
        "adam": draw.errors(
            table,
            "learning rate",
            "largest distance",
            ode="ODE error",
            label=draw.named(orders, "order"),
            ylabel="largest distance to Adam",
        )
    }
