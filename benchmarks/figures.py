"""Figures from the tables of report.py: they only read."""

from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")

from matplotlib import pyplot as plt


COST = "cost [gradient evaluations per GD step]"


def figures(tables: dict[str, Any]) -> dict[str, Any]:
    """The figures that these tables have, by name."""
    known = {
        "accuracy": (("solve",), accuracy),
        "field": (("field",), field),
        "scripts": (("script", "euler"), scripts),
        "solvers": (("solver",), solvers),
        "points": (("points",), points),
        "edge": (("edge",), edge),
    }
    return {
        name: figure(tables)
        for name, (needs, figure) in known.items()
        if all(tables.get(table) for table in needs)
    }


def draw(results: dict[str, Any], out: Path) -> list[Path]:
    """Write the figures of the tables that are there."""
    made = []
    for name, drawn in figures(results["tables"]).items():
        path = out / f"{name}.png"
        drawn.savefig(path, dpi=110)
        plt.close(drawn)
        made.append(path)
    return made


def _axes(columns: int = 1) -> tuple[Any, Any]:
    figure, axes = plt.subplots(1, columns, figsize=(7 * columns, 5), layout="constrained", squeeze=False)
    for ax in axes[0]:
        ax.grid(True, which="major", alpha=0.3)
    return figure, axes[0]


def accuracy(tables: dict[str, Any]) -> Any:
    """Largest distance to GD against cost of solve, an order a point."""
    problems = list(dict.fromkeys(row["problem"] for row in tables["solve"]))
    figure, axes = _axes(len(problems))
    for ax, problem in zip(axes, problems, strict=True):
        rows = [row for row in tables["solve"] if row["problem"] == problem]
        cost = [row["gradients_per_step"] for row in rows]
        both = [row["gradients_per_step_with_estimate"] for row in rows]
        error = [row["distance_to_GD"] for row in rows]
        ax.loglog(cost, error, "o-", label="model error: distance to GD")
        ax.loglog(
            both, [row["ode_error_estimate"] for row in rows], "s:", label="ODE error, estimate (with it)"
        )
        known = [row for row in rows if "ode_error" in row]
        ax.loglog(
            [row["gradients_per_step"] for row in known],
            [row["ode_error"] for row in known],
            "x--",
            label="ODE error, true",
        )
        for row in rows:
            at = (row["gradients_per_step"], row["distance_to_GD"])
            ax.annotate(f"order {row['order']}", at, xytext=(6, 5), textcoords="offset points", fontsize=9)
        ax.set(title=f"solve, 200 GD steps: {problem}", xlabel=COST, ylabel="largest Euclidean distance")
        ax.legend()
    return figure


def field(tables: dict[str, Any]) -> Any:
    """Cost of one evaluation, and seconds to compile it, by order."""
    figure, (left, right) = _axes(2)
    names = {
        "trees": "rooted trees (the product)",
        "series": "power series",
        "nested": "two nested gradients",
    }
    for route, label in names.items():
        rows = sorted((r for r in tables["field"] if r["route"] == route), key=lambda r: r["order"])
        order = [row["order"] for row in rows]
        (line,) = left.semilogy(order, [row["gradients"] for row in rows], "o-", label=f"{label}, flops")
        left.semilogy(
            order,
            [row["time_ratio"] for row in rows],
            "x:",
            color=line.get_color(),
            label=f"{label}, seconds",
        )
        right.semilogy(order, [row["trace_s"] + row["compile_s"] for row in rows], "o-", label=label)
    left.set(title="one evaluation of the field", xlabel="order", ylabel="cost [gradients]")
    right.set(title="tracing and compiling it", xlabel="order", ylabel="time [s]")
    left.legend()
    right.legend()
    return figure


