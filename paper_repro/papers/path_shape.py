"""The shape of the path: length, curvature, torsion and dimension of gradient descent's way.

A tanh network 64-32-10 (counter terms need derivatives, which ReLU has not at its kinks) on 500 digits, cross entropy, learning rate 0.1,
300 steps; SGD with batches of 5 for 3,000 steps. Curvature and torsion per parameter distance, median over the path. Dimension of the
points of a path by maximum likelihood and TwoNN.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

import eomdl
from eomdl import geometry
from eomdl.plotting import plot
from paper_repro import claims as made, networks, runs
from paper_repro.harness import Images, Tables


SOURCE = (
    "'Shape, Symmetries, and Structure' (The Gradient); Antognini & Sohl-Dickstein 2018 for the random walk."
)
SECONDS = 60
RATE = 0.1  # eta lambda_max stays under 0.7
TOLERANCE = 1e-12  # of the flows, in float64: torsion is a third difference
RANDOM_WALK = (6 / np.pi**2, 2.5)  # share of the first component, effective dimension
BENDS = ("curvature", "torsion")


class Size(NamedTuple):
    """Images, seeds, steps, models, SGD's steps, points for the dimension, points a side of the plane."""

    images: int = 500
    seeds: int = 3
    steps: int = 300
    orders: int = 3
    sgd_steps: int = 3000
    points: int = 150
    plane: int = 40
    partitions: int = 2


SMOKE = Size(150, 1, 20, 2, 200, 125, 5, 1)


def measure(size: Size, images: Images) -> Tables:
    """GD, its flows and SGD from every seed; for the first one their course on the loss."""
    data = images(size.images)
    found = [_paths(data, size, seed) for seed in tqdm(range(size.seeds), desc="seeds")]
    return {
        "paths": pd.concat(tables["paths"] for tables in found),
        "shape": found[0]["shape"],
        "plane": found[0]["plane"],
    }


def _paths(data: Any, size: Size, seed: int) -> Tables:
    """Length, shape and dimension of GD's path, its flows' and SGD's, and their course on the loss."""
    loss, steps = networks.mlp_loss, size.steps
    params = networks.mlp_init(jax.random.key(seed), (data[0].shape[1], 32, 10))
    tolerance = TOLERANCE if jnp.result_type(float) == jnp.float64 else None
    options: dict[str, Any] = {"args": data, "rtol": tolerance, "atol": tolerance, "estimate_error": False}
    paths = {"GD": eomdl.descend(loss, params, optax.sgd(RATE), steps, args=data)}
    paths |= runs.solve_all(runs.counter_terms(loss, RATE, range(size.orders)), params, steps, **options)
    index = np.random.default_rng(seed).integers(0, len(data[0]), (size.sgd_steps, 5))
    batches = (data[0][index], data[1][index])
    paths["SGD"] = eomdl.descend(loss, params, optax.sgd(RATE), size.sgd_steps, batches=batches)
    axes = geometry.principal_components(paths["GD"])
    shapes = {name: geometry.path_shape(path) for name, path in paths.items() if name != "SGD"}
    rows = []
    for name, path in paths.items():
        shape = shapes[name] if name in shapes else geometry.path_shape(path)
        row = {"seed": seed, "run": name, "length": shape.length[-1], "straightness": shape.straightness[-1]}
        row["first component"] = axes.explained[0] if name == "GD" else np.nan
        row["effective dimension"] = geometry.participation_ratio(path.params)
        for what in BENDS if name in shapes else ():
            ratio = getattr(shapes[name], what) / getattr(shapes["GD"], what)
            row[f"|log {what} ratio to GD|"] = float(np.nanmedian(np.abs(np.log(ratio))))
        points = geometry.path_points(path, size.points)
        for label, estimator in runs.dimension_estimators().items():
            found = geometry.intrinsic_dimension(points, estimator, partitions=size.partitions)
            row |= {label: found.dimension, f"{label} error": found.standard_error}
        rows.append(row)
    scores = {
        name: dict(zip(("first", "second"), axes.project(paths[name]).T, strict=True)) for name in shapes
    }
    course = pd.concat(
        shapes[n].to_frame().rename(columns={"step": "steps"}).assign(run=n, **scores[n]) for n in shapes
    )
    return {
        "paths": pd.DataFrame(rows),
        "shape": course,
        "plane": _plane(loss, axes, course, data, size.plane),
    }


def _plane(loss: Any, axes: Any, course: pd.DataFrame, data: Any, points: int) -> pd.DataFrame:
    low, high = course[["first", "second"]].min(), course[["first", "second"]].max()
    margin = 0.2 * (high - low)
    across, up = np.linspace(low - margin, high + margin, points).T
    plane = geometry.loss_plane(loss, axes.mean, axes.direction(0), axes.direction(1), across, up, data)
    x, y = np.meshgrid(plane.x, plane.y)
    return pd.DataFrame({"first": x.ravel(), "second": y.ravel(), "loss": plane.loss.ravel()})


def claims(tables: Tables) -> list[made.Claim]:
    """Curvature and torsion, straightness, roughness."""
    paths = tables["paths"].set_index("run")
    smooth = paths.drop("SGD")
    least, most = smooth["first component"].min(), smooth["effective dimension"].max()
    gd, sgd = (paths.loc[[name], "MLE"] for name in ("GD", "SGD"))
    found = []
    for what, better, base, much in (
        ("curvature", "EoM 1", "gradient flow", 5),
        ("torsion", "EoM 1", "gradient flow", 2),
    ):
        text = f"Along GD's path one counter term brings {what} much nearer to GD's than gradient flow does."
        errors = (paths.loc[[name], f"|log {what} ratio to GD|"] for name in (better, base))
        found.append(made.gain(text, *errors, least=much, what="times smaller median |log ratio|"))
    if "EoM 2" in paths.index:
        errors = (paths.loc[[name], "|log curvature ratio to GD|"] for name in ("EoM 2", "EoM 1"))
        found.append(made.gain("A second counter term brings curvature nearer still.", *errors, least=2))
    return [
        *found,
        made.Claim(
            "GD's path and its flows' are nearer to a straight line than a random walk: GD's first component "
            "explains more than its 61 %, and the effective dimension of all is below its 2.5.",
            f"First component at least {least:.3f}, effective dimension at most {most:.2f}, distance over length "
            f"at least {smooth['straightness'].min():.2f}.",
            bool(least > RANDOM_WALK[0] and most < RANDOM_WALK[1]),
        ),
        made.Claim(
            "The path of GD has dimension 1; that of SGD with batches of 5 is rougher, between a smooth curve's 1 "
            "and a random walk's 2.",
            f"By maximum likelihood {made.listed(gd)} and {made.listed(sgd)}.",
            bool((abs(gd - 1) < 0.1).all() and sgd.min() > 1.2 and sgd.max() < 2.1),
            full_only=True,
        ),
    ]


def pictures(tables: Tables) -> dict[str, Figure]:
    """Shape of the paths, and the paths on the loss."""
    course = dict(list(tables["shape"].groupby("run", sort=False)))
    fields = [field.name for field in dataclasses.fields(geometry.PathShape) if field.name != "notes"]
    shapes = {name: geometry.PathShape(*rows[fields].to_numpy().T) for name, rows in course.items()}
    grid = tables["plane"].pivot(index="second", columns="first", values="loss")
    plane = geometry.LossPlane(grid.columns.to_numpy(), grid.index.to_numpy(), grid.to_numpy())
    scores = {name: rows[["first", "second"]].to_numpy() for name, rows in course.items()}
    return {"shape": plot(shapes), "plane": plane.plot(paths=scores)}
