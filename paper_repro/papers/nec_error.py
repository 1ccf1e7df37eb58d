"""The discretization error, predicted before the run and measured, and how large a learning rate may be.

A tanh network with 16 hidden units, cross entropy + L2 weight decay 1e-3, full-batch gradient descent on 256 images until time 2. The error
of a flow is predicted along the flow itself, without a run of gradient descent; the real run is made to check it. Rates: the largest one
for which a flow stays within a tolerance, from one integration, then measured at that rate.
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


SOURCE = "Miyagawa 2022 (NeurIPS), discretization error and the learning rates for which it is bounded."
SECONDS = 90
MAIN = True
DECAY = 1e-3
BELOW = 0.3  # eta lambda_max of the rates for which the tolerance is asserted


class Size(NamedTuple):
    """Images, time, counter terms (0 to `orders` - 1), eta lambda_max at the start, tolerances for each order."""

    images: int = 256
    time: float = 2.0
    orders: int = 3
    edges: tuple[float, ...] = (0.4, 0.2, 0.1, 0.05)
    tolerances: tuple[tuple[float, ...], ...] = ((3e-2, 1e-2), (1e-3, 1e-4), (1e-4, 1e-5))


SMOKE = Size(images=64, time=1.0, orders=2, edges=(0.1, 0.05), tolerances=((1e-2,), (1e-3,)))


def measure(size: Size, images: Images) -> Tables:
    """Predictions and real runs over the learning rates; then real runs at the largest rates."""
    data, loss = images(size.images), eomdl.WeightDecay(networks.mlp_loss, DECAY)
    params = networks.mlp_init(jax.random.key(0), (data[0].shape[1], 16, 10))
    sharpness = float(jax.jit(eomdl.sharpness(loss))(params, data))
    rows, curves, rates = [], [], []
    for order in tqdm(range(size.orders), desc="orders"):
        for edge in size.edges:
            steps = int(np.ceil(size.time * sharpness / edge))
            eta = size.time / steps
            flow = _flow(loss, eta, order)
            real = eomdl.descend(loss, params, optax.sgd(eta), steps, args=data)
            predicted = eomdl.errors.predict_error(flow, params, steps, args=data)
            key = {"model": _name(order), "learning rate": eta, "eta lambda_max": eta * sharpness}
            rows.append(key | _compared(real, predicted, flow, params, data))
            if edge == size.edges[-1]:
                columns = {
                    "step": predicted.steps,
                    "predicted": predicted.norm,
                    "by one term more": predicted.embedded,
                }
                distance = eomdl.compare(real, {"flow": predicted.path}).distance["flow"]
                curves.append(pd.DataFrame({"model": _name(order)} | columns | {"measured": distance}))
        for tolerance in size.tolerances[order]:
            rates.append(_at_largest(loss, params, data, order, tolerance, size.time))
    return {"predictions": pd.DataFrame(rows), "rates": pd.DataFrame(rates), "curves": pd.concat(curves)}


def _name(order: int) -> str:
    return f"EoM {order}" if order else "gradient flow"


def _flow(loss: Any, eta: float, order: int) -> eomdl.AbstractFlow:
    return eomdl.EquationOfMotion(loss, eta, order)


def _compared(real: Any, predicted: Any, flow: Any, params: Any, data: Any) -> dict[str, Any]:
    """The predicted against the true error vector at the end, that of a tightly integrated flow."""
    steps = int(predicted.steps[-1])
    tight: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-13, "estimate_error": False, "save_steps": [steps]}
    path = eomdl.solve(flow, params, steps, args=data, **tight)
    true = optax.tree.sub(path.at(steps), real.at(steps))
    found = jax.tree.map(lambda leaf: leaf[-1], predicted.vector)
    corrected = optax.tree.sub(predicted.corrected.at(steps), real.at(steps))
    size = float(optax.tree.norm(true))
    return {
        "measured": size,
        "predicted": float(predicted.norm[-1]),
        "vectors differ by": float(optax.tree.norm(optax.tree.sub(found, true))) / size,
        "by one term more differs by": float(predicted.difference[-1] / predicted.norm[-1]),
        "left after correction": float(optax.tree.norm(corrected)),
        "notes": " ".join(predicted.notes),
    }


def _at_largest(
    loss: Any, params: Any, data: Any, order: int, tolerance: float, time: float
) -> dict[str, Any]:
    """The predicted rate, and the error measured at it."""
    found = eomdl.errors.largest_learning_rate(loss, params, time, tolerance, order, args=data)
    steps = int(np.ceil(time / found.value))
    real = eomdl.descend(loss, params, optax.sgd(found.value), steps, args=data)
    path = eomdl.solve(_flow(loss, found.value, order), params, steps, args=data, estimate_error=False)
    largest = eomdl.compare(real, {"flow": path}).distance["flow"].max()
    row = {"model": _name(order), "tolerance": tolerance, "learning rate": found.value}
    row |= {"eta lambda_max": found.eta_lambda_max, "limited by": found.limited_by}
    return row | {"measured / tolerance": largest / tolerance, "notes": " ".join(found.notes)}


def claims(tables: Tables) -> list[made.Claim]:
    """Vectors, their order, the corrected path, the rates."""
    table, rates = tables["predictions"], tables["rates"]
    fine = table[table["eta lambda_max"] <= 0.1]
    kept = rates[rates["eta lambda_max"] < BELOW]["measured / tolerance"]
    corrected = runs.observed_orders(table, "left after correction", last=2)
    return [
        made.share(
            "The predicted error vectors agree with the measured ones where eta lambda_max is at most 0.1.",
            fine["vectors differ by"],
            0.05,
            full_only=True,
        ),
        made.orders(
            "Their relative difference falls with the learning rate at first order.",
            runs.observed_orders(table, "vectors differ by", last=2),
            dict.fromkeys(table["model"].unique(), 1),
            within=0.2,
        ),
        made.orders(
            "A path less its predicted error is one order nearer to gradient descent than the path.",
            corrected,
            {model: n + 2 for n, model in enumerate(corrected)},
            within=0.3,
        ),
        made.Claim(
            f"At the largest rate predicted the measured error is between 0.5 and 1 times the tolerance (eta lambda_max < {BELOW}).",
            f"{kept.min():.3f} to {kept.max():.3f} times, {len(kept)} of {len(rates)} rates.",
            bool(len(kept) and kept.min() > 0.5 and kept.max() < 1),
        ),
    ]


def pictures(tables: Tables) -> dict[str, Figure]:
    """Predicted and measured error along a run; how far the vectors are off against the learning rate."""
    figure, axes = draw.panel("step", "error of the flow", "smallest learning rate", yscale="log")
    for color, (model, some) in enumerate(tables["curves"].groupby("model", sort=False)):
        axes.plot(
            some["step"],
            draw.positive_or_nan(some["measured"]),
            f"C{color}o",
            ms=3,
            mfc="none",
            label=f"{model}, measured",
        )
        axes.plot(some["step"], draw.positive_or_nan(some["predicted"]), f"C{color}", label="predicted")
    off = draw.errors(
        tables["predictions"],
        "learning rate",
        "vectors differ by",
        ylabel="relative difference of predicted and measured vectors",
        title=f"at time {Size().time:g}",
    )
    return {"along-a-run": draw.add_legend(figure), "vectors": off}
