"""Trials of candidates on the first steps of the real run."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from eomdl import _warn
from eomdl._types import Params
from eomdl.choice.candidates import Candidate, Estimate
from eomdl.errors.comparison import compare
from eomdl.maps.optimizer import OptimizerStep
from eomdl.runs.continuous import solve
from eomdl.runs.discrete import iterate
from eomdl.runs.trajectory import Trajectory


MAX_TRIALS = 5
MIN_ODE_STEPS = 8  # of a trial: with fewer the length of the trial cuts them
MISLEADING = 5.0  # from this ratio of an error to the one predicted, or back, predictions do not say which flow is near
_MAX_COST_RATIO = 4  # a trial ends where it takes so many times as many ODE steps as predicted
_REAL_RUNS = 5  # whose gradients the trials may cost at least
_SHARED_FACTOR = 5.0  # what one kind of flow may say of the errors and costs of another
_ABOUT_THE_LEAST = 2.0  # errors predicted up to so many times the least may as well be the least


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


Factors = dict[
    Any, tuple[str, float]
]  # what trials measured over what was predicted, each with the kind of its flow


class Trials(NamedTuple):
    """The candidates that had a trial, the best first; the others; the cost of all trials in gradients.

    `error_ratio`: the largest error after a trial over the one that the first differences predict; infinite where it did not end.
    `budget`: in gradients; `is_cut`: whether it kept a flow from a trial.
    """

    tried: list[Candidate]
    others: list[Candidate]
    cost: float
    error_ratio: float
    budget: float
    is_cut: bool


@dataclasses.dataclass(frozen=True)
class Search:
    """The search among estimates that may have a trial, with what the trials so far say.

    - `estimates`: those that may have one, or another one.
    - `errors`, `costs`: factors over what was predicted, by flow, and by flow and solver.
    - `tried`, `accepted`: the candidates after their trials, and the best one within the tolerance.
    - `ratios`: of each trial, the error after it over the one that the first differences predict.
    """

    tolerance: float
    estimates: list[Estimate]
    errors: Factors = dataclasses.field(default_factory=dict)
    costs: Factors = dataclasses.field(default_factory=dict)
    tried: tuple[Candidate, ...] = ()
    accepted: Candidate | None = None
    ratios: tuple[float, ...] = ()

    @property
    def is_misled(self) -> bool:
        """Whether a trial was far from what the first differences predict."""
        return any(not 1 / MISLEADING < ratio < MISLEADING for ratio in self.ratios)

    def candidate(self, estimate: Estimate) -> Candidate:
        """Return the candidate with what the trials say of it."""
        error_factor = _factor(self.errors, estimate.model.name)
        return estimate.candidate(self.tolerance, error_factor, self.cost_ratio(estimate))

    def described(self, estimate: Estimate) -> Candidate:
        """Return the candidate for the table: without an error where nothing is known of it."""
        candidate = self.candidate(estimate)
        if estimate.is_asymptotic or candidate.model in self.errors:
            return candidate
        return dataclasses.replace(candidate, model_error=math.nan, predicted_error=math.nan)

    def cost_ratio(self, estimate: Estimate) -> float:
        """Return how many times as many ODE steps as predicted an estimate is taken to need."""
        name, solver = estimate.model.name, estimate.method.name
        return _factor({key: known for key, known in self.costs.items() if key[1] == solver}, (name, solver))

    def without(self, estimate: Estimate) -> "Search":
        """Return the search in which an estimate has no other trial."""
        return dataclasses.replace(self, estimates=[e for e in self.estimates if e is not estimate])

    def with_trial(self, estimate: Estimate, before: Candidate, after: Candidate) -> "Search":
        """Return the search after a trial. Of a flow that did not get to its end nothing is learnt for others."""
        ratio, factor = after.predicted_error / before.predicted_error, _factor(self.errors, after.model)
        new = dataclasses.replace(self, tried=(*self.tried, after), ratios=(*self.ratios, ratio * factor))
        if np.isinf(ratio):
            return new.without(estimate)
        is_within = after.predicted_error <= self.tolerance
        is_best = is_within and (self.accepted is None or after.predicted_cost < self.accepted.predicted_cost)
        # Well within the tolerance, errors are smaller than predicted: cheaper ones may do.
        margin = max(1.1 * ratio, 0.5) if is_within else 1.05 * ratio
        cost_ratio = self.cost_ratio(estimate) * after.predicted_cost / before.predicted_cost
        return dataclasses.replace(
            new,
            accepted=after if is_best else self.accepted,
            errors=self.errors | {after.model: (after.kind, margin * factor)},
            costs=self.costs | {(after.model, after.method): (after.kind, cost_ratio)},
        )

    def next(self) -> Estimate | None:
        """Return the cheapest within the tolerance, at best one whose differences fall; if there is none, what may be nearest."""
        within = [e for e in self.estimates if e.fits(self.tolerance, _factor(self.errors, e.model.name))]
        if within:
            return min(within, key=lambda e: (not e.is_asymptotic, self.candidate(e).predicted_cost))
        return None if self.accepted else self._nearest()

    def _nearest(self) -> Estimate | None:
        """Return what may be the nearest: where predictions mislead, at first a cheap flow of each other kind."""
        other = self._cheap_of_another_kind() if self.is_misled else None
        if other is not None:
            return other
        best = min((candidate.predicted_error for candidate in self.tried), default=math.inf)
        known = [e for e in self.estimates if e.is_asymptotic or not self.tried]
        nearest = min(known, key=self._distance, default=None)
        if nearest is None or self.candidate(nearest).predicted_error >= best / _ABOUT_THE_LEAST:
            return None
        return nearest

    def _cheap_of_another_kind(self) -> Estimate | None:
        """Return the cheapest of those that may be the nearest of a kind without a trial."""
        kinds = {candidate.kind for candidate in self.tried}
        untried = [e for e in self.estimates if e.model.kind not in kinds]
        untried = [e for e in untried if e.is_asymptotic] or untried
        least: dict[str, float] = {}
        for e in untried:
            least[e.model.kind] = min(e.model_error, least.get(e.model.kind, math.inf))
        near = [e for e in untried if e.model_error <= _ABOUT_THE_LEAST * least[e.model.kind]]
        return min(near, key=lambda e: self.candidate(e).predicted_cost, default=None)

    def _distance(self, e: Estimate) -> tuple[bool, float, float]:
        return not e.is_asymptotic, e.model_error, self.candidate(e).predicted_cost


def _factor(known: Factors, key: Any) -> float:
    """Return the factor of a flow, or of the others the one nearest to 1.

    What one kind of flow failed by is its own; what two kinds agree on is the path's.
    """
    if key in known:
        return known[key][1]
    nearest = min((factor for _, factor in known.values()), key=lambda x: abs(math.log(x)), default=1.0)
    is_shared = len({kind for kind, _ in known.values()}) > 1
    return nearest if is_shared else float(np.clip(nearest, 1 / _SHARED_FACTOR, _SHARED_FACTOR))


def run_trials(
    estimates: list[Estimate],
    tolerance: float,
    real: Real,
    is_gradient_descent: bool,
    budget: float | None = None,
) -> Trials:
    """Integrate the cheapest over the first steps, until one is within the tolerance of the real run there.

    One that is well within the tolerance makes others eligible: these have trials as long as what they would save pays for them.
    Where the optimizer has a memory its modes turn and hardly contract, so errors add up: after the trial they are taken to grow
    as a power of the steps. `budget`: in gradients, by default those of a whole run of the first flow tried, or of
    five real runs if these are more.
    """
    search, cost, is_cut = Search(tolerance, estimates), 0.0, False
    while len(search.tried) < MAX_TRIALS and (estimate := search.next()) is not None:
        before, accepted = search.candidate(estimate), search.accepted
        if accepted is not None and not _pays(before, accepted, real):
            break
        if budget is None:
            budget = max(before.predicted_cost, _REAL_RUNS) * (real.num_steps - real.first)
        if cost + before.cost_of_steps(_trial_steps(search, estimate, real)) > budget:
            is_cut, search = True, search.without(estimate)
            continue
        path, real, spent, cost_ratio = _run_trial(search, estimate, real, budget - cost)
        cost += spent
        after = before.with_trial(real.distance(path), real.fraction, not is_gradient_descent, cost_ratio)
        search = search.with_trial(estimate, before, after)
        if accepted is not None and after.predicted_error > tolerance:
            break
    tried = _once(sorted(search.tried, key=lambda c: (c is not search.accepted, c.predicted_error)))
    names = {c.name for c in tried}
    return Trials(
        tried=tried,
        others=[c for c in map(search.described, estimates) if c.name not in names],
        cost=cost + real.length,
        error_ratio=max(search.ratios, default=0.0),
        budget=budget or 0.0,
        is_cut=is_cut or cost >= (budget or math.inf),
    )


def _once(candidates: list[Candidate]) -> list[Candidate]:
    """Return the first of each flow and solver."""
    first = {c.name: c for c in reversed(candidates)}
    return [c for c in candidates if first[c.name] is c]


def _pays(candidate: Candidate, accepted: Candidate, real: Real) -> bool:
    """Whether a candidate would save more over the run than its trial costs."""
    saved = (accepted.predicted_cost - candidate.predicted_cost) * (real.num_steps - real.first)
    return saved > candidate.predicted_cost * real.length


def _trial_steps(search: Search, estimate: Estimate, real: Real) -> float:
    """Return the ODE steps that a trial is predicted to take."""
    atol = search.candidate(estimate).solve_options["atol"]
    return search.cost_ratio(estimate) * estimate.ode_steps(atol, real.length)


def _run_trial(
    search: Search, estimate: Estimate, real: Real, budget: float
) -> tuple[Trajectory, Real, float, float]:
    """Run a flow over the first steps, more of them until it takes enough ODE steps.

    Also return the cost in gradients, and the ODE steps over those predicted. It ends where these are too many, or beyond the budget.
    """
    candidate, cost = search.candidate(estimate), 0.0
    while True:
        last = real.first + real.length
        predicted = _trial_steps(search, estimate, real)
        # Fewer than twice so many steps say little, and cost little.
        paid = max(candidate.steps_of_cost(budget - cost), 2 * MIN_ODE_STEPS)
        most = min(_MAX_COST_RATIO * max(predicted, MIN_ODE_STEPS), paid)
        options = {**candidate.solve_options, **real.options, "max_steps": max(math.ceil(most), 1)}
        path = _warn.quietly(solve)(candidate.flow, real.params, last, diagnose=False, **options)
        cost += candidate.cost_of(path)
        is_enough = int(path.stats.num_steps) >= MIN_ODE_STEPS or last == real.num_steps
        if path.message or is_enough:
            return path, real, cost, int(path.stats.num_steps) / predicted
        real = real.double()
