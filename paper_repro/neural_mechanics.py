"""Conservation laws of symmetric losses, and how discreteness breaks them (Kunin et al. 2021)."""

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


DECAYS = (0.0, 1e-4, 1e-3)
RATE = 0.05
MOMENTA = (0.0, 0.9)
BATCH = 64
STEP = {0.0: RATE, 0.9: 0.1 * RATE}  # learning rates: the same time a step, lr/(1 - beta)
TURN_1_POINT = "angle, largest relative error, 1 point, integrated"  # no better than a first step


def norm_and_head(features, params, labels):
    """Batch norm with gain and shift, ReLU, mean over positions if there are any, softmax."""
    axes = tuple(range(features.ndim - 1))
    centred = features - jnp.mean(features, axis=axes, keepdims=True)
    normal = centred / jnp.sqrt(jnp.mean(centred**2, axis=axes, keepdims=True))
    hidden = jax.nn.relu(normal * params["norm"]["gain"] + params["norm"]["shift"])
    if hidden.ndim == 3:
        hidden = hidden.reshape(len(hidden), 4, -1, hidden.shape[-1]).mean(2).reshape(len(hidden), -1)
    head = params["head"]["w"]
    return models.cross_entropy(hidden @ head.reshape(-1, head.shape[-1]) + params["head"]["b"], labels)


def mlp_loss(params, inputs) -> jax.Array:
    """Linear, batch norm, ReLU, linear."""
    images, labels = inputs
    return norm_and_head(images @ params["first"], params, labels)


def cnn_loss(params, inputs) -> jax.Array:
    """Convolution, batch norm, ReLU, mean over four bands of the image, linear."""
    images, labels = inputs
    return norm_and_head(models.patches(images) @ params["first"], params, labels)


LOSSES = {"MLP": mlp_loss, "CNN": cnn_loss}


def start(network: str, pixels: int) -> dict:
    """Weights normal with variance 1/fan-in; `first` has its units along axis 1, `head` along axis -2."""
    rng = np.random.default_rng(0)
    fan_in, units, bands = (pixels, 24, 1) if network == "MLP" else (9, 8, 4)

    def array(*shape, scale=1.0, mean=0.0):
        return jnp.asarray(mean + scale * rng.normal(size=shape), jnp.result_type(float))

    head = array(*([bands] if bands > 1 else []), units, 10, scale=(units * bands) ** -0.5)
    return {
        "first": array(fan_in, units, scale=fan_in**-0.5),
        "norm": {"gain": array(units, scale=0.2, mean=1.0), "shift": array(units, scale=0.2)},
        "head": {"w": head, "b": array(10, scale=0.3)},
    }


CHARGES = {
    "translation": eomdl.symmetry.Translation("head.w"),
    "scale": eomdl.symmetry.Scaling([("first", 1)]),
    "rescale": eomdl.symmetry.Scaling([("norm.gain", 0), ("norm.shift", 0)], [("head.w", -2)]),
}


