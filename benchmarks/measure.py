"""Measurements, each made once a session: field costs, runs of `solve`, runs of the scripts.

Costs are in gradients: XLA's flop count of the compiled program over that of one gradient of
the loss. Distances are Euclidean over all parameters, the largest over the steps.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import diffrax
import jax
import numpy as np
import optax

import eomdl
from benchmarks import scripts
from benchmarks.aliases import Args, Params
from benchmarks.power_series import modified_field_series
from benchmarks.problems import Problem, digits_mlp


STAGES = 6  # evaluations of the field an ODE step: Tsit5 has 7 stages, first same as last


def problem(name: str) -> Problem:
    """The problem called "main" or "small"."""
    return {"main": lambda: digits_mlp(64, 1000), "small": lambda: digits_mlp(16, 200)}[name]()


def bar_row(name: str, measured: float, limit: float, at_most: bool = True) -> dict[str, Any]:
    """A figure, its bar, and whether it passes."""
    passed = measured <= limit if at_most else measured >= limit
    return {"bar": name, "measured": measured, "relation": "<=" if at_most else ">=", "limit": limit} | {
        "passed": bool(passed)
    }


def compiled(function: Callable, *args: Any) -> tuple[Any, dict[str, float]]:
    """The compiled program; its flops, and the seconds to trace and to compile it."""
    cpu, start = time.process_time(), time.perf_counter()
    lowered = jax.jit(function).lower(*args)
    traced = time.perf_counter()
    program = lowered.compile()
    cost = {"trace_s": traced - start, "compile_s": time.perf_counter() - traced}
    cost["trace_and_compile_cpu_s"] = time.process_time() - cpu
    counted = program.cost_analysis() or {}  # None where a backend does not count
    return program, cost | {"flops": counted["flops"]}


def time_ratio(a: Callable, b: Callable, args: tuple, rounds: int) -> float:
    """Seconds of a over seconds of b, the shortest of interleaved rounds."""
    best = [np.inf, np.inf]
    for k in range(rounds + 1):
        for i, function in enumerate((a, b)):
            start = time.perf_counter()
            jax.block_until_ready(function(*args))
            if k:  # the first round warms up
                best[i] = min(best[i], time.perf_counter() - start)
    return best[0] / best[1]


@cache
def gradient(p: str) -> tuple[Any, float]:
    """The compiled gradient of the loss, and its flops."""
    case = problem(p)
    program, cost = compiled(lambda eta, x, args: jax.grad(case.loss)(x, args), *inputs(case))
    return program, cost["flops"]


def inputs(case: Problem) -> tuple:
    """The arguments of the field: learning rate, parameters, data."""
    return case.learning_rate, case.params, case.args


def field(case: Problem, order: int, route: str) -> Callable:
    """A field of the equation of motion as a function of (eta, params, args)."""

    def trees(eta: float, x: Params, args: Args) -> Params:
        return eomdl.EquationOfMotion(case.loss, eta, order)(0.0, x, args)

    def series(eta: float, x: Params, args: Args) -> Params:
        terms = modified_field_series(lambda y: scripts.gradient_flow(case.loss)(y, args), x, order)
        return jax.tree.map(lambda *f: sum(eta**k * term for k, term in enumerate(f)), *terms)

    def nested(eta: float, x: Params, args: Args) -> Params:
        return scripts.modified_flow(case.loss, eta)(x, args)

    return {"trees": trees, "series": series, "nested": nested}[route]


@cache
def field_cost(p: str, order: int, route: str = "trees", rounds: int = 0) -> dict[str, Any]:
    """Cost of one evaluation of the field against one gradient, and of compiling it."""
    case = problem(p)
    base, base_flops = gradient(p)
    program, cost = compiled(field(case, order, route), *inputs(case))
    out = {
        "problem": case.name,
        "order": order,
        "route": route,
        "gradients": cost["flops"] / base_flops,
        "compile_s": cost["compile_s"],
        "trace_s": cost["trace_s"],
        "trace_and_compile_cpu_s": cost["trace_and_compile_cpu_s"],
    }
    if rounds:
        out["time_ratio"] = time_ratio(program, base, inputs(case), rounds)
    return out


def flat(params: Any) -> np.ndarray:
    """Saved parameters as a matrix, a row for each step."""
    return np.concatenate([np.asarray(x).reshape(len(x), -1) for x in jax.tree.leaves(params)], axis=1)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """The largest Euclidean distance between rows of two paths."""
    return float(np.linalg.norm(a - b, axis=1).max())


@cache
def descent(p: str, num_steps: int) -> np.ndarray:
    """The path of gradient descent, the reference of every model."""
    case = problem(p)
    run = eomdl.descend(case.loss, case.params, optax.sgd(case.learning_rate), num_steps, args=case.args)
    return flat(run.params)


@cache
def solved(
    p: str,
    order: int,
    num_steps: int,
    estimate: bool = False,
    atol: float | None = None,
    solver: diffrax.AbstractSolver | None = None,
    stages: int = STAGES,
) -> dict[str, Any]:
    """One run of `eomdl.solve`: its path, and its cost in gradients.

    The cost leaves out what measuring the tolerances takes (test_bars.py counts that too).
    """
    case = problem(p)
    flow = eomdl.EquationOfMotion(case.loss, case.learning_rate, order)
    rtol = None if atol is None else 4 * np.finfo(float).eps
    start = time.perf_counter()
    run = eomdl.solve(
        flow,
        case.params,
        num_steps,
        args=case.args,
        estimate_error=estimate,
        rtol=rtol,
        atol=atol,
        solver=solver,
        max_steps=1_000_000,
    )
    seconds = time.perf_counter() - start
    if run.message:
        raise RuntimeError(run.message)
    steps = int(run.stats.num_steps)
    evaluations = stages * steps + 1 + estimate  # the first stage of each of the runs
    return {
        "path": flat(run.params),
        "steps": steps,
        "evaluations": evaluations,
        "gradients_per_step": evaluations * field_cost(p, order)["gradients"] / num_steps,
        "estimate": None if run.ode_error is None else float(run.ode_error.max()),
        "atol": float(run.stats.atol),
        "seconds_with_compile": seconds,
    }


@cache
def tight(p: str, order: int, num_steps: int, factor: float) -> np.ndarray:
    """The exact flow, for our purpose: the default tolerance divided by `factor`."""
    atol = solved(p, order, num_steps)["atol"] / factor
    return solved(p, order, num_steps, atol=atol)["path"]


def cheapest(
    p: str,
    order: int,
    num_steps: int,
    target: float,
    exact: np.ndarray,
    solver: diffrax.AbstractSolver | None = None,
    stages: int = STAGES,
) -> dict[str, Any]:
    """The cheapest run of `solve` found whose ODE error is at most `target`, by a search over atol."""
    atol = solved(p, order, num_steps)["atol"]
    error = distance(solved(p, order, num_steps)["path"], exact)
    tried = []
    for _ in range(6):
        atol = float(f"{atol * min(max(0.7 * target / error, 1e-4), 1e4):.3g}")
        run = solved(p, order, num_steps, atol=atol, solver=solver, stages=stages)
        error = distance(run["path"], exact)
        tried.append(run | {"error": error})
        if 0.4 * target <= error <= target:
            break
    good = [run for run in tried if run["error"] <= target]
    return min(good, key=lambda run: run["gradients_per_step"])


STEPPERS = {"Euler": (scripts.euler_step, 1), "RK4": (scripts.rk4_step, 4)}


@cache
def scripted(p: str, order: int, stepper: str, num_steps: int, substeps: int) -> dict[str, Any]:
    """One run of a script: its path, and its cost in gradients."""
    case = problem(p)
    eta = case.learning_rate
    flow = scripts.modified_flow(case.loss, eta) if order else scripts.gradient_flow(case.loss)
    step, stages = STEPPERS[stepper]
    run = scripts.integrate.lower(
        step, flow, case.params, case.args, eta, num_steps=num_steps, substeps=substeps
    ).compile()
    start = time.perf_counter()
    path = jax.block_until_ready(run(case.params, case.args, eta))
    seconds = time.perf_counter() - start
    cost = field_cost(p, 1, "nested")["gradients"] if order else 1.0
    return {
        "path": flat(path),
        "gradients_per_step": stages * substeps * cost,
        "field_gradients": cost,
        "seconds": seconds,
    }
