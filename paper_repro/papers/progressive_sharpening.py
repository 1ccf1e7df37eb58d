"""Progressive sharpening to the threshold of the optimizer, and hovering there.

An MLP 64-32-32-10 and a small CNN (tanh) on digits, full batch, by gradient descent, heavy ball (0.9) and Adam (0.9, 0.999). Squared error
with 500 (MLP) or 300 (CNN) images; cross entropy with 1,000 images, 40 % of whose labels are drawn at random: heavy ball and Adam fit
the true ones before they come to the edge. `EdgeTelemetry` measures every tenth step: the largest eigenvalue of R H, with the optimizer's
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
EVERY = 10  # steps between two measurements
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


_MLP, _CNN = (networks.mlp, networks.small_mlp_init), (networks.cnn, networks.small_cnn_init)
_SQUARED, _CROSS = (networks.squared_error, 0.0), (networks.cross_entropy, 0.4)


class Case(NamedTuple):
    """A network with its start, a loss with the part of random labels, and for each optimizer its rate and steps."""

    name: str
    network: tuple[Callable, Callable[[int], Any]]
    criterion: tuple[Callable, float]
    images: int
    runs: dict[str, tuple[float, int]]


CASES = [
    Case(
        "MLP, squared error", _MLP, _SQUARED, 500, {GD: (0.12, 1500), HEAVY: (0.3, 1000), ADAM: (2e-3, 1000)}
    ),
    Case("MLP, cross entropy", _MLP, _CROSS, 1000, {GD: (0.4, 1000), HEAVY: (0.2, 700), ADAM: (3e-3, 700)}),
    Case(
        "CNN, squared error", _CNN, _SQUARED, 300, {GD: (0.15, 1000), HEAVY: (0.15, 800), ADAM: (2e-3, 1000)}
    ),
    Case("CNN, cross entropy", _CNN, _CROSS, 1000, {GD: (0.6, 800), HEAVY: (0.6, 500), ADAM: (6e-3, 800)}),
]


class Size(NamedTuple):
    """How many networks and losses, optimizers of each, and the part of the steps."""

    cases: int = 4
    optimizers: int = 4
    part: float = 1.0


SMOKE = Size(cases=1, optimizers=1, part=0.1)


def measure(size: Size, images: Images) -> Tables:
    """Every run, with its telemetry."""
    runs = [(case, name) for case in CASES[: size.cases] for name in list(OPTIMIZERS)[: size.optimizers]]
    measured = pd.concat(_measure(case, name, images, size.part) for case, name in tqdm(runs, desc="runs"))
    rows = [_summary(some) for _, some in measured.groupby(["case", "optimizer"], sort=False)]
    return {"measurements": measured, "runs": pd.DataFrame(rows)}


def _measure(case: Case, optimizer: str, images: Images, part: float) -> pd.DataFrame:
    """Return what was measured along one run."""
    inputs, labels = images(case.images, None)
    criterion, random_labels = case.criterion
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 10, len(labels))
    labels = jnp.where(rng.random(len(labels)) < random_labels, drawn, labels).astype(labels.dtype)
    rate, steps = case.runs[GD if optimizer == SLOW else optimizer]
    network, init = case.network
    loss, rule = networks.loss(network, criterion), OPTIMIZERS[optimizer](rate)
    telemetry = eomdl.telemetry.EdgeTelemetry(loss, rule, along_every=None, edge_every=EVERY, num_matvecs=16)
    options: dict[str, Any] = {"args": (inputs, labels), "observe": {"loss": loss}, "save_steps": EVERY}
    options |= {"save_params": False, "monitors": [telemetry]}
    run = eomdl.descend(loss, init(inputs.shape[1]), rule, int(part * steps), **options)
    report = telemetry.results()
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


def _summary(measured: pd.DataFrame) -> dict[str, Any]:
    """When a run came to the edge from below, for how long it was there, and where it is at the end.

    The first measurements of Adam do not count: its second moments are those of few gradients, and the ratio falls at first.
    """
    ratio, step = measured["ratio"].to_numpy(), measured["step"].to_numpy()
    near = np.append(np.flatnonzero(ratio >= NEAR), len(ratio))
    below = np.append(np.flatnonzero(ratio < NEAR), len(ratio))[0]
    first = near[near >= below][0]
    there = slice(first, near[-2] + 1 if first < len(ratio) else first)
    before, hovering = ratio[below:first], ratio[there]
    return measured.iloc[0][["case", "optimizer", "threshold"]].to_dict() | {
        "lowest before": before.min() if before.size else np.nan,
        "reached": step[first] if hovering.size else np.nan,
        "steps at the edge": step[there][-1] - step[first] if hovering.size else 0,
        "median at the edge": np.median(hovering) if hovering.size else np.nan,
        "largest": ratio[below:].max() if below < len(ratio) else np.nan,
        "at the end": np.median(ratio[-5:]),
        "steps": step[-1] + EVERY,
        "loss at the end": measured["loss"].iloc[-1],
        "converged": measured["converged"].mean(),
    }


def claims(tables: Tables) -> list[made.Claim]:
    """Each optimizer comes to its own threshold from below and stays near it; a tenth of the rate does not come there."""
    runs = tables["runs"]
    found = [
        made.law(
            "The telemetry finds the threshold of each optimizer: gradient descent 2, heavy ball 2 + 2 beta, Adam "
            "2 (1 + b1) / (1 - b1).",
            np.abs(runs["threshold"] / runs["optimizer"].map(THRESHOLDS) - 1),
            1e-6,
        )
    ]
    for case, some in runs.groupby("case", sort=False):
        fast, slow = some[some["optimizer"] != SLOW], some[some["optimizer"] == SLOW]
        fitted = fast[(fast["optimizer"] != GD) & ("cross" in str(case))]
        found += [
            _claim(
                f"{case}: the curvature rises from below 0.6 of the threshold to the threshold.",
                fast,
                (fast["lowest before"] < 0.6) & (fast["largest"] >= 1),
                "from {lowest before:.2f}, within 10 % of it at step {reached:.0f}, largest {largest:.2f}",
            ),
            _claim(
                f"{case}: it hovers there for at least {LEAST} steps, with a median of 0.8 to 1.25 of the threshold.",
                fast,
                fast["median at the edge"].between(0.8, 1.25) & (fast["steps at the edge"] >= LEAST),
                "{median at the edge:.3f} for {steps at the edge:.0f} of {steps:.0f} steps, {at the end:.2f} at the end "
                "(loss {loss at the end:.1e}), {converged:.0%} of the measurements converged",
            ),
            _claim(
                f"{case}: gradient descent with a tenth of the rate stays below half of its threshold.",
                slow,
                slow["largest"] < 0.5,
                "at most {largest:.2f} in as many steps",
            ),
        ]
        if len(fitted):
            text = f"{case}: once the examples are fitted, the curvature falls below 0.75 of the threshold again."
            fallen = (fitted["at the end"] < 0.75) & (fitted["loss at the end"] < 0.1)
            found.append(_claim(text, fitted, fallen, "{at the end:.2f}, loss {loss at the end:.1e}"))
    return found


def _claim(text: str, runs: pd.DataFrame, holds: pd.Series, form: str) -> made.Claim:
    """That it holds in every run, with the numbers of each; not of the smoke size, which is too short."""
    said = [f"{row['optimizer']}: {form.format_map(row.to_dict())}" for _, row in runs.iterrows()]
    return made.Claim(text, "; ".join(said) + ".", bool(holds.all() and len(runs)), full_only=True)


def pictures(tables: Tables) -> dict[str, Figure]:
    """The value over the threshold against the step, one panel for each network and loss."""
    figures = {}
    for case, some in tables["measurements"].groupby("case", sort=False):
        figure, axes = draw.panel("step", "eigenvalue / threshold", str(case), ylim=(0, 2))
        for color, (optimizer, measured) in enumerate(some.groupby("optimizer", sort=False)):
            axes.plot(measured["step"], measured["ratio"], f"C{color}", lw=1, label=optimizer)
        axes.axhline(1, color="k", ls=":", lw=1, label="threshold")
        figures[str(case).replace(",", "").replace(" ", "-")] = draw.add_legend(figure)
    return figures
