"""The central flow against gradient descent and RMSProp on a network, through the edge of stability.

MLP 64-32-32-10, tanh, 500 digits. Gradient descent with squared error (learning rate 0.162) and cross entropy (0.4), from where
eta * sharpness first exceeds 1.9, and optax.rmsprop with squared error (3e-4, decay 0.99), from step 100. The central flow as it is by
default, which adds directions as they become critical, and the same flow without its oscillation: gradient flow, or RMSProp's flow in
continuous time. Both against the smoothed path (w_{k-1} + 2 w_k + w_{k+1})/4; losses, squared gradients and variances of the real
run are means over 32 steps.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

import eomdl
from eomdl.flows import SMOOTHED, CentralFlow, SecondMoment
from paper_repro import claims as made, pictures as draw
from paper_repro.harness import Images, Tables
from paper_repro.papers.edge_of_stability import CASES, Case, setting


SOURCE = "Cohen, Damian, Talwalkar, Kolter & Lee 2025 (arXiv 2410.24206): central flows."
SECONDS = 200
REAL, CENTRAL, STABLE = "real run", "central flow", "without oscillation"
WINDOW = 32  # steps, over which the real run is averaged: its oscillation swells and dies in as many
STEP: dict[str, Any] = {
    "solver": diffrax.Bosh3(),
    "stepsize_controller": diffrax.PIDController(rtol=1e-3, atol=1e-6),
}


STILL: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-8, "estimate_error": False}


class Size(NamedTuple):
    """Runs, steps past their starts, steps between rows, in which the edge must be reached; directions at most (or the default)."""

    runs: int = 3
    steps: int = 1000
    every: int = 5
    search: int = 600
    directions: int | None = None


SMOKE = Size(runs=1, steps=60, search=100, directions=1)


class Stable(eomdl.AbstractFlow):
    """The flow of the same optimizer where nothing oscillates."""

    flow: CentralFlow

    @property
    def step_size(self) -> jax.Array:
        """The time of a step."""
        return self.flow.step_size

    @property
    def target(self) -> eomdl.flows.Target:
        """The smoothed path, as of the central flow."""
        return SMOOTHED

    def init(self, params: Any, args: Any) -> Any:
        """The state of the central flow, in which nothing oscillates yet."""
        return self.flow.init(params, args)

    def begin(self, params: Any, state: Any, args: Any) -> Any:
        """The same, with a real run's moment."""
        return self.flow.begin(params, state, args)

    def params(self, state: Any) -> Any:
        """The parameters."""
        return state.params

    def __call__(self, t: Any, state: Any, args: Any) -> Any:
        """The velocity without an oscillation."""
        return self.flow(t, state, args)


class Run(NamedTuple):
    """A case, its optimizer and flow, and where the edge is looked at first: after `lead` steps, or where it is reached."""

    name: str
    case: Case
    optimizer: optax.GradientTransformation
    flow: CentralFlow
    lead: int = 0


def runs_of(size: Size) -> list[Run]:
    """Gradient descent on two losses, and RMSProp."""
    squared, cross = CASES[:2]
    rate, decay, eps = 3e-4, 0.99, 1e-8
    by_moment = CentralFlow(squared.loss, rate, size.directions, SecondMoment(decay, eps))
    found = [
        Run("RMSProp, squared error", squared, optax.rmsprop(rate, decay, eps), by_moment, lead=100),
        *[
            Run(
                f"GD, {name}",
                case,
                optax.sgd(case.learning_rate),
                CentralFlow(case.loss, case.learning_rate, size.directions),
            )
            for name, case in (("squared error", squared), ("cross entropy", cross))
        ],
    ]
    return found[: size.runs]


def measure(size: Size, images: Images) -> Tables:
    """Every real run, and both flows of it."""
    found = [_follow(run, size, images) for run in tqdm(runs_of(size), desc="runs")]
    return {name: pd.concat(table[name] for table in found) for name in ("paths", "variances", "notes")}


def _begun(run: Run, size: Size, images: Images) -> tuple[eomdl.runs.End, Any]:
    """Where the real run is at the edge, and the data."""
    if run.lead == 0:
        params, args = setting(run.case, images, size.search)
        return eomdl.runs.End(0, None, params), args
    inputs, labels = images(run.case.images, None)
    if run.case.standardized:
        inputs = (inputs - jnp.mean(inputs)) / jnp.std(inputs)
    args, params = (inputs, labels), run.case.init(inputs.shape[1])
    real = eomdl.descend(run.case.loss, params, run.optimizer, run.lead, args=args, save_steps=[run.lead])
    return real.end, args


