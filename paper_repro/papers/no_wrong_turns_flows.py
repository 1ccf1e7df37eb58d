"""The equation of motion predicts how gradient descent's gradients point towards its end.

A tanh network 64-32-10 (cross entropy, 512 images scaled to a root mean square norm of 4), gradient descent with learning rate 0.2, 200
steps, and its flows, each towards its own end. gamma = RSI / EB is the cosine of the gradient with the way to the end; RSI / EB^2 is the
locally best learning rate. Every run is made twice, first for its end, then to measure.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

import eomdl
from paper_repro import claims as made, networks, pictures as draw, runs
from paper_repro.harness import Images, Tables


SOURCE = (
    "Guille-Escuret et al. 2024, No Wrong Turns (arXiv 2306.11922), with the equation of motion beside it."
)
SECONDS = 25
RATE = 0.2


class Size(NamedTuple):
    """Images loaded (512 of them are used), steps, counter terms (0 to `orders` - 1)."""

    images: int = 1024
    steps: int = 200
    orders: int = 3


SMOKE = Size(steps=40, orders=2)


def measure(size: Size, images: Images) -> Tables:
    """gamma, RSI and EB along gradient descent and along its flows."""
    loss, steps, whole = networks.mlp_loss, size.steps, networks.scaled(images(size.images))
    data = jax.tree.map(lambda x: x[:512], whole)
    params = networks.mlp_init(jax.random.key(0), (data[0].shape[1], 32, 10))
    common: dict[str, Any] = {"args": data, "save_steps": max(steps // 100, 1)}

    def real(**options: Any) -> eomdl.Trajectory:
        return eomdl.descend(loss, params, optax.sgd(RATE), steps, **common, **options)

    gd = eomdl.geometry.secants(real, {"full": loss})["full"]
    rows, curves = [], [gd.to_frame().assign(model="GD")]
    for name, flow in tqdm(runs.counter_terms(loss, RATE, range(size.orders)).items(), desc="flows"):

        def model(flow: eomdl.AbstractFlow = flow, **options: Any) -> eomdl.Trajectory:
            return eomdl.solve(flow, params, steps, estimate_error=False, **common, **options)

        study = eomdl.geometry.secants(model, {"full": loss})["full"]
        difference = np.abs(study.gamma - gd.gamma)
        curves.append(study.to_frame().assign(model=name, difference=difference))
        parted, apart = study.parts_from(gd, 1e-3), np.flatnonzero(difference > 1e-3)
        row = {"model": name, "largest difference of gamma": np.nanmax(difference)}
        row["largest relative difference of RSI"] = np.nanmax(np.abs(study.rsi / gd.rsi - 1))
        row["parts from GD by 1e-3 at step"] = "never" if parted is None else str(parted)
        row["together within 1e-3 from step"] = int(study.steps[apart[-1] + 1]) if len(apart) else 0
        rows.append(row)
    return {"flows": pd.DataFrame(rows), "curves": pd.concat(curves)}


def claims(tables: Tables) -> list[made.Claim]:
    """Each counter term brings gamma nearer."""
    text = "Each counter term brings gamma, the geometry of gradient descent's path, nearer."
    differences = runs.by(tables["flows"], "model", "largest difference of gamma")
    return [made.falling(text, differences, "Largest differences of gamma")]


def pictures(tables: Tables) -> dict[str, Figure]:
    """gamma, its difference to gradient descent's, and the locally best learning rate."""
    curves, figures = tables["curves"], {}
    for column, label, scale in (
        ("gamma", "gamma = RSI / EB (cosine)", "linear"),
        ("difference", "|gamma - gamma of GD|", "log"),
        ("learning_rate", "locally best learning rate RSI / EB^2 [time]", "log"),
    ):
        some = curves[curves[column].notna()]
        style: dict[str, Any] = {"xscale": "linear", "yscale": scale, "marker": ""}
        figures[column] = draw.errors(some, "steps", column, xlabel="step", ylabel=label, **style)
    return figures
