"""Two players: where gradient flow circles, players who move at once spiral out, and players who alternate do not.

A bilinear game, min over a, max over b of a b, and the Dirac-GAN with V = -log(1 + exp(-a b)), from (1, 0.2), step size 0.1, 400 steps.
Gradient flow keeps a^2 + b^2 in both. The first-order field of simultaneous steps is f - h/2 f'f; of alternating ones, player a first,
f + h (f_b' f_a - f'f/2), since their map is x + h f + h^2 f_b' f_a + O(h^3).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from matplotlib.figure import Figure

import eomdl
from paper_repro import claims as made, pictures as draw, runs
from paper_repro.harness import Images, Tables


SOURCE = "Rosca et al. 2021, Discretization Drift in Two-Player Games (arXiv 2105.13922)."
SECONDS = 20
STEP = 0.1
START = {"a": 1.0, "b": 0.2}
FLOW, FIRST = "gradient flow", "first order"


class Size(NamedTuple):
    """Steps, and step sizes for the order."""

    steps: int = 400
    rates: tuple[float, ...] = (0.2, 0.1, 0.05)


SMOKE = Size(steps=100, rates=(0.2, 0.1))


def bilinear(x: Any, args: Any) -> Any:
    """Velocity of both players: a descends on a b, b ascends."""
    del args
    return {"a": -x["b"], "b": x["a"]}


def dirac_gan(x: Any, args: Any) -> Any:
    """The same on V = -log(1 + exp(-a b))."""
    del args
    slope = jax.nn.sigmoid(-x["a"] * x["b"])
    return {"a": -slope * x["b"], "b": slope * x["a"]}


GAMES = {"bilinear": bilinear, "Dirac-GAN": dirac_gan}


def alternating(field: Any, h: float) -> Any:
    """One step of a, then one of b, who sees it."""

    def step(x: Any, args: Any, k: Any = 0) -> Any:
        del k
        first = x | {"a": x["a"] + h * field(x, args)["a"]}
        return first | {"b": x["b"] + h * field(first, args)["b"]}

    return step


def simultaneous(field: Any, h: float) -> Any:
    """One step of both."""
    return lambda x, args, k=0: jax.tree.map(lambda p, v: p + h * v, x, field(x, args))


def modified(field: Any, h: float, both: bool) -> Any:
    """The first-order field of simultaneous or of alternating steps."""

    def velocity(x: Any, args: Any) -> Any:
        f = field(x, args)
        _, along = jax.jvp(lambda y: field(y, args), (x,), (f,))
        of_a = f | {"b": jnp.zeros_like(f["b"])}
        _, seen = jax.jvp(lambda y: field(y, args), (x,), (of_a,))
        drift = {"a": -along["a"] / 2, "b": -along["b"] / 2 + (0.0 if both else seen["b"])}
        return jax.tree.map(lambda v, d: v + h * d, f, drift)

    return velocity


UPDATES = {"simultaneous": simultaneous, "alternating": alternating}


def measure(size: Size, images: Images) -> Tables:
    """Real iterates and flows of both games with both kinds of updates; errors of one step over the step size."""
    start = {name: jnp.asarray(value) for name, value in START.items()}
    rows, paths, orders = [], [], []
    for game, field in GAMES.items():
        for updates, make in UPDATES.items():
            key, both = {"game": game, "updates": updates}, updates == "simultaneous"
            real = eomdl.iterate(make(field, STEP), start, size.steps)
            flows = {
                FLOW: eomdl.flows.ModifiedFlow(field, STEP, 0),
                FIRST: eomdl.flows.ModifiedFlow(modified(field, STEP, both), STEP, 0),
                "4 points": eomdl.InterpolatingFlow(make(field, STEP), STEP, 4),
            }
            models = runs.solve_all(flows, start, size.steps, rtol=1e-9, atol=1e-10)
            summary = runs.summary(eomdl.compare(real, models)).assign(**key)
            summary["radius, real"] = _radius(real)
            summary["radius"] = [_radius(path) for path in models.values()]
            rows.append(summary)
            paths.append(runs.coordinates({"real": real} | models).assign(**key))
            orders += [key | row for row in _orders(field, make, both, start, size.rates)]
    return {"drift": pd.concat(rows), "orders": pd.DataFrame(orders), "paths": pd.concat(paths)}


def _radius(path: eomdl.Trajectory) -> float:
    """The last radius over the first."""
    players = runs.values(path)
    first, last = (float(np.hypot(players["a"][i], players["b"][i])) for i in (0, -1))
    return last / first


def _orders(field: Any, make: Any, both: bool, start: Any, rates: tuple[float, ...]) -> list[dict[str, Any]]:
    """Errors of the fields after one step."""
    rows = []
    for h in rates:
        target = make(field, h)(start, None)
        for name, velocity in {FLOW: field, FIRST: modified(field, h, both)}.items():
            flow = eomdl.flows.ModifiedFlow(velocity, h, 0)
            path = eomdl.solve(flow, start, 1, rtol=1e-12, atol=1e-13, estimate_error=False)
            error = float(optax.tree.norm(optax.tree.sub(path.at(1), target)))
            rows.append({"model": name, "learning rate": h, "error": error})
    return rows


def claims(tables: Tables) -> list[made.Claim]:
    """The sign of the drift, its size, and the order."""
    drift = tables["drift"].set_index(["game", "updates", "model"])["radius"]
    real = tables["drift"].drop_duplicates(["game", "updates"]).set_index(["game", "updates"])["radius, real"]
    out, still = (real.xs(updates, level="updates") for updates in UPDATES)
    found = []
    for updates in UPDATES:
        some = tables["orders"][tables["orders"]["updates"] == updates]
        for game, of_game in some.groupby("game", sort=False):
            text = f"{game}, {updates} updates: in one step the first-order field is one order better than gradient flow."
            observed = runs.observed_orders(of_game, "error")
            found.append(made.orders(text, observed, {FLOW: 2, FIRST: 3}, within=0.3))
    off = (drift.xs(FIRST, level="model") / real - 1).abs()
    return [
        made.Claim(
            "Gradient flow circles; simultaneous updates spiral out, alternating ones do not.",
            f"Last radius over the first: gradient flow {drift.xs(FLOW, level='model').min():.4f} to "
            f"{drift.xs(FLOW, level='model').max():.4f}, simultaneous {made.listed(out)}, alternating {made.listed(still)}.",
            bool(
                (drift.xs(FLOW, level="model") - 1).abs().max() < 1e-6
                and out.min() > 1.1
                and (still - 1).abs().max() < 0.1
            ),
        ),
        made.share("The first-order field predicts the last radius.", off, 0.02),
        *found,
    ]


def pictures(tables: Tables) -> dict[str, Figure]:
    """The players in the plane: real iterates, gradient flow, and the first-order field."""
    figures = {}
    for (game, updates), paths in tables["paths"].groupby(["game", "updates"], sort=False):
        figure, axes = draw.panel("a", "b", f"{game}, {updates} updates")
        draw.plane(axes, paths, real="real")
        axes.set_aspect("equal")
        figures[f"{game}-{updates}".lower()] = draw.add_legend(figure)
    return figures
