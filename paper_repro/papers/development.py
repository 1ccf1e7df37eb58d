"""Clusters of runs part and do not meet again: basins, not early stages of one path.

A tanh network 64-3-10 on 500 digits, cross entropy and weight decay 0.003. From each of --seeds starts, 16 runs of SGD (batches of 16,
learning rate 0.5/(1 + k/1000)) that differ only in the order of the batches, in one compiled program; loss barriers on straight lines
between all pairs. Clusters are taken at step 2,000 (average linkage, threshold 0.1; 0.05 and 0.2 too). Intervention: all are trained on
to step 16,000, then without noise (full batch, heavy ball 0.1 with momentum 0.98) to the minimum. Straight lines only: a curved path, or
a permutation of the hidden units, may well join two of the minima.
"""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

import eomdl
from eomdl.plotting import plot_barriers, plot_development
from paper_repro import claims as made, many, networks
from paper_repro.harness import Images, Tables


SOURCE = (
    "Saphra, 'Interpretability Creationism' (2022/2023), after Juneja et al. 2022 (arXiv 2205.12411) on clusters of "
    "linearly connected runs."
)
SECONDS = 60
HIDDEN, SCALE, BATCH, POINTS = 3, 0.3, 16, 15
THRESHOLD, THRESHOLDS = 0.1, (0.05, 0.1, 0.2)
LONGER = 8  # times as many steps in all
LOSS = eomdl.WeightDecay(networks.mlp_loss, 0.003)
# 0.5 at first, where the noise of the batches lets runs part; then falling, so that they settle.
SGD = many.Minibatches(eomdl.optimizer_step(LOSS, optax.sgd(lambda k: 0.5 / (1 + k / 1000))), BATCH)
HEAVY_BALL = eomdl.optimizer_step(LOSS, optax.sgd(0.1, momentum=0.98))
_losses_and_gradients = jax.jit(jax.vmap(jax.value_and_grad(LOSS), (0, None)))


