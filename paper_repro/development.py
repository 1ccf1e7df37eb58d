"""Clusters of runs in their development: basins, or early stages of one path? (Saphra; Juneja et al. 2022.)"""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

from eomdl.plotting import plot_barriers, plot_development
from paper_repro import data
from paper_repro.development_runs import (
    LONGER,
    THRESHOLD,
    Development,
    better_and_worse,
    develop,
    labels_of,
    matched_barriers,
)
from paper_repro.reproduction import Claim, Config, Reproduction


RUNS = 16
THRESHOLDS = (0.05, 0.1, 0.2)
STAGES = ("when clustered", "matched loss", "longer, other as it was", "both longer", "at the minima")


def run(config: Config) -> tuple[dict[str, pd.DataFrame], list[Claim]]:
    """From every start, `RUNS` orders of batches: checkpoints, barriers, clusters, then all trained longer."""
    images = data.load(config.data, config.subset or 500)
    clustered, rest, runs = (400, 500, 8) if config.smoke else (2000, 6000, RUNS)
    starts = range(1 if config.smoke else config.seeds)
    developments = [develop(images, n, clustered, rest, runs) for n in tqdm(starts, desc="development")]
    tables = {
        "checkpoints": pd.concat([_checkpoints(d) for d in developments]),
        "clusters": pd.concat([_clusters(d) for d in developments]),
        "intervention": pd.concat([_intervention(d, images) for d in developments]),
        "fates": _fates(developments),
        "runs": pd.concat([_runs(d) for d in developments]),
        "barriers": pd.concat([_pairs(d) for d in developments]),
    }
    return tables, _claims(tables, developments, config)


def _upper(matrix: np.ndarray) -> np.ndarray:
    return matrix[np.triu_indices(len(matrix), 1)]


# -------------------------------------------------------------------- tables


def _checkpoints(d: Development) -> pd.DataFrame:
    same = _upper(d.labels[:, None] == d.labels)
    rows = []
    for i, (step, matrix, losses) in enumerate(zip(d.steps, d.matrices, d.losses, strict=True)):
        heights = _upper(matrix)
        within, between = heights[same], heights[~same]
        rows.append(
            {
                "start": d.start,
                "step": step,
                "stage": d.stage(i),
                **{f"clusters at {t}": len(set(labels_of(matrix, t))) for t in THRESHOLDS},
                "within, median": np.median(within) if len(within) else np.nan,
                "within, largest": within.max() if len(within) else np.nan,
                "between, smallest": between.min() if len(between) else np.nan,
                "between, median": np.median(between) if len(between) else np.nan,
                "mean loss": losses.mean(),
            }
        )
    return pd.DataFrame(rows)


def _clusters(d: Development) -> pd.DataFrame:
    """What became of each cluster."""
    rows = []
    for label in np.unique(d.labels):
        own = np.flatnonzero(d.labels == label)
        for i, step in enumerate(d.steps):
            losses, heights = d.losses[i, own], _upper(d.matrices[i][np.ix_(own, own)])
            rows.append(
                {
                    "start": d.start,
                    "cluster": label,
                    "runs": len(own),
                    "step": step,
                    "stage": d.stage(i),
                    "mean loss": losses.mean(),
                    "lowest loss": losses.min(),
                    "highest loss": losses.max(),
                    "within, largest": heights.max(initial=0),
                    "minima reached": len(set(d.minima[own])),
                }
            )
    return pd.DataFrame(rows)


def _intervention(d: Development, images) -> pd.DataFrame:
    """The worse cluster trained longer: where does it come to lie, seen from the better one?"""
    rows = []
    for threshold in THRESHOLDS:
        pair = better_and_worse(d, threshold)
        if pair is None:
            continue
        better, worse = pair
        here, end, rest = d.at, len(d.steps) - 2, len(d.steps) - 1
        block = np.ix_(better, worse)
        heights = (
            d.matrices[here][block],
            matched_barriers(d, better, worse, images),
            d.across[block],
            d.matrices[end][block],
            d.matrices[rest][block],
        )
        for stage, height, (i, j) in zip(
            STAGES,
            heights,
            ((here, here), (here, None), (here, end), (end, end), (rest, rest)),
            strict=True,
        ):
            found = height[np.isfinite(height)]
            rows.append(
                {
                    "start": d.start,
                    "threshold": threshold,
                    "stage": stage,
                    "better runs": len(better),
                    "worse runs": len(worse),
                    "loss of the better": d.losses[i, better].mean(),
                    "loss of the worse": np.nan if j is None else d.losses[j, worse].mean(),
                    "pairs": found.size,
                    "barrier, smallest": np.min(found) if found.size else np.nan,
                    "barrier, median": np.median(found) if found.size else np.nan,
                    "connected": np.mean(found <= threshold) if found.size else np.nan,
                }
            )
    return pd.DataFrame(rows)