def _follow(run: Run, size: Size, images: Images) -> Tables:
    loss, flow = run.case.loss, run.flow
    begin, args = _begun(run, size, images)
    last = int(begin.step) + size.steps
    common: dict[str, Any] = {"args": args, "resume": begin}
    observe = {"loss": loss, "squared gradient": _squared_gradient(loss)}
    real = eomdl.descend(loss, begin.params, run.optimizer, last + WINDOW, observe=observe, **common)
    rows = list(range(int(begin.step), last + 1, size.every))
    seen = {
        "loss": flow.mean_loss,
        "squared gradient": flow.mean_squared_gradient,
        "variances": flow.variances,
        "axes": flow.axes,
        "curvature": _curvature(flow),
    }
    path = eomdl.solve(flow, begin.params, last, observe_state=seen, save_steps=rows, **common, **STEP)
    still = eomdl.solve(Stable(flow), begin.params, last, observe=observe, save_steps=rows, **common, **STILL)
    # What the path says of the loss without its oscillation.
    bare = {name: np.array([f(path.at(k), args) for k in path.steps]) for name, f in observe.items()}
    comparison = eomdl.compare(real, {CENTRAL: path, STABLE: still})
    kept = np.isin(path.steps, comparison.steps)
    steps = np.asarray(path.steps)[kept]
    paths = [pd.DataFrame({"model": REAL, "step": steps, **_averaged(real, steps)})]
    for name, model in {CENTRAL: path, STABLE: still}.items():
        columns = {k: np.asarray(model.observables[k])[kept] for k in observe}
        columns["distance"] = comparison.relative_distance[name]
        columns["travelled"] = comparison.travelled
        paths.append(pd.DataFrame({"model": name, "step": steps, **columns}))
    paths[1] = paths[1].assign(
        curvature=np.asarray(path.observables["curvature"])[kept],
        tracked=np.sum(np.abs(path.observables["axes"]).sum(2) > 0, axis=1)[kept],
        **{f"{name} of the path": values[kept] for name, values in bare.items()},
    )
    # The first row is before the flow's first step: it knows no oscillation yet.
    measured = eomdl.errors.variances_along(real, steps[1:], path.observables["axes"][kept][1:], WINDOW)
    predicted = path.observables["variances"][kept][1:]
    variances = pd.DataFrame(
        {"step": steps[1 + i], "direction": j + 1, "predicted": predicted[i, j], "measured": measured[i, j]}
        for i, j in np.ndindex(predicted.shape)
    )
    notes = pd.DataFrame({"note": [note for note in path.notes if "predicts" not in note] or ["none"]})
    found = {"paths": pd.concat(paths), "variances": variances, "notes": notes}
    return {name: table.assign(run=run.name) for name, table in found.items()}


def _squared_gradient(loss: Callable) -> Callable:
    """The squared norm of the gradient."""
    return lambda params, args: optax.tree.norm(jax.grad(loss)(params, args)) ** 2


def _curvature(flow: CentralFlow) -> Callable:
    """The largest eigenvalue of P^-1 H at the flow's parameters, found anew: not from the directions that it tracks."""

    def of(t: Any, state: Any, args: Any) -> jax.Array:
        diagonal = flow.preconditioner.diagonal(flow.learning_rate, state.moment, state.params)
        found = eomdl.curvature.eigenpairs(
            flow.loss, state.params, args, 1, preconditioner=diagonal, num_matvecs=24, rtol=1e-3
        )
        return found.values[0]

    return of


def _averaged(real: eomdl.Trajectory, steps: np.ndarray) -> dict[str, np.ndarray]:
    """Means of the observables over the steps around these; NaN where the run has not all of them."""
    first = steps - WINDOW // 2 - int(real.steps[0])
    there = first >= 0
    found = {}
    for name, values in real.observables.items():
        sums = np.concatenate([[0], np.cumsum(np.asarray(values))])
        means = (sums[first[there] + WINDOW] - sums[first[there]]) / WINDOW
        found[name] = np.full(len(steps), np.nan)
        found[name][there] = means
    return found


def claims(tables: Tables) -> list[made.Claim]:
    """Nearer than without the oscillation; the curvature is held; means and variances are foretold."""
    return [
        claim
        for name, paths in tables["paths"].groupby("run", sort=False)
        for claim in _claims(str(name), paths, tables["variances"].query("run == @name"))
    ]