class Size(NamedTuple):
    """Images, starts, runs from each; the step at which clusters are taken, and steps without noise."""

    images: int = 500
    seeds: int = 3
    runs: int = 16
    clustered: int = 2000
    rest: int = 6000

    @property
    def steps(self) -> list[int]:
        """The checkpoints; the fifth is where clusters are taken, the last but one the end of SGD."""
        before = [0, *(self.clustered // n for n in (8, 4, 2, 1))]
        later = [round(self.clustered * LONGER ** (n / 6)) for n in range(1, 7)]
        return [*before, *later, later[-1] + self.rest]


SMOKE = Size(seeds=1, runs=8, clustered=400, rest=500)
AT, END, REST = 4, -2, -1  # checkpoints: clustered, end of SGD, minima


def measure(size: Size, images: Images) -> Tables:
    """Of every start: checkpoints of all runs, barriers of all pairs, clusters, and the intervention."""
    data = images(size.images)
    found = [_develop(data, start, size) for start in tqdm(range(size.seeds), desc="starts")]
    tables = {name: pd.concat(table[name] for table in found) for name in found[0]}
    return tables | {"fates": many.fates(tables["pairs"], size.steps, AT, THRESHOLDS)}


def _checkpoints(data: Any, start: int, size: Size) -> list[Any]:
    """Parameters of all runs at every checkpoint. The intervention is a branch from where clusters are taken."""
    params = networks.mlp_init(jax.random.key(start), (data[0].shape[1], HIDDEN, 10))
    stacked = jax.tree.map(lambda x: np.stack([SCALE * x] * size.runs), params)
    ensemble, steps = eomdl.Ensemble(SGD, (None, 0)), size.steps
    args = (data, jnp.arange(start * size.runs, (start + 1) * size.runs))
    common: dict[str, Any] = {"args": args, "save_params": False}
    with tempfile.TemporaryDirectory() as folder:
        store = eomdl.Checkpoints(folder, steps[: AT + 1])
        eomdl.iterate(ensemble, stacked, steps[AT], save_steps=steps[AT], checkpoints=store, **common)
        later = eomdl.Checkpoints(Path(folder) / "longer", steps[AT + 1 : REST])
        common |= {"save_steps": steps[END], "checkpoints": later, "resume": store.latest}
        real = eomdl.iterate(ensemble, stacked, steps[END], **common)
        rows = [c.final_params for c in (*store, *later)]
    rest = {"args": data, "save_steps": [size.rest]}
    return [
        *rows,
        eomdl.iterate(eomdl.Ensemble(HEAVY_BALL), real.final_params, size.rest, **rest).final_params,
    ]


def _develop(data: Any, start: int, size: Size) -> Tables:
    """One start: one row per run and checkpoint, per pair and checkpoint, per checkpoint, per stage of the intervention."""
    params, steps = _checkpoints(data, start, size), size.steps
    losses, gradients = zip(*[_losses_and_gradients(p, data) for p in params], strict=True)
    matrices = [np.asarray(eomdl.geometry.barriers(LOSS, p, data, POINTS)) for p in params]
    both = jax.tree.map(lambda a, b: np.concatenate([a, b]), params[AT], params[END])
    across = np.asarray(eomdl.geometry.barriers(LOSS, both, data, POINTS))[: size.runs, size.runs :]
    labels, flat = many.linked(matrices[AT], THRESHOLD), many.flat(params[REST])
    minima = many.same_point(flat)
    gradient = np.linalg.norm(many.flat(gradients[REST]), axis=1)
    i, j = np.triu_indices(size.runs, 1)
    pair = {"run": i, "other run": j, "one minimum": minima[i] == minima[j]}
    pair["one loss"] = np.abs(losses[REST][i] - losses[REST][j]) < 1e-4
    each = {"run": np.arange(size.runs), "cluster": labels, "minimum": minima}
    each |= {"own later self": np.diag(across), "gradient at rest": gradient}
    pairs, of_runs, counts = [], [], []
    for step, matrix, loss in zip(steps, matrices, losses, strict=True):
        pairs.append(pd.DataFrame(pair | {"step": step, "barrier": matrix[i, j]}))
        of_runs.append(pd.DataFrame(each | {"step": step, "loss": loss}))
        clusters = {f"clusters at {t}": len(set(many.linked(matrix, t))) for t in THRESHOLDS}
        counts.append({"step": step, "mean loss": loss.mean()} | clusters)
    tables = {"checkpoints": pd.DataFrame(counts), "runs": pd.concat(of_runs), "pairs": pd.concat(pairs)}
    moments = many.Moments(params, matrices, np.array(losses), across, AT)
    rows = [row for t in THRESHOLDS for row in many.intervention(moments, t, LOSS, data, POINTS)]
    tables["intervention"] = pd.DataFrame(rows, columns=many.COLUMNS)
    return {name: table.assign(start=start) for name, table in tables.items()}


def claims(tables: Tables) -> list[made.Claim]:
    """Runs part; the test would see an early stage; basins by two measures; the intervention."""
    fates = tables["fates"][tables["fates"]["clustered"]]
    joined, one = fates["separated: connected longer"], fates["separated: one minimum"]
    parted, gradient = 1 - fates["connected: connected longer"], tables["runs"]["gradient at rest"].max()
    counts = (
        tables["checkpoints"]
        .pivot(index="start", columns="step", values=f"clusters at {THRESHOLD}")
        .to_numpy()
    )
    stages = tables["intervention"]
    share = many.by_stage(stages, "connected")
    height = stages.pivot(index=["threshold", "start"], columns="stage", values="barrier, median")
    height = height.reindex(columns=list(many.STAGES))  # without clusters there are no stages
    rise = height["both longer"] / height["when clustered"]
    return [
        made.Claim(
            "Runs from one point, of which only the order of the batches differs, part into clusters.",
            f"Clusters (mean barrier between any two above {THRESHOLD}) from each start: "
            + "; ".join(f"{c[0]} at step 0, {c[AT]} when clustered, {c[END]} at the end" for c in counts)
            + ".",
            bool(np.all(counts[:, 0] == 1) and counts[:, AT].max() > 1),
        ),
        made.law(
            f"The test would see an early stage of the same path: a run and itself trained {LONGER} times as long are connected.",
            tables["runs"]["own later self"],
            THRESHOLD,
            "Largest barrier of a run to its own later self",
        ),
        made.Claim(
            f"Basins, not stages: runs that are apart do not come together when trained {LONGER} times as long. Connected ones do part.",
            f"Barriers above {made.listed(THRESHOLDS)}: of the pairs that were apart {made.listed(100 * joined)} % are connected in "
            f"the end; of the others {made.listed(100 * parted)} % no longer are.",
            bool(np.all(joined < 0.05) and np.all(parted > 0.05)),
            full_only=True,
        ),
        made.Claim(
            "By another measure too: followed without noise to the minimum, runs that were apart end in different points. "
            "(Of the connected ones many do as well: an early cluster holds several basins.)",
            f"Largest gradient there {gradient:.0e}. Of separated pairs {100 * one.max():.1f} % at most reach one minimum; of connected "
            f"ones {made.listed(100 * fates['connected: one minimum'])} %. Of separated pairs "
            f"{made.listed(100 * fates['separated: one loss'])} % reach minima of one loss, copies by symmetry perhaps.",
            bool(gradient < 1e-2 and np.all(one < 0.05)),
            full_only=True,
        ),
        made.Claim(
            f"The worse cluster, trained {LONGER} times as long, comes no nearer to the better one: the barrier between them does "
            "not fall, and no more of the pairs are connected than before.",
            f"Median barrier, times what it was: at least {rise.min():.2f}. Connected at {made.listed(share.index)}: "
            + "; ".join(f"{stage} {made.listed(100 * share[stage])} %" for stage in many.STAGES)
            + ".",
            bool(
                rise.min() > 0.9
                and np.all(share["both longer"] <= share["when clustered"] + 0.05)
                and np.all(share["matched loss"] <= share["when clustered"] + 0.1)
                and np.all(share["both longer"] < 0.25)
            ),
            full_only=True,
        ),
    ]


def pictures(tables: Tables) -> dict[str, Figure]:
    """For the first start: barrier matrices at checkpoints; barriers, clusters and losses against steps."""
    pairs, of_runs = (table[table["start"] == 0] for table in (tables["pairs"], tables["runs"]))
    losses = of_runs.pivot(index="step", columns="run", values="loss")
    steps, labels = losses.index.to_numpy(), of_runs[of_runs["step"] == 0]["cluster"].to_numpy()
    matrices = np.zeros((len(steps), len(labels), len(labels)))
    matrices[np.searchsorted(steps, pairs["step"]), pairs["run"], pairs["other run"]] = pairs["barrier"]
    matrices += matrices.transpose(0, 2, 1)
    chosen = [1, 2, AT, 7, len(steps) - 2, len(steps) - 1]
    grown = plot_development(
        steps, matrices, losses.to_numpy(), labels, THRESHOLD, intervention=steps[AT], linkage="average"
    )
    return {"barriers": plot_barriers(steps[chosen], matrices[chosen], labels), "development": grown}
