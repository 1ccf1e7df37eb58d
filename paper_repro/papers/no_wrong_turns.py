"""No wrong turns: gradients point towards the end of the path.

A tanh network 64-32-10 (cross entropy, 1,024 images scaled to a root mean square norm of 4), 400 steps of SGD with learning rate 0.1 on
batches of 32; swept one at a time: batch size, width, layer norm, optimizer (momentum 0.9 with learning rate 0.02, Adam with 0.003). Every
run is made twice, first for its end, then to measure.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

import eomdl
from paper_repro import claims as made, networks, pictures as draw
from paper_repro.harness import Images, Tables


SOURCE = "Guille-Escuret et al. 2024, No Wrong Turns (arXiv 2306.11922)."
SECONDS = 75
BASE = 32  # batch size and width of all runs that do not vary it
OPTIMIZERS = {"SGD": optax.sgd(0.1), "momentum": optax.sgd(0.02, momentum=0.9), "Adam": optax.adam(3e-3)}
TENTHS = slice(1, 9)  # of a run, whose first and last tenth are left out of "stable"


class Size(NamedTuple):
    """Images, steps, seeds and what is swept."""

    images: int = 1024
    steps: int = 400
    seeds: int = 3
    batches: tuple[int, ...] = (8, 32, 128, 512)
    widths: tuple[int, ...] = (8, 32, 128)
    normalizations: tuple[str, ...] = ("none", "layer norm")
    optimizers: tuple[str, ...] = tuple(OPTIMIZERS)


SMOKE = Size(steps=60, seeds=1, batches=(8, 512), widths=(), normalizations=(), optimizers=())


class Case(NamedTuple):
    """One run of a sweep."""

    sweep: str
    value: Any
    batch: int = BASE
    width: int = BASE
    optimizer: str = "SGD"
    normal: bool = False
    seed: int = 0


def _cases(size: Size) -> list[Case]:
    return [
        *(Case("batch size", b, batch=b, seed=seed) for b in size.batches for seed in range(size.seeds)),
        *(Case("width", w, width=w) for w in size.widths),
        *(Case("normalization", name, normal=name == "layer norm") for name in size.normalizations),
        *(Case("optimizer", name, optimizer=name) for name in size.optimizers),
    ]


def measure(size: Size, images: Images) -> Tables:
    """Two passes over every run of the sweeps."""
    data = networks.scaled(images(size.images))
    curves = pd.concat(_curves(case, data, size.steps) for case in tqdm(_cases(size), desc="runs"))
    return {"summary": _summary(curves, size.steps), "curves": curves}


def _curves(case: Case, data: Any, steps: int) -> pd.DataFrame:
    """gamma, RSI and EB along one run, of the full gradient and of the minibatch's."""
    inputs, labels = data
    loss = networks.layer_norm_loss if case.normal else networks.mlp_loss
    pixels, key = inputs.shape[1], jax.random.key(case.seed)
    init: Any = networks.normalized_init if case.normal else networks.two_layer_init
    params = init(key, pixels, case.width, 10)
    index = np.random.default_rng(case.seed).integers(0, len(labels), (steps, case.batch))
    common: dict[str, Any] = {"args": data, "batches": (inputs[index], labels[index])}

    def path(**options: Any) -> eomdl.Trajectory:
        optimizer = OPTIMIZERS[case.optimizer]
        return eomdl.descend(
            loss, params, optimizer, steps, save_steps=max(steps // 100, 1), **common, **options
        )

    studies = eomdl.geometry.secants(path, {"full batch": loss, "minibatch": eomdl.on_batch(loss)})
    key_ = {"sweep": case.sweep, "value": str(case.value), "seed": case.seed}
    return pd.concat(study.to_frame().assign(**key_, gradient=name) for name, study in studies.items())


def _summary(curves: pd.DataFrame, steps: int) -> pd.DataFrame:
    """One row per run: gamma by tenths of the run (means), against the random directions."""
    rows, keys = [], ["sweep", "value", "seed", "gradient"]
    for key, one in curves[curves["gamma"].notna()].groupby(keys, sort=False):
        tenth = np.minimum((10 * one["steps"] / steps).astype(int), 9)
        means = one["gamma"].groupby(tenth).mean().to_numpy()
        rows.append(
            dict(zip(keys, key, strict=True))
            | {
                "gamma": one["gamma"].mean(),
                "smallest before the last tenth": one["gamma"][tenth < 9].min(),
                "smallest in it": one["gamma"][tenth == 9].min(),
                "smallest of tenths": means.min(),
                "largest / smallest of middle tenths": means[TENTHS].max() / means[TENTHS].min(),
                "random directions": np.sqrt((one["random_gamma"] ** 2).mean()),
                "RSI": one["rsi"].median(),
                "EB": one["eb"].median(),
                "RSI / EB^2": one["learning_rate"].median(),
            }
        )
    return pd.DataFrame(rows)


def claims(tables: Tables) -> list[made.Claim]:
    """The cosine gamma is positive, large, stable, and larger for larger batches."""
    table = tables["summary"]
    full, sweep = table[table["gradient"] == "full batch"], table[table["sweep"] == "batch size"]
    smallest, last = full["smallest before the last tenth"].min(), full["smallest in it"].min()
    spread = full["largest / smallest of middle tenths"]
    sizes = list(dict.fromkeys(sweep["value"]))
    by_batch = {
        name: some.pivot(index="seed", columns="value", values="gamma")[sizes].to_numpy()
        for name, some in sweep.groupby("gradient", sort=False)
    }
    means = "; ".join(f"{name} {made.listed(g.mean(axis=0), '.2f')}" for name, g in by_batch.items())
    return [
        made.Claim(
            "The full gradient points towards the end of the path all along it: up to the last tenth of the run, where the end "
            "is a few noisy steps away, its cosine gamma with the displacement is positive at every step of every run.",
            f"Smallest gamma of {len(full)} runs: {smallest:.3f}, in the last tenth {last:.3f}.",
            bool(smallest > 0),
        ),
        made.gain(
            "gamma is far above what a random direction has, in every tenth of every run.",
            full["random directions"],
            full["smallest of tenths"],
            least=4,
            what="times its cosine",
        ),
        made.Claim(
            "gamma is stable: over the middle eight tenths of a run its means stay within a factor of 2.5.",
            f"Largest over smallest: {spread.min():.2f} to {spread.max():.2f}.",
            bool(spread.max() < 2.5),
        ),
        made.Claim(
            "A larger batch gives a larger gamma, of the minibatch's own gradient and of the full one, for every seed.",
            f"Batch sizes {', '.join(map(str, sizes))}: {means}.",
            all(bool(np.all(np.diff(gammas, axis=1) > 0)) for gammas in by_batch.values()),
        ),
    ]


def pictures(tables: Tables) -> dict[str, Figure]:
    """The cosine gamma along the runs of each sweep (first seed), and along gradient descent and its flows."""
    curves = tables["curves"][tables["curves"]["seed"] == 0]
    figures = {}
    for (sweep, gradient), some in curves.groupby(["sweep", "gradient"], sort=False):
        title = f"{sweep}, {gradient} gradient"
        figure, axes = draw.panel(
            "step", "gamma = RSI / EB (cosine), mean of 5 points", title, ylim=(-0.2, 1)
        )
        for i, (value, one) in enumerate(some.groupby("value", sort=False)):
            smooth = one["gamma"].rolling(5, min_periods=1, center=True).mean()
            axes.plot(one["steps"], smooth, f"C{i}", label=f"{sweep} {value}")
            axes.plot(one["steps"], one["random_gamma"], f"C{i}:", lw=1)
        axes.plot([], [], "k:", lw=1, label="random directions")
        figures[title.replace(", ", "-").replace(" ", "-")] = draw.add_legend(figure)
    return figures
