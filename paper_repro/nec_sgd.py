"""Step by step against SGD on minibatches (Miyagawa 2022)."""

import jax
import numpy as np
import optax
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

import eomdl
from paper_repro import data, models
from paper_repro.reproduction import Claim, Config, Reproduction


DECAY = 1e-3
LEARNING_RATE = 0.1
BATCH = 64
ORDERS = (0, 1, 2, 3)


def run(config: Config) -> tuple[dict[str, pd.DataFrame], list[Claim]]:
    """SGD over a fixed sequence of batches, and each flow over the same sequence."""
    images, labels = data.load(config.data, config.subset or 1024)
    steps = 30 if config.smoke else 200
    orders = ORDERS[:3] if config.smoke else ORDERS
    index = jax.random.randint(jax.random.key(1), (steps, min(BATCH, len(labels))), 0, len(labels))
    batches = (images[index], labels[index])
    loss = eomdl.WeightDecay(models.mlp_loss, DECAY)
    params = models.mlp_init(jax.random.key(0), (images.shape[1], 16, 10))
    observe = {"loss": loss}
    full = (images, labels)
    real = eomdl.descend(
        loss, params, optax.sgd(LEARNING_RATE), steps, args=full, batches=batches, observe=observe
    )
    flows = {}
    for order in tqdm(orders, desc="orders"):
        name = "gradient flow" if order == 0 else f"EoM {order}"
        flow = eomdl.EquationOfMotion(loss, LEARNING_RATE, order)
        flows[name] = eomdl.solve(flow, params, steps, args=full, batches=batches, observe=observe)
    comparison = eomdl.compare(real, flows)
    frame = comparison.to_frame()
    summary = pd.DataFrame(
        {
            "model": list(flows),
            "largest distance": [d.max() for d in comparison.distance.values()],
            "largest distance / travelled": [
                d.max() / comparison.travelled.max() for d in comparison.distance.values()
            ],
            "largest loss difference": [np.abs(d["loss"]).max() for d in comparison.differences.values()],
            "ODE error (estimate)": [e.max() for e in comparison.ode_error.values()],
        }
    )
    distances = summary["largest distance"].to_numpy()
    share = (summary["ODE error (estimate)"] / summary["largest distance"]).max()
    claims = [
        Claim(
            "On the same minibatches each counter term brings the flow nearer to SGD, step by step.",
            "Largest distances: " + ", ".join(f"{d:.1e}" for d in distances) + ".",
            bool(np.all(np.diff(distances) < 0)) and not comparison.notes,
        ),
        Claim(
            "The ODE solver's own error is under 1 % of that.",
            f"At most {share:.2%} (estimate).",
            bool(share < 0.01),
        ),
    ]
    return {"summary": summary, "steps": frame}, claims


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, Figure]:
    """Distance of the parameters and difference of the loss against steps."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (model, some) in enumerate(tables["steps"].groupby("model", sort=False)):
        some = some[some["step"] > 0]
        left.plot(some["step"], some["distance"], f"C{i}", label=model)
        left.plot(some["step"], some["ode_error"].where(some["ode_error"] > 0), f"C{i}:")
        right.plot(some["step"], some["difference loss"].abs(), f"C{i}", label=model)
    left.plot([], [], "k:", label="ODE error (estimate)")
    left.set(ylabel="distance to SGD")
    right.set(ylabel="|loss - loss of SGD| on the full data")
    for axes in (left, right):
        axes.set(xlabel="step", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    return {"sgd": figure}


REPRODUCTION = Reproduction(
    name="nec-sgd",
    title="SGD on minibatches, step by step",
    source="Miyagawa 2022 (NeurIPS), with each step following the equation of motion of its own minibatch.",
    setting=(
        "A tanh network with 16 hidden units, cross entropy + L2 weight decay 1e-3, SGD with learning rate 0.1 on "
        "batches of 64 drawn from 1,024 images, 200 steps; the loss is that of all images."
    ),
    seconds=25,
    run=run,
    plot=plot,
)