def _claims(run: str, paths: pd.DataFrame, variances: pd.DataFrame) -> list[made.Claim]:
    real, central, stable = (paths[paths["model"] == model] for model in (REAL, CENTRAL, STABLE))
    apart = [float((some["distance"] * some["travelled"]).mean()) for some in (central, stable)]
    moved = central["travelled"].iloc[-1]
    critical = variances[variances["direction"] == 1].set_index("step")["predicted"]
    held = central[central["step"].isin(critical.index[critical > 0])]["curvature"]
    found = [
        made.gain(
            f"{run}: the central flow is nearer to the smoothed path than the flow without the oscillation, on the mean over "
            f"the run ({apart[0] / moved:.1e} and {apart[1] / moved:.1e} of the distance travelled).",
            apart[0],
            apart[1],
            least=3.0,
            full_only=True,
        ),
        made.law(
            f"{run}: it holds the curvature at 2 where it oscillates ({len(held)} rows).",
            np.abs(held / 2 - 1),
            5e-3,
        ),
    ]
    for name in ("loss", "squared gradient"):
        foretold, bare = (_apart(real[name], central[c]) for c in (name, f"{name} of the path"))
        found.append(
            made.gain(
                f"{run}: the mean {name} that it predicts is nearer to the real run's than that of its path "
                f"({foretold:.1%} and {bare:.1%} off on the mean).",
                foretold,
                bare,
                least=2.0,
                full_only=True,
            )
        )
    whole = variances.dropna()
    sums = whole[["measured", "predicted"]].sum()
    found.append(
        made.close(
            f"{run}: the variance along the critical directions, all of them and all steps together.",
            sums["measured"] / sums["predicted"],
            1.0,
            within=0.25,
            full_only=True,
        )
    )
    return found


def _apart(real: pd.Series, model: pd.Series) -> float:
    """The mean difference, relative to the real run's mean."""
    a, b = real.to_numpy(), model.to_numpy()
    some = np.isfinite(a)
    return float(np.abs(a - b)[some].mean() / a[some].mean())


def pictures(tables: Tables) -> dict[str, Figure]:
    """Distance, mean loss and squared gradient, curvature, variances, for each run."""
    figures: dict[str, Figure] = {}
    for run, paths in tables["paths"].groupby("run", sort=False):
        name = str(run).replace(",", "").replace(" ", "-")
        models = {str(model): some for model, some in paths.groupby("model", sort=False)}
        for column, label in {
            "distance": "distance to the smoothed path / travelled",
            "loss": "mean loss",
            "squared gradient": "mean |gradient|^2",
        }.items():
            figure, axes = draw.panel("step", label, str(run), yscale="log")
            for color, (model, some) in enumerate(models.items()):
                if model != REAL or column != "distance":
                    style = "k" if model == REAL else f"C{color - 1}"
                    axes.plot(some["step"], draw.positive(some[column]), style, lw=1, label=model)
            if column != "distance":
                path = models[CENTRAL]
                axes.plot(path["step"], path[f"{column} of the path"], "C0:", lw=1, label="of its path")
            figures[f"{name}-{column.replace(' ', '-')}"] = draw.legend(figure)
        figures[f"{name}-curvature"] = _curvatures(str(run), models[CENTRAL])
        figures[f"{name}-variance"] = _variances(str(run), tables["variances"].query("run == @run"))
    return figures


def _curvatures(run: str, central: pd.DataFrame) -> Figure:
    figure, axes = draw.panel("step", "largest curvature of P^-1 H", run)
    axes.plot(central["step"], central["curvature"], "C0", lw=1, label=CENTRAL)
    axes.plot(central["step"], central["tracked"], "0.5", lw=1, ls="--", label="directions tracked")
    axes.axhline(2, color="0.6", lw=1, ls=":")
    axes.set_ylim(0, None)
    return draw.legend(figure)


def _variances(run: str, variances: pd.DataFrame) -> Figure:
    figure, axes = draw.panel("step", "variance along critical directions", run)
    for direction, some in variances.groupby("direction"):
        if some["predicted"].max() > 0:
            axes.plot(
                some["step"], some["predicted"], f"C{direction - 1}", lw=1, label=f"predicted, {direction}"
            )
            axes.plot(
                some["step"], some["measured"], f"C{direction - 1}.", ms=2, label=f"measured, {direction}"
            )
    return draw.legend(figure)