def run(config: Config) -> tuple[dict[str, pd.DataFrame], list[Claim]]:
    """Every network, decay and momentum: the real run, its flows on the same batches, and the charges of all."""
    images, labels = data.load(config.data, config.subset or 1024)
    steps = 20 if config.smoke else 200
    index = np.random.default_rng(1).integers(0, len(labels), (steps, BATCH))
    batches = (images[index], labels[index])
    networks = ("MLP",) if config.smoke else tuple(LOSSES)
    symmetries = _symmetries(networks, (images[:256], labels[:256]))
    errors, curves, turning = [], [], []
    cases = itertools.product(networks, MOMENTA, DECAYS[::2] if config.smoke else DECAYS)
    optimizers = {beta: optax.sgd(STEP[beta], momentum=beta or None) for beta in MOMENTA}
    for network, beta, decay in tqdm(list(cases), desc="runs"):
        loss = eomdl.WeightDecay(LOSSES[network], decay)
        params = start(network, images.shape[1])
        real = eomdl.descend(loss, params, optimizers[beta], steps, batches=batches)
        paths = {
            name: eomdl.solve(
                flow, params, steps, batches=batches, estimate_error=False, rtol=1e-5, atol=1e-7
            )
            for name, flow in _flows(loss, optimizers[beta], beta, network == "CNN" or config.smoke).items()
        }
        key = {"network": network, "momentum": beta, "weight decay": decay}
        for name, symmetry in CHARGES.items():
            found = eomdl.symmetry.conservation(
                real,
                symmetry,
                learning_rate=STEP[beta],
                weight_decay=decay,
                momentum=beta,
                models=paths,
            )
            size = np.abs(found.charge).max()
            for prediction, error in found.errors.items():
                kind = "law" if prediction in found.laws else "integrated flow"
                errors.append(
                    key
                    | {
                        "charge": name,
                        "kind": kind,
                        "prediction": prediction,
                        "largest error": error.max(),
                        "charge changes by": found.change,
                        "error / largest charge": error.max() / size,
                    }
                )
            curves.append(found.to_frame().assign(**key, charge=name))
        turning += [
            _turning(path, STEP[beta], beta).assign(**key, run=name)
            for name, path in {"real run": real, **paths}.items()
        ]
    table, turns = pd.DataFrame(errors), pd.concat(turning)
    tables = {
        "errors": table,
        "symmetries": symmetries,
        "angles": _angles(turns),
        "curves": pd.concat(curves),
        "turning": turns,
    }
    return tables, _claims(table, symmetries, tables["angles"], config.smoke)


def _flows(loss, optimizer, beta: float, few: bool) -> dict[str, eomdl.AbstractFlow]:
    """The equation of motion; with momentum, the logarithm of the heavy-ball step. (Gradient flow obeys its law.)"""
    if beta == 0:
        return {
            f"EoM {n}, integrated": eomdl.EquationOfMotion(loss, RATE, n) for n in ((1,) if few else (1, 2))
        }
    step_map = eomdl.optimizer_step(loss, optimizer)
    return {
        f"{k} point{'s' * (k > 1)}, integrated": eomdl.InterpolatingFlow(step_map, STEP[beta], k)
        for k in ((2,) if few else (1, 2))
    }


def _symmetries(networks, inputs) -> pd.DataFrame:
    """What is found by trying, without being told."""
    rows = []
    for network in networks:
        params = start(network, inputs[0].shape[1])
        for check in eomdl.symmetry.propose(LOSSES[network], params, inputs):
            rows.append((network, check.symmetry.label, check.gradient, check.value))
    return pd.DataFrame(
        rows, columns=["network", "symmetry", "cosine with the gradient", "change of the loss"]
    )


def _turning(path, eta: float, beta: float) -> pd.DataFrame:
    """Angle per step and effective learning rate of the scale-invariant block along a run."""
    block = path.params["first"]
    norm = np.linalg.norm(np.asarray(block).reshape(len(block), -1), axis=1)
    return pd.DataFrame(
        {
            "step": path.steps,
            "angle per step": np.append(eomdl.observe.angle_per_step(block), np.nan),
            "effective learning rate": np.asarray(eomdl.symmetry.effective_learning_rate(norm, eta, beta)),
        }
    )


