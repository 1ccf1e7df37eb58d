"""Weight norms of scale-invariant layers (Miyagawa 2022; Wan et al. 2021)."""

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
MODELS = ("gradient flow", "EoM 1", "EoM 2", "EoM 3")  # 0, 1, 2 and 3 counter terms
NETWORKS = {"layer norm": models.layer_norm_loss, "batch norm": models.batch_norm_loss}
HIDDEN = 16
LONG_RATE, LONG_DECAY, LONG_BATCH = 0.1, 0.05, 16


def hidden(params):
    """The scale-invariant block: the weights before the normalization."""
    return params["hidden"]


def gradient_norm(loss):
    """Observable |grad f| over that block, without weight decay."""
    return lambda params, args: jnp.linalg.norm(hidden(jax.grad(loss)(params, args)))


def run(config: Config) -> tuple[dict[str, pd.DataFrame], list[Claim]]:
    """Norm rates on a grid of (learning rate, weight decay), then the approach to equilibrium."""
    inputs = data.load(config.data, config.subset or 256)
    starts = [
        models.normalized_init(jax.random.key(seed), inputs[0].shape[1], HIDDEN, 10)
        for seed in range(1 if config.smoke else config.seeds)
    ]
    claims = []
    for name, loss in NETWORKS.items():
        check = eomdl.symmetry.check(loss, starts[0], eomdl.symmetry.Scaling(["hidden"]), args=inputs)
        claims.append(
            Claim(f"The weights before the {name} are scale invariant.", check.message + ".", check.holds)
        )
    rates = _rates(starts, inputs, *((10, RATES[:2], MODELS[:2]) if config.smoke else (50, RATES, MODELS)))
    long, equilibrium = _equilibrium(config, starts[0], 100 if config.smoke else 600)
    tables = {"norm-rate": rates, "equilibrium": equilibrium, "approach": long}
    return tables, claims + _claims(rates, equilibrium, config)


def _rates(starts, inputs, steps, grid, names) -> pd.DataFrame:
    etas, decays, which = (
        np.array(column) for column in zip(*itertools.product(grid, grid, range(len(starts))), strict=True)
    )
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    rows = []
    for network, bare in NETWORKS.items():
        grad_norm = gradient_norm(bare)

        @jax.jit
        @jax.vmap
        def real(eta, decay, seed, bare=bare, grad_norm=grad_norm):
            loss = eomdl.WeightDecay(bare, decay)
            observe = {
                "norm": eomdl.observe.block_norm(hidden),
                "gradient": grad_norm,
                "sharpness": eomdl.sharpness(loss, 8),
            }
            params = jax.tree.map(lambda leaf: leaf[seed], stacked)
            return eomdl.descend(
                loss, params, optax.sgd(eta), steps, args=inputs, observe=observe, save_params=False
            ).observables

        measured = jax.tree.map(np.asarray, real(etas, decays, which))
        observe = {"norm": eomdl.observe.block_norm(hidden)}
        for i in tqdm(range(len(etas)), desc=f"flows, {network}"):
            eta, decay, norm, gradient = etas[i], decays[i], measured["norm"][i], measured["gradient"][i]
            rate = -2 * eomdl.observe.decay_rate(norm, eta)
            law = eomdl.symmetry.scale_norm_after_step(norm[:-1], gradient[:-1], eta, decay)
            row = {
                "network": network,
                "learning rate": eta,
                "weight decay": decay,
                "eta lambda_max": eta * measured["sharpness"][i].max(),
                "measured": rate.mean(),
                "spread": rate.std(),
                "exact law error": np.abs(np.asarray(law) / norm[1:] - 1).max(),
                "closed form EoM 1": float(
                    np.mean(eomdl.symmetry.scale_norm_rate(norm[:-1], gradient[:-1], eta, decay, order=1))
                ),
            }
            loss = eomdl.WeightDecay(bare, decay)
            for order, model in enumerate(names):
                path = eomdl.solve(
                    eomdl.EquationOfMotion(loss, eta, order),
                    starts[which[i]],
                    steps,
                    args=inputs,
                    observe=observe,
                    save_params=False,
                    estimate_error=False,
                )
                predicted = -2 * eomdl.observe.decay_rate(path.observables["norm"], eta)
                row[model] = predicted.mean()
                row[f"error {model}"] = np.abs(predicted - rate).max()
            rows.append(row)
    keys = ["network", "learning rate", "weight decay"]
    return pd.DataFrame(rows).groupby(keys, sort=False).mean().reset_index()


