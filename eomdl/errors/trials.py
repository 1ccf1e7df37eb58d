"""Candidates tried on a stretch of the real run."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from eomdl._types import Params
from eomdl.errors.candidates import Candidate, Rated
from eomdl.errors.comparison import compare
from eomdl.maps.optimizer import OptimizerStep
from eomdl.runs.continuous import solve
from eomdl.runs.discrete import iterate
from eomdl.runs.trajectory import Trajectory


TRIES = 5
ENOUGH = 8  # ODE steps, of which a trial consists at least: with fewer the length of the stretch cuts them


def real_run(
    step_map: OptimizerStep, params: Params, last: int, step_size: jax.Array, options: dict[str, Any]
) -> Trajectory:
    """That to a step; `ValueError` if it does not stay finite."""
    run = iterate(step_map, params, last, step_size=step_size, **options)
    if run.message:
        raise ValueError(
            f"optimizer: expected a run that stays finite, got one that ends at step {run.end.step}"
        )
    return run


@dataclasses.dataclass(frozen=True)
class Real:
    """The real run as far as it has been looked at."""

    step_map: OptimizerStep
    params: Params
    step_size: jax.Array
    first: int
    num_steps: int
    options: dict[str, Any]
    run: Trajectory

    @property
    def length(self) -> int:
        """In steps."""
        return int(self.run.end.step) - self.first

    @property
    def share(self) -> float:
        """Of the whole run."""
        return self.length / (self.num_steps - self.first)

    def longer(self) -> "Real":
        """Twice as long, at most to the end."""
        last = min(self.first + 2 * self.length, self.num_steps)
        options = {**self.options, "resume": self.run}
        return dataclasses.replace(
            self, run=real_run(self.step_map, self.params, last, self.step_size, options)
        )

    def distance(self, path: Trajectory) -> np.ndarray:
        """Of a flow, at each step; infinite if it does not get to the end."""
        if path.message:
            return np.full(2, np.inf)
        return compare(self.run, {"tried": path}).distance["tried"]


class Trials(NamedTuple):
    """What was tried, the best first; the others; the cost of all that in gradients."""

    tried: list[Candidate]
    others: list[Candidate]
    cost: float


def trials(found: list[Rated], tolerance: float, real: Real, plain: bool) -> Trials:
    """Integrate the cheapest over the stretch, until one is within the tolerance of the real run there.

    All errors are corrected by the factor found. One that is well within the tolerance makes others eligible: these are
    tried as long as what they would save pays for the trial. Where the optimizer has a memory its modes turn and
    hardly contract, so errors add up: after the stretch they are taken to grow linearly.
    """
    cost, safety = 0.0, 1.0
    tried: list[Candidate] = []
    dearer: dict[str, float] = {}
    accepted: Candidate | None = None
    for _ in range(TRIES):
        r = _next(found, tolerance, safety, dearer, first=not tried)
        if r is None:
            break
        candidate = r.candidate(tolerance, safety, dearer)
        if accepted is not None and not _pays(candidate, accepted, real):
            break
        path, real, spent = _tried(candidate, real)
        cost += spent
        ratio = r.dearer(path)
        change = ratio / dearer.get(r.method.name, 1.0)
        candidate = candidate.with_trial(real.distance(path), real.share, not plain, change)
        tried.append(candidate)
        dearer[r.method.name] = ratio
        part = candidate.predicted_error / tolerance
        if part <= 1:
            accepted = candidate
            safety *= max(1.1 * part, 0.5)
        elif accepted is not None:
            break
        elif np.isinf(part):
            found = [other for other in found if other is not r]
        else:
            safety *= 1.05 * part
    return _ranked(
        accepted, tried, [r.candidate(tolerance, safety, dearer) for r in found], cost + real.length
    )


def _next(
    found: list[Rated], tolerance: float, safety: float, dearer: Mapping[str, float], first: bool
) -> Rated | None:
    """The cheapest that is within the tolerance; if none is, first of all the nearest, with the cheapest of its solvers."""

    def cost(r: Rated) -> float:
        return r.candidate(tolerance, safety, dearer).predicted_cost

    within = [r for r in found if r.fits(tolerance, safety)]
    if within:
        return min(within, key=cost)
    return min(found, key=lambda r: (r.model_error, cost(r))) if first and found else None


def _pays(candidate: Candidate, accepted: Candidate, real: Real) -> bool:
    """Whether what a candidate would save over the run is more than what its trial costs."""
    saved = (accepted.predicted_cost - candidate.predicted_cost) * (real.num_steps - real.first)
    return saved > candidate.predicted_cost * real.length


def _ranked(
    accepted: Candidate | None, tried: list[Candidate], others: list[Candidate], cost: float
) -> Trials:
    """The accepted one, or the nearest, first; the same flow and solver only once."""
    best_first = sorted(tried, key=lambda c: (c is not accepted, c.predicted_error))
    once = {c.name: c for c in reversed(best_first)}
    return Trials(
        [c for c in best_first if once[c.name] is c], [c for c in others if c.name not in once], cost
    )


def _tried(candidate: Candidate, real: Real) -> tuple[Trajectory, Real, float]:
    """A run of the flow over the stretch, which is made longer until it takes enough ODE steps; its cost in gradients."""
    cost = 0.0
    while True:
        last = real.first + real.length
        path = solve(
            candidate.flow, real.params, last, diagnose=False, **candidate.solve_options, **real.options
        )
        cost += candidate.gradients_of(path)
        if path.message or int(path.stats.num_steps) >= ENOUGH or last == real.num_steps:
            return path, real, cost
        real = real.longer()
