"""Through the edge of stability with a flow of stride 2."""

from collections.abc import Callable
from typing import NamedTuple

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


PERTURBATION = 1e-12
TOLERANCES = {"rtol": 1e-7, "atol": 1e-9}


class Case(NamedTuple):
    """A network, a loss and a learning rate; inputs standardized or as they are."""

    name: str
    init: Callable
    loss: Callable
    learning_rate: float
    standardized: bool
    subset: int
    asserted: bool = True  # whether claims are made: not where GD itself cannot be predicted
    slow: bool = False  # left to the benchmarks


def _loss(network: Callable, criterion: Callable) -> Callable:
    def loss(params, batch):
        inputs, labels = batch
        return criterion(network(params, inputs), labels)

    return loss


_MLP_SQUARED = _loss(models.mlp, models.squared_error)
_MLP_ENTROPY = _loss(models.mlp, models.cross_entropy)
_CNN_ENTROPY = _loss(models.cnn, models.cross_entropy)
_CNN_SQUARED = _loss(models.cnn, models.squared_error)
CASES = [
    Case("MLP, squared error", models.small_mlp_init, _MLP_SQUARED, 0.162, True, 500),
    Case("MLP, cross entropy", models.small_mlp_init, _MLP_ENTROPY, 0.4, False, 500),
    Case("CNN, cross entropy", models.small_cnn_init, _CNN_ENTROPY, 0.7, True, 300),
    Case("CNN, squared error", models.small_cnn_init, _CNN_SQUARED, 0.237, True, 300, slow=True),
    Case(
        "MLP, squared error, violent", models.small_mlp_init, _MLP_SQUARED, 0.14, False, 500, asserted=False
    ),
]


def run(config: Config) -> tuple[dict[str, pd.DataFrame], list[Claim]]:
    """Real GD from where eta * sharpness passes 1.9, and its models."""
    paths, rows = [], []
    cases = [case for case in CASES if not case.slow]
    for case in tqdm(cases[:1] if config.smoke else cases, desc="networks"):
        path, some = _follow(case, config)
        paths.append(path)
        rows += some
    table = pd.DataFrame(rows)
    return {"summary": table, "paths": pd.concat(paths)}, _claims(table)


def setting(case: Case, folder: str | None = None, subset: int | None = None, search: int = 600):
    """`(params, args)` where eta * sharpness first exceeds 1.9."""
    images, labels = data.load(folder, subset or case.subset, seed=None)
    if case.standardized:
        images = (images - jnp.mean(images)) / jnp.std(images)
    args, optimizer = (images, labels), optax.sgd(case.learning_rate)
    observe = {"sharpness": eomdl.sharpness(case.loss, 12)}
    params = case.init(images.shape[1])
    before = eomdl.descend(case.loss, params, optimizer, search, args=args, observe=observe, save_steps=4)
    beyond = np.flatnonzero(case.learning_rate * before.observables["sharpness"] > 1.9)
    if len(beyond) == 0:
        raise ValueError(
            f"{case.name}: expected eta * sharpness to pass 1.9 in {search} steps; use the default data"
        )
    return before.at(before.steps[beyond[0]]), args


