"""`python -m benchmarks.report [--smoke] [--out DIR] [--from FILE]`: run the suite, print ratios, draw figures."""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from benchmarks import figures, publish
from benchmarks.tables import TABLES, cell


ROOT = Path(__file__).parents[1]
PACKAGES = ("eomdl", "jax", "jaxlib", "diffrax", "equinox", "optax", "numpy", "scikit-learn")


def run_suite(smoke: bool, data: str | None) -> tuple[dict[str, Any], int]:
    """What pytest-benchmark wrote, and pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmark.json"
        command = [sys.executable, "-m", "pytest", "benchmarks", "-n", "0", "--benchmark-enable", "-vv"]
        command += ["--benchmark-columns=min", f"--benchmark-json={path}"] + ["--smoke"] * smoke
        command += [] if data is None else ["--data", data]
        code = subprocess.run(command, cwd=ROOT).returncode
        return json.loads(path.read_text()), code


def merged(paths: list[Path]) -> dict[str, Any]:
    """Several files of pytest-benchmark as one; a benchmark in a later file replaces that in an earlier one."""
    files = [json.loads(path.read_text()) for path in paths]
    benchmarks = {b["fullname"]: b for file in files for b in file["benchmarks"]}
    commits = [file["commit_info"] for file in files]
    if any(commit["id"] != commits[0]["id"] for commit in commits):
        ids = ", ".join(dict.fromkeys(commit["id"] + "+" * commit["dirty"] for commit in commits))
        commits[0] = {"id": f"several: {ids} (+: with changes)", "dirty": any(c["dirty"] for c in commits)}
    return files[-1] | {"benchmarks": list(benchmarks.values()), "commit_info": commits[0]}


def condense(raw: dict[str, Any], smoke: bool) -> dict[str, Any]:
    """Tables, configuration, versions, commit and machine."""
    tables: dict[str, list] = {}
    for benchmark in raw["benchmarks"]:
        extra = benchmark["extra_info"]
        if "rows" in extra:
            tables.setdefault(extra["table"], []).extend(extra["rows"])
    cpu = raw["machine_info"].get("cpu", {})
    machine = {
        "node": platform.node(),
        "cpu": cpu.get("brand_raw", platform.processor()),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_at_end": os.getloadavg(),
    }
    if jax.default_backend() != "cpu":
        machine["gpu"] = jax.devices()[0].device_kind
    return {
        "config": {"smoke": smoke, "dtype": "float64", "weight_decay": 1e-3, "num_steps": 200},
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": {k: raw["commit_info"].get(k) for k in ("id", "dirty", "time")},
        "date": raw["datetime"],
        "machine": machine,
        "tables": tables,
    }


def show(results: dict[str, Any], console: Console) -> None:
    """Print every table that has rows."""
    machine = results["machine"]
    console.print(f"{machine['cpu']}, {machine['cores']} cores; costs in gradients are XLA flop counts")
    if results["note"]:
        console.print(results["note"])
    for name, (title, columns) in TABLES.items():
        rows = results["tables"].get(name)
        if not rows:
            continue
        table = Table(title=title)
        for heading in columns.values():
            table.add_column(heading, justify="right", overflow="fold")
        for row in rows:
            table.add_row(*(cell(row.get(key)) for key in columns))
        console.print(table)


def main() -> int:
    """Run or read the suite, write results.json and the figures, and print the tables; pytest's exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="the small size, under 3 minutes")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "results" / "benchmarks", help="folder to write to"
    )
    parser.add_argument(
        "--from",
        dest="sources",
        type=Path,
        nargs="+",
        help="pytest-benchmark JSON files, where a later one replaces the same benchmarks; runs nothing",
    )
    parser.add_argument(
        "--data", help="a folder with MNIST or other IDX files for the suites that take images"
    )
    parser.add_argument("--note", default="", help="a remark to keep with the results")
    parser.add_argument(
        "--readme",
        action="store_true",
        help="only write README.md's table and the documentation's page from the results kept",
    )
    options = parser.parse_args()
    if options.readme:
        Console().print(
            *[f"wrote {path}" for path in publish.write()], sep="\n", soft_wrap=True, markup=False
        )
        return 0
    raw, code = (merged(options.sources), 0) if options.sources else run_suite(options.smoke, options.data)
    results = condense(raw, options.smoke) | {"note": options.note}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    console = Console(width=max(Console().width, 130))
    show(results, console)
    for written in (path, *figures.draw(results, options.out)):
        console.print(f"wrote {written}")
    return code


if __name__ == "__main__":
    sys.exit(main())