def _angles(turns: pd.DataFrame) -> pd.DataFrame:
    """Where each run begins and ends, against the equilibrium, and how far the flows are off."""
    rows = []
    keys = ["network", "momentum", "weight decay"]
    for key, case in turns.groupby(keys, sort=False):
        real = case[case["run"] == "real run"]
        angle, rate = real["angle per step"].to_numpy()[:-1], real["effective learning rate"].to_numpy()
        tenth = max(len(angle) // 10, 1)
        row = dict(zip(keys, key, strict=True)) | {
            "angle per step, first tenth": angle[:tenth].mean(),
            "angle per step, last tenth": angle[-tenth:].mean(),
            "angle at equilibrium": float(eomdl.symmetry.equilibrium_angle(STEP[key[1]], key[2], key[1])),
            "effective learning rate, start": rate[0],
            "effective learning rate, end": rate[-1],
        }
        for name, model in case[case["run"] != "real run"].groupby("run", sort=False):
            off = np.abs(model["angle per step"].to_numpy()[:-1] / angle - 1)
            row[f"angle, largest relative error, {name}"] = off.max()
        rows.append(row)
    return pd.DataFrame(rows)


def _claims(table: pd.DataFrame, symmetries: pd.DataFrame, angles: pd.DataFrame, smoke: bool) -> list[Claim]:
    def worst(prediction: str, charges=("scale", "rescale")) -> pd.DataFrame:
        return table[(table["prediction"] == prediction) & table["charge"].isin(charges)]

    exact = table[table["prediction"] == "exact"]["error / largest charge"].max()
    keys = ["network", "momentum", "weight decay", "charge"]

    def gain(better: str, base: str) -> float:
        """The least factor by which the better one is nearer, over all cases."""
        both = worst(better).set_index(keys)["largest error"], worst(base).set_index(keys)["largest error"]
        return float((both[1] / both[0]).dropna().min())

    free = worst("exact")[worst("exact")["weight decay"] == 0]
    change = free["charge changes by"] / (free["largest error"] / free["error / largest charge"])
    above = float((free["charge changes by"] / free["largest error"]).min()) if len(free) else 0.0
    first = gain("first order", "gradient flow")
    expected = 4 * symmetries["network"].nunique()
    best = {name: "gradient flow" for name in ("EoM 1, integrated", "2 points, integrated")}
    present = [name for name in best if (table["prediction"] == name).any()]
    gains = {name.removesuffix(", integrated"): gain(name, best[name]) for name in present}
    turned = (
        angles.filter(like="largest relative error").drop(columns=TURN_1_POINT, errors="ignore").max().max()
    )
    long = None if smoke else True  # what takes more steps than the smoke size has
    alone = angles[angles["weight decay"] == 0]
    falls = alone["effective learning rate, end"] / alone["effective learning rate, start"]
    return [
        Claim(
            "Told nothing, the numerical test finds the softmax's translations, the scale symmetry of the weights before batch norm "
            "and the rescale symmetry of its gain and shift against the layer after it.",
            f"{len(symmetries)} symmetries, largest cosine with the gradient {symmetries.iloc[:, 2].max():.0e}.",
            len(symmetries) == expected and bool(symmetries.iloc[:, 2].max() < 1e-10),
        ),
        Claim(
            "The exact laws of heavy ball hold for every charge over the whole run, with and without momentum, on minibatches.",
            f"Largest error relative to the charge {exact:.1e}.",
            bool(exact < 1e-10),
        ),
        Claim(
            "Without decay gradient flow conserves the scale and rescale charges; the real run does not.",
            f"They change by {change.min():.1e} to {change.max():.1e} of the charge, at least {above:.0e} times the rounding of the exact law.",
            long and above > 1e6,
        ),
        Claim(
            "The first-order law along the real path (one counter term; with momentum the memory factor) explains it.",
            f"At least {first:.1f} times nearer than gradient flow's.",
            long and first > 2,
        ),
        Claim(
            "Integrated from the start alone, one counter term brings the charges nearer than gradient flow; with momentum so "
            "do two points of the step map's logarithm.",
            "At least " + " and ".join(f"{g:.1f} times ({name})" for name, g in gains.items()) + ".",
            min(gains.values()) > 1,
        ),
        Claim(
            "Discreteness lets the scale-invariant weights grow, so their effective learning rate falls on its own.",
            f"Without decay to {falls.min():.3f} to {falls.max():.3f} of its start.",
            long and bool(falls.max() < 1),
        ),
        Claim(
            "Counter terms, and two points of the logarithm, predict by what angle the scale-invariant weights turn at every step.",
            f"Largest relative error of a step's angle {turned:.1%}.",
            bool(turned < 0.1),
        ),
    ]


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, Figure]:
    """A figure a network: charges and errors of their predictions, largest decay, a row a momentum."""
    figures = {}
    colors = {
        "exact": "C2",
        "gradient flow": "C0",
        "first order": "C1",
        "damped oscillator": "C5",
        "EoM 1, integrated": "C1",
        "EoM 2, integrated": "C3",
        "1 point, integrated": "C4",
        "2 points, integrated": "C3",
    }
    curves = tables["curves"]
    curves = curves[curves["weight decay"] == curves["weight decay"].max()]
    for network, of_network in curves.groupby("network", sort=False):
        momenta = list(dict.fromkeys(of_network["momentum"]))
        figure = Figure(figsize=(15, 7.0 * len(momenta)), layout="constrained")
        panels = figure.subplots(2 * len(momenta), len(CHARGES), squeeze=False)
        for i, beta in enumerate(momenta):
            for column, name in enumerate(CHARGES):
                one = of_network[(of_network["momentum"] == beta) & (of_network["charge"] == name)].dropna(
                    axis=1
                )
                top, bottom = panels[2 * i, column], panels[2 * i + 1, column]
                top.plot(one["step"], one["measured"], "k", lw=3, alpha=0.4, label="measured")
                for prediction, color in colors.items():
                    if prediction not in one:
                        continue
                    style = {
                        "color": color,
                        "label": prediction,
                        "ls": ":" if "integrated" in prediction else "--",
                    }
                    top.plot(one["step"], one[prediction], **style)
                    error = one[f"error {prediction}"]
                    bottom.plot(one["step"], error.where(error > 0), **style)
                top.set(title=f"{name}, momentum {beta}", ylabel="charge, sum over units")
                bottom.set(ylabel="error (norm over units)", yscale="log")
                for axes in (top, bottom):
                    axes.set(xlabel="step")
                    axes.grid(alpha=0.3)
                    axes.legend(fontsize=7)
        figures[f"charges-{network.lower()}"] = figure
    figures["turning"] = _plot_turning(tables["turning"])
    return figures


