"""Weight-norm rates before the softmax: gradient flow, equation of motion, real GD.

A tanh network with 16 hidden units, softmax cross entropy + L2 weight decay, full-batch gradient descent on 256 images (unless --subset),
100 steps. Rates per unit of time, -log(|v_(k+1)|/|v_k|)/eta; spread is the standard deviation over steps and seeds. The symmetric
component is the part of the last layer along the all-ones direction of the classes, predicted in closed form. The layer's norm is
predicted by integrating each flow from the same start; its error is the largest over the steps.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import eomdl
from paper_repro import claims as made, networks, pictures as draw, runs
from paper_repro.harness import Images, Tables


SOURCE = "Miyagawa 2022, Toward Equation of Motion for Deep Neural Networks (NeurIPS), translation-invariant layers."
SECONDS = 60
MAIN = True
RATES = (1e-1, 1e-2, 1e-3)
MODELS = ("gradient flow", "EoM 1", "EoM 2", "EoM 3")
KEYS = ["learning rate", "weight decay"]


class Size(NamedTuple):
    """Images, steps of every run, initializations."""

    images: int = 256
    steps: int = 100
    seeds: int = 3


SMOKE = Size(steps=20, seeds=1)


def weights(params: Any) -> jax.Array:
    """Those of the last layer."""
    return params[-1]["w"]


def symmetric_component(params: Any, args: Any) -> jax.Array:
    """The last layer's component along the all-ones direction of the classes, a vector (inputs + 1,)."""
    whole = jnp.concatenate([weights(params), params[-1]["b"][None]])
    return eomdl.observe.shift_component(lambda block: block, axis=-1)(whole, args)


OBSERVE = {"component": symmetric_component, "norm": eomdl.observe.block_norm(lambda params: params[-1])}


def measure(size: Size, images: Images) -> Tables:
    """Real GD for every (learning rate, weight decay, seed), and the flows beside it."""
    inputs, loss = images(size.images), networks.mlp_loss
    sizes = (inputs[0].shape[1], 16, 10)
    starts = [networks.mlp_init(jax.random.key(seed), sizes) for seed in range(size.seeds)]
    check = eomdl.symmetry.check(loss, starts[0], eomdl.symmetry.Translation(weights), args=inputs)
    rows = []
    for setting in runs.descend_grid(loss, starts, RATES, size.steps, inputs, lambda decayed: OBSERVE):
        eta, decay = setting.eta, setting.decay
        component, norm = (eomdl.observe.decay_rate(setting.observed[name], eta) for name in OBSERVE)
        row = {"learning rate": eta, "weight decay": decay, "seed": setting.seed}
        row |= {"component measured": component.mean(), "component spread": component.std()}
        row |= {"norm measured": norm.mean(), "norm spread": norm.std()}
        law = eomdl.symmetry.translation_decay_rate
        row |= {f"component {name}": float(law(eta, decay, order)) for order, name in enumerate(MODELS)}
        row["component exact"] = float(law(eta, decay, None))
        flows = runs.norm_rates(setting, loss, range(len(MODELS)), size.steps, inputs, OBSERVE["norm"])
        for name, predicted in flows.items():
            row |= {f"norm {name}": predicted.mean(), f"norm error {name}": np.abs(predicted - norm).max()}
        rows.append(row)
    table = pd.DataFrame(rows)
    return {
        "symmetric-component": _mean(table, "component"),
        "layer-norm": _mean(table, "norm"),
        "runs": table,
        "symmetry": pd.DataFrame([{"network": "", "message": check.verdict, "holds": check.holds}]),
    }


def _mean(table: pd.DataFrame, what: str) -> pd.DataFrame:
    """Means over seeds; spread over steps and seeds together, by the law of total variance."""
    groups = table.groupby(KEYS, sort=False)
    mean = groups.mean().filter(like=f"{what} ")
    within = (table[f"{what} spread"] ** 2).groupby([table[k] for k in KEYS], sort=False).mean()
    mean[f"{what} spread"] = np.sqrt(within + groups[f"{what} measured"].var(ddof=0))
    return mean.rename(columns=lambda c: c.removeprefix(f"{what} ")).reset_index()


def claims(tables: Tables) -> list[made.Claim]:
    """The closed-form law, what each order leaves out of it, and the norm of the whole layer."""
    component, norm = tables["symmetric-component"], tables["layer-norm"]
    error = {name: np.abs(component[name] - component["measured"]) for name in (*MODELS, "exact")}
    middle = component[(component["learning rate"] == 1e-2) & (component["weight decay"] == 1e-2)].iloc[0]
    measured, flow, eom = middle["measured"], middle["gradient flow"], middle["EoM 1"]
    eta, decay = component["learning rate"], component["weight decay"]
    off = []
    for order, model in enumerate(MODELS):
        left_out = eta ** (order + 1) * decay ** (order + 2) / (order + 2)
        off.append(np.abs(error[model] / left_out - 1)[left_out > 100 * error["exact"]])
    return [
        *made.symmetries(tables["symmetry"], "The loss has the translation symmetry."),
        made.law(
            "Real GD decays the symmetric component at -log(1 - eta lambda)/eta, for every eta and lambda.",
            error["exact"] / component["measured"],
            1e-9,
            "Largest relative difference",
        ),
        made.Claim(
            "At eta = lambda = 0.01 the measured rate is 0.0100005 and not 0.01: one counter term accounts for it.",
            f"Measured {measured:.12f}; gradient flow is off by {abs(flow - measured):.1e}, "
            f"the equation of motion by {abs(eom - measured):.1e}.",
            bool(abs(eom - measured) < 1e-3 * abs(flow - measured) and round(measured, 7) == 0.0100005),
        ),
        made.law(
            "What n counter terms leave out is eta^(n+1) lambda^(n+2)/(n+2), wherever float64 resolves it.",
            pd.concat(off),
            2e-2,
            "Largest relative difference (the next order is at most eta lambda = 1e-2)",
        ),
        made.gain(
            "Each counter term brings the norm rate of the whole layer nearer to real GD, for every eta and lambda.",
            np.array([norm[f"error {b}"] for _, b in itertools.pairwise(MODELS)]),
            np.array([norm[f"error {a}"] for a, _ in itertools.pairwise(MODELS)]),
        ),
    ]


def pictures(tables: Tables) -> dict[str, Figure]:
    """Errors of the predicted rates for each (eta, lambda)."""
    component, norm = tables["symmetric-component"], tables["layer-norm"]
    off = {name: np.abs(component[name] / component["measured"] - 1) for name in (*MODELS, "exact")}
    ticks = draw.ticks(component, "learning rate", "weight decay")
    style: dict[str, Any] = {"ticks": ticks, "xlabel": "learning rate (top), weight decay (bottom)"}
    return {
        "component": draw.points(
            pd.DataFrame(off),
            {name: name for name in MODELS} | {"exact law": "exact"},
            ylabel="relative error of the decay rate",
            title="symmetric component of the last layer",
            **style,
        ),
        "norm": draw.points(
            norm,
            {name: f"error {name}" for name in MODELS},
            ylabel="largest error of the rate over steps (1/time)",
            title="norm of the last layer",
            **style,
        ),
    }
