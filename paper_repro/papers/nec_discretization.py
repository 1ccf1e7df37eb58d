"""Discretization error against steps and against the learning rate, orders 0 to 4.

A tanh network with 16 hidden units, cross entropy + L2 weight decay 1e-3, full-batch gradient descent on 256 images. Against steps:
learning rate 0.1, 200 steps. Against the learning rate: 0.05 down to 0.00625, at time 0.5 and after one step; slopes by least squares of
log error on log learning rate.
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


SOURCE = "Miyagawa 2022 (NeurIPS), discretization error of gradient flow and of the equation of motion."
SECONDS = 75
MAIN = True
DECAY, LEARNING_RATE = 1e-3, 0.1
# Small enough for the leading term to be the only one, so that its order shows.
LEARNING_RATES = (0.05, 0.025, 0.0125, 0.00625)
SPANS = {"fixed time": 0.5, "one step": None}


class Size(NamedTuple):
    """Images, steps and counter terms (0 to `orders` - 1)."""

    images: int = 256
    steps: int = 200
    orders: int = 5


SMOKE = Size(steps=20, orders=3)


def measure(size: Size, images: Images) -> Tables:
    """Distance to real GD against steps at one learning rate, and against the learning rate."""
    inputs = images(size.images)
    params = networks.mlp_init(jax.random.key(0), (inputs[0].shape[1], 16, 10))
    loss = eomdl.WeightDecay(networks.mlp_loss, DECAY)
    real = eomdl.descend(loss, params, optax.sgd(LEARNING_RATE), size.steps, args=inputs)
    flows = runs.counter_terms(loss, LEARNING_RATE, range(size.orders))
    comparison = eomdl.compare(real, runs.solve_all(flows, params, size.steps, args=inputs))
    slopes, errors = [], []
    for order, model in enumerate(tqdm(flows, desc="orders")):
        for span, time in SPANS.items():

            def flow(eta: float, order: int = order) -> eomdl.AbstractFlow:
                return eomdl.EquationOfMotion(loss, eta, order)

            study = eomdl.errors.convergence_study(flow, loss, params, LEARNING_RATES, time=time, args=inputs)
            key = {"error after": span, "model": model}
            share = (study.ode_errors / study.errors).max()
            expected = order + (2 if time is None else 1)
            slope = {"expected slope": expected, "observed slope": study.order, "ODE error / error": share}
            slopes.append(key | slope)
            columns = {
                "learning rate": study.learning_rates,
                "steps": study.num_steps,
                "error": study.errors,
                "ODE error": study.ode_errors,
            }
            errors.append(pd.DataFrame(key | columns))
    return {
        "slopes": pd.DataFrame(slopes),
        "summary": runs.summary(comparison),
        "against-steps": comparison.to_frame(),
        "against-learning-rate": pd.concat(errors),
    }


def claims(tables: Tables) -> list[made.Claim]:
    """Orders, distances, and whose error it is."""
    slopes, some = tables["slopes"], tables["summary"]
    keys = ["error after", "model"]
    return [
        made.orders(
            "With n counter terms the error is of order n + 1 in the learning rate at fixed time, n + 2 in one step.",
            runs.by(slopes, keys, "observed slope"),
            runs.by(slopes, keys, "expected slope"),
            within=0.1,
        ),
        made.falling(
            f"At eta = {LEARNING_RATE} each counter term brings the whole path nearer to real GD.",
            runs.by(some, "model", "largest distance"),
            "Largest distances",
            runs.notes(some),
        ),
        made.share(
            "What is measured is the model's error and not the ODE solver's.",
            some["ODE error"] / some["largest distance"],
            0.01,
        ),
    ]


def pictures(tables: Tables) -> dict[str, Figure]:
    """Distance against steps with the ODE error under it; error against the learning rate."""
    steps, rates, slopes = tables["against-steps"], tables["against-learning-rate"], tables["slopes"]
    figures = {
        "steps": draw.errors(
            steps,
            "step",
            "distance",
            ode="ode_error",
            xscale="linear",
            marker="",
            ylabel="distance to gradient descent",
            title=f"learning rate {LEARNING_RATE}",
        )
    }
    for span in SPANS:
        slope = runs.by(slopes[slopes["error after"] == span], "model", "observed slope")
        some = rates[rates["error after"] == span]
        figures[span.replace(" ", "-")] = draw.errors(
            some,
            "learning rate",
            "error",
            ode="ODE error",
            label=draw.named(slope, "slope"),
            ylabel="distance to gradient descent",
            title=f"error after {span}",
        )
    return figures
