"""Implicit gradient regularization (Barrett & Dherin 2021)."""

import jax
import numpy as np
import optax
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

import eomdl
from paper_repro import data, models
from paper_repro.reproduction import Claim, Config, Reproduction


START = {"a": 2.8, "b": 3.5}
POINT = (1.0, 0.6)  # x, y
RATES = (0.02, 0.01, 0.005, 0.0025)
TIME = 1.0
MLP_RATES = (0.1, 0.05, 0.025, 0.0125)
MLP_TIME = 10.0
MODELS = {
    "original loss": eomdl.GradientFlow,
    "modified loss": lambda loss, eta: eomdl.GradientFlow(eomdl.losses.GradientPenalty(loss, eta / 4), eta),
}


def run(config: Config) -> tuple[dict[str, pd.DataFrame], list[Claim]]:
    """Distances of gradient flow on the original and on the modified loss to real GD."""
    rates = RATES[1:3] if config.smoke else RATES
    params = {name: jax.numpy.asarray(value) for name, value in START.items()}
    sharpness = eomdl.sharpness(models.two_parameter_loss, 2)
    rows, path = [], {}
    for eta in tqdm(rates, desc="two parameters"):
        runs = _runs(models.two_parameter_loss, params, POINT, eta, TIME)
        rows.append(
            {
                "problem": "two parameters",
                "learning rate": eta,
                "eta lambda_max": eta * float(sharpness(params, POINT)),
                "sharpness at the end": float(
                    sharpness(runs["gradient descent"].at(round(TIME / eta)), POINT)
                ),
                **_distances(runs),
            }
        )
        if eta == rates[0]:
            for name, trajectory in runs.items():
                path |= {f"{name} {key}": np.asarray(trajectory.params[key]) for key in ("a", "b")}

    inputs = data.load(config.data, config.subset or (64 if config.smoke else 256))
    net = models.mlp_init(jax.random.key(0), (inputs[0].shape[1], 16, 10))
    loss = models.mlp_loss
    sharpness, gradient = jax.jit(eomdl.sharpness(loss)), jax.jit(jax.grad(loss))
    for eta in tqdm(MLP_RATES[1:3] if config.smoke else MLP_RATES, desc="MLP"):
        time = 1.0 if config.smoke else MLP_TIME
        runs = _runs(loss, net, inputs, eta, time)
        last = runs["gradient descent"].at(round(time / eta))
        rows.append(
            {
                "problem": "MLP",
                "learning rate": eta,
                "eta lambda_max": eta * float(sharpness(net, inputs)),
                "sharpness at the end": float(sharpness(last, inputs)),
                "squared gradient at the end": float(optax.tree.norm(gradient(last, inputs)) ** 2),
                **_distances(runs),
            }
        )
    table = pd.DataFrame(rows)
    return {"distances": table, "path": pd.DataFrame(path)}, _claims(table)


def _runs(loss, params, args, eta, time):
    steps = round(time / eta)
    runs = {"gradient descent": eomdl.descend(loss, params, optax.sgd(eta), steps, args=args)}
    return runs | {
        name: eomdl.solve(make(loss, eta), params, steps, args=args, rtol=1e-9, atol=1e-9)
        for name, make in MODELS.items()
    }


def _distances(runs) -> dict[str, float]:
    real, *_ = runs.values()
    comparison = eomdl.compare(real, {name: runs[name] for name in MODELS})
    return {f"distance, {name}": float(d.max()) for name, d in comparison.distance.items()} | {
        "ODE error": max(float(e.max()) for e in comparison.ode_error.values())
    }


def _claims(table: pd.DataFrame) -> list[Claim]:
    claims = []
    for problem, some in table.groupby("problem", sort=False):
        fine = some[some["eta lambda_max"] < 0.35]
        orders = [
            eomdl.errors.observed_order(fine["learning rate"], fine[f"distance, {name}"]) for name in MODELS
        ]
        gain = some["distance, original loss"] / some["distance, modified loss"]
        claims.append(
            Claim(
                f"{problem}: GD follows the modified loss, L + eta/4 |grad L|^2, one order better than L.",
                f"Distances fall with the learning rate at order {orders[0]:.2f} and {orders[1]:.2f}; the modified "
                f"loss is {gain.min():.1f} to {gain.max():.0f} times nearer.",
                bool(abs(orders[0] - 1) < 0.2 and abs(orders[1] - 2) < 0.25 and gain.min() > 1),
            )
        )
    two = table[table["problem"] == "two parameters"]
    ends = two["sharpness at the end"].to_numpy()  # learning rates fall
    claims.append(
        Claim(
            "Two parameters: among the minima, all with a b = y, a larger learning rate ends at a flatter one.",
            f"Sharpness at time {TIME} for learning rates {', '.join(f'{r:g}' for r in two['learning rate'])}: "
            + ", ".join(f"{s:.3f}" for s in ends)
            + ".",
            bool(np.all(np.diff(ends) > 0)),
        )
    )
    return claims


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, Figure]:
    """The path in the plane of the two parameters; distances against the learning rate."""
    path, table = tables["path"], tables["distances"]
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    plane, *others = figure.subplots(1, 3)
    a = np.linspace(0.2, 3, 200)
    plane.plot(a, POINT[1] / a, "0.6", lw=1, label="minima, a b = y")
    for name, style in (("original loss", "C0"), ("modified loss", "C1"), ("gradient descent", "k.")):
        plane.plot(path[f"{name} a"], path[f"{name} b"], style, ms=4, label=name)
    plane.set(xlabel="a", ylabel="b", xlim=(0.2, 2.9), ylim=(1.7, 3.6), title="two parameters")
    for axes, (problem, some) in zip(others, table.groupby("problem", sort=False), strict=True):
        for color, name in enumerate(MODELS):
            axes.loglog(some["learning rate"], some[f"distance, {name}"], f"C{color}o-", label=name)
        axes.loglog(some["learning rate"], some["ODE error"], "k:", label="ODE error (estimate)")
        axes.set(xlabel="learning rate", ylabel="largest distance to gradient descent", title=problem)
    for axes in (plane, *others):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return {"implicit-regularization": figure}


REPRODUCTION = Reproduction(
    name="implicit-regularization",
    title="Gradient descent follows the modified loss L + eta/4 |grad L|^2",
    source="Barrett & Dherin 2021 (arXiv 2009.11162): the two-parameter model and an MLP.",
    setting=(
        "Two parameters: 1/2 (y - a b x)^2 with x = 1, y = 0.6 from (2.8, 3.5), until time 1. MLP: a tanh network with "
        "16 hidden units, cross entropy, 256 images, until time 10. Gradient flow on the loss and on the modified "
        "loss against full-batch gradient descent at four learning rates; largest distance along the path."
    ),
    seconds=20,
    run=run,
    plot=plot,
)
