"""`solve` against what people write today, at the same accuracy on the same flow.

The script's own ODE error is its distance to the exact flow; `solve` is then given the
loosest tolerance found at which its ODE error is no larger.
"""

import diffrax
import numpy as np
import pytest

from benchmarks import measure
from benchmarks.conftest import Record, Size
from benchmarks.measure import cheapest, descent, distance, scripted, solved, tight


STEPS = 200
EXACT = 1e5
SCRIPTS = [("Euler", 0, 100), ("Euler", 1, 100), ("RK4", 0, 10), ("RK4", 1, 10)]


def _against(problem: str, stepper: str, order: int, substeps: int) -> dict:
    exact = tight(problem, order, STEPS, EXACT)
    script = scripted(problem, order, stepper, STEPS, substeps)
    error = distance(script["path"], exact)
    same = cheapest(problem, order, STEPS, error, exact)
    row = {
        "problem": measure.problem(problem).name,
        "script": f"{stepper}, eta/{substeps}",
        "order": order,
        "distance_to_GD": distance(script["path"], descent(problem, STEPS)),
        "ode_error": error,
        "gradients_per_step": script["gradients_per_step"],
        "solve_distance_to_GD": distance(same["path"], descent(problem, STEPS)),
        "solve_ode_error": same["error"],
        "solve_gradients_per_step": same["gradients_per_step"],
        "solve_atol": same["atol"],
        "times_fewer_gradients": script["gradients_per_step"] / same["gradients_per_step"],
        "solve_ode_steps": same["steps"],
    }
    if stepper == "Euler":
        bosh3 = cheapest(problem, order, STEPS, error, exact, diffrax.Bosh3(), 3)
        row["Bosh3_gradients_per_step"] = bosh3["gradients_per_step"]
        row["Bosh3_ode_error"] = bosh3["error"]
        row["Bosh3_times_fewer_gradients"] = script["gradients_per_step"] / bosh3["gradients_per_step"]
    return row


@pytest.mark.parametrize(("stepper", "order", "substeps"), SCRIPTS)
def test_same_accuracy(record: Record, size: Size, stepper: str, order: int, substeps: int) -> None:
    """At the script's ODE error `solve` needs fewer gradients."""
    row = record("script", _against, size.problem, stepper, order, substeps)
    assert row["solve_ode_error"] <= row["ode_error"]
    assert row["times_fewer_gradients"] > 1


def _euler_order(problem: str, order: int, substeps: tuple[int, ...]) -> list[dict]:
    """Euler at several step sizes, then what it would need for the ODE error of `solve`."""
    exact = tight(problem, order, STEPS, EXACT)
    default = solved(problem, order, STEPS)
    target = distance(default["path"], exact)
    rows = []
    for m in substeps:
        script = scripted(problem, order, "Euler", STEPS, m)
        error = distance(script["path"], exact)
        rows.append({"substeps": m, "ode_error": error, "gradients_per_step": script["gradients_per_step"]})
    slope = -np.polyfit(np.log(substeps), np.log([r["ode_error"] for r in rows]), 1)[0]
    last = rows[-1]
    needed = last["gradients_per_step"] * last["ode_error"] / target
    rows.append(
        {
            "substeps": last["substeps"] * last["ode_error"] / target,
            "ode_error": target,
            "gradients_per_step": needed,
            "extrapolated": True,  # by first order from the last row measured
            "measured_order": slope,
            "solve_gradients_per_step": default["gradients_per_step"],
            "times_fewer_gradients": needed / default["gradients_per_step"],
        }
    )
    return [{"order": order} | row for row in rows]


@pytest.mark.parametrize("order", [0, 1])
def test_euler_to_default_accuracy(record: Record, size: Size, order: int) -> None:
    """Euler's error falls with first order, from which its cost at the error of `solve` follows."""
    substeps = (10, 30, 100) if order == 0 else (10, 100)
    rows = record("euler", _euler_order, size.problem, order, substeps)
    assert abs(rows[-1]["measured_order"] - 1) < 0.15
