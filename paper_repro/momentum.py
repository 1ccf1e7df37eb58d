"""Implicit regularization of momentum (Ghosh et al. 2023)."""

import jax
import numpy as np
import optax
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

import eomdl
from paper_repro import models
from paper_repro.reproduction import Claim, Config, Reproduction


START = {"a": 2.8, "b": 3.4}
POINT = (1.0, 0.6)  # x, y
MOMENTA = (0.0, 0.5, 0.8, 0.9)
STEP = 0.004  # lr/(1 - beta), the time a step takes: the same for every beta
TIME = 1.2
WARMUP = 0.12  # after which the memory is full
RATES = (0.002, 0.001, 0.0005, 0.00025)


def run(config: Config) -> tuple[dict[str, pd.DataFrame], list[Claim]]:
    """Paths of heavy ball at one effective learning rate; orders of the defect after the transient."""
    params = {name: jax.numpy.asarray(value) for name, value in START.items()}
    loss, steps = models.two_parameter_loss, round(TIME / STEP)
    sharpness = eomdl.sharpness(loss, 2)
    rows, paths = [], []
    for beta in tqdm(MOMENTA, desc="momentum"):
        optimizer = _optimizer(STEP, beta)
        warm = eomdl.descend(loss, params, optimizer, round(WARMUP / STEP), args=POINT, step_size=STEP)
        real = eomdl.descend(loss, params, optimizer, steps, args=POINT, resume=warm)
        flows = {
            "gradient flow": eomdl.GradientFlow(loss, STEP),
            "with memory factor": eomdl.flows.MomentumFlow(loss, STEP * (1 - beta), beta),
            "4 points": eomdl.InterpolatingFlow(eomdl.optimizer_step(loss, optimizer), STEP, 4),
        }
        runs = {
            name: eomdl.solve(flow, params, steps, args=POINT, resume=warm, rtol=1e-10, atol=1e-10)
            for name, flow in flows.items()
        }
        comparison = eomdl.compare(real, runs)
        end = real.at(steps)
        rows.append(
            {
                "momentum": beta,
                "sharpness at the end": float(sharpness(end, POINT)),
                "loss at the end": float(loss(end, POINT)),
                **{f"distance, {name}": float(d.max()) for name, d in comparison.distance.items()},
                "ODE error": max(float(e.max()) for e in comparison.ode_error.values()),
            }
        )
        path = {"momentum": beta, "step": real.steps}
        for name, run_ in {"heavy ball": real, **runs}.items():
            path |= {f"{name} {key}": np.asarray(run_.params[key]) for key in ("a", "b")}
        paths.append(pd.DataFrame(path))
    table = pd.DataFrame(rows)
    orders = pd.DataFrame(
        _orders(params, MOMENTA[1:2] if config.smoke else MOMENTA[:3]),
        columns=["momentum", "model", "observed order"],
    )
    return {"distances": table, "orders": orders, "paths": pd.concat(paths)}, _claims(table, orders)


def _optimizer(step: float, beta: float) -> optax.GradientTransformation:
    return optax.sgd(step * (1 - beta), momentum=beta)


def _orders(params, momenta) -> list[tuple[float, str, float]]:
    rows = []
    for beta in tqdm(momenta, desc="orders"):

        def optimizer(eta, beta=beta):
            return _optimizer(eta, beta)

        def modified(eta, beta=beta):
            return eomdl.flows.MomentumFlow(models.two_parameter_loss, eta * (1 - beta), beta)

        def plain(eta):
            return eomdl.GradientFlow(models.two_parameter_loss, eta)

        for name, flow in (("gradient flow", plain), ("with memory factor", modified)):
            study = eomdl.errors.convergence_study(
                flow,
                models.two_parameter_loss,
                params,
                RATES,
                optimizer=optimizer,
                warmup=WARMUP,
                args=POINT,
            )
            rows.append((beta, name, study.order))
    return rows


def _claims(table: pd.DataFrame, orders: pd.DataFrame) -> list[Claim]:
    off = [
        abs(order - (2 if name == "gradient flow" else 3))
        for name, order in zip(orders["model"], orders["observed order"], strict=True)
    ]
    gain = table["distance, gradient flow"] / table["distance, with memory factor"]
    more = table["distance, with memory factor"] / table["distance, 4 points"]
    ends = table["sharpness at the end"].to_numpy()
    return [
        Claim(
            "After the transient heavy ball follows L + h/4 (1 + beta)/(1 - beta) |grad L|^2, h = lr/(1 - beta): "
            "the defect is of order 3, that of gradient flow of order 2.",
            f"Observed orders differ from that by at most {max(off):.2f}.",
            max(off) < 0.2,
        ),
        Claim(
            "At one h the memory factor brings the flow nearer to heavy ball at every beta, and 4 points of the "
            "step map much nearer still.",
            f"Times nearer than gradient flow: {', '.join(f'{g:.1f}' for g in gain)} for beta = "
            f"{', '.join(map(str, MOMENTA))}; 4 points again {', '.join(f'{m:.0f}' for m in more)} times.",
            bool(gain.min() > 1 and more.min() > 10),
        ),
        Claim(
            "More momentum regularizes more: at one h it ends at a flatter minimum.",
            "Sharpness at the end: " + ", ".join(f"{s:.3f}" for s in ends) + ".",
            bool(np.all(np.diff(ends) < 0)),
        ),
    ]


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, Figure]:
    """The paths of heavy ball in the plane, and of its models for the largest momentum; distances."""
    paths, table = tables["paths"], tables["distances"]
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    plane, zoom, bars = figure.subplots(1, 3)
    a = np.linspace(0.15, 3, 200)
    plane.plot(a, POINT[1] / a, "0.6", lw=1, label="minima, a b = y")
    for color, (beta, path) in enumerate(paths.groupby("momentum")):
        plane.plot(
            path["heavy ball a"], path["heavy ball b"], f"C{color}", label=f"heavy ball, beta = {beta}"
        )
    last = paths[paths["momentum"] == max(MOMENTA)]
    zoom.plot(last["heavy ball a"], last["heavy ball b"], "k.", ms=3, label="heavy ball")
    for color, name in enumerate(("gradient flow", "with memory factor", "4 points")):
        zoom.plot(last[f"{name} a"], last[f"{name} b"], f"C{color}", label=name)
        bars.semilogy(table["momentum"], table[f"distance, {name}"], f"C{color}o-", label=name)
    plane.set(xlabel="a", ylabel="b", ylim=(1.2, 3.6), title=f"lr/(1 - beta) = {STEP}")
    zoom.set(xlabel="a", ylabel="b", title=f"beta = {max(MOMENTA)}, models start after the transient")
    bars.set(xlabel="momentum beta", ylabel="largest distance to heavy ball")
    for axes in (plane, zoom, bars):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return {"momentum": figure}


REPRODUCTION = Reproduction(
    name="momentum",
    title="Heavy ball follows a modified loss with the memory factor (1 + beta)/(1 - beta)",
    source="Ghosh et al. 2023 (arXiv 2302.00849), the two-parameter model.",
    setting=(
        "1/2 (y - a b x)^2 with x = 1, y = 0.6 from (2.8, 3.4), beta = 0, 0.5, 0.8, 0.9, learning rate 0.004 (1 - beta) so "
        "that a step takes the same time, until time 1.2. Models start at time 0.12 of the real run, when the memory is full; "
        "orders there from steps of 0.002 down to 0.00025 (beta up to 0.8)."
    ),
    seconds=20,
    run=run,
    plot=plot,
)
