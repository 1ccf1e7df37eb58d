"""The shape of training: of the path, of hidden activations, of the ReLU network's regions."""

import dataclasses
import itertools

import jax
import numpy as np
import optax
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

import eomdl
from eomdl.plotting import plot_dimensions, plot_path_plane, plot_path_shape, plot_regions
from paper_repro import data, models
from paper_repro.reproduction import Claim, Config, Reproduction


PATH_RATE = 0.1  # eta lambda_max stays under 0.7
TOLERANCE = 1e-12  # of the flows, in float64: torsion is a third difference
RELU_RATES = 0.2, 0.5  # the second overshoots at first
RANDOM_WALK = (6 / np.pi**2, 2.5)  # share of the first component, effective dimension
LAYERS = ("input", "hidden 1", "hidden 2", "hidden 3")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is made smaller for a smoke run."""

    images: int
    path_steps: int
    terms: int
    sgd_steps: int
    points: int
    checkpoints: tuple[int, ...]
    lines: int
    rates: tuple[float, ...]
    resolution: int
    plane: int
    partitions: int


FULL = Sizes(500, 300, 2, 3000, 150, (0, 10, 100, 1000), 40, RELU_RATES, 150, 40, 2)
SMOKE = Sizes(150, 20, 1, 0, 125, (0, 20), 4, RELU_RATES[:1], 20, 5, 1)


def run(config: Config) -> tuple[dict[str, pd.DataFrame], list[Claim]]:
    """Paths of GD and its flows on a tanh network; dimensions and regions of a ReLU network in training."""
    size = SMOKE if config.smoke else FULL
    images = data.load(config.data, config.subset or size.images)
    paths, shape, plane = _paths(images, size, config.seeds if not config.smoke else 1)
    clouds, regions, pictures, corners = _relu(images, size, config.seeds if not config.smoke else 1)
    tables = {
        "paths": paths,
        "shape": shape,
        "plane": plane,
        "dimensions": clouds,
        "regions": regions,
        "region map": pictures,
        "region corners": corners,
    }
    return tables, _claims(paths, clouds, regions, size, config.smoke)


# ------------------------------------------------------------------------ paths


def _paths(images, size: Sizes, seeds: int) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    loss, steps = models.mlp_loss, size.path_steps
    tolerance = TOLERANCE if jax.config.jax_enable_x64 else None
    flows = {
        "gradient flow": eomdl.GradientFlow(loss, PATH_RATE),
    } | {f"EoM {n}": eomdl.EquationOfMotion(loss, PATH_RATE, order=n) for n in range(1, size.terms + 1)}
    rows, shapes, plane = [], [], pd.DataFrame()
    for seed in tqdm(range(seeds), desc="paths"):
        params = models.mlp_init(jax.random.key(seed), (images[0].shape[1], 32, 10))
        runs = {"GD": eomdl.descend(loss, params, optax.sgd(PATH_RATE), steps, args=images)}
        runs |= {
            name: eomdl.solve(
                flow, params, steps, args=images, rtol=tolerance, atol=tolerance, estimate_error=False
            )
            for name, flow in flows.items()
        }
        if size.sgd_steps:
            index = np.random.default_rng(seed).integers(0, len(images[0]), (size.sgd_steps, 5))
            batches = (images[0][index], images[1][index])
            runs["SGD"] = eomdl.descend(loss, params, optax.sgd(PATH_RATE), size.sgd_steps, batches=batches)
        axes = eomdl.geometry.principal_components(runs["GD"])
        real = eomdl.geometry.path_shape(runs["GD"])
        for name, run_ in runs.items():
            row = {"seed": seed, "run": name, "length": eomdl.geometry.path_length(run_)[-1]}
            row["straightness"] = eomdl.geometry.straightness(run_)[-1]
            if name != "SGD":
                here = real if name == "GD" else eomdl.geometry.path_shape(run_)
                row |= {
                    f"|log {what} ratio to GD|": float(
                        np.nanmedian(np.abs(np.log(getattr(here, what) / getattr(real, what))))
                    )
                    for what in ("curvature", "torsion")
                }
                if seed == 0:
                    scores = dict(zip(("first", "second"), axes.project(run_).T, strict=True))
                    shapes.append(pd.DataFrame({"run": name} | dataclasses.asdict(here) | scores))
            if name == "GD":
                row["first component"] = axes.explained[0]
            row["effective dimension"] = eomdl.geometry.participation_ratio(run_.params)
            points = eomdl.geometry.path_points(run_, size.points)
            for label, estimator in eomdl.geometry.dimension_estimators().items():
                found = eomdl.geometry.intrinsic_dimension(points, estimator, partitions=size.partitions)
                row |= {label: found.dimension, f"{label} error": found.standard_error}
            rows.append(row)
        if seed == 0:
            plane = _plane(loss, axes, shapes, images, size.plane)
    return pd.DataFrame(rows), pd.concat(shapes, ignore_index=True), plane


def _plane(loss, axes, shapes, images, points: int) -> pd.DataFrame:
    path = pd.concat(shapes)
    low, high = path[["first", "second"]].min(), path[["first", "second"]].max()
    sides = [
        np.linspace(a - 0.2 * (b - a), b + 0.2 * (b - a), points) for a, b in zip(low, high, strict=True)
    ]
    plane = eomdl.geometry.loss_plane(loss, axes.mean, axes.direction(0), axes.direction(1), *sides, images)
    x, y = np.meshgrid(plane.x, plane.y)
    return pd.DataFrame({"first": x.ravel(), "second": y.ravel(), "loss": plane.loss.ravel()})


# ---------------------------------------------------------- the ReLU network


def preactivations(layers, x):
    """Of every hidden layer, for one image."""
    hidden = []
    for layer in layers[:-1]:
        hidden.append(x @ layer["w"] + layer["b"])
        x = jax.nn.relu(hidden[-1])
    return hidden


def activations(layers, inputs):
    """What each layer hands on, input first, for many images."""
    out = [inputs]
    for layer in layers[:-1]:
        out.append(jax.nn.relu(out[-1] @ layer["w"] + layer["b"]))
    return out


def relu_loss(layers, batch):
    """Cross entropy of the ReLU network."""
    inputs, labels = batch
    last = activations(layers, inputs)[-1]
    return models.cross_entropy(last @ layers[-1]["w"] + layers[-1]["b"], labels)


def _relu(images, size: Sizes, seeds: int) -> tuple[pd.DataFrame, ...]:
    inputs = images[0]
    ends = np.random.default_rng(0).permutation(len(inputs))[: 2 * size.lines].reshape(2, -1)
    clouds, regions, pictures, corners = [], [], [], pd.DataFrame()
    for seed, rate in tqdm(list(itertools.product(range(seeds), size.rates)), desc="ReLU networks"):
        params = models.mlp_init(jax.random.key(seed), (inputs.shape[1], 32, 32, 32, 10))
        first, *later = size.checkpoints
        trained = eomdl.descend(relu_loss, params, optax.sgd(rate), later[-1], args=images, save_steps=later)
        for step in size.checkpoints:
            now = params if step == first else trained.at(step)
            name = {"seed": seed, "learning rate": rate, "step": step, "loss": float(_relu_loss(now, images))}
            regions.append(name | _counts(now, inputs[ends]))
            if rate != RELU_RATES[0]:
                continue
            clouds += [name | row for row in _dimensions(now, images, size.partitions)]
            if seed == 0 and step in (first, later[-1]):
                found = eomdl.geometry.region_map(preactivations, now, inputs[:3], resolution=size.resolution)
                x, y = np.meshgrid(found.x, found.y)
                picture = {"step": step, "x": x.ravel(), "y": y.ravel(), "label": found.labels.ravel()}
                pictures.append(pd.DataFrame(picture))
                corners = pd.DataFrame(found.corners, columns=["x", "y"])
    return pd.DataFrame(clouds), pd.DataFrame(regions), pd.concat(pictures, ignore_index=True), corners


_relu_loss = jax.jit(relu_loss)
_activations = jax.jit(activations)


def _dimensions(params, images, partitions: int) -> list[dict]:
    """Of the activations of every layer, and of the gradients of single images."""
    points = dict(zip(LAYERS, _activations(params, images[0]), strict=True))
    points["gradients"] = eomdl.geometry.gradient_points(relu_loss, params, images)
    rows = []
    for (name, cloud), (label, estimator) in itertools.product(
        points.items(), eomdl.geometry.dimension_estimators().items()
    ):
        found = eomdl.geometry.intrinsic_dimension(cloud, estimator, partitions=partitions)
        notes = "; ".join(found.notes)
        rows.append({"cloud": name} | dataclasses.asdict(found) | {"estimator": label, "notes": notes})
    return rows


def _counts(params, ends) -> dict:
    """Regions on the lines between images."""
    counts = [
        eomdl.geometry.count_regions_on_line(preactivations, params, a, b).count
        for a, b in zip(*ends, strict=True)
    ]
    return {
        "regions on a line": np.mean(counts),
        "error": np.std(counts, ddof=1) / np.sqrt(len(counts)),
    }


# ----------------------------------------------------------------------- claims


def _claims(paths, clouds, regions, size: Sizes, smoke: bool) -> list[Claim]:
    def of(run: str, column: str) -> np.ndarray:
        return paths[paths["run"] == run][column].to_numpy()

    curvature, torsion = "|log curvature ratio to GD|", "|log torsion ratio to GD|"
    gain = {w: of("gradient flow", w) / of("EoM 1", w) for w in (curvature, torsion)}
    again = of("EoM 1", curvature) / of("EoM 2", curvature) if size.terms > 1 else np.array([])
    smooth = paths[paths["run"] != "SGD"]
    first, last = size.checkpoints[0], size.checkpoints[-1]

    def dimension(step: int, cloud: str) -> pd.DataFrame:
        rows = clouds[(clouds["step"] == step) & (clouds["cloud"] == cloud)]
        return rows.set_index(["seed", "estimator"])[["dimension", "standard_error"]]

    early, late = dimension(first, "hidden 3"), dimension(last, "hidden 3")
    fall = early["dimension"] - late["dimension"]
    spread = np.hypot(early["standard_error"], late["standard_error"])
    deep = pd.DataFrame(
        {name: dimension(last, name)["dimension"].groupby("estimator").mean() for name in LAYERS}
    )
    lines = regions.pivot(index=["learning rate", "seed"], columns="step", values="regions on a line")
    calm, rough = ((lines[last] / lines[first]).reindex([rate], level=0) for rate in RELU_RATES)

    def asserted(holds) -> bool | None:
        return None if smoke else bool(holds)

    claims = [
        Claim(
            "Along GD's path the equation of motion has GD's curvature, and its torsion, much more nearly than "
            "gradient flow has" + ("; a second counter term comes nearer still." if len(again) else "."),
            "Median |log ratio| to GD, times smaller with one counter term, seed by seed: curvature "
            f"{_list(gain[curvature])}, torsion {_list(gain[torsion])}"
            + (f"; with the second, curvature again {_list(again)}." if len(again) else "."),
            bool(gain[curvature].min() > 5 and gain[torsion].min() > 2 and again.min(initial=np.inf) > 2),
        ),
        Claim(
            "GD's path and its flows' are nearer to a straight line than a random walk: GD's first component "
            "explains more than its 61 %, and the effective dimension of all is below its 2.5.",
            f"First component at least {smooth['first component'].min():.3f}, effective dimension at most "
            f"{smooth['effective dimension'].max():.2f}, distance over length at least {smooth['straightness'].min():.2f}.",
            bool(
                smooth["first component"].min() > RANDOM_WALK[0]
                and smooth["effective dimension"].max() < RANDOM_WALK[1]
            ),
        ),
        Claim(
            "Both estimators see the images in the last hidden layer lie in fewer dimensions after training than before, by "
            "more than two standard errors.",
            f"{early['dimension'].min():.1f} to {early['dimension'].max():.1f} before, {late['dimension'].min():.1f} to "
            f"{late['dimension'].max():.1f} after; smallest fall {float((fall / spread).min()):.1f} standard errors.",
            asserted((fall > 2 * spread).all()),
        ),
        Claim(
            "After training the dimension falls from every layer to the next, by both estimators (means over seeds).",
            "Input first: " + "; ".join(f"{name} {_list(row)}" for name, row in deep.iterrows()) + ".",
            asserted((np.diff(deep, axis=1) < 0).all()),
        ),
        Claim(
            "From one start, the larger learning rate, which overshoots first, makes more linear regions: on lines between images at "
            "least a tenth more than the smaller one makes, and than there were.",
            f"After over before, seed by seed: {_list(calm)} at {RELU_RATES[0]}, {_list(rough)} at {RELU_RATES[1]} "
            f"(means of {size.lines} lines; {lines[first].mean():.0f} before).",
            asserted(rough.min() > 1.1 and (rough.to_numpy() / calm.to_numpy()).min() > 1.1),
        ),
    ]
    if size.sgd_steps:
        gd, sgd = (paths[paths["run"] == name]["MLE"] for name in ("GD", "SGD"))
        claims.append(
            Claim(
                "The path of GD has dimension 1; that of SGD with batches of 5 is rougher, between a smooth curve's 1 and a "
                "random walk's 2.",
                f"By maximum likelihood {_list(gd)} and {_list(sgd)}.",
                bool((abs(gd - 1) < 0.1).all() and sgd.min() > 1.2 and sgd.max() < 2.1),
            )
        )
    return claims


def _list(values) -> str:
    return ", ".join(f"{v:.3g}" for v in values)


# --------------------------------------------------------------------- pictures


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, Figure]:
    """Shape of the paths, the paths on the loss, dimensions by each estimator, regions early and late."""
    runs = {name: rows for name, rows in tables["shape"].groupby("run", sort=False)}
    fields = [field.name for field in dataclasses.fields(eomdl.geometry.PathShape)]
    shapes = {
        name: eomdl.geometry.PathShape(*(rows[f].to_numpy() for f in fields)) for name, rows in runs.items()
    }
    grid = tables["plane"].pivot(index="second", columns="first", values="loss")
    plane = eomdl.geometry.LossPlane(grid.columns.to_numpy(), grid.index.to_numpy(), grid.to_numpy())
    paths = {name: rows[["first", "second"]].to_numpy() for name, rows in runs.items()}
    figures = {"shape": plot_path_shape(shapes), "plane": plot_path_plane(plane, paths)}
    clouds = tables["dimensions"]
    for estimator, rows in clouds[clouds["seed"] == 0].groupby("estimator", sort=False):
        found = {
            cloud: {row["step"]: _estimate(row) for row in of_cloud.to_dict("records")}
            for cloud, of_cloud in rows[rows["cloud"] != "gradients"].groupby("cloud", sort=False)
        }
        figures[f"dimensions {estimator}"] = plot_dimensions(found)
    maps = {}
    for step, rows in tables["region map"].groupby("step"):
        labels = rows.pivot(index="y", columns="x", values="label")
        maps[f"step {step}"] = eomdl.geometry.RegionMap(
            labels.to_numpy(),
            labels.columns.to_numpy(),
            labels.index.to_numpy(),
            tables["region corners"].to_numpy(),
        )
    figures["regions"] = plot_regions(maps)
    figures["in training"] = _plot_training(tables["regions"], clouds[clouds["cloud"] == "gradients"])
    return figures


def _estimate(row: dict) -> eomdl.geometry.IntrinsicDimension:
    fields = [field.name for field in dataclasses.fields(eomdl.geometry.IntrinsicDimension)]
    return eomdl.geometry.IntrinsicDimension(**{name: row[name] for name in fields} | {"notes": ()})


def _plot_training(regions: pd.DataFrame, gradients: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, (rate, of_rate) in enumerate(regions.groupby("learning rate")):
        for seed, rows in of_rate.groupby("seed"):
            label = f"learning rate {rate}" if seed == 0 else None
            bars = 2 * rows["error"]
            left.errorbar(
                rows["step"],
                rows["regions on a line"],
                bars,
                fmt=f"C{color}o-",
                capsize=3,
                alpha=0.7,
                label=label,
            )
    for color, (name, of_estimator) in enumerate(gradients.groupby("estimator", sort=False)):
        for seed, rows in of_estimator.groupby("seed"):
            label = name if seed == 0 else None
            bars = 2 * rows["standard_error"]
            right.errorbar(
                rows["step"], rows["dimension"], bars, fmt=f"C{color}o-", capsize=3, alpha=0.7, label=label
            )
    left.set(ylabel="linear regions between two images")
    right.set(ylabel="dimension of the images' gradients")
    for axes in (left, right):
        axes.set_xscale("symlog", linthresh=10)
        axes.set(xlabel="step (bars: 2 standard errors)", xlim=(-1, None), ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


REPRODUCTION = Reproduction(
    name="shape",
    title="The shape of training: curvature of the path, dimension of the activations, regions of the network",
    source=(
        "'Shape, Symmetries, and Structure: The Changing Role of Mathematics in Machine Learning Research' (The Gradient); "
        "Antognini & Sohl-Dickstein 2018 for the random walk, Hanin & Rolnick 2019 for regions on lines."
    ),
    setting=(
        "Digits. Paths: 64-32-10 tanh network (counter terms need derivatives, which ReLU has not at its kinks), cross entropy, "
        "learning rate 0.1, 300 steps; SGD with batches of 5 for 3,000 steps. Dimensions and regions: 64-32-32-32-10 ReLU "
        "network, learning rates 0.2 and 0.5 (regions alone), 1,000 steps; dimensions of all images' activations and gradients, by TwoNN and maximum "
        "likelihood, errors from disjoint blocks; regions counted exactly on 40 lines between images. The estimators look at different scales and differ: only changes are claimed."
    ),
    seconds=75,
    run=run,
    plot=plot,
)