def _follow(case: Case, config: Config) -> tuple[pd.DataFrame, list[dict]]:
    loss, eta = case.loss, case.learning_rate
    steps, search = (120, 100) if config.smoke else (1000, 600)
    start, args = setting(case, config.data, config.subset, search)
    optimizer = optax.sgd(eta)
    sharpness = eomdl.sharpness(loss, 12)
    observe = {"loss": loss, "sharpness": sharpness}
    save = list(range(0, steps + 1, 5)) + list(range(1, steps + 1, 5))  # even and odd ones, for smoothing
    real = eomdl.descend(loss, start, optimizer, steps, args=args, observe=observe, save_steps=save)
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda leaf: leaf + PERTURBATION * rng.normal(size=leaf.shape), start)
    runs = {
        "GD, perturbed by 1e-12": eomdl.descend(loss, moved, optimizer, steps, args=args, save_steps=save)
    }
    step = eomdl.optimizer_step(loss, optimizer)
    best = eomdl.flows.choose_points(step, start, steps, args=args, stride=2, max_points=6).points
    flows = {"gradient flow": eomdl.GradientFlow(loss, eta)}
    flows |= {
        f"stride 2, {k} points": eomdl.InterpolatingFlow(step, eta, k, stride=2) for k in sorted({4, best})
    }
    for name, flow in flows.items():
        runs[name] = eomdl.solve(
            flow,
            start,
            steps,
            args=args,
            observe=observe,
            save_steps=save,
            estimate_error=False,
            **TOLERANCES,
        )
    comparison = eomdl.compare(real, runs).at_multiples_of(2)
    path = {"network": case.name, "step": comparison.steps}
    even = np.isin(real.steps, comparison.steps)
    path["loss"] = real.observables["loss"][even]
    path["eta * sharpness"] = eta * real.observables["sharpness"][even]
    rows = []
    for name, trajectory in runs.items():
        relative = comparison.relative_distance[name]
        path[f"distance, {name}"] = np.pad(
            relative, (0, len(even[even]) - len(relative)), constant_values=np.nan
        )
        row = {
            "network": case.name,
            "model": name,
            "points chosen": best,
            "asserted": case.asserted,
            "largest eta * sharpness": path["eta * sharpness"].max(),
            "relative distance at the end": relative[-1],
            "largest": np.nanmax(relative[comparison.steps >= steps // 20]),
        }
        if name in flows:
            cost = getattr(flows[name], "points", 1) * flows[name].stride
            row["gradients per step"] = 6 * trajectory.stats.num_steps * cost / steps
            difference = eomdl.compare(real, {name: trajectory}).differences[name]
            row["largest loss difference"] = np.abs(difference["loss"]).max()
            path[f"eta * sharpness, {name}"] = (
                eta * trajectory.observables["sharpness"][np.isin(trajectory.steps, comparison.steps)]
            )
        if trajectory.message:
            row["message"] = trajectory.message
        rows.append(row)
    return pd.DataFrame(path), rows


def _claims(table: pd.DataFrame) -> list[Claim]:
    claims = []
    for network, some in table.groupby("network", sort=False):
        error = some.set_index("model")["relative distance at the end"]
        chosen = f"stride 2, {some['points chosen'].iloc[0]} points"
        gain = error["gradient flow"] / error[chosen]
        holds = bool(gain >= 10) if some["asserted"].iloc[0] else None
        claims.append(
            Claim(
                f"{network}: through the edge of stability the flow of stride 2, with the points it chooses itself, "
                "ends at least 10 times nearer to GD than gradient flow.",
                f"{chosen}: {error[chosen]:.1e} of the distance travelled, gradient flow {error['gradient flow']:.1e}, "
                f"{gain:.0f} times; eta * sharpness reaches {some['largest eta * sharpness'].max():.2f}; "
                f"GD itself moved by 1e-12: {error['GD, perturbed by 1e-12']:.1e}.",
                holds,
            )
        )
    return claims


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, Figure]:
    """Sharpness, loss and relative distance against steps, a column a network."""
    groups = list(tables["paths"].groupby("network", sort=False))
    figure = Figure(figsize=(5.2 * len(groups), 9), layout="constrained")
    grid = figure.subplots(3, len(groups), squeeze=False, sharex="col")
    for (top, middle, bottom), (network, path) in zip(grid.T, groups, strict=True):
        top.plot(path["step"], path["eta * sharpness"], "k", lw=1, label="GD")
        top.axhline(2, color="0.6", lw=1)
        middle.semilogy(path["step"], path["loss"], "k", lw=1)
        names = [c.removeprefix("distance, ") for c in path if c.startswith("distance, ")]
        for color, name in enumerate(n for n in names if path[f"distance, {n}"].notna().any()):
            style = "0.5" if name.startswith("GD") else f"C{color}"
            bottom.semilogy(path["step"], path[f"distance, {name}"], style, lw=1, label=name)
            if f"eta * sharpness, {name}" in path:
                top.plot(path["step"], path[f"eta * sharpness, {name}"], f"C{color}--", lw=1, label=name)
        top.set(title=network, ylabel="eta * sharpness", ylim=(0, 4))
        middle.set(ylabel="training loss")
        bottom.set(xlabel="step", ylabel="distance to GD / distance travelled")
        for axes in (top, middle, bottom):
            axes.grid(alpha=0.3)
        bottom.legend(fontsize=8)
    return {"edge-of-stability": figure}


REPRODUCTION = Reproduction(
    name="edge-of-stability",
    title="Through the edge of stability: the flow of the two-step map",
    source="Our own; central flows (Cohen et al. 2025) and edge of stability (Cohen et al. 2021) are what it goes through.",
    setting=(
        "1,000 steps of full-batch GD from where eta * sharpness first exceeds 1.9, on 500 (MLP 64-32-32-10, tanh) or 300 (CNN, "
        "tanh) digits (the CNN with squared error, a minute more, is in the benchmarks). The flow of stride 2, with 4 points and with the number it chooses from the path, against even iterates, "
        "relative to the distance travelled; tolerance 1e-7. Beside it GD from a start moved by 1e-12: where that too "
        "departs, no model can follow."
    ),
    seconds=240,
    run=run,
    plot=plot,
)
