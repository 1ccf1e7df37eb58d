"""Every flow of the edge of stability on a network, each against what it predicts.

1,000 steps of full-batch GD from where eta * sharpness first exceeds 1.9: an MLP 64-32-32-10 (tanh, squared error, 500 digits, learning
rate 0.162). Distances to what each flow predicts, relative to the distance travelled: iterates (gradient flow), even iterates (stride 2, 3
points and the iterate before), midpoints (rod, Euler with steps of 1/3), the smoothed path (edge, Euler with steps of 1/2; central, two
directions). Loss and sharpness are those at the place that each predicts; the central flow's loss is the mean over the oscillation, against
the averaged loss.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import numpy as np
import optax
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

import eomdl
from paper_repro import claims as made, pictures as draw
from paper_repro.harness import Images, Tables
from paper_repro.papers.edge_of_stability import CASES, setting


SOURCE = "Flows: Cohen et al. 2025, Regis & Chewi 2026, Marion 2026; the flow of stride 2 is our own."
SECONDS = 100
CASE = CASES[0]  # the MLP 64-32-32-10, squared error
FLOW, EDGE, ROD, CENTRAL, STRIDE = "gradient flow", "edge flow", "rod flow", "central flow", "stride 2"
# A step of a refreshed flow is one of the optimizer: one of the solver, too, unless its error is larger than this.
QUICK: dict[str, Any] = {
    "solver": diffrax.Bosh3(),
    "stepsize_controller": diffrax.PIDController(rtol=1e-3, atol=1e-6),
}
BOSH: dict[str, Any] = {"solver": diffrax.Bosh3(), "rtol": 1e-6, "atol": 1e-8}


def euler(length: float) -> dict[str, Any]:
    """Steps of one length, in steps of the optimizer."""
    constant = diffrax.ConstantStepSize()
    return {"solver": diffrax.Euler(), "stepsize_controller": constant, "dt0": length}


class Size(NamedTuple):
    """Where distances are compared, the last at the end; steps between two rows, to the edge; what takes long to compile."""

    at: tuple[int, ...] = (200, 400, 1000)
    every: int = 10
    search: int = 600
    diagnose: bool = True
    directions: int = 2


SMOKE = Size(at=(60, 120), every=20, search=100, diagnose=False, directions=1)


class Model(NamedTuple):
    """A flow, how it is integrated, and what it says of the averaged loss, a function of its state (None: nothing)."""

    flow: eomdl.AbstractFlow
    options: dict[str, Any]
    mean_loss: Callable | None = None


def models(directions: int) -> dict[str, Model]:
    """All flows, by name."""
    loss, eta = CASE.loss, CASE.learning_rate
    step = eomdl.optimizer_step(loss, optax.sgd(eta))
    central = eomdl.flows.CentralFlow(loss, eta, directions)
    return {
        FLOW: Model(eomdl.GradientFlow(loss, eta), BOSH),
        CENTRAL: Model(central, QUICK, central.mean_loss),
        ROD: Model(eomdl.flows.RodFlow(step, eta), euler(1 / 3)),
        EDGE: Model(eomdl.flows.EdgeFlow(loss, eta), euler(1 / 2)),
        STRIDE: Model(eomdl.InterpolatingFlow(step, eta, 3, stride=2, backward=3), BOSH),
    }


def measure(size: Size, images: Images) -> Tables:
    """Gradient descent, and every flow against what it predicts of it."""
    start, args = setting(CASE, images, size.search)
    rows = np.arange(0, size.at[-1] + 1, size.every)
    beside = sorted({int(k + j) for k in rows for j in (-1, 0, 1) if k + j >= 0})
    optimizer = optax.sgd(CASE.learning_rate)
    real = eomdl.descend(
        CASE.loss,
        start,
        optimizer,
        size.at[-1] + 1,
        args=args,
        save_steps=beside,
        observe={"loss": CASE.loss},
    )
    table = [_table("GD", real.rows(np.isin(real.steps, rows)), args)]
    notes = []
    for name, (flow, options, mean_loss) in tqdm(models(size.directions).items(), desc="flows", leave=False):
        common: dict[str, Any] = {"args": args, "save_steps": rows, "estimate_error": False, **options}
        common |= {"diagnose": size.diagnose}
        state = {} if mean_loss is None else {"mean loss": mean_loss}
        path = eomdl.solve(flow, start, size.at[-1], observe_state=state, **common)
        predicted = real.averaged(flow.target)
        predicted = predicted.rows(np.isin(predicted.steps, rows))
        found = eomdl.compare(real, {name: path})
        columns = _table(name, path, args).set_index("step")
        columns.loc[found.steps, "distance"] = found.relative_distance[name]
        there = _table("GD", predicted, args).set_index("step")
        columns[["GD's loss", "GD's sharpness"]] = there[["loss", "sharpness"]]
        if mean_loss is not None:
            columns["loss"] = path.observables["mean loss"]
            columns["GD's loss"] = pd.Series(predicted.observables["loss"], predicted.steps)
        table.append(columns.reset_index())
        notes.append({"model": name, "target": flow.target.name, "notes": " ".join(found.notes)})
    return {"models": pd.DataFrame(notes), "paths": pd.concat(table)}


def _table(name: str, path: eomdl.Trajectory, args: Any) -> pd.DataFrame:
    """Loss and sharpness at every row of a run."""
    loss, sharpness = _look(path.params, args)
    return pd.DataFrame({"run": name, "step": path.steps, "loss": loss, "sharpness": np.asarray(sharpness)})


@jax.jit
def _look(rows: Any, args: Any) -> tuple[jax.Array, jax.Array]:
    # One program for all runs, in place of an observable in each.
    sharpness = eomdl.sharpness(CASE.loss, 32)
    return jax.lax.map(lambda w: (CASE.loss(w, args), sharpness(w, args)), rows)


def claims(tables: Tables) -> list[made.Claim]:
    """What follows gradient descent through the edge on a network, in distance, sharpness and loss."""
    paths = {str(name): some.set_index("step") for name, some in tables["paths"].groupby("run", sort=False)}
    last = paths[FLOW].index[-1]
    at = [k for k in Size().at if k < last] + [last]
    distance = {name: paths[name]["distance"][at].to_numpy() for name in tables["models"]["model"]}
    apart = {
        name: (paths[name]["sharpness"] / paths[name]["GD's sharpness"] - 1).abs().loc[last // 2 :].max()
        for name in distance
    }
    off = {name: (paths[name]["loss"] / paths[name]["GD's loss"] - 1).abs().median() for name in distance}
    shown = "; ".join(f"{name} {made.listed(values, '.1e')}" for name, values in distance.items())
    middle = [CENTRAL, ROD, EDGE]
    return [
        made.gain(
            f"At steps {made.listed(at, 'd')} the central, rod and edge flow are nearer to what they predict than gradient flow "
            f"to gradient descent. Parts of the distance travelled: {shown}.",
            [distance[name] for name in middle],
            [distance[FLOW]] * len(middle),
            least=4,
            full_only=True,  # a short run ends in the first spike
        ),
        made.law(
            "There the flow of stride 2 passes through the even iterates.",
            distance[STRIDE],
            5e-5,
            "Largest part of the distance travelled",
        ),
        made.falling(
            "At the end, from farthest to nearest.",
            {name: distance[name][-1] for name in (FLOW, CENTRAL, EDGE, ROD, STRIDE)},
            "Parts of the distance travelled",
            full_only=True,
        ),
        made.law(
            "In the second half the sharpness of every flow but gradient flow is that of the place it predicts.",
            [apart[name] for name in distance if name != FLOW],
            0.05,
            f"Gradient flow {apart[FLOW]:.0%} off; the largest relative error of the others",
            full_only=True,
        ),
        made.gain(
            "The mean loss of the central flow is nearer to the averaged loss of gradient descent than the loss along gradient "
            "flow to that of the iterates, in the median.",
            off[CENTRAL],
            off[FLOW],
            full_only=True,
        ),
    ]


def pictures(tables: Tables) -> dict[str, Figure]:
    """Distance, loss and sharpness against steps."""
    far, low = draw.panel("step", "distance to what it predicts / distance travelled", "", yscale="log")
    fall, middle = draw.panel("step", "loss", "", yscale="log")
    off, lower = draw.panel("step", "|loss / loss of what it predicts - 1|", "", yscale="log")
    sharp, top = draw.panel("step", "eta * sharpness", "")
    paths = dict(list(tables["paths"].groupby("run", sort=False)))
    real = paths.pop("GD")
    for run, path in paths.items():
        middle.plot(path["step"], path["loss"], lw=1, label=run)
        top.plot(path["step"], CASE.learning_rate * path["sharpness"], lw=1, label=run)
        low.plot(path["step"], draw.positive_or_nan(path["distance"]), lw=1, label=run)
        lower.plot(
            path["step"], draw.positive_or_nan((path["loss"] / path["GD's loss"] - 1).abs()), lw=1, label=run
        )
    middle.plot(real["step"], real["loss"], "k.", ms=3, label="GD")
    top.plot(real["step"], CASE.learning_rate * real["sharpness"], "k.", ms=3, label="GD")
    top.axhline(2, color="0.6", lw=1)
    figures = {"distance": far, "loss": fall, "loss-error": off, "sharpness": sharp}
    return {name: draw.add_legend(figure) for name, figure in figures.items()}