def _fates(developments: list[Development]) -> pd.DataFrame:
    """What became of every two runs that were separated, or connected, at a checkpoint."""
    rows = []
    for threshold in THRESHOLDS:
        for i in range(1, developments[0].at + 1):
            separated, longer, rest, one, loss = (
                np.concatenate([_upper(f(d)) for d in developments])
                for f in (
                    lambda d, i=i, t=threshold: d.matrices[i] > t,
                    lambda d, t=threshold: d.matrices[-2] > t,
                    lambda d, t=threshold: d.matrices[-1] > t,
                    lambda d: d.minima[:, None] == d.minima,
                    lambda d: np.abs(d.losses[-1][:, None] - d.losses[-1]) < 1e-4,
                )
            )
            row = {"threshold": threshold, "step": developments[0].steps[i]}
            for name, pairs in (("separated", separated), ("connected", ~separated)):
                row |= {
                    f"{name} pairs": pairs.sum(),
                    f"{name}: connected longer": _share(~longer[pairs]),
                    f"{name}: connected at the minima": _share(~rest[pairs]),
                    f"{name}: one minimum": _share(one[pairs]),
                    f"{name}: minima of one loss": _share(loss[pairs]),
                }
            rows.append(row)
    return pd.DataFrame(rows)


def _share(those: np.ndarray) -> float:
    return float(np.mean(those)) if those.size else np.nan


def _runs(d: Development) -> pd.DataFrame:
    count = len(d.labels)
    return pd.DataFrame(
        {
            "start": d.start,
            "step": np.repeat(d.steps, count),
            "run": np.tile(np.arange(count), len(d.steps)),
            "loss": d.losses.ravel(),
            "cluster": np.tile(d.labels, len(d.steps)),
            "minimum": np.tile(d.minima, len(d.steps)),
        }
    )


def _pairs(d: Development) -> pd.DataFrame:
    i, j = np.triu_indices(len(d.labels), 1)
    return pd.DataFrame(
        {
            "start": d.start,
            "step": np.repeat(d.steps, len(i)),
            "run": np.tile(i, len(d.steps)),
            "other run": np.tile(j, len(d.steps)),
            "barrier": np.concatenate([_upper(matrix) for matrix in d.matrices]),
        }
    )


# -------------------------------------------------------------------- claims


def _claims(tables: dict[str, pd.DataFrame], developments: list[Development], config: Config) -> list[Claim]:
    own = max(float(np.diag(d.across).max()) for d in developments)
    gradient = max(d.gradient for d in developments)
    fates = tables["fates"][tables["fates"]["step"] == developments[0].steps[developments[0].at]]
    joined, one, copies = (
        fates[f"separated: {name}"].to_numpy()
        for name in ("connected longer", "one minimum", "minima of one loss")
    )
    parted = 1 - fates["connected: connected longer"].to_numpy()
    checkpoints = tables["checkpoints"]
    counts = [g[f"clusters at {THRESHOLD}"].to_numpy() for _, g in checkpoints.groupby("start")]
    at = developments[0].at
    stages = tables["intervention"]
    if len(stages):
        shares = _shares(stages)
        by_start = stages.set_index(["stage", "start", "threshold"])
        first, longer = by_start.loc["when clustered"], by_start.loc["both longer"]
    judged = not config.smoke
    return [
        Claim(
            "Runs from one point, of which only the order of the batches differs, part into clusters.",
            f"Clusters (mean barrier between any two above {THRESHOLD}) from each start: "
            + "; ".join(f"{c[0]} at step 0, {c[at]} when clustered, {c[-2]} at the end" for c in counts)
            + ".",
            bool(all(c[0] == 1 for c in counts) and max(c[at] for c in counts) > 1),
        ),
        Claim(
            "The test would see an early stage of the same path: a run and itself trained "
            f"{LONGER} times as long are connected.",
            f"Largest barrier of {sum(len(d.labels) for d in developments)} runs to their own later selves: {own:.3f}.",
            own < THRESHOLD,
        ),
        Claim(
            f"Basins, not stages: runs that are apart do not come together when trained {LONGER} times as long. "
            "Connected ones do part.",
            " ".join(
                f"Above {t}: {n} pairs, of which {100 * j:.1f} % are connected in the end; of the {m} others "
                f"{100 * p:.0f} % no longer are."
                for t, n, j, m, p in zip(
                    fates["threshold"],
                    fates["separated pairs"],
                    joined,
                    fates["connected pairs"],
                    parted,
                    strict=True,
                )
            ),
            bool(np.all(joined < 0.05) and np.all(parted > 0.05)) if judged else None,
        ),
        Claim(
            "By another measure too: followed without noise to the minimum, runs that were apart end in different points. "
            "(Of the connected ones many do as well: an early cluster holds several basins.)",
            f"Largest gradient there {gradient:.0e}. Of separated pairs, {100 * np.max(one):.1f} % at most reach one "
            f"minimum; of connected ones {_percent(fates['connected: one minimum'])}. Of separated pairs "
            f"{_percent(copies)} reach minima of one loss, copies by symmetry perhaps; the others differ in it.",
            bool(gradient < 1e-2 and np.all(one < 0.05)) if judged else None,
        ),
        Claim(
            f"The worse cluster, trained {LONGER} times as long, comes no nearer to the better one: the barrier between them does "
            "not fall, and no more of the pairs are connected than before.",
            _told(stages),
            bool(
                np.all(longer["barrier, median"] > 0.9 * first["barrier, median"])
                and np.all(shares["both longer"] <= shares["when clustered"] + 0.05)
                and np.all(shares["matched loss"] <= shares["when clustered"] + 0.1)
                and np.all(shares["both longer"] < 0.25)
            )
            if judged and len(stages)
            else None,
        ),
    ]


