"""Candidates tried on a stretch of the real run."""

import dataclasses
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

    Where the optimizer has a memory its modes turn and hardly contract, so errors add up: after the stretch they are
    taken to grow linearly.
    """
    cost, safety = 0.0, 1.0
    tried: dict[str, Candidate] = {}
    dearer: dict[str, float] = {}
    for _ in range(TRIES):
        within = [r for r in found if r.fits(tolerance, safety)]
        if within:
            r = min(within, key=lambda r: r.candidate(tolerance, safety, dearer).predicted_cost)
        elif tried:
            break
        else:  # the nearest is tried too, with the cheapest of its solvers
            r = min(found, key=lambda r: (r.on_whole, r.candidate(tolerance, safety, dearer).predicted_cost))
        candidate = r.candidate(tolerance, safety, dearer)
        path, real, spent = _tried(candidate, real)
        cost += spent
        ratio = r.dearer(path)
        change = ratio / dearer.get(r.method.name, 1.0)
        candidate = candidate.with_trial(real.distance(path), real.share, 0.0 if plain else 1.0, change)
        tried[candidate.name], dearer[r.method.name] = candidate, ratio
        if candidate.predicted_error <= tolerance:
            break
        if np.isinf(candidate.predicted_error):
            found = [other for other in found if other is not r]
        else:
            safety *= max(1.2, candidate.predicted_error / tolerance)
    others = [r.candidate(tolerance, safety, dearer) for r in found]
    best_first = sorted(tried.values(), key=lambda c: c.predicted_error)
    return Trials(best_first, [c for c in others if c.name not in tried], cost + real.length)


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
