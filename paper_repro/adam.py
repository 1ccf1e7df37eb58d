"""The first-order correction of Adam (Cattaneo et al. 2024)."""

import jax
import optax
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

import eomdl
from paper_repro import data, models
from paper_repro.reproduction import Claim, Config, Reproduction


B1, B2, EPS = 0.9, 0.99, 1e-4  # eps under the root, as in the paper: of the size of the squared gradients
RATES = (4e-4, 2e-4, 1e-4)
WARMUP, TIME = 0.4, 0.08
POINTS = (1, 2)


def run(config: Config) -> tuple[dict[str, pd.DataFrame], list[Claim]]:
    """Trajectory error of three kinds of flow after the transient, against the learning rate."""
    rates = RATES[1:] if config.smoke else RATES
    inputs = data.load(config.data, config.subset or (64 if config.smoke else 128))
    net = models.mlp_init(jax.random.key(0), (inputs[0].shape[1], 8 if config.smoke else 16, 10))
    rows = []
    for eta in tqdm(rates, desc="learning rates"):
        rows += _errors(inputs, net, eta, POINTS[1:] if config.smoke else POINTS)
    table = pd.DataFrame(rows, columns=["model", "learning rate", "largest error", "ODE error"])
    orders = pd.DataFrame(
        [
            (model, eomdl.errors.observed_order(some["learning rate"], some["largest error"]))
            for model, some in table.groupby("model", sort=False)
        ],
        columns=["model", "observed order"],
    )
    return {"orders": orders, "errors": table}, _claims(orders, table)


def _errors(inputs, net, eta: float, points) -> list[tuple[str, float, float, float]]:
    loss, optimizer = models.mlp_loss, optax.adam(eta, B1, B2, eps=0.0, eps_root=EPS)
    begin, end = round(WARMUP / eta), round((WARMUP + TIME) / eta)
    warm = eomdl.descend(loss, net, optimizer, begin, args=inputs, save_steps=[begin])
    rest = list(range(begin, end + 1, max((end - begin) // 50, 1)))
    real = eomdl.descend(loss, net, optimizer, end, args=inputs, save_steps=rest, resume=warm)
    step = eomdl.optimizer_step(loss, optimizer)
    flows = {
        name: eomdl.flows.AdamFlow(loss, eta, B1, B2, eps=0.0, eps_root=EPS, order=order)
        for order, name in enumerate(("without correction", "first-order correction"))
    }
    flows |= {f"{k} points": eomdl.InterpolatingFlow(step, eta, k) for k in points}
    rows = []
    for name, flow in flows.items():
        path = eomdl.solve(flow, net, end, args=inputs, save_steps=rest, resume=warm, rtol=1e-10, atol=1e-12)
        comparison = eomdl.compare(real, {name: path})
        rows.append((name, eta, comparison.distance[name].max(), comparison.ode_error[name].max()))
    return rows


def _claims(orders: pd.DataFrame, table: pd.DataFrame) -> list[Claim]:
    order = orders.set_index("model")["observed order"]
    expected = {"without correction": 1, "first-order correction": 2}
    expected |= {f"{k} points": k for k in POINTS if f"{k} points" in order.index}
    error = table.pivot(index="learning rate", columns="model", values="largest error")
    gain = error["without correction"] / error["first-order correction"]
    best = error["first-order correction"] / error["2 points"]
    closed = ("without correction", "first-order correction")
    off = max(abs(order[name] - expected[name]) for name in closed)
    return [
        Claim(
            "The trajectory error of Adam's flow is of first order in the learning rate without correction, of second "
            "with the correction of Cattaneo et al.",
            f"Observed orders {order[closed[0]]:.2f} and {order[closed[1]]:.2f}.",
            bool(off < 0.25),
        ),
        Claim(
            "The correction brings the flow nearer to Adam at every learning rate.",
            f"{gain.min():.0f} to {gain.max():.0f} times.",
            bool(gain.min() > 2),
        ),
        Claim(
            "The interpolating flow in the space of parameters and averages has the order of its points, with errors far "
            "below the closed form's.",
            ", ".join(f"{name}: order {order[name]:.2f}" for name in expected if name not in closed)
            + f"; 2 points are {best.min():.0f} to {best.max():.0f} times nearer than the correction.",
            bool(
                all(abs(order[n] - e) < 0.25 for n, e in expected.items() if n not in closed)
                and best.min() > 10
            ),
        ),
    ]


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, Figure]:
    """Largest error along the path against the learning rate."""
    table, orders = tables["errors"], tables["orders"].set_index("model")["observed order"]
    figure = Figure(figsize=(6.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for color, (model, some) in enumerate(table.groupby("model", sort=False)):
        label = f"{model}: order {orders[model]:.2f}"
        axes.loglog(some["learning rate"], some["largest error"], f"C{color}o-", label=label)
        axes.loglog(some["learning rate"], some["ODE error"], f"C{color}:")
    axes.plot([], [], "k:", label="ODE error (estimate)")
    axes.set(xlabel="learning rate", ylabel="largest distance to Adam")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return {"adam": figure}


REPRODUCTION = Reproduction(
    name="adam",
    title="Adam's flow, its first-order correction, and the interpolating flow",
    source="Cattaneo, Klusowski & Shigida 2024 (arXiv 2309.00079).",
    setting=(
        "A tanh network with 16 hidden units, cross entropy, full batch of 128 images; Adam with b1 = 0.9, b2 = 0.99, eps = "
        "1e-4 under the root. Flows start from the real run at time 0.4 (1,000 to 4,000 steps) and run to 0.48; largest "
        "distance to Adam over all parameters, learning rates 4e-4 to 1e-4."
    ),
    seconds=40,
    run=run,
    plot=plot,
)
