"""Progressive sharpening to the threshold of the optimizer, and hovering there.

An MLP 64-32-32-10 and a small CNN (tanh) on digits, full batch, by gradient descent, heavy ball (0.9) and Adam (0.9, 0.999). Squared error
with 500 (MLP) or 300 (CNN) images; cross entropy with 1,000 images, 40 % of whose labels are drawn at random: heavy ball and Adam fit
the true ones before they come to the edge. `EdgeTelemetry` looks at every tenth step: the largest eigenvalue of R H, with the optimizer's
rate R of each parameter, over the threshold that it finds for the optimizer. Beside it gradient descent with a tenth of the rate.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

import eomdl
from paper_repro import claims as made, networks, pictures as draw
from paper_repro.harness import Images, Tables


SOURCE = "Cohen et al. 2021 (arXiv 2103.00065); Adam: Cohen et al. 2022 (arXiv 2207.14484)."
SECONDS = 240
EVERY = 10  # steps between two looks
NEAR = 0.9  # of the threshold, from which on a run is at the edge,
LEAST = 50  # and for how many steps at least
GD, HEAVY, ADAM, SLOW = "gradient descent", "heavy ball", "Adam", "a tenth of the rate"
OPTIMIZERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    GD: optax.sgd,
    HEAVY: lambda rate: optax.sgd(rate, 0.9),
    ADAM: lambda rate: optax.adam(rate, 0.9, 0.999),
    SLOW: lambda rate: optax.sgd(rate / 10),
}
THRESHOLDS = {GD: 2.0, HEAVY: 2 + 2 * 0.9, ADAM: 2 * 1.9 / 0.1, SLOW: 2.0}


class Case(NamedTuple):
    """A network and a loss, and for each optimizer its learning rate and steps."""

    name: str
    network: Callable
    init: Callable[[int], Any]
    criterion: Callable
    images: int
    random_labels: float  # the part of them
    runs: dict[str, tuple[float, int]]


_MLP, _CNN = (networks.mlp, networks.small_mlp_init), (networks.cnn, networks.small_cnn_init)
CASES = [
    Case(
        "MLP, squared error",
        *_MLP,
        networks.squared_error,
        500,
        0.0,
        {GD: (0.12, 1500), HEAVY: (0.3, 1000), ADAM: (2e-3, 1000), SLOW: (0.12, 1500)},
    ),
    Case(
        "MLP, cross entropy",
        *_MLP,
        networks.cross_entropy,
        1000,
        0.4,
        {GD: (0.4, 1000), HEAVY: (0.2, 700), ADAM: (3e-3, 700), SLOW: (0.4, 1000)},
    ),
    Case(
        "CNN, squared error",
        *_CNN,
        networks.squared_error,
        300,
        0.0,
        {GD: (0.15, 1000), HEAVY: (0.15, 800), ADAM: (2e-3, 1000)},
    ),
    Case(
        "CNN, cross entropy",
        *_CNN,
        networks.cross_entropy,
        1000,
        0.4,
        {GD: (0.6, 800), HEAVY: (0.6, 500), ADAM: (6e-3, 800)},
    ),
]


class Size(NamedTuple):
    """How many networks and losses, optimizers of each, and the part of the steps."""

    cases: int = 4
    optimizers: int = 4
    part: float = 1.0


SMOKE = Size(cases=1, optimizers=1, part=0.1)


def measure(size: Size, images: Images) -> Tables:
    """Every run, with its telemetry."""
    runs = [
        (case, optimizer) for case in CASES[: size.cases] for optimizer in list(case.runs)[: size.optimizers]
    ]
    looks = pd.concat(
        _looked(case, optimizer, images, size.part) for case, optimizer in tqdm(runs, desc="runs")
    )
    rows = [_summary(some) for _, some in looks.groupby(["case", "optimizer"], sort=False)]
    return {"looks": looks, "runs": pd.DataFrame(rows)}


def _looked(case: Case, optimizer: str, images: Images, part: float) -> pd.DataFrame:
    """The looks at one run."""
    inputs, labels = images(case.images, None)
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 10, len(labels))
    labels = jnp.where(rng.random(len(labels)) < case.random_labels, drawn, labels).astype(labels.dtype)
    rate, steps = case.runs[optimizer]
    loss, rule = networks.loss(case.network, case.criterion), OPTIMIZERS[optimizer](rate)
    telemetry = eomdl.observe.EdgeTelemetry(loss, rule, along_every=None, edge_every=EVERY, num_matvecs=16)
    run = eomdl.descend(
        loss,
        case.init(inputs.shape[1]),
        rule,
        int(part * steps),
        args=(inputs, labels),
        observe={"loss": loss},
        save_steps=EVERY,
        save_params=False,
        telemetry=telemetry,
    )
    report = telemetry.report()
    table = {
        "case": case.name,
        "optimizer": optimizer,
        "step": report.edge_steps,
        "value": report.values[:, 0],
        "threshold": report.thresholds,
        "ratio": report.ratios,
        "converged": report.converged[:, 0],
        "loss": run.observables["loss"][: len(report.edge_steps)],
        "message": run.message,
    }
    return pd.DataFrame(table)


def _summary(looks: pd.DataFrame) -> dict[str, Any]:
    """When a run came to the edge from below, for how long it was there, and where it is at the end.

    The first looks at Adam do not count: its second moments are those of few gradients, and the ratio falls at first.
    """
    ratio, step = looks["ratio"].to_numpy(), looks["step"].to_numpy()
    near = np.append(np.flatnonzero(ratio >= NEAR), len(ratio))
    below = np.append(np.flatnonzero(ratio < NEAR), len(ratio))[0]
    first = near[near >= below][0]
    there = slice(first, near[-2] + 1 if first < len(ratio) else first)
    before, hovering = ratio[below:first], ratio[there]
    return looks.iloc[0][["case", "optimizer", "threshold"]].to_dict() | {
        "lowest before": before.min() if before.size else np.nan,
        "reached": step[first] if hovering.size else np.nan,
        "steps at the edge": step[there][-1] - step[first] if hovering.size else 0,
        "median at the edge": np.median(hovering) if hovering.size else np.nan,
        "largest": ratio[below:].max() if below < len(ratio) else np.nan,
        "at the end": np.median(ratio[-5:]),
        "steps": step[-1] + EVERY,
        "loss at the end": looks["loss"].iloc[-1],
        "converged": looks["converged"].mean(),
    }


def claims(tables: Tables) -> list[made.Claim]:
    """Each optimizer comes to its own threshold from below and stays near it; a tenth of the rate does not come there."""
    runs = tables["runs"]
    expected = runs["optimizer"].map(THRESHOLDS)
    found = [
        made.law(
            "The telemetry finds the threshold of each optimizer: gradient descent 2, heavy ball 2 + 2 beta, Adam "
            "2 (1 + b1) / (1 - b1).",
            np.abs(runs["threshold"] / expected - 1),
            1e-6,
        )
    ]
    for case, some in runs.groupby("case", sort=False):
        fast = some[some["optimizer"] != SLOW]
        found += [_sharpening(str(case), fast), _hovering(str(case), fast)]
        if "squared" not in str(case):
            found.append(_fall(str(case), fast[fast["optimizer"] != GD]))
    return [*found, _control(runs[runs["optimizer"] == SLOW])]


def _sharpening(case: str, runs: pd.DataFrame) -> made.Claim:
    rise = (runs["lowest before"] < 0.6) & (runs["largest"] >= 1)
    return made.Claim(
        f"{case}: the curvature rises from below 0.6 of the threshold to the threshold.",
        _said(
            runs,
            lambda row: (
                f"from {row['lowest before']:.2f}, within 10 % of it at step {row['reached']:.0f}, "
                f"largest {row['largest']:.2f}"
            ),
        ),
        bool(rise.all() and len(runs)),
        full_only=True,
    )


def _hovering(case: str, runs: pd.DataFrame) -> made.Claim:
    near = runs["median at the edge"].between(0.8, 1.25) & (runs["steps at the edge"] >= LEAST)
    return made.Claim(
        f"{case}: it hovers there for at least {LEAST} steps, with a median of 0.8 to 1.25 of the threshold.",
        _said(
            runs,
            lambda row: (
                f"{row['median at the edge']:.3f} for {row['steps at the edge']:.0f} of {row['steps']:.0f} steps, "
                f"{row['at the end']:.2f} at the end (loss {row['loss at the end']:.1e}), "
                f"{row['converged']:.0%} of the looks converged"
            ),
        ),
        bool(near.all() and len(runs)),
        full_only=True,
    )


def _fall(case: str, runs: pd.DataFrame) -> made.Claim:
    fallen = (runs["at the end"] < 0.75) & (runs["loss at the end"] < 0.1)
    return made.Claim(
        f"{case}: once the examples are fitted, the curvature falls below 0.75 of the threshold again.",
        _said(runs, lambda row: f"{row['at the end']:.2f} at the end, loss {row['loss at the end']:.1e}"),
        bool(fallen.all() and len(runs)),
        full_only=True,
    )


def _control(runs: pd.DataFrame) -> made.Claim:
    return made.Claim(
        "Gradient descent with a tenth of the rate, for as many steps, stays below half of its threshold.",
        "; ".join(f"{row['case']}: at most {row['largest']:.2f}" for _, row in runs.iterrows()) + ".",
        bool((runs["largest"] < 0.5).all() and len(runs)),
        full_only=True,
    )


def _said(runs: pd.DataFrame, words: Callable[[Any], str]) -> str:
    return "; ".join(f"{row['optimizer']}: {words(row)}" for _, row in runs.iterrows()) + "."


def pictures(tables: Tables) -> dict[str, Figure]:
    """The value over the threshold against the step, one panel for each network and loss."""
    figures = {}
    for case, some in tables["looks"].groupby("case", sort=False):
        figure, axes = draw.panel("step", "eigenvalue / threshold", str(case), ylim=(0, 2))
        for color, (optimizer, looks) in enumerate(some.groupby("optimizer", sort=False)):
            axes.plot(looks["step"], looks["ratio"], f"C{color}", lw=1, label=optimizer)
        axes.axhline(1, color="k", ls=":", lw=1, label="threshold")
        figures[str(case).replace(",", "").replace(" ", "-")] = draw.legend(figure)
    return figures
