"""Gradient descent follows the modified loss L + eta/4 |grad L|^2.

Two parameters: 1/2 (y - a b x)^2 with x = 1, y = 0.6 from (2.8, 3.5), until time 1. MLP: a tanh network with 16 hidden units, cross
entropy, 256 images, until time 10. Gradient flow on the loss and on the modified loss against full-batch gradient descent at four learning
rates; largest distance along the path.
"""

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


SOURCE = "Barrett & Dherin 2021 (arXiv 2009.11162): the two-parameter model and an MLP."
SECONDS = 20
START = {"a": 2.8, "b": 3.5}
POINT = (1.0, 0.6)  # x, y
LOSSES = ("original loss", "modified loss")


class Size(NamedTuple):
    """Images; learning rates and time of the two-parameter model and of the MLP."""

    images: int = 256
    rates: tuple[float, ...] = (0.02, 0.01, 0.005, 0.0025)
    time: float = 1.0
    mlp_rates: tuple[float, ...] = (0.1, 0.05, 0.025, 0.0125)
    mlp_time: float = 10.0


SMOKE = Size(images=64, rates=(0.01, 0.005), mlp_rates=(0.05, 0.025), mlp_time=1.0)


def measure(size: Size, images: Images) -> Tables:
    """Distances of gradient flow on the original and on the modified loss to real GD."""
    inputs = images(size.images)
    mlp = networks.mlp_init(jax.random.key(0), (inputs[0].shape[1], 16, 10))
    two = {name: jnp.asarray(value) for name, value in START.items()}
    problems: dict[str, tuple[Any, ...]] = {
        "two parameters": (networks.two_parameter_loss, two, POINT, size.rates, size.time, 2),
        "MLP": (networks.mlp_loss, mlp, inputs, size.mlp_rates, size.mlp_time, None),
    }
    rows, path = [], pd.DataFrame()
    for problem, (loss, params, args, rates, time, iterations) in problems.items():
        sharpness = jax.jit(eomdl.sharpness(loss, iterations) if iterations else eomdl.sharpness(loss))
        gradient = jax.jit(jax.grad(loss))
        for eta in tqdm(rates, desc=problem):
            steps = round(time / eta)
            real = eomdl.descend(loss, params, optax.sgd(eta), steps, args=args)
            penalized = eomdl.losses.GradientPenalty(loss, eta / 4)
            flows = {
                name: eomdl.GradientFlow(f, eta) for name, f in zip(LOSSES, (loss, penalized), strict=True)
            }
            models = runs.solve_all(flows, params, steps, args=args, rtol=1e-9, atol=1e-9)
            end = real.at(steps)
            key = {
                "problem": problem,
                "learning rate": eta,
                "eta lambda_max": eta * float(sharpness(params, args)),
            }
            key |= {"sharpness at the end": float(sharpness(end, args))}
            key |= {"squared gradient at the end": float(optax.tree.norm(gradient(end, args)) ** 2)}
            rows.append(runs.summary(eomdl.compare(real, models)).assign(**key))
            if path.empty:
                path = runs.coordinates({"gradient descent": real} | models)
    return {"distances": pd.concat(rows), "path": path}


def claims(tables: Tables) -> list[made.Claim]:
    """The orders in the learning rate, the gain, and the flatter minimum."""
    table, made_ = tables["distances"], []
    for problem, some in table.groupby("problem", sort=False):
        text = f"{problem}: GD follows the modified loss, L + eta/4 |grad L|^2, "
        fine = some[some["eta lambda_max"] < 0.35]
        distance = {name: some.loc[some["model"] == name, "largest distance"] for name in LOSSES}
        made_ += [
            made.orders(
                text + "one order better than L.",
                runs.observed_orders(fine, "largest distance"),
                dict(zip(LOSSES, (1, 2), strict=True)),
                within=0.25,
            ),
            made.gain(
                text + "and stays nearer to it than to L at every learning rate.",
                *(distance[n] for n in LOSSES[::-1]),
            ),
        ]
    two = table[(table["problem"] == "two parameters") & (table["model"] == LOSSES[0])][
        ::-1
    ]  # learning rates rise
    ends = runs.by(two, "learning rate", "sharpness at the end")
    text = "Two parameters: among the minima, all with a b = y, a larger learning rate ends at a flatter one."
    return [*made_, made.falling(text, ends, "Sharpness at the end, by learning rate")]


def pictures(tables: Tables) -> dict[str, Figure]:
    """The path in the plane of the two parameters; distances against the learning rate."""
    figure, axes = draw.panel("a", "b", "two parameters", xlim=(0.2, 2.9), ylim=(1.7, 3.6))
    draw.plane(axes, tables["path"], POINT[1], np.linspace(0.2, 3, 200), real="gradient descent")
    style: dict[str, Any] = {"ode": "ODE error", "ylabel": "largest distance to gradient descent"}
    return {"plane": draw.add_legend(figure)} | {
        problem.replace(" ", "-"): draw.errors(
            some, "learning rate", "largest distance", title=problem, **style
        )
        for problem, some in tables["distances"].groupby("problem", sort=False)
    }
