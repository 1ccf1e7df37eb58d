"""Scale-invariant weights under SGD settle at an equilibrium norm, and turn by a fixed angle per step.

Weights (pixels x 16) before batch norm in training mode, then tanh and a linear head; cross entropy + L2 weight decay. SGD with batches of
16 of 512 images, eta = 0.1, lambda = 0.05, 600 steps, the flows on the same batches (ODE tolerances 1e-6).
"""

from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pandas as pd
from matplotlib.figure import Figure

import eomdl
from paper_repro import claims as made, networks, pictures as draw, runs
from paper_repro.harness import Images, Tables


SOURCE = (
    "Miyagawa 2022 (NeurIPS), scale-invariant layers; equilibrium as in Wan et al. 2021, "
    "Spherical Motion Dynamics (NeurIPS)."
)
SECONDS = 30
MAIN = True
MODELS = ("gradient flow", "EoM 1", "EoM 2")
RATE, DECAY, BATCH = 0.1, 0.05, 16
TOLERANCE = 1e-6
NORM = eomdl.observe.block_norm(networks.hidden)


class Size(NamedTuple):
    """Images and steps."""

    images: int = 512
    steps: int = 600


SMOKE = Size(steps=100)


def measure(size: Size, images: Images) -> Tables:
    """One long SGD run, the flows on the same batches, and the balance."""
    (inputs, labels), steps, bare = images(size.images), size.steps, networks.batch_norm_loss
    start = networks.normalized_init(jax.random.key(0), inputs.shape[1], 16, 10)
    index = jax.random.randint(jax.random.key(7), (steps, BATCH), 0, len(labels))
    batches, loss = (inputs[index], labels[index]), eomdl.WeightDecay(bare, DECAY)
    real = eomdl.descend(loss, start, optax.sgd(RATE), steps, batches=batches, progress=True)
    weights = networks.hidden(real.params)
    norm = np.linalg.norm(np.asarray(weights).reshape(steps + 1, -1), axis=1)
    before = jax.tree.map(lambda leaf: leaf[:-1], real.params)
    gradient = np.asarray(jax.jit(jax.vmap(networks.hidden_gradient_norm(bare)))(before, batches))
    options: dict[str, Any] = {"batches": batches, "observe": {"norm": NORM}, "save_params": False}
    options |= {"estimate_error": False, "rtol": TOLERANCE, "atol": TOLERANCE, "progress": True}
    paths = runs.solve_all(runs.counter_terms(loss, RATE, range(len(MODELS))), start, steps, **options)
    curve = {
        "step": real.steps,
        "SGD": norm,
        "angle": np.append(eomdl.observe.angle_per_step(weights), np.nan),
    }
    for name, path in paths.items():
        curve[name] = np.pad(
            path.observables["norm"], (0, steps + 1 - len(path.steps)), constant_values=np.nan
        )
    # The balance at each step, with the gradient's mean square over the last 50 batches.
    square = pd.Series((norm[:-1] * gradient) ** 2)
    mean = np.sqrt(square.rolling(50, min_periods=1).mean().to_numpy())
    balance = np.asarray(eomdl.symmetry.equilibrium_norm(1.0, mean, RATE, DECAY))
    curve["equilibrium"] = np.append(balance, np.nan)
    tail = slice(steps // 2, None)
    predicted = float(eomdl.symmetry.equilibrium_norm(1.0, np.sqrt(square[tail].mean()), RATE, DECAY))
    angle, turn = curve["angle"][:-1][tail], float(eomdl.symmetry.equilibrium_angle(RATE, DECAY))
    rows = [
        ("norm", norm[tail].mean(), norm[tail].std(), predicted),
        ("angle per step (root mean square)", np.sqrt(np.mean(angle**2)), angle.std(), turn),
        *((f"norm, {name}", curve[name][tail].mean(), curve[name][tail].std(), predicted) for name in MODELS),
    ]
    columns = ["second half of the run", "mean", "spread", "predicted at equilibrium"]
    return {"equilibrium": pd.DataFrame(rows, columns=columns), "approach": pd.DataFrame(curve)}


def claims(tables: Tables) -> list[made.Claim]:
    """The norm, the angle, and which flows have an equilibrium."""
    table = tables["equilibrium"].set_index("second half of the run")
    mean = table["mean"]
    sgd, flow, first, second = (mean[name] for name in ("norm", *(f"norm, {model}" for model in MODELS)))
    laws = {
        "norm": "The norm settles at the equilibrium r^4 = eta |grad f|^2 r^2 / (lambda (2 - eta lambda)).",
        "angle per step (root mean square)": "There the weights turn by arccos(1 - eta lambda) a step.",
    }
    return [
        *(
            made.close(
                text, mean[row], table.loc[row, "predicted at equilibrium"], within=0.02, full_only=True
            )
            for row, text in laws.items()
        ),
        made.Claim(
            "Gradient flow has no equilibrium: its norm decays on. With counter terms the flow settles, and each term "
            "brings it nearer to SGD (not all the way: eta lambda_max of a batch is near 1 there).",
            f"Mean norm over the second half: SGD {sgd:.3f}, gradient flow {flow:.3f}, EoM 1 {first:.3f}, "
            f"EoM 2 {second:.3f}.",
            bool(flow < 0.5 * sgd < first and abs(second - sgd) < abs(first - sgd)),
            full_only=True,
        ),
    ]


def pictures(tables: Tables) -> dict[str, Figure]:
    """Norm and angle along the run."""
    long = tables["approach"]
    norm, axes = draw.panel("step", "norm of the weights", "approach to the equilibrium norm", yscale="log")
    for style, name in zip(("k-", "C0-", "C1-", "C2--", "r:"), ("SGD", *MODELS, "equilibrium"), strict=True):
        axes.plot(long["step"], long[name], style, label=name, lw=2.5 if name == "SGD" else 1.5)
    angle, axes = draw.panel("step", "angle per step (radians)", "angular update")
    axes.plot(long["step"], long["angle"], "k-", lw=0.6, label="SGD")
    axes.axhline(float(np.arccos(1 - RATE * DECAY)), color="r", ls=":", label="arccos(1 - eta lambda)")
    return {"norm": draw.add_legend(norm), "angle": draw.add_legend(angle)}
