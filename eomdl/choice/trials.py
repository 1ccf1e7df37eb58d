"""Trials of candidates on the first steps of the real run."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from eomdl._types import Params
from eomdl.choice.candidates import Candidate, Estimate
from eomdl.errors.comparison import compare
from eomdl.maps.optimizer import OptimizerStep
from eomdl.runs.continuous import solve
from eomdl.runs.discrete import iterate
from eomdl.runs.trajectory import Trajectory


MAX_TRIALS = 5
MIN_ODE_STEPS = 8  # of a trial: with fewer the length of the trial cuts them


def real_run(
    step_map: OptimizerStep, params: Params, last: int, step_size: jax.Array, options: dict[str, Any]
) -> Trajectory:
    """Return the real run up to a step. **Raises:** `ValueError` if it does not stay finite."""
    run = iterate(step_map, params, last, step_size=step_size, **options)
    if run.message:
        raise ValueError(
            f"optimizer: expected a run that stays finite, got one that ends at step {run.end.step}"
        )
    return run


@dataclasses.dataclass(frozen=True)
class Real:
    """The real run, and its first steps as far as they have been computed."""

    step_map: OptimizerStep
    params: Params
    step_size: jax.Array
    first: int
    num_steps: int
    options: dict[str, Any]
    run: Trajectory

    @property
    def length(self) -> int:
        """The number of steps computed."""
        return int(self.run.end.step) - self.first

    @property
    def fraction(self) -> float:
        """The part of the whole run that was computed."""
        return self.length / (self.num_steps - self.first)

    def double(self) -> "Real":
        """Return it with twice as many steps computed, at most to the end."""
        last = min(self.first + 2 * self.length, self.num_steps)
        options = {**self.options, "resume": self.run}
        run = real_run(self.step_map, self.params, last, self.step_size, options)
        return dataclasses.replace(self, run=run)

    def distance(self, path: Trajectory) -> np.ndarray:
        """Return the distance of a flow at each step; infinite if it does not get to the end."""
        if path.message:
            return np.full(2, np.inf)
        return compare(self.run, {"trial": path}).distance["trial"]


class Trials(NamedTuple):
    """The candidates that had a trial, the best first; the others; the cost of all trials in gradients."""

    tried: list[Candidate]
    others: list[Candidate]
    cost: float


def run_trials(estimates: list[Estimate], tolerance: float, real: Real, is_gradient_descent: bool) -> Trials:
    """Integrate the cheapest over the first steps, until one is within the tolerance of the real run there.

    All errors are corrected by the factor found. One that is well within the tolerance makes others eligible: these have
    trials as long as what they would save pays for them. Where the optimizer has a memory its modes turn and
    hardly contract, so errors add up: after the trial they are taken to grow linearly.
    """
    cost, error_factor = 0.0, 1.0
    tried: list[Candidate] = []
    cost_ratios: dict[str, float] = {}
    accepted: Candidate | None = None
    for _ in range(MAX_TRIALS):
        estimate = _next(estimates, tolerance, error_factor, cost_ratios, is_first=not tried)
        if estimate is None:
            break
        candidate = estimate.candidate(tolerance, error_factor, cost_ratios)
        if accepted is not None and not _pays(candidate, accepted, real):
            break
        path, real, spent = _run_trial(candidate, real)
        cost += spent
        ratio = estimate.cost_ratio(path)
        change = ratio / cost_ratios.get(estimate.method.name, 1.0)
        candidate = candidate.with_trial(real.distance(path), real.fraction, not is_gradient_descent, change)
        tried.append(candidate)
        cost_ratios[estimate.method.name] = ratio
        part = candidate.predicted_error / tolerance
        if part <= 1:
            accepted = candidate
            error_factor *= max(1.1 * part, 0.5)
        elif accepted is not None:
            break
        elif np.isinf(part):
            estimates = [other for other in estimates if other is not estimate]
        else:
            error_factor *= 1.05 * part
    others = [other.candidate(tolerance, error_factor, cost_ratios) for other in estimates]
    return _rank(accepted, tried, others, cost + real.length)


def _next(
    estimates: list[Estimate],
    tolerance: float,
    error_factor: float,
    cost_ratios: Mapping[str, float],
    is_first: bool,
) -> Estimate | None:
    """Return the cheapest within the tolerance; if none is, at first the nearest, with the cheapest of its solvers."""

    def cost(estimate: Estimate) -> float:
        return estimate.candidate(tolerance, error_factor, cost_ratios).predicted_cost

    within = [estimate for estimate in estimates if estimate.fits(tolerance, error_factor)]
    if within:
        return min(within, key=cost)
    if is_first and estimates:
        return min(estimates, key=lambda estimate: (estimate.model_error, cost(estimate)))
    return None


def _pays(candidate: Candidate, accepted: Candidate, real: Real) -> bool:
    """Whether a candidate would save more over the run than its trial costs."""
    saved = (accepted.predicted_cost - candidate.predicted_cost) * (real.num_steps - real.first)
    return saved > candidate.predicted_cost * real.length


def _rank(accepted: Candidate | None, tried: list[Candidate], others: list[Candidate], cost: float) -> Trials:
    """Return the accepted one, or the nearest, first; the same flow and solver only once."""
    best_first = sorted(tried, key=lambda c: (c is not accepted, c.predicted_error))
    once = {c.name: c for c in reversed(best_first)}
    return Trials(
        [c for c in best_first if once[c.name] is c], [c for c in others if c.name not in once], cost
    )


def _run_trial(candidate: Candidate, real: Real) -> tuple[Trajectory, Real, float]:
    """Run a flow over the first steps, more of them until it takes enough ODE steps; also return the cost in gradients."""
    cost = 0.0
    while True:
        last = real.first + real.length
        path = solve(
            candidate.flow, real.params, last, diagnose=False, **candidate.solve_options, **real.options
        )
        cost += candidate.cost_of(path)
        if path.message or int(path.stats.num_steps) >= MIN_ODE_STEPS or last == real.num_steps:
            return path, real, cost
        real = real.double()
