"""Flows that may describe a run, each with a solver: what each leaves out and what each costs, from the first steps of the run."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eomdl import _costs, _tree
from eomdl._end import End
from eomdl._types import Args, Loss, Params, State
from eomdl.choice.differences import Differences, differences, starting_state
from eomdl.choice.fitted import NUM_LEFT_OUT, fitted_coefficients
from eomdl.choice.points import multipliers
from eomdl.choice.step_lengths import METHODS, Method, StepLengths, stable_length, step_lengths
from eomdl.flows.base import AbstractFlow
from eomdl.flows.equation_of_motion import EquationOfMotion
from eomdl.flows.gradient import GradientFlow
from eomdl.flows.interpolating import InterpolatingFlow
from eomdl.maps.optimizer import OptimizerStep
from eomdl.runs.trajectory import Trajectory
from eomdl.series.weights import (
    difference_coefficients,
    log_coefficients,
    minimax_weights,
    weights_of_differences,
)


# Of flows; by dtype, since the rounding of the differences grows like 2^K.
MAX_POINTS = {jnp.dtype("float64"): 14, jnp.dtype("float32"): 6}
NUM_DIFFERENCE_STEPS = 32  # of which differences are taken, at most: the fastest ones
_DEPTH = 16  # of the Krylov space for the multipliers
_ORDERS = (1, 2)  # of equations of motion
_STRIDE_2_DEPARTURE = 0.7  # of the map from the identity, from which stride 2 is a candidate
_BOUND_MARGIN = 1.2  # the bound of minimax weights over that departure
_MODEL_FRACTION = 0.9  # of the tolerance, which a flow may take where it leaves the rest to the solver
_SOLVER_FRACTION = 0.1  # of its error, where a flow is not within the tolerance


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A flow with a solver and its tolerance.

    - `kind`, `model`, `method`: which kind of flow, which flow, and which solver, in words; `name`: the last two.
    - `flow`; `solve_options`: `rtol`, `atol`, `solver`, `estimate_error=False`.
    - `evaluations`: of the field in one ODE step.
    - `model_error`, `ode_error`: the predicted parts of the largest distance, of the flow itself and of the ODE solver.
    - `predicted_error`: the largest distance predicted, of both; corrected by the trial, if there was one.
    - `predicted_cost`: gradients per step of the optimizer.
    - `trial_error`: the distance measured in the trial; NaN if there was none.
    - `measured_error`, `measured_cost`: of a whole run; NaN if there was none.
    """

    kind: str
    model: str
    method: str
    flow: AbstractFlow
    solve_options: dict[str, Any]
    evaluations: int
    model_error: float
    ode_error: float
    predicted_error: float
    predicted_cost: float
    trial_error: float = math.nan
    measured_error: float = math.nan
    measured_cost: float = math.nan

    @property
    def name(self) -> str:
        """The flow and the solver, in words."""
        return f"{self.model}, {self.method}"

    def cost_of(self, path: Trajectory) -> float:
        """Return the gradients that a run of this candidate has cost."""
        return self.cost_of_steps(int(path.stats.num_steps))

    def cost_of_steps(self, ode_steps: float) -> float:
        """Return the gradients that so many ODE steps cost."""
        return self.flow.gradient_cost * (self.evaluations * ode_steps + 1)

    def steps_of_cost(self, gradients: float) -> float:
        """Return the ODE steps that so many gradients pay for."""
        return (gradients / self.flow.gradient_cost - 1) / self.evaluations

    def with_trial(
        self, distance: np.ndarray, fraction: float, is_power: bool, cost_ratio: float
    ) -> "Candidate":
        """Return the candidate with the result of a trial over the first steps.

        `distance`: at each step; `fraction`: of the whole run; `cost_ratio`: of the trial's cost to that predicted. After
        the trial the error is taken to grow in each doubling of the steps as in the last one: by the same factor, at most 2,
        where it `is_power` of the steps, else by the same amount.
        """
        largest = np.maximum.accumulate(distance)
        last, half = float(largest[-1]), float(largest[len(largest) // 2])
        doublings, predicted = math.log2(1 / fraction), math.inf
        if np.isfinite(last) and is_power:
            predicted = last * min(last / half if half > 0 else 2.0, 2.0) ** doublings
        elif np.isfinite(last):
            predicted = last + (last - half) * doublings
        return dataclasses.replace(
            self,
            trial_error=last,
            predicted_error=predicted,
            predicted_cost=self.predicted_cost * cost_ratio,
        )

    def with_run(self, path: Trajectory, error: float) -> "Candidate":
        """Return the candidate with the measured error and cost of its run."""
        cost = self.cost_of(path) / int(path.steps[-1] - path.steps[0])
        return dataclasses.replace(self, measured_error=error, measured_cost=cost)


class Model(NamedTuple):
    """A flow, and its coefficients over the differences of its strides."""

    kind: str
    name: str
    flow: AbstractFlow
    coefficients: np.ndarray


@dataclasses.dataclass(frozen=True)
class Probe:
    """What the first steps of a real run tell of it.

    - `step_map`, `step_size`: of the run.
    - `first`, `length`, `num_steps`: where the probe begins, its length, and where the whole run ends, in steps.
    - `differences`: by stride; `multipliers`: those of one step at the end of the probe, nan where it has no derivative.
    - `is_gradient_descent`: whether the run is gradient descent with the step size as learning rate.
    - `rounding`: the norm of the parameters times the precision; `rtol`: the smallest that makes sense; `cost`: of the
        probe, in gradients.
    """

    step_map: OptimizerStep
    step_size: jax.Array
    first: int
    length: int
    num_steps: int
    differences: dict[int, Differences]
    multipliers: np.ndarray
    is_gradient_descent: bool
    rounding: float
    rtol: float
    cost: float

    @property
    def num_terms(self) -> int:
        """How many terms of the logarithm's series fall along the path."""
        return _smallest_term(self.differences[1], self.rounding)

    @property
    def instability(self) -> float:
        """How many times as large a small error may be at the end of the run, by the multipliers at the end of the probe."""
        left = self.num_steps - self.first - self.length
        return float(np.abs(self.multipliers).max()) ** min(left, 1000)

    @property
    def growth(self) -> float:
        """The length of the last step over that of the first."""
        first, *_, last = self.differences[1].local(np.ones(1)) if self.length > 1 else (1.0, 1.0)
        return float(last / first) if first > 0 else 1.0

    @property
    def departure(self) -> float:
        """The departure of the map of one step from the identity."""
        return float(np.abs(self.multipliers - 1).max())


def probe_run(
    step_map: OptimizerStep,
    params: Params,
    step_size: jax.Array,
    args: Args,
    start: End | None,
    end: End,
    num_steps: int,
) -> Probe:
    """Return the probe of a real run from `start` to `end`, of `num_steps` steps in all."""
    state, first = starting_state(step_map, params, start)
    reached, last = starting_state(step_map, params, end)
    dtype = jnp.dtype(_tree.dtype(params))
    order = MAX_POINTS[dtype] + NUM_LEFT_OUT
    values = multipliers(step_map, reached, last, args, 1, min(_DEPTH, _tree.size(reached)))
    strides = (1, 2) if np.abs(values - 1).max() > _STRIDE_2_DEPARTURE else (1,)
    length = last - first
    measured = min(length, NUM_DIFFERENCE_STEPS)
    eps = float(jnp.finfo(dtype).eps)
    ends = ((state, first), (reached, last))
    return Probe(
        step_map=step_map,
        step_size=step_size,
        first=first,
        length=length,
        num_steps=num_steps,
        differences={
            m: differences(step_map, state, first, args, m, max(measured // m, 1), order) for m in strides
        },
        multipliers=values,
        is_gradient_descent=all(_is_descent(step_map, x, step_size, args, k) for x, k in ends),
        rounding=float(_tree.norm(params)) * eps,
        rtol=4 * eps,
        cost=sum(measured + m * order for m in strides) + _DEPTH * _costs.STEP_DERIVATIVE + 4,
    )


def _is_descent(step_map: OptimizerStep, state: State, step_size: jax.Array, args: Args, k: int) -> bool:
    """Whether a step is one of gradient descent: the state is the parameters only, which move by -h g."""
    params = step_map.params(state)
    if len(jax.tree.leaves(state)) != len(jax.tree.leaves(params)):
        return False
    moved = step_map.params(step_map.increment(state, args, float(k)))
    descent = _tree.scale(-step_size, jax.grad(step_map.loss)(params, args))
    return float(_tree.norm(_tree.sub(moved, descent))) <= 1e-5 * float(_tree.norm(descent))


def models(loss: Loss, probe: Probe) -> Iterator[Model]:
    """Iterate over all flows considered."""
    h, step_map = probe.step_size, probe.step_map
    if probe.is_gradient_descent:
        yield Model("gradient flow", "gradient flow", GradientFlow(loss, h), log_coefficients(1))
        for order in _ORDERS:
            flow = EquationOfMotion(loss, h, order)
            kind = "equation of motion"
            yield Model(kind, f"{kind}, order {order}", flow, log_coefficients(order + 1))
    for m, measured in probe.differences.items():
        bound = _BOUND_MARGIN * float(np.abs(probe.multipliers**m - 1).max())
        for points in range(2, measured.order - NUM_LEFT_OUT + 1):
            weights = {"Taylor": log_coefficients(points)}
            if points > 2:
                weights["fitted"] = fitted_coefficients(measured, points, points // 2)
            if points > 2 and bound < 1 and m == 1:
                weights["minimax"] = difference_coefficients(minimax_weights(points, bound))
            for kind, c in weights.items():
                b = None if kind == "Taylor" else weights_of_differences(c)
                kind += "" if m == 1 else f", stride {m}"
                interpolating = InterpolatingFlow(step_map, h, points, m, b)
                yield Model(kind, f"{points} points, {kind}", interpolating, c)


class Estimate(NamedTuple):
    """A model with a solver: the estimated error of the model, and how it can be integrated.

    `model_error`: of the flow over the whole run; `is_asymptotic`: whether the series of the logarithm still falls after its last point.
    `stable`: the longest ODE step, and `strides`: how many there are.
    """

    model: Model
    model_error: float
    is_asymptotic: bool
    lengths: StepLengths
    stable: float
    size: int
    rounding: float
    rtol: float
    strides: float

    @property
    def method(self) -> Method:
        """The solver."""
        return self.lengths.method

    def candidate(self, tolerance: float, error_factor: float = 1.0, cost_ratio: float = 1.0) -> Candidate:
        """Return the candidate with the largest ODE tolerance that leaves the total error within `tolerance`.

        `error_factor`: all errors are taken times this. `cost_ratio`: how many times as many ODE steps as predicted are
        taken. Where the model is not within the tolerance, the solver may make a tenth of its error.
        """
        method, root = self.lengths.method, math.sqrt(self.size)
        left = tolerance / error_factor - self.model_error
        fits = self.fits(tolerance, error_factor)
        allowed = left if fits else _SOLVER_FRACTION * max(self.model_error, tolerance)
        growth = next_growth = method.growth[0]
        for _ in range(6):  # the growth depends on the tolerance by way of the steps
            growth = next_growth
            atol = max(allowed / (growth * root), self.rounding / root)
            lengths = self.lengths.along(atol, self.stable, self.strides)
            limited = float(np.mean(lengths == self.stable))
            next_growth = 0.5 * (growth + (1 - limited) * method.growth[0] + limited * method.growth[1])
        ode_error = growth * root * atol
        steps = float(np.sum(1 / lengths)) * cost_ratio
        per_step = method.evaluations * steps / (self.strides * self.model.flow.stride)
        return Candidate(
            kind=self.model.kind,
            model=self.model.name,
            method=method.name,
            flow=self.model.flow,
            solve_options={
                "rtol": self.rtol,
                "atol": atol,
                "solver": method.solver,
                "estimate_error": False,
            },
            evaluations=method.evaluations,
            model_error=self.model_error,
            ode_error=ode_error,
            predicted_error=error_factor * (self.model_error + ode_error),
            predicted_cost=self.model.flow.gradient_cost * per_step,
        )

    def ode_steps(self, atol: float, num_steps: int) -> float:
        """Return the ODE steps predicted for the first steps of the run at an ODE tolerance."""
        strides = num_steps / self.model.flow.stride
        return float(np.sum(1 / self.lengths.along(atol, self.stable, strides)))

    def fits(self, tolerance: float, error_factor: float) -> bool:
        """Whether the model leaves a part of the tolerance for the solver."""
        return error_factor * self.model_error <= _MODEL_FRACTION * tolerance


def estimates(loss: Loss, probe: Probe) -> list[Estimate]:
    """Return all models with all solvers; without those that make a decaying mode of the run grow."""
    lengths = {
        (m, method): step_lengths(method, measured)
        for m, measured in probe.differences.items()
        for method in METHODS
    }
    cuts = {m: _smallest_term(measured, probe.rounding) for m, measured in probe.differences.items()}
    out = []
    for model in models(loss, probe):
        m = model.flow.stride
        measured, c = probe.differences[m], model.coefficients
        z = probe.multipliers**m - 1
        rates = np.sum(c * z[:, None] ** np.arange(1, len(c) + 1), axis=1)
        if np.any((rates.real > 0) & (np.abs(1 + z) < 1)):
            continue
        cut = cuts[m]
        # Beyond the smallest term nothing is known; a flow that goes there is compared with all that was measured.
        end = cut if len(c) < cut else measured.order
        known = np.where(np.arange(measured.order) < end, log_coefficients(measured.order), 0)
        left_out = np.pad(c, (0, measured.order - len(c))) - known
        error = max(measured.largest_sum(left_out), measured.sum_at_rest(left_out))
        for method in METHODS:
            out.append(
                Estimate(
                    model=model,
                    model_error=error,
                    is_asymptotic=len(c) < cut,
                    lengths=lengths[m, method],
                    stable=stable_length(method, rates),
                    size=measured.size,
                    rounding=probe.rounding,
                    rtol=probe.rtol,
                    strides=(probe.num_steps - probe.first) / m,
                )
            )
    return out


def _smallest_term(measured: Differences, rounding: float) -> int:
    r"""Return the j of the smallest term $|\Delta^j \theta| / j$ of the logarithm's series, where it is to be cut.

    Kinks, and multipliers further than 1 from 1, make higher differences grow. Where the series falls to rounding nothing is cut.
    """
    j, sizes = np.arange(1, measured.order + 1), measured.sizes()
    terms = np.where(sizes > rounding * 2.0**j, sizes / j, 0)
    return int(np.argmin(terms)) + 1 if terms.min() > 0 else measured.order + 1
