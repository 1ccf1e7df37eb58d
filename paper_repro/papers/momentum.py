"""Heavy ball follows a modified loss with the memory factor (1 + beta)/(1 - beta).

1/2 (y - a b x)^2 with x = 1, y = 0.6 from (2.8, 3.4), beta = 0, 0.5, 0.8, 0.9, learning rate 0.004 (1 - beta) so that a step takes the
same time, until time 1.2. Models start at time 0.12 of the real run, when the memory is full; orders there from steps of 0.002 down to
0.00025 (beta up to 0.8).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

import eomdl
from paper_repro import claims as made, networks, pictures as draw, runs
from paper_repro.harness import Images, Tables


SOURCE = "Ghosh et al. 2023 (arXiv 2302.00849), the two-parameter model."
SECONDS = 25
START = {"a": 2.8, "b": 3.4}
POINT = (1.0, 0.6)  # x, y
LOSS = networks.two_parameter_loss
MOMENTA = (0.0, 0.5, 0.8, 0.9)
STEP = 0.004  # lr/(1 - beta), the time a step takes: the same for every beta
TIME, WARMUP = 1.2, 0.12  # after the warmup the memory is full
RATES = (0.002, 0.001, 0.0005, 0.00025)
ORDERS = {"gradient flow": 2, "with memory factor": 3}  # expected, of the local error


class Size(NamedTuple):
    """Momenta for which orders are measured."""

    momenta: tuple[float, ...] = MOMENTA[:3]


SMOKE = Size(momenta=MOMENTA[1:2])


def optimizer(step: float, beta: float) -> optax.GradientTransformation:
    """Heavy ball whose steps take the time `step`."""
    return optax.sgd(step * (1 - beta), momentum=beta)


def modified(step: float, beta: float) -> eomdl.AbstractFlow:
    """Gradient flow on L + h/4 (1 + beta)/(1 - beta) |grad L|^2, h = lr/(1 - beta)."""
    return eomdl.flows.MomentumFlow(LOSS, step * (1 - beta), beta)


def measure(size: Size, images: Images) -> Tables:
    """Paths of heavy ball at one effective learning rate; orders of the local error after the transient."""
    params = {name: jnp.asarray(value) for name, value in START.items()}
    steps, sharpness = round(TIME / STEP), eomdl.sharpness(LOSS, 2)
    rows, paths, orders = [], [], []
    for beta in tqdm(MOMENTA, desc="momentum"):
        heavy_ball = optimizer(STEP, beta)
        warm = eomdl.descend(LOSS, params, heavy_ball, round(WARMUP / STEP), args=POINT, step_size=STEP)
        real = eomdl.descend(LOSS, params, heavy_ball, steps, args=POINT, resume=warm)
        flows = {
            "gradient flow": eomdl.GradientFlow(LOSS, STEP),
            "with memory factor": modified(STEP, beta),
            "4 points": eomdl.InterpolatingFlow(eomdl.optimizer_step(LOSS, heavy_ball), STEP, 4),
        }
        models = runs.solve_all(flows, params, steps, args=POINT, resume=warm, rtol=1e-10, atol=1e-10)
        end = real.at(steps)
        key = {"momentum": beta, "sharpness at the end": float(sharpness(end, POINT))}
        key["loss at the end"] = float(LOSS(end, POINT))
        rows.append(runs.summary(eomdl.compare(real, models)).assign(**key))
        paths.append(runs.coordinates({"heavy ball": real} | models).assign(momentum=beta))
    for beta in tqdm(size.momenta, desc="orders"):
        families: dict[str, Any] = {
            "gradient flow": lambda eta: eomdl.GradientFlow(LOSS, eta),
            "with memory factor": lambda eta, beta=beta: modified(eta, beta),
        }
        for name, family in families.items():
            options: dict[str, Any] = {
                "optimizer": lambda eta, beta=beta: optimizer(eta, beta),
                "warmup": WARMUP,
            }
            study = eomdl.errors.convergence_study(family, LOSS, params, RATES, args=POINT, **options)
            orders.append((beta, name, study.order))
    return {
        "distances": pd.concat(rows),
        "orders": pd.DataFrame(orders, columns=["momentum", "model", "observed order"]),
        "paths": pd.concat(paths),
    }


def claims(tables: Tables) -> list[made.Claim]:
    """The order after the transient, the gains, the flatter minimum."""
    orders, table = tables["orders"], tables["distances"]
    distance = {
        name: some["largest distance"].to_numpy() for name, some in table.groupby("model", sort=False)
    }
    gradient_flow, memory, points = distance.values()
    observed = runs.by(orders, ["model", "momentum"], "observed order")
    ends = table.drop_duplicates("momentum")
    return [
        made.orders(
            "After the transient heavy ball follows L + h/4 (1 + beta)/(1 - beta) |grad L|^2, h = lr/(1 - beta): "
            "the local error is of order 3, that of gradient flow of order 2.",
            observed,
            {key: ORDERS[key[0]] for key in observed},
            within=0.2,
        ),
        made.gain(
            "At one h the memory factor brings the flow nearer to heavy ball at every beta.",
            memory,
            gradient_flow,
        ),
        made.gain("4 points of the step map come much nearer still.", points, memory, least=10),
        made.falling(
            "More momentum regularizes more: at one h it ends at a flatter minimum.",
            runs.by(ends, "momentum", "sharpness at the end"),
            "Sharpness at the end, by beta",
        ),
    ]


def pictures(tables: Tables) -> dict[str, Figure]:
    """Paths of heavy ball in the plane, the models of the largest momentum, and distances with their ODE error."""
    paths, minima = tables["paths"], np.linspace(0.15, 3, 200)
    plane, axes = draw.panel("a", "b", f"heavy ball, lr/(1 - beta) = {STEP}", ylim=(1.2, 3.6))
    axes.plot(minima, POINT[1] / minima, "0.6", lw=1, label="minima, a b = y")
    for color, (beta, path) in enumerate(paths[paths["run"] == "heavy ball"].groupby("momentum")):
        axes.plot(path["a"], path["b"], f"C{color}", label=f"beta = {beta}")
    last = paths[paths["momentum"] == max(MOMENTA)]
    zoom, axes = draw.panel("a", "b", f"beta = {max(MOMENTA)}, models start after the transient")
    draw.plane(axes, last, real="heavy ball")
    distances = draw.errors(
        tables["distances"],
        "momentum",
        "largest distance",
        ode="ODE error",
        xscale="linear",
        xlabel="momentum beta",
        ylabel="largest distance to heavy ball",
    )
    return {"plane": draw.add_legend(plane), "models": draw.add_legend(zoom), "distances": distances}
