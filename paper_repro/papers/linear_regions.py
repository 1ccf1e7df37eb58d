"""A rough start cuts the input space finer: linear regions of a ReLU network in training.

A ReLU network 64-32-32-32-10 on 500 digits, cross entropy, 1,000 steps of gradient descent with learning rates 0.2 and 0.5, of which the
second overshoots at first. Regions are counted exactly on 40 lines between images; the pictures show a plane through three images.
"""

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
from paper_repro import claims as made, networks, pictures as draw
from paper_repro.harness import Images, Tables


SOURCE = "'Shape, Symmetries, and Structure' (The Gradient); Hanin & Rolnick 2019 for regions on lines."
SECONDS = 40
CALM, ROUGH = 0.2, 0.5


class Size(NamedTuple):
    """Images, seeds, checkpoints, lines, points a side of the pictures."""

    images: int = 500
    seeds: int = 3
    checkpoints: tuple[int, ...] = (0, 10, 100, 1000)
    lines: int = 40
    resolution: int = 150


SMOKE = Size(150, 1, (0, 20), 4, 20)


def measure(size: Size, images: Images) -> Tables:
    """Regions on lines at every checkpoint of every run; the plane early and late in the first one."""
    data, loss, network = images(size.images), networks.relu_loss, networks.relu_preactivations
    inputs, last = data[0], size.checkpoints[-1]
    ends = inputs[np.random.default_rng(0).permutation(len(inputs))[: 2 * size.lines].reshape(2, -1)]
    rows, planes = [], []
    for seed, rate in tqdm(list(itertools.product(range(size.seeds), (CALM, ROUGH))), desc="networks"):
        start = networks.mlp_init(jax.random.key(seed), (inputs.shape[1], 32, 32, 32, 10))
        run = eomdl.descend(loss, start, optax.sgd(rate), last, args=data, save_steps=list(size.checkpoints))
        for step, params in ((step, run.at(step)) for step in size.checkpoints):
            pairs = zip(*ends, strict=True)
            counts = [geometry.count_regions_on_line(network, params, a, b).count for a, b in pairs]
            error = np.std(counts, ddof=1) / np.sqrt(len(counts))
            row = {"seed": seed, "learning rate": rate, "step": step, "loss": float(loss(params, data))}
            rows.append(row | {"regions on a line": np.mean(counts), "error": error})
            if (seed, rate) == (0, CALM) and step in (size.checkpoints[0], last):
                found = geometry.region_map(network, params, inputs[:3], resolution=size.resolution)
                x, y = np.meshgrid(found.x, found.y)
                cells = {"step": step, "x": x.ravel(), "y": y.ravel(), "label": found.labels.ravel()}
                planes.append(pd.DataFrame(cells))
    corners = pd.DataFrame(found.corners, columns=["x", "y"])
    return {"regions": pd.DataFrame(rows), "region map": pd.concat(planes), "region corners": corners}


def claims(tables: Tables) -> list[made.Claim]:
    """More regions after a rough start."""
    table = tables["regions"]
    index = ["learning rate", "seed"]
    lines = table.pivot(index=index, columns="step", values="regions on a line")
    before = lines.iloc[:, 0]
    calm, rough = ((lines.iloc[:, -1] / before).loc[rate] for rate in (CALM, ROUGH))
    return [
        made.Claim(
            "From one start, the larger learning rate, which overshoots first, makes more linear regions: on lines "
            "between images at least a tenth more than the smaller one makes, and than there were.",
            f"After over before, seed by seed: {made.listed(calm)} at {CALM}, {made.listed(rough)} at {ROUGH} "
            f"(means over lines; {before.mean():.0f} before).",
            bool(rough.min() > 1.1 and (rough / calm).min() > 1.1),
            full_only=True,
        )
    ]


def pictures(tables: Tables) -> dict[str, Figure]:
    """The plane through three images early and late; regions on lines against steps."""
    corners, maps = tables["region corners"].to_numpy(), {}
    for step, rows in tables["region map"].groupby("step"):
        cells = rows.pivot(index="y", columns="x", values="label")
        sides = (cells.columns.to_numpy(), cells.index.to_numpy())
        maps[f"step {step}"] = geometry.RegionMap(cells.to_numpy(), *sides, corners)
    label = "linear regions between two images"
    lines = draw.bars(tables["regions"], "step", "regions on a line", "error", label, by="learning rate")
    return {"planes": plot(maps), "lines": lines}
