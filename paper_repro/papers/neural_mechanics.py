"""Conservation laws of symmetric losses, broken by discreteness.

An MLP (24 units) and a CNN (8 channels) with batch norm (gain, shift, no epsilon), ReLU and softmax; SGD on batches of 64 from 1,024
images, 200 steps; weight decay 0, 1e-4, 1e-3; learning rate 0.05, and 0.005 with momentum 0.9. Every flow follows the same batches.
Charges: the head's columns' sum, the squared norm of each unit's weights, gain^2 + shift^2 against the squared norm out of each unit.
"""

import itertools
from typing import Any, NamedTuple

import numpy as np
import optax
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

import eomdl
from paper_repro import claims as made, networks, pictures as draw, runs
from paper_repro.harness import Images, Tables


SOURCE = "Kunin et al. 2021, Neural Mechanics (arXiv 2012.04728)."
SECONDS = 110
RATE, BATCH = 0.05, 64
STEP = {0.0: RATE, 0.9: 0.1 * RATE}  # learning rates by momentum: the same time a step, lr/(1 - beta)
LOSSES = {"MLP": networks.normalized_mlp_loss, "CNN": networks.normalized_cnn_loss}
OPTIMIZERS = {beta: optax.sgd(eta, momentum=beta or None) for beta, eta in STEP.items()}
CHARGES: dict[str, Any] = {
    "translation": eomdl.symmetry.Translation("head.w"),
    "scale": eomdl.symmetry.Scaling([("first", 1)]),
    "rescale": eomdl.symmetry.Scaling([("norm.gain", 0), ("norm.shift", 0)], [("head.w", -2)]),
}
KEYS = ["network", "momentum", "weight decay"]
REAL = "real run"
OPTIONS: dict[str, Any] = {"estimate_error": False, "rtol": 1e-5, "atol": 1e-7}


class Size(NamedTuple):
    """Images, steps, networks and decays; counter terms without momentum, points with it, for each network."""

    images: int = 1024
    steps: int = 200
    networks: tuple[str, ...] = tuple(LOSSES)
    decays: tuple[float, ...] = (0.0, 1e-4, 1e-3)
    orders: tuple[tuple[int, ...], ...] = ((1, 2), (1,))
    points: tuple[tuple[int, ...], ...] = ((1, 2), (2,))


SMOKE = Size(steps=20, networks=("MLP",), decays=(0.0, 1e-3), orders=((1,),), points=((2,),))


def measure(size: Size, images: Images) -> Tables:
    """Every network, decay and momentum: the real run, its flows on the same batches, and the charges of all."""
    inputs, labels = images(size.images)
    index = np.random.default_rng(1).integers(0, len(labels), (size.steps, BATCH))
    batches = (inputs[index], labels[index])
    cases = list(itertools.product(enumerate(size.networks), STEP, size.decays))
    found = []
    for (n, network), beta, decay in tqdm(cases, desc="runs"):
        loss = eomdl.WeightDecay(LOSSES[network], decay)
        start = networks.normalized_start(network, inputs.shape[1])
        real = eomdl.descend(loss, start, OPTIMIZERS[beta], size.steps, batches=batches)
        flows = _flows(loss, beta, size.orders[n], size.points[n])
        paths = runs.solve_all(flows, start, size.steps, batches=batches, **OPTIONS)
        key = dict(zip(KEYS, (network, beta, decay), strict=True))
        found.append({name: t.assign(**key) for name, t in _charges(real, paths, beta, decay).items()})
    joined = {name: pd.concat(tables[name] for tables in found) for name in found[0]}
    return joined | {"angles": _angles(joined["turning"])}


def _flows(loss: Any, beta: float, orders: Any, points: Any) -> dict[str, eomdl.AbstractFlow]:
    """The equation of motion; with momentum, the logarithm of the step. Gradient flow obeys its own law."""
    if beta == 0:
        return dict(runs.counter_terms(loss, RATE, orders))
    step_map = eomdl.optimizer_step(loss, OPTIMIZERS[beta])
    return {f"{k} point{'s' * (k > 1)}": eomdl.InterpolatingFlow(step_map, STEP[beta], k) for k in points}


def _charges(real: Any, paths: Any, beta: float, decay: float) -> Tables:
    """Errors of every prediction of every charge, and the charges along the run."""
    options: dict[str, Any] = {"learning_rate": STEP[beta], "weight_decay": decay, "momentum": beta}
    found = {
        name: eomdl.symmetry.conservation(real, symmetry, models=paths, **options)
        for name, symmetry in CHARGES.items()
    }
    return {
        "errors": pd.concat(runs.charge_errors(charge).assign(charge=name) for name, charge in found.items()),
        "curves": pd.concat(charge.to_frame().assign(charge=name) for name, charge in found.items()),
        "turning": runs.turning({REAL: real} | paths, lambda params: params["first"], STEP[beta], beta),
    }


