"""Discretization error of gradient flow and of the equation of motion (Miyagawa 2022)."""

import jax
import numpy as np
import optax
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

import eomdl
from paper_repro import data, models
from paper_repro.reproduction import Claim, Config, Reproduction


DECAY = 1e-3
LEARNING_RATE = 0.1
# Small enough for the leading term to stand alone, so that its order shows.
TIME = 0.5
LEARNING_RATES = (0.05, 0.025, 0.0125, 0.00625)


def run(config: Config) -> tuple[dict[str, pd.DataFrame], list[Claim]]:
    """Distance to real GD against steps at one learning rate, and against the learning rate."""
    inputs = data.load(config.data, config.subset or 256)
    orders = range(3 if config.smoke else 5)
    steps = 20 if config.smoke else 200
    params = models.mlp_init(jax.random.key(0), (inputs[0].shape[1], 16, 10))
    loss = eomdl.WeightDecay(models.mlp_loss, DECAY)

    real = eomdl.descend(loss, params, optax.sgd(LEARNING_RATE), steps, args=inputs)
    distance = {"step": real.steps}
    slopes, errors, notes = [], [], ()
    for order in tqdm(orders, desc="orders"):

        def flow(eta, order=order):
            return eomdl.EquationOfMotion(loss, eta, order)

        path = eomdl.solve(flow(LEARNING_RATE), params, steps, args=inputs)
        comparison = eomdl.compare(real, {"flow": path})
        notes += comparison.notes
        distance[f"order {order}"] = comparison.distance["flow"]
        distance[f"ODE error {order}"] = comparison.ode_error["flow"]
        for kind, fixed in (("fixed time", TIME), ("one step", None)):
            study = eomdl.errors.convergence_study(
                flow, loss, params, LEARNING_RATES, time=fixed, args=inputs
            )
            share = study.ode_errors / study.errors
            slopes.append((kind, order, order + (1 if fixed else 2), study.order, share.max()))
            errors += [
                (kind, order, *row)
                for row in zip(
                    study.learning_rates, study.num_steps, study.errors, study.ode_errors, strict=True
                )
            ]
    steps_table = pd.DataFrame(distance)
    slope_table = pd.DataFrame(
        slopes,
        columns=["error after", "counter terms", "expected slope", "observed slope", "ODE error / error"],
    )
    rate_table = pd.DataFrame(
        errors, columns=["error after", "counter terms", "learning rate", "steps", "error", "ODE error"]
    )
    return (
        {"slopes": slope_table, "against-steps": steps_table, "against-learning-rate": rate_table},
        _claims(slope_table, steps_table, list(orders), notes),
    )


def _claims(slopes: pd.DataFrame, steps: pd.DataFrame, orders, notes) -> list[Claim]:
    off = (slopes["observed slope"] - slopes["expected slope"]).abs()
    shares = [(steps[f"ODE error {n}"].max() / steps[f"order {n}"].max()) for n in orders]
    largest = [steps[f"order {n}"].max() for n in orders]
    return [
        Claim(
            "With n counter terms the error is of order n + 1 in the learning rate at fixed time, n + 2 in one step.",
            f"Observed slopes differ from that by at most {off.max():.3f}.",
            bool(off.max() < 0.1),
        ),
        Claim(
            f"At eta = {LEARNING_RATE} each counter term brings the whole path nearer to real GD.",
            "Largest distances: " + ", ".join(f"{d:.1e}" for d in largest) + ".",
            bool(np.all(np.diff(largest) < 0)) and not notes,
        ),
        Claim(
            "What is measured is the model's error and not the ODE solver's.",
            f"The ODE error (estimate) is at most {max(shares):.1%} of the largest distance.",
            bool(max(shares) < 0.01),
        ),
    ]


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, Figure]:
    """Distance against steps with the ODE error under it; error against learning rate."""
    steps, rates, slopes = tables["against-steps"], tables["against-learning-rate"], tables["slopes"]
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    first, *others = figure.subplots(1, 3)
    orders = sorted(rates["counter terms"].unique())
    for n in orders:
        first.plot(steps["step"][1:], steps[f"order {n}"][1:], f"C{n}", label=f"{n} counter terms")
        first.plot(steps["step"][1:], steps[f"ODE error {n}"][1:], f"C{n}:")
    first.plot([], [], "k:", label="ODE error (estimate)")
    first.set(
        xlabel="step",
        ylabel="distance to gradient descent",
        yscale="log",
        title=f"learning rate {LEARNING_RATE}",
    )
    for axes, kind in zip(others, ("fixed time", "one step"), strict=True):
        for n in orders:
            some = rates[(rates["error after"] == kind) & (rates["counter terms"] == n)]
            row = slopes[(slopes["error after"] == kind) & (slopes["counter terms"] == n)].iloc[0]
            label = f"{n}: slope {row['observed slope']:.2f} (expected {row['expected slope']})"
            axes.loglog(some["learning rate"], some["error"], f"C{n}o-", label=label)
            axes.loglog(some["learning rate"], some["ODE error"], f"C{n}:")
        axes.set(xlabel="learning rate", ylabel="distance to gradient descent", title=f"error after {kind}")
    for axes in (first, *others):
        axes.grid(alpha=0.3)
    first.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)
    for axes in others:
        axes.legend(fontsize=8)
    return {"discretization": figure}


REPRODUCTION = Reproduction(
    name="nec-discretization",
    title="Discretization error against steps and against the learning rate, orders 0 to 4",
    source="Miyagawa 2022 (NeurIPS), discretization error of gradient flow and of the equation of motion.",
    setting=(
        "A tanh network with 16 hidden units, cross entropy + L2 weight decay 1e-3, full-batch gradient descent on 256 "
        "images. Against steps: learning rate 0.1, 200 steps. Against the learning rate: 0.05 down to 0.00625, at time "
        "0.5 and after one step; slopes by least squares of log error on log learning rate."
    ),
    seconds=60,
    run=run,
    plot=plot,
)
