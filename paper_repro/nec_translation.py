"""Weight-norm rates of the linear layer before the softmax (Miyagawa 2022)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

import eomdl
from paper_repro import data, models
from paper_repro.reproduction import Claim, Config, Reproduction


RATES = (1e-1, 1e-2, 1e-3)
ORDERS = (0, 1, 2, 3)
MODELS = ("gradient flow", "EoM 1", "EoM 2", "EoM 3")


def last_layer(params):
    """The block before the softmax: weights and biases."""
    return params[-1]


def symmetric_component(params, args) -> jax.Array:
    """Its component along the all-ones direction of the classes, a vector (inputs + 1,)."""
    del args
    block = last_layer(params)
    whole = jnp.concatenate([block["w"], block["b"][None]])
    return eomdl.observe.shift_component(lambda b: b, axis=-1)(whole, None)


OBSERVE = {"component": symmetric_component, "norm": eomdl.observe.block_norm(last_layer)}


def run(config: Config) -> tuple[dict[str, pd.DataFrame], list[Claim]]:
    """Measure real GD for every (learning rate, weight decay, seed); integrate the flows beside it."""
    inputs = data.load(config.data, config.subset or 256)
    steps = 20 if config.smoke else 100
    seeds = range(1 if config.smoke else config.seeds)
    grid = list(itertools.product(RATES, RATES, seeds))
    sizes = (inputs[0].shape[1], 16, 10)
    starts = [models.mlp_init(jax.random.key(seed), sizes) for seed in seeds]

    check = eomdl.symmetry.check(
        models.mlp_loss, starts[0], eomdl.symmetry.Translation(lambda p: p[-1]["w"]), args=inputs
    )
    real = _descend_all(grid, starts, steps, inputs)
    rows = []
    for i, (eta, decay, seed) in enumerate(tqdm(grid, desc="flows")):
        measured = {name: np.asarray(values[i]) for name, values in real.items()}
        row = {"learning rate": eta, "weight decay": decay, "seed": seed}
        component = eomdl.observe.decay_rate(measured["component"], eta)
        row |= {"component measured": component.mean(), "component spread": component.std()}
        norm = eomdl.observe.decay_rate(measured["norm"], eta)
        row |= {"norm measured": norm.mean(), "norm spread": norm.std()}
        loss = eomdl.WeightDecay(models.mlp_loss, decay)
        for order, model in zip(ORDERS, MODELS, strict=True):
            row[f"component {model}"] = float(eomdl.symmetry.translation_decay_rate(eta, decay, order))
            flow = eomdl.EquationOfMotion(loss, eta, order)
            path = eomdl.solve(
                flow,
                starts[seed],
                steps,
                args=inputs,
                observe=OBSERVE,
                save_params=False,
                estimate_error=False,
            )
            predicted = eomdl.observe.decay_rate(path.observables["norm"], eta)
            row[f"norm {model}"] = predicted.mean()
            row[f"norm error {model}"] = np.abs(predicted - norm).max()
        row["component exact"] = float(eomdl.symmetry.translation_decay_rate(eta, decay, None))
        rows.append(row)
    runs = pd.DataFrame(rows)
    keys = ["learning rate", "weight decay"]
    mean = runs.drop(columns="seed").groupby(keys, sort=False).mean().reset_index()
    # Spread over steps and seeds together: the law of total variance.
    for name in ("component", "norm"):
        within = (runs[f"{name} spread"] ** 2).groupby([runs[k] for k in keys], sort=False).mean()
        between = runs.groupby(keys, sort=False)[f"{name} measured"].var(ddof=0)
        mean[f"{name} spread"] = np.sqrt(within.to_numpy() + between.to_numpy())
    component = mean[[*keys, *(c for c in mean if c.startswith("component"))]]
    norm = mean[[*keys, *(c for c in mean if c.startswith("norm"))]]
    component.columns = [c.removeprefix("component ") for c in component]
    norm.columns = [c.removeprefix("norm ") for c in norm]
    return {"symmetric-component": component, "layer-norm": norm, "runs": runs}, _claims(
        component, norm, check
    )


def _descend_all(grid, starts, steps, inputs) -> dict[str, jax.Array]:
    """Real gradient descent for the whole grid in one compiled program."""
    etas, decays, which = (jnp.asarray(column) for column in zip(*grid, strict=True))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)

    @jax.jit
    @jax.vmap
    def descend(eta, decay, seed):
        params = jax.tree.map(lambda leaf: leaf[seed], stacked)
        loss = eomdl.WeightDecay(models.mlp_loss, decay)
        path = eomdl.descend(
            loss, params, optax.sgd(eta), steps, args=inputs, observe=OBSERVE, save_params=False
        )
        return path.observables

    return descend(etas, decays, which)


def _claims(component: pd.DataFrame, norm: pd.DataFrame, check) -> list[Claim]:
    error = {m: np.abs(component[m] - component["measured"]) for m in (*MODELS, "exact")}
    exact = (error["exact"] / component["measured"]).max()
    middle = component[(component["learning rate"] == 1e-2) & (component["weight decay"] == 1e-2)].iloc[0]
    measured, flow, eom = middle["measured"], middle["gradient flow"], middle["EoM 1"]
    # What each order leaves out, to leading order: eta^(n+1) lambda^(n+2) / (n + 2).
    eta, decay = component["learning rate"], component["weight decay"]
    worst = 0.0
    for order, model in zip(ORDERS, MODELS, strict=True):
        left_out = eta ** (order + 1) * decay ** (order + 2) / (order + 2)
        resolved = left_out > 100 * error["exact"]
        if resolved.any():
            worst = max(worst, np.abs(error[model] / left_out - 1)[resolved].max())
    gains = [norm[f"error {a}"] / norm[f"error {b}"] for a, b in itertools.pairwise(MODELS)]
    return [
        Claim(
            "The loss has the translation symmetry.",
            check.message + ".",
            check.holds,
        ),
        Claim(
            "Real GD decays the symmetric component at -log(1 - eta lambda)/eta, for every eta and lambda.",
            f"Largest relative difference {exact:.1e}.",
            bool(exact < 1e-9),
        ),
        Claim(
            "At eta = lambda = 0.01 the measured rate is 0.0100005 and not 0.01: one counter term accounts for it.",
            f"Measured {measured:.12f}; gradient flow is off by {abs(flow - measured):.1e}, "
            f"the equation of motion by {abs(eom - measured):.1e}.",
            bool(abs(eom - measured) < 1e-3 * abs(flow - measured) and round(measured, 7) == 0.0100005),
        ),
        Claim(
            "What n counter terms leave out is eta^(n+1) lambda^(n+2)/(n+2), wherever float64 resolves it.",
            f"Largest relative difference from it {worst:.1e} (next order: at most eta lambda = 1e-2).",
            bool(worst < 2e-2),
        ),
        Claim(
            "Each counter term brings the norm rate of the whole layer nearer to real GD, for every eta and lambda.",
            f"Smallest and largest factor: {min(g.min() for g in gains):.1f}, {max(g.max() for g in gains):.0f}.",
            bool(min(g.min() for g in gains) > 1),
        ),
    ]


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, Figure]:
    """Error of the predicted rates against the measured ones, per (eta, lambda)."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    component, norm = tables["symmetric-component"], tables["layer-norm"]
    labels = [
        f"{e:g}\n{w:g}" for e, w in zip(component["learning rate"], component["weight decay"], strict=True)
    ]
    x = np.arange(len(labels))
    for marker, model in zip("osD^", MODELS, strict=True):
        left.plot(
            x, np.abs(component[model] - component["measured"]) / component["measured"], marker, label=model
        )
        right.plot(x, norm[f"error {model}"], marker, label=model)
    left.plot(
        x, np.abs(component["exact"] - component["measured"]) / component["measured"], "kx", label="exact law"
    )
    left.set(ylabel="relative error of the decay rate", title="symmetric component of the last layer")
    right.set(ylabel="largest error of the rate over steps (1/time)", title="norm of the last layer")
    for axes in (left, right):
        axes.set(yscale="log", xlabel="learning rate (top), weight decay (bottom)")
        axes.set_xticks(x, labels)
        axes.grid(alpha=0.3)
        axes.legend()
    return {"rates": figure}


REPRODUCTION = Reproduction(
    name="nec-translation",
    title="Weight-norm rates before the softmax: gradient flow, equation of motion, real GD",
    source="Miyagawa 2022, Toward Equation of Motion for Deep Neural Networks (NeurIPS), translation-invariant layers.",
    setting=(
        "A tanh network with 16 hidden units, softmax cross entropy + L2 weight decay, full-batch gradient descent "
        "on 256 images (unless --subset), 100 steps. Rates per unit of time, -log(|v_(k+1)|/|v_k|)/eta; spread is "
        "the standard deviation over steps and seeds. The symmetric component is the part of the last layer along "
        "the all-ones direction of the classes, predicted in closed form; the layer's norm is predicted by "
        "integrating each flow from the same start, and its error is the largest over the steps."
    ),
    seconds=60,
    run=run,
    plot=plot,
)
