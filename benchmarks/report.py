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

from rich.console import Console
from rich.table import Table

from benchmarks import figures


ROOT = Path(__file__).parents[1]
PACKAGES = ("eomdl", "jax", "jaxlib", "diffrax", "equinox", "optax", "numpy", "scikit-learn")

# What to print of every table: (title, columns as {key: heading}).
TABLES: dict[str, tuple[str, dict[str, str]]] = {
    "bar": (
        "Figures to reach",
        {"bar": "bar", "measured": "measured", "relation": "", "limit": "limit", "passed": "passed"},
    ),
    "field": (
        "One evaluation of the field against one gradient",
        {
            "route": "route",
            "order": "order",
            "gradients": "flops / gradient",
            "time_ratio": "seconds / gradient",
            "trace_s": "trace [s]",
            "compile_s": "compile [s]",
        },
    ),
    "solve": (
        "solve on 200 steps of gradient descent (gradients: per GD step)",
        {
            "problem": "problem",
            "order": "order",
            "distance_to_GD": "distance to GD",
            "ode_error": "ODE error",
            "ode_error_estimate": "its estimate",
            "ode_over_model_error": "ODE / model error",
            "ode_steps": "ODE steps",
            "gradients_per_step": "gradients",
            "gradients_per_step_with_estimate": "with estimate_error",
        },
    ),
    "points": (
        "The flow of the step map on 200 steps of gradient descent, eta = 0.1",
        {
            "init": "initialization",
            "eta_lambda_max": "eta lambda_max",
            "weights": "weights",
            "points": "points",
            "distance": "distance to GD",
            "limit": "bar",
            "passed": "passed",
        },
    ),
    "edge": (
        "Past the edge: distance to GD over distance travelled, stride 2 (0 points: gradient flow)",
        {
            "network": "network",
            "points": "points",
            "eta_sharpness": "largest eta * sharpness",
            "at_200": "step 200",
            "at_400": "step 400",
            "at_1000": "step 1000",
            "gradients_per_step": "gradients per GD step",
            "chosen": "chosen",
        },
    ),
    "optimizer": (
        "Other optimizers, 50 steps after the transient (0 points: the flow without correction)",
        {
            "optimizer": "optimizer",
            "points": "points",
            "distance": "distance",
            "ode_error": "ODE error",
            "times_nearer": "times nearer",
            "observed_order": "order of the local error",
        },
    ),
    "script": (
        "Fixed-step scripts against solve at the script's ODE error (gradients: per GD step)",
        {
            "script": "script",
            "order": "flow order",
            "distance_to_GD": "distance to GD",
            "ode_error": "ODE error",
            "gradients_per_step": "gradients",
            "solve_ode_error": "solve: ODE error",
            "solve_gradients_per_step": "solve: gradients",
            "times_fewer_gradients": "times fewer",
            "Bosh3_times_fewer_gradients": "with solver=Bosh3()",
        },
    ),
    "euler": (
        "Euler refined to the default ODE error of solve (the extrapolated rows are not measured)",
        {
            "order": "flow order",
            "substeps": "substeps a GD step",
            "ode_error": "ODE error",
            "gradients_per_step": "gradients per GD step",
            "extrapolated": "extrapolated",
            "measured_order": "measured order",
            "times_fewer_gradients": "solve: times fewer",
        },
    ),
    "solver": (
        "Solvers, small problem (gradients: per GD step)",
        {
            "order": "order",
            "solver": "solver",
            "atol_over_default": "atol / default",
            "ode_over_model_error": "ODE / model error",
            "gradients_per_step": "gradients",
        },
    ),
    "growth": (
        "Growth with parameters, data and steps (order 1; seconds without compiling)",
        {
            "num_params": "parameters",
            "num_examples": "examples",
            "num_steps": "GD steps",
            "eta_lambda_max": "eta lambda_max",
            "ode_steps_per_step": "ODE steps per GD step",
            "solve_over_descend_seconds": "solve / descend seconds",
            "field_order_2_gradients": "order-2 field / gradient",
        },
    ),
    "observing": (
        "What observing adds to a run of gradient descent",
        {
            "observed": "observed",
            "every": "every ... steps",
            "gradients": "flops / gradient, once",
            "steps_once": "seconds / those of a GD step, once",
            "compile_s": "compile [s]",
            "run_seconds_ratio": "run / run without it (seconds)",
        },
    ),
    "first answer": (
        "The first path of a process (MLP, 20 steps): seconds with all compiling",
        {
            "order": "order",
            "what": "what",
            "first_s": "seconds",
            "compile_s": "of it XLA [s]",
            "programs": "programs",
            "ratio": "against the call by hand",
        },
    ),
    "leaves": (
        "The first path of a process against the arrays that the parameters are made of (order 1)",
        {
            "what": "what",
            "leaves": "arrays",
            "first_s": "seconds",
            "programs": "programs",
            "growth": "growth",
            "growth_over_leaves": "growth / growth of the arrays",
        },
    ),
    "descending": (
        "descend against a training loop by hand that saves nothing",
        {
            "problem": "problem",
            "num_steps": "steps",
            "ms_by_hand": "by hand [ms]",
            "every_step_ratio": "every step saved, ratio",
            "last_step_ratio": "only the last, ratio",
        },
    ),
    "memory": (
        "Memory of one run of solve (order 1, observables at every step)",
        {
            "num_steps": "GD steps",
            "save_params": "save_params",
            "num_params": "parameters",
            "peak_live_arrays_MiB": "peak JAX arrays [MiB]",
            "peak_rss_growth_MiB": "growth of peak RSS [MiB]",
            "peak_rss_MiB": "peak RSS [MiB]",
            "ode_steps_per_step": "ODE steps per GD step",
        },
    ),
}


def run_suite(smoke: bool) -> tuple[dict[str, Any], int]:
    """What pytest-benchmark wrote, and pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmark.json"
        command = [sys.executable, "-m", "pytest", "benchmarks", "-n", "0", "--benchmark-enable", "-vv"]
        command += ["--benchmark-columns=min", f"--benchmark-json={path}"] + ["--smoke"] * smoke
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
    return {
        "config": {"smoke": smoke, "dtype": "float64", "weight_decay": 1e-3, "num_steps": 200},
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": {k: raw["commit_info"].get(k) for k in ("id", "dirty", "time")},
        "date": raw["datetime"],
        "machine": machine,
        "tables": tables,
    }


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    if value == 0 or 0.01 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.1e}"


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
            table.add_row(*(_cell(row.get(key)) for key in columns))
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
    parser.add_argument("--note", default="", help="a remark to keep with the results")
    options = parser.parse_args()
    raw, code = (merged(options.sources), 0) if options.sources else run_suite(options.smoke)
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
