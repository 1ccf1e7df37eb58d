"""The gradient points towards the end of the path, all along it (Guille-Escuret et al. 2024)."""

import jax
import numpy as np
import optax
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

import eomdl
from paper_repro import data, models
from paper_repro.reproduction import Claim, Config, Reproduction


BATCHES = (8, 32, 128, 512)
WIDTHS = (8, 32, 128)
BASE = 32  # batch size and width of all runs that do not vary it
OPTIMIZERS = {
    "SGD": optax.sgd(0.1),
    "momentum": optax.sgd(0.02, momentum=0.9),
    "Adam": optax.adam(3e-3),
}
FLOW_RATE = 0.2
NORM = 4.0  # root mean square over images of |x|
TENTHS = slice(1, 9)  # of a run, whose first and last tenth are left out of "stable"


def run(config: Config) -> tuple[dict[str, pd.DataFrame], list[Claim]]:
    """Two passes over every run of the sweeps; then gradient descent beside its flows."""
    images, labels = data.load(config.data, config.subset or 1024)
    # To the size of the digits, so that one learning rate fits any data.
    images = NORM * images / np.sqrt(np.mean(np.sum(np.square(images), axis=1)))
    steps = 60 if config.smoke else 400
    seeds = range(1 if config.smoke else config.seeds)
    sizes = BATCHES[::3] if config.smoke else BATCHES
    cases = [("batch size", b, b, BASE, "SGD", False, seed) for b in sizes for seed in seeds]
    if not config.smoke:
        cases += [("width", w, BASE, w, "SGD", False, 0) for w in WIDTHS]
        cases += [
            ("normalization", name, BASE, BASE, "SGD", name == "layer norm", 0)
            for name in ("none", "layer norm")
        ]
        cases += [("optimizer", name, BASE, BASE, name, False, 0) for name in OPTIMIZERS]
    frames = []
    for sweep, value, batch, width, optimizer, normal, seed in tqdm(cases, desc="runs"):
        loss = models.layer_norm_loss if normal else models.mlp_loss
        pixels, key = images.shape[1], jax.random.key(seed)
        params = (
            models.normalized_init(key, pixels, width, 10)
            if normal
            else models.mlp_init(key, (pixels, width, 10))
        )
        index = np.random.default_rng(seed).integers(0, len(labels), (steps, batch))
        batches = (images[index], labels[index])

        def path(loss=loss, params=params, optimizer=optimizer, batches=batches, **options):
            return eomdl.descend(
                loss,
                params,
                OPTIMIZERS[optimizer],
                steps,
                args=(images, labels),
                batches=batches,
                save_steps=max(steps // 100, 1),
                **options,
            )

        studies = eomdl.geometry.secants(path, {"full batch": loss, "minibatch": eomdl.on_batch(loss)})
        frames += [
            study.to_frame().assign(sweep=sweep, value=str(value), seed=seed, gradient=name)
            for name, study in studies.items()
        ]
    curves = pd.concat(frames)
    table = _summary(curves, steps)
    flows, parting = _flows(config, images, labels, 40 if config.smoke else 200)
    tables = {"summary": table, "flows": parting, "curves": curves, "flow-curves": flows}
    return tables, _claims(table, parting)


def _summary(curves: pd.DataFrame, steps: int) -> pd.DataFrame:
    """One row a run: gamma by tenths of the run (means), against the random directions."""
    rows = []
    keys = ["sweep", "value", "seed", "gradient"]
    for key, one in curves.groupby(keys, sort=False):
        one = one[one["gamma"].notna()]
        tenth = np.minimum((10 * one["steps"] / steps).astype(int), 9)
        means = one["gamma"].groupby(tenth).mean().to_numpy()
        rows.append(
            dict(zip(keys, key, strict=True))
            | {
                "gamma": one["gamma"].mean(),
                "smallest before the last tenth": one["gamma"][tenth < 9].min(),
                "smallest in it": one["gamma"][tenth == 9].min(),
                "smallest of tenths": means.min(),
                "largest / smallest of middle tenths": means[TENTHS].max() / means[TENTHS].min(),
                "random directions": np.sqrt((one["random_gamma"] ** 2).mean()),
                "RSI": one["rsi"].median(),
                "EB": one["eb"].median(),
                "RSI / EB^2": one["learning_rate"].median(),
            }
        )
    return pd.DataFrame(rows)


def _flows(config: Config, images, labels, steps) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Gradient descent on the full batch, and its flows, each towards its own end."""
    inputs = (images[:512], labels[:512])
    loss = models.mlp_loss
    params = models.mlp_init(jax.random.key(0), (images.shape[1], BASE, 10))
    optimizer = optax.sgd(FLOW_RATE)
    common = {"args": inputs, "save_steps": max(steps // 100, 1)}

    def real(**options):
        return eomdl.descend(loss, params, optimizer, steps, **common, **options)

    runs = {"GD": eomdl.geometry.secants(real, {"full": loss})["full"]}
    for order in tqdm((0, 1) if config.smoke else (0, 1, 2), desc="flows"):
        flow = eomdl.EquationOfMotion(loss, FLOW_RATE, order)

        def model(flow=flow, **options):
            return eomdl.solve(flow, params, steps, estimate_error=False, **common, **options)

        runs["gradient flow" if order == 0 else f"EoM {order}"] = eomdl.geometry.secants(
            model, {"full": loss}
        )["full"]
    rows = []
    for name, study in runs.items():
        if name != "GD":
            difference = np.abs(study.gamma - runs["GD"].gamma)
            parted = study.parts_from(runs["GD"], 1e-3)
            rows.append(
                {
                    "model": name,
                    "largest difference of gamma": np.nanmax(difference),
                    "largest relative difference of RSI": np.nanmax(np.abs(study.rsi / runs["GD"].rsi - 1)),
                    "parts from GD by 1e-3 at step": "never" if parted is None else str(parted),
                    "together within 1e-3 from step": int(
                        study.steps[np.flatnonzero(difference > 1e-3)[-1] + 1]
                    )
                    if np.any(difference > 1e-3)
                    else 0,
                }
            )
    curves = pd.concat([study.to_frame().assign(model=name) for name, study in runs.items()])
    return curves, pd.DataFrame(rows)


def _claims(table: pd.DataFrame, flows: pd.DataFrame) -> list[Claim]:
    full = table[table["gradient"] == "full batch"]
    above = full["smallest of tenths"] / full["random directions"]
    spread = full["largest / smallest of middle tenths"]
    sweep = table[table["sweep"] == "batch size"]
    sizes = list(dict.fromkeys(sweep["value"]))
    by_batch = {
        name: some.pivot(index="seed", columns="value", values="gamma")[sizes].to_numpy()
        for name, some in sweep.groupby("gradient", sort=False)
    }
    means = {name: ", ".join(f"{g:.2f}" for g in gammas.mean(axis=0)) for name, gammas in by_batch.items()}
    differences = flows["largest difference of gamma"].to_numpy()
    return [
        Claim(
            "The full gradient points towards the end of the path all along it: up to the last tenth of the run, where the end "
            "is a few noisy steps away, its cosine gamma with the displacement is positive at every step of every run.",
            f"Smallest gamma of {len(full)} runs: {full['smallest before the last tenth'].min():.3f}, in the last tenth "
            f"{full['smallest in it'].min():.3f}.",
            bool(full["smallest before the last tenth"].min() > 0),
        ),
        Claim(
            "gamma is far above what a random direction has: in every tenth of every run more than 4 times its cosine.",
            f"{above.min():.1f} to {above.max():.0f} times.",
            bool(above.min() > 4),
        ),
        Claim(
            "gamma is stable: over the middle eight tenths of a run its means stay within a factor of 2.5.",
            f"Largest over smallest: {spread.min():.2f} to {spread.max():.2f}.",
            bool(spread.max() < 2.5),
        ),
        Claim(
            "A larger batch gives a larger gamma, of the minibatch's own gradient and of the full one, for every seed.",
            f"Batch sizes {', '.join(sizes)}: "
            + "; ".join(f"{name} {values}" for name, values in means.items())
            + ".",
            all(bool(np.all(np.diff(gammas, axis=1) > 0)) for gammas in by_batch.values()),
        ),
        Claim(
            "The equation of motion predicts the geometry of gradient descent's path: each counter term brings gamma nearer.",
            f"Largest differences of gamma: {', '.join(f'{d:.1e}' for d in differences)}.",
            bool(np.all(np.diff(differences) < 0)),
        ),
    ]


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, Figure]:
    """gamma along the runs of each sweep (first seed), and along gradient descent and its flows."""
    curves = tables["curves"]
    curves = curves[curves["seed"] == 0]
    sweeps = list(dict.fromkeys(curves["sweep"]))
    figure = Figure(figsize=(4.4 * len(sweeps), 7.6), layout="constrained")
    panels = figure.subplots(2, len(sweeps), sharey=True, squeeze=False)
    for row, gradient in zip(panels, ("full batch", "minibatch"), strict=True):
        for axes, sweep in zip(row, sweeps, strict=True):
            some = curves[(curves["sweep"] == sweep) & (curves["gradient"] == gradient)]
            for i, (value, one) in enumerate(some.groupby("value", sort=False)):
                smooth = one["gamma"].rolling(5, min_periods=1, center=True).mean()
                axes.plot(one["steps"], smooth, f"C{i}", label=f"{sweep} {value}")
                axes.plot(one["steps"], one["random_gamma"], f"C{i}:", lw=1)
            axes.plot([], [], "k:", lw=1, label="random directions")
            axes.axhline(0, color="0.7", lw=0.8)
            axes.set(xlabel="step", title=f"{gradient} gradient")
            axes.legend(fontsize=7)
            axes.grid(alpha=0.3)
        row[0].set(ylabel="gamma = RSI / EB (cosine), mean of 5 points")
    flows = tables["flow-curves"]
    models_figure = Figure(figsize=(14, 4.2), layout="constrained")
    left, middle, right = models_figure.subplots(1, 3)
    real = flows[flows["model"] == "GD"]
    for i, (model, one) in enumerate(flows.groupby("model", sort=False)):
        style = {"color": f"C{i}", "ls": "-" if model == "GD" else "--", "label": model}
        left.plot(one["steps"], one["gamma"], **style)
        right.plot(one["steps"], one["learning_rate"], **style)
        if model != "GD":
            difference = np.abs(one["gamma"].to_numpy() - real["gamma"].to_numpy())
            middle.plot(one["steps"], difference, **style)
    left.plot(real["steps"], real["random_gamma"], "k:", lw=1, label="random directions")
    left.set(ylabel="gamma = RSI / EB (cosine)")
    middle.set(ylabel="|gamma - gamma of GD|", yscale="log")
    right.set(ylabel="locally best learning rate RSI / EB^2 [time]", yscale="log")
    for axes in (left, middle, right):
        axes.set(xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return {"sweeps": figure, "flows": models_figure}


REPRODUCTION = Reproduction(
    name="no-wrong-turns",
    title="No wrong turns: gradients point towards the end of the path",
    source="Guille-Escuret et al. 2024, No Wrong Turns (arXiv 2306.11922).",
    setting=(
        "A tanh network 64-32-10 (cross entropy, 1,024 images scaled to a root mean square norm of 4), 400 steps of SGD with learning rate 0.1 on batches of 32; swept one at "
        "a time: batch size, width, layer norm, optimizer (momentum 0.9 with learning rate 0.02, Adam with 0.003). Every run is made "
        "twice, first for its end, then to measure. Flows: gradient descent on 512 images with learning rate 0.2, 200 steps."
    ),
    seconds=60,
    run=run,
    plot=plot,
)
