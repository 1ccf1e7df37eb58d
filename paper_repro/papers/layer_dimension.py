"""Training squeezes the images: the dimension of what each layer hands on.

A ReLU network 64-32-32-32-10 on 500 digits, cross entropy, learning rate 0.2, 1,000 steps. Dimension of all images' activations, layer by
layer, and of their gradients, by TwoNN and maximum likelihood; errors from disjoint blocks. The estimators look at different scales and
differ: only changes are claimed.
"""

import dataclasses
import itertools
from typing import NamedTuple

import jax
import numpy as np
import optax
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

import eomdl
from eomdl import geometry
from eomdl.plotting import plot
from paper_repro import claims as made, networks, pictures as draw, runs
from paper_repro.harness import Images, Tables


SOURCE = "'Shape, Symmetries, and Structure' (The Gradient); estimators of Facco et al. 2017 and Levina & Bickel 2004."
SECONDS = 40
RATE = 0.2
LAYERS = ("input", "hidden 1", "hidden 2", "hidden 3")


class Size(NamedTuple):
    """Images, seeds, checkpoints, blocks for the standard error."""

    images: int = 500
    seeds: int = 3
    checkpoints: tuple[int, ...] = (0, 10, 100, 1000)
    partitions: int = 2


SMOKE = Size(150, 1, (0, 20), 1)


def measure(size: Size, images: Images) -> Tables:
    """Dimension of every cloud of points, by every estimator, at every checkpoint of every seed."""
    data, loss = images(size.images), networks.relu_loss
    rows = []
    for seed in tqdm(range(size.seeds), desc="seeds"):
        start = networks.mlp_init(jax.random.key(seed), (data[0].shape[1], 32, 32, 32, 10))
        last = size.checkpoints[-1]
        run = eomdl.descend(loss, start, optax.sgd(RATE), last, args=data, save_steps=list(size.checkpoints))
        for step, params in ((step, run.at(step)) for step in size.checkpoints):
            clouds = dict(zip(LAYERS, networks.relu_activations(params, data[0]), strict=True))
            clouds["gradients"] = geometry.gradient_points(loss, params, data)
            pairs = itertools.product(clouds.items(), runs.dimension_estimators().items())
            for (cloud, points), (name, estimator) in pairs:
                found = geometry.intrinsic_dimension(points, estimator, partitions=size.partitions)
                key = {"seed": seed, "step": step, "cloud": cloud}
                values = {"estimator": name, "notes": "; ".join(found.notes)}
                rows.append(key | dataclasses.asdict(found) | values)
    return {"dimensions": pd.DataFrame(rows)}


def claims(tables: Tables) -> list[made.Claim]:
    """Dimension before and after, and from layer to layer."""
    table = tables["dimensions"]
    first, last = table["step"].min(), table["step"].max()
    deepest = table[table["cloud"] == LAYERS[-1]].set_index(["seed", "estimator"])
    early, late = (deepest[deepest["step"] == step] for step in (first, last))
    fall = early["dimension"] - late["dimension"]
    error = np.hypot(early["standard_error"], late["standard_error"])
    means = table[table["step"] == last].groupby(["estimator", "cloud"])["dimension"].mean()
    layers = means.unstack()[[*LAYERS]]
    return [
        made.Claim(
            "Both estimators see the images in the last hidden layer lie in fewer dimensions after training than "
            "before, by more than two standard errors.",
            f"{early['dimension'].min():.1f} to {early['dimension'].max():.1f} before, "
            f"{late['dimension'].min():.1f} to {late['dimension'].max():.1f} after; smallest fall "
            f"{(fall / error).min():.1f} standard errors.",
            bool((fall > 2 * error).all()),
            full_only=True,
        ),
        made.Claim(
            "After training the dimension falls from every layer to the next, by both estimators (means over seeds).",
            "Input first: "
            + "; ".join(f"{name} {made.listed(row)}" for name, row in layers.iterrows())
            + ".",
            bool((np.diff(layers, axis=1) < 0).all()),
            full_only=True,
        ),
    ]


def pictures(tables: Tables) -> dict[str, Figure]:
    """Dimension by layer and over training, by each estimator (first seed); of the gradients (all seeds)."""
    table, figures = tables["dimensions"], {}
    for estimator, rows in table[table["seed"] == 0].groupby("estimator", sort=False):
        layers: dict[str, dict[int, geometry.IntrinsicDimension]] = {name: {} for name in LAYERS}
        for row in rows[rows["cloud"] != "gradients"].to_dict("records"):
            values = {
                field.name: row[field.name] for field in dataclasses.fields(geometry.IntrinsicDimension)
            }
            layers[row["cloud"]][row["step"]] = geometry.IntrinsicDimension(**values | {"notes": ()})
        figures[f"layers-{estimator}"] = plot(layers)
    gradients = table[table["cloud"] == "gradients"]
    label = "dimension of the images' gradients"
    return figures | {
        "gradients": draw.bars(gradients, "step", "dimension", "standard_error", label, by="estimator")
    }
