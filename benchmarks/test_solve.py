"""Accuracy against cost of `solve`, by order, on 200 steps of gradient descent."""

import diffrax
import pytest

from benchmarks import measure
from benchmarks.conftest import Record, Size
from benchmarks.measure import descent, distance, solved, tight


STEPS = 200
EXACT = 300.0  # the tolerance of the reference flow is the default divided by this


def _row(problem: str, order: int) -> dict:
    plain = solved(problem, order, STEPS)
    both = solved(problem, order, STEPS, estimate=True)
    model_error = distance(plain["path"], descent(problem, STEPS))
    row = {
        "problem": measure.problem(problem).name,
        "eta_lambda_max": measure.problem(problem).eta_lambda,
        "order": order,
        "distance_to_GD": model_error,
        "ode_error_estimate": both["estimate"],
        "ode_steps": plain["steps"],
        "ode_steps_with_estimate": both["steps"],
        "gradients_per_step": plain["gradients_per_step"],
        "gradients_per_step_with_estimate": both["gradients_per_step"],
    }
    if order <= 2 or (problem == "small" and order <= 4):
        row["ode_error"] = distance(plain["path"], tight(problem, order, STEPS, EXACT))
        row["ode_over_model_error"] = row["ode_error"] / model_error
    return row


CASES = [("small", n) for n in range(7)] + [("main", n) for n in range(4)]


@pytest.mark.parametrize(("problem", "order"), CASES, ids=lambda x: str(x))
def test_solve(record: Record, size: Size, problem: str, order: int) -> None:
    """By default the ODE error is below 1% of the model error."""
    if size.smoke and (problem == "main" or order > 2):
        pytest.skip("not in the smoke size")
    row = record("solve", _row, problem, order)
    if "ode_error" in row:
        assert row["ode_over_model_error"] < 0.01


# Evaluations of the field an ODE step, the first-same-as-last stage not counted twice.
SOLVERS = {
    "Bosh3": (diffrax.Bosh3(), 3),
    "Tsit5": (diffrax.Tsit5(), 6),
    "Dopri5": (diffrax.Dopri5(), 6),
    "Dopri8": (diffrax.Dopri8(), 13),
}


def _solver_rows(name: str, order: int) -> list[dict]:
    solver, stages = SOLVERS[name]
    default = solved("small", order, STEPS)["atol"]
    exact = tight("small", order, STEPS, 1e4)
    model_error = distance(exact, descent("small", STEPS))
    rows = []
    for factor in (100, 10, 1, 0.1):
        run = solved("small", order, STEPS, atol=factor * default, solver=solver, stages=stages)
        error = distance(run["path"], exact)
        rows.append(
            {
                "solver": name,
                "order": order,
                "atol_over_default": factor,
                "ode_over_model_error": error / model_error,
                "gradients_per_step": run["gradients_per_step"],
            }
        )
    return rows


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("name", SOLVERS)
def test_solver(record: Record, full: None, name: str, order: int) -> None:
    """Cost and ODE error of several solvers, recorded."""
    record("solver", _solver_rows, name, order)