def _equilibrium(config: Config, start, steps) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One long SGD run with batch norm, the flows on the same batches, and the balance."""
    images, labels = data.load(config.data, config.subset or 512)
    index = jax.random.randint(jax.random.key(7), (steps, LONG_BATCH), 0, len(labels))
    batches = (images[index], labels[index])
    bare = models.batch_norm_loss
    loss = eomdl.WeightDecay(bare, LONG_DECAY)
    real = eomdl.descend(loss, start, optax.sgd(LONG_RATE), steps, batches=batches, progress=True)
    norm = np.linalg.norm(np.asarray(hidden(real.params)).reshape(steps + 1, -1), axis=1)
    before = jax.tree.map(lambda leaf: leaf[:-1], real.params)
    gradient = np.asarray(jax.jit(jax.vmap(gradient_norm(bare)))(before, batches))
    curve = {"step": real.steps, "SGD": norm}
    observe = {"norm": eomdl.observe.block_norm(hidden)}
    for order, model in enumerate(MODELS[:3]):
        flow = eomdl.EquationOfMotion(loss, LONG_RATE, order)
        path = eomdl.solve(
            flow,
            start,
            steps,
            batches=batches,
            observe=observe,
            save_params=False,
            estimate_error=False,
            rtol=1e-6,
            atol=1e-6,
            progress=True,
        )
        reached = path.observables["norm"]
        curve[model] = np.pad(reached, (0, steps + 1 - len(reached)), constant_values=np.nan)
    curve["angle"] = np.append(eomdl.observe.angle_per_step(hidden(real.params)), np.nan)
    # The balance at each step, with the gradient's mean square over the last 50 batches.
    invariant = pd.Series((norm[:-1] * gradient) ** 2).rolling(50, min_periods=1).mean().to_numpy()
    balance = eomdl.symmetry.equilibrium_norm(1.0, np.sqrt(invariant), LONG_RATE, LONG_DECAY)
    curve["equilibrium"] = np.append(np.asarray(balance), np.nan)
    tail = slice(steps // 2, None)
    predicted = float(
        eomdl.symmetry.equilibrium_norm(
            1.0, np.sqrt(np.mean((norm[:-1][tail] * gradient[tail]) ** 2)), LONG_RATE, LONG_DECAY
        )
    )
    angle = curve["angle"][:-1][tail]
    rows = [
        ("norm", norm[tail].mean(), norm[tail].std(), predicted),
        (
            "angle per step (root mean square)",
            np.sqrt(np.mean(angle**2)),
            angle.std(),
            float(eomdl.symmetry.equilibrium_angle(LONG_RATE, LONG_DECAY)),
        ),
    ]
    for model in MODELS[:3]:
        rows.append((f"norm, {model}", np.mean(curve[model][tail]), np.std(curve[model][tail]), predicted))
    table = pd.DataFrame(
        rows, columns=["second half of the run", "mean", "spread", "predicted at equilibrium"]
    )
    return pd.DataFrame(curve), table


def _claims(rates: pd.DataFrame, equilibrium: pd.DataFrame, config: Config) -> list[Claim]:
    valid = rates[rates["eta lambda_max"] < 1]
    names = [model for model in MODELS if model in rates]
    gains = [valid[f"error {a}"] / valid[f"error {b}"] for a, b in itertools.pairwise(names)]
    closed = (
        np.abs(valid["closed form EoM 1"] - valid["measured"])
        / np.abs(valid["measured"] - valid["gradient flow"])
    ).max()
    law = rates["exact law error"].max()
    value = equilibrium.set_index("second half of the run")
    norm, angle = value.loc["norm"], value.loc["angle per step (root mean square)"]
    flow, first, second = (value.loc[f"norm, {model}", "mean"] for model in MODELS[:3])
    settled = None if config.smoke else True  # the smoke run stops before it
    norm_error = norm["mean"] / norm["predicted at equilibrium"] - 1
    angle_error = angle["mean"] / angle["predicted at equilibrium"] - 1
    return [
        Claim(
            "Real GD obeys |theta|^2 <- (1 - eta lambda)^2 |theta|^2 + eta^2 |grad f|^2 at every step.",
            f"Largest relative error of the norm {law:.1e}.",
            bool(law < 1e-12),
        ),
        Claim(
            "The closed-form rate with one counter term, -(2 lambda + eta lambda^2) + eta |grad f|^2/|theta|^2, taken "
            "along the real path explains what gradient flow's -2 lambda misses.",
            f"It leaves at most {closed:.0%} of gradient flow's error of the mean rate.",
            bool(closed < 0.5),
        ),
        Claim(
            "Integrated from the start alone, each counter term brings the norm rate nearer to real GD, wherever "
            f"eta lambda_max < 1 ({len(valid)} of {len(rates)} settings).",
            f"Smallest and largest factor: {min(g.min() for g in gains):.1f}, {max(g.max() for g in gains):.0f}.",
            bool(min(g.min() for g in gains) > 1),
        ),
        Claim(
            "The norm settles at the equilibrium r^4 = eta |grad f|^2 r^2 / (lambda (2 - eta lambda)).",
            f"Measured {norm['mean']:.4f}, predicted {norm['predicted at equilibrium']:.4f} ({norm_error:+.1%}).",
            settled and bool(abs(norm_error) < 0.02),
        ),
        Claim(
            "There the weights turn by arccos(1 - eta lambda) a step.",
            f"Measured {angle['mean']:.4f}, predicted {angle['predicted at equilibrium']:.4f} ({angle_error:+.1%}).",
            settled and bool(abs(angle_error) < 0.02),
        ),
        Claim(
            "Gradient flow has no equilibrium: its norm decays on. With counter terms the flow settles, and each term "
            "brings it nearer to SGD (not all the way: eta lambda_max of a batch is near 1 there).",
            f"Mean norm over the second half: SGD {norm['mean']:.3f}, gradient flow {flow:.3f}, EoM 1 {first:.3f}, "
            f"EoM 2 {second:.3f}.",
            settled
            and bool(
                flow < 0.5 * norm["mean"] < first and abs(second - norm["mean"]) < abs(first - norm["mean"])
            ),
        ),
    ]


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, Figure]:
    """Errors of the norm rate per setting; norm and angle along the long run."""
    rates, long = tables["norm-rate"], tables["approach"]
    first = Figure(figsize=(12, 4.6), layout="constrained")
    for axes, network in zip(first.subplots(1, 2, sharey=True), NETWORKS, strict=True):
        some = rates[rates["network"] == network]
        x = np.arange(len(some))
        for marker, model in zip("osD^", (m for m in MODELS if m in some), strict=False):
            axes.plot(x, some[f"error {model}"], marker, label=model)
        labels = [
            f"{e:g}\n{w:g}\n{s:.2g}"
            for e, w, s in zip(
                some["learning rate"], some["weight decay"], some["eta lambda_max"], strict=True
            )
        ]
        axes.set_xticks(x, labels)
        axes.set(
            yscale="log",
            title=f"weights before {network}",
            xlabel="learning rate, weight decay, largest eta lambda_max",
        )
        axes.set_ylabel("largest error of d log |theta|^2 / dt (1/time)")
        axes.grid(alpha=0.3)
        axes.legend()
    second = Figure(figsize=(12, 4.2), layout="constrained")
    left, right = second.subplots(1, 2)
    for style, name in zip(
        ("k-", "C0-", "C1-", "C2--", "r:"), ("SGD", *MODELS[:3], "equilibrium"), strict=True
    ):
        left.plot(long["step"], long[name], style, label=name, lw=2.5 if name == "SGD" else 1.5)
    left.set(
        xlabel="step", ylabel="norm of the weights", yscale="log", title="approach to the equilibrium norm"
    )
    right.plot(long["step"], long["angle"], "k-", lw=0.6, label="SGD")
    right.axhline(
        float(np.arccos(1 - LONG_RATE * LONG_DECAY)), color="r", ls=":", label="arccos(1 - eta lambda)"
    )
    right.set(xlabel="step", ylabel="angle per step (radians)", title="angular update")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    return {"norm-rate": first, "equilibrium": second}


REPRODUCTION = Reproduction(
    name="nec-scale",
    title="Weight norms of scale-invariant layers: rate, equilibrium, angle per step",
    source=(
        "Miyagawa 2022 (NeurIPS), scale-invariant layers; equilibrium as in Wan et al. 2021, "
        "Spherical Motion Dynamics (NeurIPS)."
    ),
    setting=(
        "Weights (pixels x 16) before a normalization without affine parameters or epsilon, over the features (layer "
        "norm) or over the batch (batch norm in training mode), then tanh and a linear head; cross entropy + L2 weight "
        "decay. Rates: full-batch gradient descent on 256 images, 50 steps; the rate is d log |theta|^2 / dt, and the "
        "error of a flow is its largest over the steps, integrated from the same start. Where eta lambda_max passes 1 "
        "the series in eta has no limit: those settings are shown, and no claim is made of them. Equilibrium: SGD with "
        f"batches of {LONG_BATCH} of 512 images, batch norm, eta = {LONG_RATE}, lambda = {LONG_DECAY}, 600 steps, the "
        "flows on the same batches (ODE tolerances 1e-6)."
    ),
    seconds=120,
    run=run,
    plot=plot,
)
