"""Weight-norm rates of scale-invariant layers: gradient flow, equation of motion, real GD.

Weights (pixels x 16) before a normalization without affine parameters or epsilon, over the features (layer norm) or over the batch (batch
norm in training mode), then tanh and a linear head; cross entropy + L2 weight decay. Full-batch gradient descent on 256 images, 50 steps.
The rate is d log |theta|^2 / dt, and the error of a flow is its largest over the steps, integrated from the same start. Where eta
lambda_max passes 1 the series in eta has no limit: those settings are shown, and no claim is made of them.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import eomdl
from paper_repro import claims as made, networks, pictures as draw, runs
from paper_repro.harness import Images, Tables


SOURCE = "Miyagawa 2022 (NeurIPS), scale-invariant layers."
SECONDS = 60
MAIN = True
MODELS = ("gradient flow", "EoM 1", "EoM 2", "EoM 3")
NETWORKS = {"layer norm": networks.layer_norm_loss, "batch norm": networks.batch_norm_loss}
KEYS = ["network", "learning rate", "weight decay"]
NORM = eomdl.observe.block_norm(networks.hidden)


class Size(NamedTuple):
    """Images, steps, seeds, learning rates (and weight decays), models."""

    images: int = 256
    steps: int = 50
    seeds: int = 3
    rates: tuple[float, ...] = (1e-1, 1e-2, 1e-3)
    orders: int = 4


SMOKE = Size(steps=10, seeds=1, rates=(1e-1, 1e-2), orders=2)


def measure(size: Size, images: Images) -> Tables:
    """Norm rates of real GD and of the flows for every (network, learning rate, weight decay, seed)."""
    inputs = images(size.images)
    keys = [jax.random.key(seed) for seed in range(size.seeds)]
    starts = [networks.normalized_init(key, inputs[0].shape[1], 16, 10) for key in keys]
    checks, rows = [], []
    for network, loss in NETWORKS.items():
        check = eomdl.symmetry.check(loss, starts[0], eomdl.symmetry.Scaling(["hidden"]), args=inputs)
        checks.append({"network": network, "message": check.verdict, "holds": check.holds})
        rows += [{"network": network} | row for row in _rows(loss, starts, size, inputs)]
    rates = pd.DataFrame(rows).groupby(KEYS, sort=False).mean().reset_index()
    return {"norm-rate": rates, "symmetry": pd.DataFrame(checks)}


def _rows(loss: runs.Loss, starts: list[Any], size: Size, inputs: Any) -> Iterator[dict[str, Any]]:
    """The measured norm rate, its law, its closed form with one counter term, and the flows'."""
    laws, gradient_norm = eomdl.symmetry, networks.hidden_gradient_norm(loss)

    def observe(decayed: runs.Loss) -> dict[str, Any]:
        return {"norm": NORM, "gradient": gradient_norm, "sharpness": eomdl.sharpness(decayed, 8)}

    for setting in runs.descend_grid(loss, starts, size.rates, size.steps, inputs, observe):
        eta, decay = setting.eta, setting.decay
        norm, gradient, sharpness = (setting.observed[name] for name in ("norm", "gradient", "sharpness"))
        rate = -2 * np.asarray(eomdl.observe.decay_rate(norm, eta))
        law = laws.scale_norm_after_step(norm[:-1], gradient[:-1], eta, decay)
        closed = laws.scale_norm_rate(norm[:-1], gradient[:-1], eta, decay, order=1)
        row = {"learning rate": eta, "weight decay": decay, "eta lambda_max": eta * sharpness.max()}
        row |= {"measured": rate.mean(), "spread": rate.std(), "closed form EoM 1": float(np.mean(closed))}
        row["exact law error"] = np.abs(np.asarray(law) / norm[1:] - 1).max()
        for name, predicted in runs.norm_rates(
            setting, loss, range(size.orders), size.steps, inputs, NORM
        ).items():
            row |= {name: -2 * predicted.mean(), f"error {name}": np.abs(-2 * predicted - rate).max()}
        yield row


def claims(tables: Tables) -> list[made.Claim]:
    """Symmetry, the exact law, the closed form, the flows."""
    rates = tables["norm-rate"]
    valid = rates[rates["eta lambda_max"] < 1]
    pairs = list(itertools.pairwise(name for name in MODELS if name in rates))
    closed, flow = (
        (valid[name] - valid["measured"]).abs() for name in ("closed form EoM 1", "gradient flow")
    )
    return [
        *made.symmetries(tables["symmetry"], "The weights before the {network} are scale invariant."),
        made.law(
            "Real GD obeys |theta|^2 <- (1 - eta lambda)^2 |theta|^2 + eta^2 |grad f|^2 at every step.",
            rates["exact law error"],
            1e-12,
        ),
        made.share(
            "The closed-form rate with one counter term, -(2 lambda + eta lambda^2) + eta |grad f|^2/|theta|^2, taken "
            "along the real path explains what gradient flow's -2 lambda misses; of that error it leaves:",
            closed / flow,
            0.5,
        ),
        made.gain(
            "Integrated from the start only, each counter term brings the norm rate nearer to real GD, wherever "
            f"eta lambda_max < 1 ({len(valid)} of {len(rates)} settings).",
            np.array([valid[f"error {b}"] for _, b in pairs]),
            np.array([valid[f"error {a}"] for a, _ in pairs]),
        ),
    ]


def pictures(tables: Tables) -> dict[str, Figure]:
    """Errors of the norm rate for each setting."""
    figures = {}
    for network, some in tables["norm-rate"].groupby("network", sort=False):
        ticks = draw.ticks(some, "learning rate", "weight decay", "eta lambda_max")
        figures[str(network).replace(" ", "-")] = draw.points(
            some,
            {name: f"error {name}" for name in MODELS if name in some},
            ticks,
            xlabel="learning rate, weight decay, largest eta lambda_max",
            ylabel="largest error of d log |theta|^2 / dt (1/time)",
            title=f"weights before {network}",
        )
    return figures