def _angles(turns: pd.DataFrame) -> pd.DataFrame:
    """Where each run begins and ends, against the equilibrium, and how far the flows are off."""
    rows = []
    for key, case in turns.groupby(KEYS, sort=False):
        real = case[case["run"] == REAL]
        angle, rate = real["angle per step"].to_numpy()[:-1], real["effective learning rate"].to_numpy()
        tenth = max(len(angle) // 10, 1)
        row = dict(zip(KEYS, key, strict=True)) | {
            "angle per step, first tenth": angle[:tenth].mean(),
            "angle per step, last tenth": angle[-tenth:].mean(),
            "angle at equilibrium": float(eomdl.symmetry.equilibrium_angle(STEP[key[1]], key[2], key[1])),
            "effective learning rate, start": rate[0],
            "effective learning rate, end": rate[-1],
        }
        for name, model in case[case["run"] != REAL].groupby("run", sort=False):
            off = np.abs(model["angle per step"].to_numpy()[:-1] / angle - 1)
            row[f"angle, largest relative error, {name}"] = off.max()
        rows.append(row)
    return pd.DataFrame(rows)


def claims(tables: Tables) -> list[made.Claim]:
    """Exact laws, what breaks them, and what predicts that."""
    table, angles = tables["errors"], tables["angles"]
    moving = table[table["charge"].isin(["scale", "rescale"])].set_index([*KEYS, "charge"])

    def errors(*predictions: str) -> list[pd.Series]:
        some = [moving.loc[moving["prediction"] == p, "largest error"] for p in predictions]
        return [series.loc[some[0].index] for series in some]

    exact = moving[moving["prediction"] == "exact"]
    free = exact.xs(0.0, level="weight decay")
    change = free["charge changes by"] / (free["largest error"] / free["error / largest charge"])
    above = (free["charge changes by"] / free["largest error"]).min()
    falls = angles["effective learning rate, end"] / angles["effective learning rate, start"]
    falls = falls[angles["weight decay"] == 0]
    # One point is no better than a first step.
    off = angles.filter(regex="largest relative error.*(?<!1 point)$")
    return [
        made.law(
            "The exact laws of heavy ball hold for every charge over the whole run, with and without momentum, on minibatches.",
            table.loc[table["prediction"] == "exact", "error / largest charge"],
            1e-10,
            "Largest error relative to the charge",
        ),
        made.Claim(
            "Without decay gradient flow conserves the scale and rescale charges; the real run does not.",
            f"They change by {change.min():.1e} to {change.max():.1e}, at least {above:.0e} times the law's rounding.",
            bool(above > 1e6),
            full_only=True,
        ),
        made.gain(
            "The first-order law along the real path (one counter term; with momentum the memory factor) explains it, "
            "against gradient flow's.",
            *errors("first order", "gradient flow"),
            least=2,
            full_only=True,
        ),
        *(
            made.gain(
                f"Integrated from the start only, {text} the charges nearer than gradient flow.",
                *errors(model, "gradient flow"),
            )
            for text, model in (
                ("one counter term brings", "EoM 1"),
                ("with momentum two points of the step map's logarithm bring", "2 points"),
            )
        ),
        made.Claim(
            "Discreteness lets the scale-invariant weights grow, so their effective learning rate falls on its own.",
            f"Without decay to {falls.min():.3f} to {falls.max():.3f} of its start.",
            bool(falls.max() < 1),
            full_only=True,
        ),
        made.share(
            "Counter terms, and two points of the logarithm, predict the angle of every step of these weights.",
            off.stack().dropna(),
            0.1,
        ),
    ]


def pictures(tables: Tables) -> dict[str, Figure]:
    """At the largest decay: charges, errors of their predictions, and how the scale-invariant weights turn."""
    decay = max(tables["curves"]["weight decay"])
    figures: dict[str, Figure] = {}
    curves, turns = (tables[name][tables[name]["weight decay"] == decay] for name in ("curves", "turning"))
    for (network, beta, charge), one in curves.groupby(["network", "momentum", "charge"], sort=False):
        title = f"{network}, momentum {beta}: {charge}"
        value, top = draw.panel("step", "charge, sum over units", title)
        error, low = draw.panel("step", "error (norm over units)", title, yscale="log")
        top.plot(one["step"], one["measured"], "k", lw=3, alpha=0.4, label="measured")
        here = one.dropna(axis=1, how="all")
        for i, prediction in enumerate(c.removeprefix("error ") for c in here if c.startswith("error ")):
            style: dict[str, Any] = {"color": f"C{i}", "label": prediction, "ls": "--" if i < 3 else ":"}
            top.plot(one["step"], one[prediction], **style)
            low.plot(one["step"], draw.positive_or_nan(one[f"error {prediction}"]), **style)
        name = f"{network}-{beta}-{charge}"
        figures |= {name: draw.add_legend(value), f"{name}-error": draw.add_legend(error)}
    for (network, beta), case in turns.groupby(["network", "momentum"], sort=False):
        style = {"by": "run", "marker": "", "xscale": "linear", "title": f"{network}, momentum {beta}"}
        for column, name, scale in (
            ("angle per step", "angle per step [rad]", "log"),
            ("effective learning rate", "effective learning rate [time]", "linear"),
        ):
            turning = draw.errors(case, "step", column, ylabel=name, yscale=scale, **style)
            figures[f"{network}-{beta}-{column.replace(' ', '-')}"] = turning
    return figures
