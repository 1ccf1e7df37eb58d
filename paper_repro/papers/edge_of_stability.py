"""Through the edge of stability: the flow of the two-step map.

1,000 steps of full-batch GD from where eta * sharpness first exceeds 1.9, on 500 (MLP 64-32-32-10, tanh) or 300 (CNN, tanh) digits (the CNN
with squared error, a minute more, is in the benchmarks). The flow of stride 2, with 4 points, with the number it chooses from the path, and
with 3 points and 3 relaxations for the iterate before, against even iterates, relative to the distance travelled; tolerance 1e-7. Beside it
GD from a start moved by 1e-12: where that too departs, no model can follow.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

import eomdl
from paper_repro import claims as made, networks, pictures as draw, runs
from paper_repro.harness import Images, Tables


SOURCE = "Our own; central flows (Cohen et al. 2025) and edge of stability (Cohen et al. 2021) are what it goes through."
SECONDS = 300
PERTURBATION = 1e-12
TOLERANCES: dict[str, Any] = {"rtol": 1e-7, "atol": 1e-9}
MOVED, FLOW = "GD, perturbed by 1e-12", "gradient flow"
BEFORE = "stride 2, 3 points and the iterate before"


class Case(NamedTuple):
    """A network, a loss and a learning rate; inputs standardized or as they are."""

    name: str
    init: Callable[[int], Any]
    loss: runs.Loss
    learning_rate: float
    standardized: bool
    images: int
    asserted: bool = True  # whether claims are made: not where GD itself cannot be predicted
    slow: bool = False  # left to the benchmarks


_MLP_SQUARED = networks.loss(networks.mlp, networks.squared_error)
CASES = [
    Case("MLP, squared error", networks.small_mlp_init, _MLP_SQUARED, 0.162, True, 500),
    Case("MLP, cross entropy", networks.small_mlp_init, networks.mlp_loss, 0.4, False, 500),
    Case("CNN, cross entropy", networks.small_cnn_init, networks.loss(networks.cnn), 0.7, True, 300),
    Case(
        "CNN, squared error",
        networks.small_cnn_init,
        networks.loss(networks.cnn, networks.squared_error),
        0.237,
        True,
        300,
        slow=True,
    ),
    Case(
        "MLP, squared error, violent", networks.small_mlp_init, _MLP_SQUARED, 0.14, False, 500, asserted=False
    ),
]


class Size(NamedTuple):
    """Networks, steps past the edge, and steps in which it must be reached."""

    networks: int = 4
    steps: int = 1000
    search: int = 600


SMOKE = Size(networks=1, steps=120, search=100)


def data_of(case: Case, images: Images) -> tuple[Any, Any]:
    """`(params, args)`: the initial parameters, and the data."""
    inputs, labels = images(case.images, None)
    inputs = (inputs - jnp.mean(inputs)) / jnp.std(inputs) if case.standardized else inputs
    return case.init(inputs.shape[1]), (inputs, labels)


def setting(case: Case, images: Images, search: int = 600) -> tuple[Any, Any]:
    """`(params, args)` where eta * sharpness first exceeds 1.9."""
    (params, args), eta = data_of(case, images), case.learning_rate
    options: dict[str, Any] = {"observe": {"sharpness": eomdl.sharpness(case.loss, 12)}, "save_steps": 4}
    before = eomdl.descend(case.loss, params, optax.sgd(eta), search, args=args, **options)
    beyond = np.flatnonzero(eta * before.observables["sharpness"] > 1.9)
    if len(beyond) == 0:
        raise ValueError(f"{case.name}: expected eta * sharpness > 1.9 in {search} steps; use the given data")
    return before.at(int(before.steps[beyond[0]])), args


def measure(size: Size, images: Images) -> Tables:
    """Real GD from where eta * sharpness passes 1.9, and its models."""
    cases = [case for case in CASES if not case.slow][: size.networks]
    found = [_follow(case, images, size) for case in tqdm(cases, desc="networks")]
    return {name: pd.concat(table[name] for table in found) for name in ("summary", "paths")}


def _follow(case: Case, images: Images, size: Size) -> Tables:
    loss, eta, steps = case.loss, case.learning_rate, size.steps
    start, args = setting(case, images, size.search)
    observe = {"loss": loss, "sharpness": eomdl.sharpness(loss, 12)}
    save = list(range(0, steps + 1, 5)) + list(range(1, steps + 1, 5))  # even and odd ones, for smoothing
    common: dict[str, Any] = {"args": args, "save_steps": save, "observe": observe}
    optimizer, step = optax.sgd(eta), eomdl.optimizer_step(loss, optax.sgd(eta))
    real = eomdl.descend(loss, start, optimizer, steps, **common)
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda leaf: leaf + PERTURBATION * rng.normal(size=leaf.shape), start)
    best = eomdl.choice.choose_points(step, start, steps, args=args, stride=2, max_points=6).points
    flows: dict[str, Any] = {FLOW: eomdl.GradientFlow(loss, eta)}
    for k in sorted({4, best}):
        flows[f"stride 2, {k} points"] = eomdl.InterpolatingFlow(step, eta, k, stride=2)
    flows[BEFORE] = eomdl.InterpolatingFlow(step, eta, 3, stride=2, backward=3)
    paths = {MOVED: eomdl.descend(loss, moved, optimizer, steps, **common)}
    paths |= runs.solve_all(flows, start, steps, estimate_error=False, **common, **TOLERANCES)
    comparison = eomdl.compare(real, paths).at_multiples_of(2)
    even = np.isin(real.steps, comparison.steps)
    curves = pd.DataFrame({"run": "GD", "step": comparison.steps, "loss": real.observables["loss"][even]})
    curves["eta * sharpness"] = eta * real.observables["sharpness"][even]
    row = {"network": case.name, "points chosen": best, "asserted": case.asserted}
    row["largest eta * sharpness"] = curves["eta * sharpness"].max()
    rows, parts = [], [curves]
    for name, path in paths.items():
        relative, difference = comparison.relative_distance[name], comparison.differences[name]["loss"]
        cost = 6 * path.stats.num_steps * flows[name].gradient_cost if name in flows else np.nan
        rows.append(
            row
            | {
                "model": name,
                "relative distance at the end": relative[-1],
                "largest": np.nanmax(relative[comparison.steps >= steps // 20]),
                "gradients per step": cost / steps,
                "largest loss difference": np.abs(difference).max(),
                "message": path.message,
            }
        )
        sharp = eta * path.observables["sharpness"][np.isin(path.steps, comparison.steps)]
        columns = {"run": name, "step": comparison.steps, "distance": relative, "eta * sharpness": sharp}
        parts.append(pd.DataFrame(columns))
    return {"summary": pd.DataFrame(rows), "paths": pd.concat(parts).assign(network=case.name)}


def claims(tables: Tables) -> list[made.Claim]:
    """The flow of stride 2 is nearer to GD than gradient flow, and within 5e-4 with the iterate before."""
    found = []
    for network, some in tables["summary"].groupby("network", sort=False):
        error, first = runs.by(some, "model", "relative distance at the end"), some.iloc[0]
        cost = runs.by(some, "model", "gradients per step")[BEFORE]
        chosen = f"stride 2, {first['points chosen']} points"
        gain = error[FLOW] / error[chosen]
        found.append(
            made.Claim(
                f"{network}: through the edge of stability the flow of stride 2, with the points it chooses itself, "
                "ends at least 10 times nearer to GD than gradient flow.",
                f"{chosen}: {error[chosen]:.1e} of the distance travelled, gradient flow {error[FLOW]:.1e}, "
                f"{gain:.0f} times; eta * sharpness reaches {first['largest eta * sharpness']:.2f}; "
                f"GD itself moved by 1e-12: {error[MOVED]:.1e}.",
                bool(gain >= 10) if first["asserted"] else None,
            )
        )
        found.append(
            made.Claim(
                f"{network}: with 3 points and the iterate before, the flow of stride 2 ends within 5e-4 of the distance "
                "travelled.",
                f"{error[BEFORE]:.1e} at {cost:.1f} gradients a step; 4 points: {error['stride 2, 4 points']:.1e}.",
                bool(error[BEFORE] <= 5e-4) if first["asserted"] else None,
                full_only=True,  # a short run ends in the spike
            )
        )
    return found


def pictures(tables: Tables) -> dict[str, Figure]:
    """Sharpness, loss and relative distance against steps, for each network."""
    figures: dict[str, Figure] = {}
    for network, of_network in tables["paths"].groupby("network", sort=False):
        name = str(network).replace(",", "").replace(" ", "-")
        sharp, top = draw.panel("step", "eta * sharpness", str(network), ylim=(0, 4))
        apart, low = draw.panel("step", "distance to GD / distance travelled", str(network), yscale="log")
        for color, (run, path) in enumerate(of_network.groupby("run", sort=False)):
            style: dict[str, Any] = {
                "color": {"GD": "k", MOVED: "0.5"}.get(str(run), f"C{color}"),
                "lw": 1,
                "label": run,
            }
            if run != MOVED:
                top.plot(path["step"], path["eta * sharpness"], ls="-" if run == "GD" else "--", **style)
            if run != "GD":
                low.plot(path["step"], draw.positive_or_nan(path["distance"]), **style)
        top.axhline(2, color="0.6", lw=1)
        real = of_network[of_network["run"] == "GD"]
        fall, axes = draw.panel("step", "training loss", str(network), yscale="log")
        axes.plot(real["step"], real["loss"], "k", lw=1, label="GD")
        figures |= {f"{name}-sharpness": draw.add_legend(sharp), f"{name}-loss": draw.add_legend(fall)}
        figures[f"{name}-distance"] = draw.add_legend(apart)
    return figures
