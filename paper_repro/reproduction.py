"""What a reproduction is, and how its results are written."""

import dataclasses
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the command line, the same for every reproduction."""

    data: str | None = None
    subset: int | None = None
    seeds: int = 3
    float32: bool = False
    smoke: bool = False


@dataclasses.dataclass(frozen=True)
class Claim:
    """One sentence, what was measured, and whether it holds (None: not asserted here)."""

    text: str
    measured: str
    holds: bool | None


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """`run(config)` measures: tables and claims. `plot(tables)` only draws the tables."""

    name: str
    title: str
    source: str
    setting: str
    seconds: int  # expected at the default size on two cores
    run: Callable[[Config], tuple[dict[str, pd.DataFrame], list[Claim]]]
    plot: Callable[[dict[str, pd.DataFrame]], dict[str, Any]]


def environment() -> dict[str, str]:
    """Versions, machine and commit, to be kept beside every number."""
    packages = ("eomdl", "jax", "jaxlib", "diffrax", "optax", "equinox", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    commit = git.stdout.strip() or "not a git checkout"
    return versions | {"python": platform.python_version(), "machine": platform.platform(), "commit": commit}


def write(
    reproduction: Reproduction,
    config: Config,
    tables: dict[str, pd.DataFrame],
    claims: list[Claim],
    seconds: float,
    out: Path,
) -> dict[str, Path]:
    """Write the tables, then draw them from what was written; returns the figures' paths."""
    folder = out / reproduction.name
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False)
    record = {
        "name": reproduction.name,
        "source": reproduction.source,
        "setting": reproduction.setting,
        "config": dataclasses.asdict(config),
        "environment": environment(),
        "seconds": round(seconds, 1),
        "claims": [dataclasses.asdict(claim) for claim in claims],
        "tables": {
            name: json.loads(t.to_json(orient="records", double_precision=15)) for name, t in tables.items()
        },
    }
    (folder / "result.json").write_text(json.dumps(record, indent=1))
    read = {name: pd.read_csv(folder / f"{name}.csv") for name in tables}
    figures = {}
    for name, figure in reproduction.plot(read).items():
        figures[name] = folder / f"{name}.png"
        figure.savefig(figures[name], dpi=110)
    return figures