def _plot_turning(turns: pd.DataFrame) -> Figure:
    """Angle per step and effective learning rate, largest decay, a column a network and momentum."""
    turns = turns[turns["weight decay"] == turns["weight decay"].max()]
    cases = list(turns.groupby(["network", "momentum"], sort=False))
    figure = Figure(figsize=(4.2 * len(cases), 7), layout="constrained")
    panels = figure.subplots(2, len(cases), squeeze=False)
    for (angle, rate), ((network, beta), case) in zip(panels.T, cases, strict=True):
        for i, (name, one) in enumerate(case.groupby("run", sort=False)):
            style = {"color": f"C{i}", "ls": "-" if i == 0 else "--", "label": name}
            angle.plot(one["step"], one["angle per step"], **style)
            rate.plot(one["step"], one["effective learning rate"], **style)
        decay = case["weight decay"].iloc[0]
        angle.axhline(
            float(eomdl.symmetry.equilibrium_angle(STEP[beta], decay, beta)),
            color="k",
            ls=":",
            label="equilibrium",
        )
        angle.set(
            title=f"{network}, momentum {beta}, decay {decay:g}", ylabel="angle per step [rad]", yscale="log"
        )
        rate.set(ylabel="effective learning rate [time]")
        for axes in (angle, rate):
            axes.set(xlabel="step")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
    return figure


REPRODUCTION = Reproduction(
    name="neural-mechanics",
    title="Conservation laws of symmetric losses, broken by discreteness",
    source="Kunin et al. 2021, Neural Mechanics (arXiv 2012.04728).",
    setting=(
        "An MLP (24 units) and a CNN (8 channels) with batch norm (gain, shift, no epsilon), ReLU and softmax; SGD on batches of 64 "
        "from 1,024 images, 200 steps; weight decay 0, 1e-4, 1e-3; learning rate 0.05, and 0.005 with momentum 0.9. Every flow "
        "follows the same batches. Charges: the head's columns' sum, the squared norm of each unit's weights, gain^2 + shift^2 "
        "against the squared norm out of each unit."
    ),
    seconds=80,
    run=run,
    plot=plot,
)
