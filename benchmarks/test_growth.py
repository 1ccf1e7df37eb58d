"""Growth with the number of parameters, of data and of steps: time, and memory."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
import pytest

import eomdl
from benchmarks.conftest import Record, Size
from benchmarks.measure import compiled, field, inputs
from benchmarks.problems import digits_mlp


ORDER = 1


def _seconds(function: Callable[[], Any]) -> float:
    """The second call, which compiles nothing."""
    function()
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def _step_cost(width: int, num_examples: int, num_steps: int) -> dict:
    case = digits_mlp(width, num_examples)
    flow = eomdl.EquationOfMotion(case.loss, case.learning_rate, ORDER)
    optimizer = optax.sgd(case.learning_rate)

    def solve() -> eomdl.Trajectory:
        return eomdl.solve(
            flow, case.params, num_steps, args=case.args, save_params=False, estimate_error=False
        )

    def descend() -> Any:
        return eomdl.descend(
            case.loss, case.params, optimizer, num_steps, args=case.args, save_params=False
        ).end.state

    _, base = compiled(lambda eta, x, args: jax.grad(case.loss)(x, args), *inputs(case))
    _, cost = compiled(field(case, 2, "trees"), *inputs(case))
    run = solve()
    solve_s, descend_s = _seconds(lambda: solve().end.state), _seconds(descend)
    return {
        "width": width,
        "num_params": case.num_params,
        "num_examples": num_examples,
        "num_steps": num_steps,
        "eta_lambda_max": case.eta_lambda,
        "order": ORDER,
        "ode_steps_per_step": float(run.stats.num_steps) / num_steps,
        "field_order_2_gradients": cost["flops"] / base["flops"],
        "solve_over_descend_seconds": solve_s / descend_s,
        "solve_ms_per_step": 1e3 * solve_s / num_steps,
    }


CASES = [(16, 250, 100), (64, 250, 100), (256, 250, 100), (64, 1000, 100), (16, 250, 400), (16, 250, 1600)]


@pytest.mark.parametrize(("width", "num_examples", "num_steps"), CASES)
def test_step_cost(record: Record, size: Size, width: int, num_examples: int, num_steps: int) -> None:
    """The field of order 2 costs less than 8 gradients at every size."""
    if size.smoke and (width > 16 or num_steps > 400):
        pytest.skip("not in the smoke size")
    row = record("growth", _step_cost, width, num_examples, num_steps)
    assert row["field_order_2_gradients"] < 8


def _memory(num_steps: int, save_params: bool) -> dict:
    command = [sys.executable, "-m", "benchmarks.memory", str(num_steps), str(save_params), str(ORDER)]
    root = Path(__file__).parents[1]
    out = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    return json.loads(out.stdout.splitlines()[-1])


MEMORY = [(1_000, False), (10_000, False), (100_000, False), (10_000, True), (100_000, True)]


@pytest.mark.parametrize(("num_steps", "save_params"), MEMORY)
def test_memory(record: Record, size: Size, num_steps: int, save_params: bool) -> None:
    """Memory does not grow with the steps where parameters are not saved."""
    if size.smoke and (num_steps > 1_000 or save_params):
        pytest.skip("not in the smoke size")
    row = record("memory", _memory, num_steps, save_params)
    assert row["steps_done"] == num_steps
    if not save_params:  # what is left is the observables, 8 bytes a step each
        assert row["peak_live_arrays_MiB"] < 8
        assert row["peak_rss_growth_MiB"] < 40