def scripts(tables: dict[str, Any]) -> Any:
    """ODE error against cost: Euler, RK4, and solve at the same accuracy."""
    orders = sorted({row["order"] for row in tables["euler"]})
    figure, axes = _axes(len(orders))
    for ax, order in zip(axes, orders, strict=True):
        euler = [row for row in tables["euler"] if row["order"] == order]
        measured = [row for row in euler if not row.get("extrapolated")]
        ax.loglog(
            [r["gradients_per_step"] for r in measured],
            [r["ode_error"] for r in measured],
            "o-",
            label="Euler",
        )
        tail = [measured[-1], *(row for row in euler if row.get("extrapolated"))]
        ax.loglog(
            [r["gradients_per_step"] for r in tail],
            [r["ode_error"] for r in tail],
            "o:",
            color="C0",
            mfc="white",
            label="Euler, extrapolated to solve's default",
        )
        rows = [row for row in tables["script"] if row["order"] == order]
        rk4 = [row for row in rows if row["script"].startswith("RK4")]
        ax.loglog(
            [r["gradients_per_step"] for r in rk4], [r["ode_error"] for r in rk4], "s", label="RK4, eta/10"
        )
        points = [(r["solve_gradients_per_step"], r["solve_ode_error"]) for r in rows]
        points += [(r["solve_gradients_per_step"], r["ode_error"]) for r in euler if r.get("extrapolated")]
        ax.loglog(*zip(*sorted(points), strict=True), "D-", color="C2", label="solve (Tsit5)")
        bosh3 = [r for r in rows if "Bosh3_ode_error" in r]
        if bosh3:
            ax.loglog(
                [r["Bosh3_gradients_per_step"] for r in bosh3],
                [r["Bosh3_ode_error"] for r in bosh3],
                "^",
                color="C3",
                label="solve (Bosh3)",
            )
        title = "gradient flow" if order == 0 else "first-order modified flow"
        ax.set(title=f"{title}, 200 GD steps", xlabel=COST, ylabel="ODE error (largest Euclidean distance)")
        ax.legend()
    return figure


def solvers(tables: dict[str, Any]) -> Any:
    """ODE error over model error against cost, for several solvers."""
    orders = sorted({row["order"] for row in tables["solver"]})
    figure, axes = _axes(len(orders))
    for ax, order in zip(axes, orders, strict=True):
        for name in dict.fromkeys(row["solver"] for row in tables["solver"]):
            rows = [r for r in tables["solver"] if (r["solver"], r["order"]) == (name, order)]
            ax.loglog(
                [r["gradients_per_step"] for r in rows],
                [r["ode_over_model_error"] for r in rows],
                "o-",
                label=name,
            )
        ax.axhline(0.01, color="gray", ls=":")
        ax.set(title=f"order {order}, small problem", xlabel=COST, ylabel="ODE error / model error")
        ax.legend()
    return figure


def points(tables: dict[str, Any]) -> Any:
    """Distance to gradient descent against the points of the interpolating flow."""
    inits = sorted({row["init"] for row in tables["points"]})
    figure, axes = _axes(len(inits))
    for ax, init in zip(axes, inits, strict=True):
        rows = [row for row in tables["points"] if row["init"] == init]
        for weights in ("Taylor", "minimax"):
            some = [row for row in rows if row["weights"] == weights]
            ax.semilogy(
                [r["points"] for r in some], [r["distance"] for r in some], "o-", label=f"{weights} weights"
            )
            ax.semilogy([r["points"] for r in some], [r["limit"] for r in some], "k_", ms=14)
        (flow,) = [row["distance"] for row in rows if row["weights"] == "gradient flow"]
        ax.axhline(flow, color="0.6", label="gradient flow")
        ax.plot([], [], "k_", ms=14, label="figure to reach")
        ax.set(
            xlabel="points", ylabel="largest distance to GD over 200 steps", title=f"initialization {init}"
        )
        ax.legend()
    return figure


def edge(tables: dict[str, Any]) -> Any:
    """Distance after 1,000 steps past the edge against cost, a line a network; squares: the points chosen."""
    figure, (ax,) = _axes()
    networks = list(dict.fromkeys(row["network"] for row in tables["edge"]))
    for color, network in enumerate(networks):
        rows = [row for row in tables["edge"] if row["network"] == network and row["at_1000"] is not None]
        flow, *some = rows
        ax.loglog(
            [r["gradients_per_step"] for r in some],
            [r["at_1000"] for r in some],
            f"C{color}o-",
            label=network,
        )
        ax.loglog(flow["gradients_per_step"], flow["at_1000"], f"C{color}x", ms=9)
        for r in some:
            if r["chosen"]:
                ax.loglog(r["gradients_per_step"], r["at_1000"], f"C{color}s", ms=10, mfc="none")
    ax.set(
        xlabel=COST,
        ylabel="distance to GD / distance travelled, step 1000",
        title="stride 2 (x: gradient flow)",
    )
    ax.legend(fontsize=8)
    return figure
