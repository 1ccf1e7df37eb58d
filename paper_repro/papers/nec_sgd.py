"""SGD on minibatches, step by step.

A tanh network with 16 hidden units, cross entropy + L2 weight decay 1e-3, SGD with learning rate 0.1 on batches of 64 drawn from 1,024
images, 200 steps. Each step of a flow follows the equation of motion of its own minibatch. The loss is that of all images.
"""

from typing import Any, NamedTuple

import jax
import optax
from matplotlib.figure import Figure

import eomdl
from paper_repro import claims as made, networks, pictures as draw, runs
from paper_repro.harness import Images, Tables


SOURCE = "Miyagawa 2022 (NeurIPS), with each step following the equation of motion of its own minibatch."
SECONDS = 30
MAIN = True
LEARNING_RATE, DECAY, BATCH = 0.1, 1e-3, 64


class Size(NamedTuple):
    """Images, steps and counter terms (0 to `orders` - 1)."""

    images: int = 1024
    steps: int = 200
    orders: int = 4


SMOKE = Size(steps=30, orders=3)


def measure(size: Size, images: Images) -> Tables:
    """SGD over a fixed sequence of batches, and each flow over the same sequence."""
    inputs, labels = data = images(size.images)
    index = jax.random.randint(jax.random.key(1), (size.steps, min(BATCH, len(labels))), 0, len(labels))
    loss = eomdl.WeightDecay(networks.mlp_loss, DECAY)
    params = networks.mlp_init(jax.random.key(0), (inputs.shape[1], 16, 10))
    options: dict[str, Any] = {
        "batches": (inputs[index], labels[index]),
        "args": data,
        "observe": {"loss": loss},
    }
    real = eomdl.descend(loss, params, optax.sgd(LEARNING_RATE), size.steps, **options)
    flows = runs.counter_terms(loss, LEARNING_RATE, range(size.orders))
    comparison = eomdl.compare(real, runs.solve_all(flows, params, size.steps, **options))
    return {"summary": runs.summary(comparison), "steps": comparison.to_frame()}


def claims(tables: Tables) -> list[made.Claim]:
    """Each counter term helps; the ODE solver's error does not count."""
    some = tables["summary"]
    return [
        made.falling(
            "On the same minibatches each counter term brings the flow nearer to SGD, step by step.",
            runs.by(some, "model", "largest distance"),
            "Largest distances",
            runs.notes(some),
        ),
        made.share(
            "The ODE solver's own error is under 1 % of that.",
            some["ODE error"] / some["largest distance"],
            0.01,
        ),
    ]


def pictures(tables: Tables) -> dict[str, Figure]:
    """Distance of the parameters and difference of the loss against steps."""
    steps = tables["steps"].assign(loss=tables["steps"]["difference loss"].abs())
    style: dict[str, Any] = {"xscale": "linear", "marker": ""}
    return {
        "distance": draw.errors(
            steps, "step", "distance", ode="ode_error", ylabel="distance to SGD", **style
        ),
        "loss": draw.errors(steps, "step", "loss", ylabel="|loss - loss of SGD| on all images", **style),
    }