def _percent(shares) -> str:
    return ", ".join(f"{100 * share:.0f} %" for share in shares)


def _shares(stages: pd.DataFrame) -> pd.DataFrame:
    """Share of pairs (better, worse) that are connected, over all starts: a row a threshold, a column a stage."""
    count = stages.assign(connected=stages["connected"] * stages["pairs"])
    sums = count.groupby(["threshold", "stage"])[["connected", "pairs"]].sum()
    return (sums["connected"] / sums["pairs"]).unstack()


def _told(stages: pd.DataFrame) -> str:
    if len(stages) == 0:
        return "No two clusters of two runs or more."
    told = stages[stages["threshold"] == THRESHOLD].set_index("stage")
    parts = []
    for start, group in told.groupby("start"):
        first, matched, _, last, rest = (group.loc[name] for name in STAGES)
        parts.append(
            f"Start {start}: loss {first['loss of the better']:.3f} and {first['loss of the worse']:.3f}, then "
            f"{last['loss of the better']:.3f} and {last['loss of the worse']:.3f}, at the minima "
            f"{rest['loss of the better']:.3f} and {rest['loss of the worse']:.3f}; median barrier "
            f"{first['barrier, median']:.2f}, then {last['barrier, median']:.2f}, {matched['barrier, median']:.2f} at matched "
            f"loss ({matched['pairs']:.0f} of {first['pairs']:.0f} pairs)."
        )
    for threshold, share in _shares(stages).iterrows():
        parts.append(
            f"Connected at {threshold}: {100 * share['when clustered']:.0f} % of pairs, then {100 * share['both longer']:.0f} %; "
            f"{100 * share['matched loss']:.0f} % at matched loss."
        )
    return " ".join(parts)


# -------------------------------------------------------------------- figures


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, Figure]:
    """For the first start: barrier matrices at checkpoints; barriers, clusters and losses against steps."""
    barriers, runs = (table[table["start"] == 0] for table in (tables["barriers"], tables["runs"]))
    steps = runs["step"].unique()
    labels = runs[runs["step"] == 0].sort_values("run")["cluster"].to_numpy()
    losses = runs.pivot(index="step", columns="run", values="loss").to_numpy()
    matrices = np.zeros((len(steps), len(labels), len(labels)))
    for n, step in enumerate(steps):
        here = barriers[barriers["step"] == step]
        matrices[n, here["run"], here["other run"]] = here["barrier"]
    matrices += matrices.transpose(0, 2, 1)
    chosen = [1, 2, 4, 7, len(steps) - 2, len(steps) - 1]
    return {
        "barriers": plot_barriers(steps[chosen], matrices[chosen], labels),
        "development": plot_development(
            steps, matrices, losses, labels, THRESHOLD, intervention=steps[4], linkage="average"
        ),
    }


REPRODUCTION = Reproduction(
    name="development",
    title="Clusters of runs part and do not meet again: basins, not early stages of one path",
    source="Saphra, 'Interpretability Creationism' (2022/2023), after Juneja et al. 2022 (arXiv 2205.12411) on clusters of "
    "linearly connected runs.",
    setting=(
        "A tanh network 64-3-10 on 500 digits, cross entropy and weight decay 0.003. From each of --seeds starts, 16 runs of "
        "SGD (batches of 16, learning rate 0.5/(1 + k/1000)) that differ in the order of the batches alone, in one compiled "
        "program; loss barriers on straight lines between all pairs. Clusters are taken at step 2,000 (average linkage, threshold "
        "0.1; 0.05 and 0.2 too). Intervention: all are trained on to step 16,000, then without noise (full batch, heavy ball "
        "0.1 with momentum 0.98) to the minimum. Straight lines only: a curved path, or a permutation of the hidden units, may well join two of the minima."
    ),
    seconds=45,
    run=run,
    plot=plot,
)
