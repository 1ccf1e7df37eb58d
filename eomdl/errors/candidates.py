"""Flows that may describe a run, each with a solver: what each leaves out and what each costs, from a stretch of the run."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eomdl import _tree
from eomdl._end import End
from eomdl._types import Args, Loss, Params, State
from eomdl.errors.solver_cost import METHODS, Method, StepLengths, stable_length, step_lengths
from eomdl.flows.base import AbstractFlow
from eomdl.flows.equation_of_motion import EquationOfMotion
from eomdl.flows.fitted import fitted_coefficients
from eomdl.flows.gradient import GradientFlow
from eomdl.flows.interpolating import InterpolatingFlow
from eomdl.flows.points import multipliers
from eomdl.flows.stretch import Differences, differences, starting_state
from eomdl.maps.optimizer import OptimizerStep
from eomdl.runs.trajectory import Trajectory
from eomdl.series.weights import (
    difference_coefficients,
    log_coefficients,
    minimax_weights,
    weights_of_differences,
)


MAX_POINTS = {jnp.dtype("float64"): 14, jnp.dtype("float32"): 6}  # rounding of the differences grows like 2^K
LOOK = 32  # steps of which the differences are taken: the fastest ones
_BEYOND = 4  # differences after the last point
_DEPTH = 16  # of the Krylov space for the multipliers
_ORDERS = (1, 2)  # of equations of motion
_PRODUCT = 2.7  # gradients of a Jacobian-vector product
_FAR = 0.7  # departure of the map from the identity from which stride 2 is looked at
_MARGIN = 1.2  # of the bound of minimax weights over that departure


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A flow with a solver and its tolerance.

    - `kind`, `model`, `method`: which kind of flow, which flow, and which solver, in words; `name`: the last two.
    - `flow`; `solve_options`: `rtol`, `atol`, `solver`, `estimate_error=False`.
    - `evaluations`: of the field in one ODE step.
    - `model_error`, `ode_error`: what is predicted of the largest distance, of the flow itself and of the ODE solver.
    - `predicted_error`: of both; corrected by the trial, if there was one.
    - `predicted_cost`: gradients a step of the optimizer.
    - `tried`: the distance measured on the stretch; NaN if it was not tried.
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
    tried: float = math.nan
    measured_error: float = math.nan
    measured_cost: float = math.nan

    @property
    def name(self) -> str:
        """Flow and solver."""
        return f"{self.model}, {self.method}"

    def gradients_of(self, path: Trajectory) -> float:
        """What a run of this candidate has cost."""
        return self.flow.gradients * (self.evaluations * int(path.stats.num_steps) + 1)

    def with_trial(self, distance: np.ndarray, share: float, linear: bool, dearer: float) -> "Candidate":
        """With the distances measured at each step of a stretch, which is this share of the run and was so much dearer.

        After it the error is taken to grow linearly, or by as much in each doubling of the steps as in the last one.
        """
        largest = np.maximum.accumulate(distance)
        last, half = float(largest[-1]), float(largest[len(largest) // 2])
        doubled = last + (last - half) * math.log2(1 / share) if np.isfinite(last) else math.inf
        return dataclasses.replace(
            self,
            tried=last,
            predicted_error=last / share if linear else doubled,
            predicted_cost=self.predicted_cost * dearer,
        )

    def with_run(self, path: Trajectory, error: float) -> "Candidate":
        """With the measured error and cost of its run."""
        cost = self.gradients_of(path) / int(path.steps[-1] - path.steps[0])
        return dataclasses.replace(self, measured_error=error, measured_cost=cost)


class Model(NamedTuple):
    """A flow, and its coefficients over the differences of its strides."""

    kind: str
    name: str
    flow: AbstractFlow
    coefficients: np.ndarray


@dataclasses.dataclass(frozen=True)
class Stretch:
    """What a short stretch of the real run says.

    - `step_map`, `step_size`: whose run it is.
    - `first`, `length`, `num_steps`: where it begins, how long it is, and where the whole run ends, in steps.
    - `found`: the differences, by stride; `multipliers`: those of one step at its end.
    - `plain`: whether it is gradient descent with the step size as learning rate.
    - `rounding`: the norm of the parameters times the precision; `rtol`: as small as it makes sense; `cost`: of the look, in gradients.
    """

    step_map: OptimizerStep
    step_size: jax.Array
    first: int
    length: int
    num_steps: int
    found: dict[int, Differences]
    multipliers: np.ndarray
    plain: bool
    rounding: float
    rtol: float
    cost: float

    @property
    def growth(self) -> float:
        """The length of the last step over that of the first."""
        first, *_, last = self.found[1].local(np.ones(1)) if self.length > 1 else (1.0, 1.0)
        return float(last / first) if first > 0 else 1.0

    @property
    def departure(self) -> float:
        """How far the map of one step is from the identity."""
        return float(np.abs(self.multipliers - 1).max())


def look(
    step_map: OptimizerStep,
    params: Params,
    step_size: jax.Array,
    args: Args,
    start: End | None,
    end: End,
    num_steps: int,
) -> Stretch:
    """At the stretch of a real run from `start` to `end`."""
    state, first = starting_state(step_map, params, start)
    reached, last = starting_state(step_map, params, end)
    dtype = jnp.dtype(_tree.dtype(params))
    order = MAX_POINTS[dtype] + _BEYOND
    values = multipliers(step_map, reached, last, args, 1, min(_DEPTH, _tree.size(reached)))
    strides = (1, 2) if np.abs(values - 1).max() > _FAR else (1,)
    length = last - first
    found = {
        m: differences(step_map, state, first, args, m, max(min(length, LOOK) // m, 1), order)
        for m in strides
    }
    eps = float(jnp.finfo(dtype).eps)
    rounding = float(_tree.norm(params)) * eps
    cost = sum(min(length, LOOK) + m * order for m in strides) + _DEPTH * _PRODUCT + 4
    plain = all(_is_plain(step_map, x, step_size, args, k) for x, k in ((state, first), (reached, last)))
    return Stretch(
        step_map, step_size, first, length, num_steps, found, values, plain, rounding, 4 * eps, cost
    )


def _is_plain(step_map: OptimizerStep, state: State, step_size: jax.Array, args: Args, k: int) -> bool:
    """Whether a step is one of gradient descent: nothing but the parameters is carried, which move by -h g."""
    params = step_map.params(state)
    if len(jax.tree.leaves(state)) != len(jax.tree.leaves(params)):
        return False
    moved = step_map.params(step_map.increment(state, args, float(k)))
    plain = _tree.scale(-step_size, jax.grad(step_map.loss)(params, args))
    return float(_tree.norm(_tree.sub(moved, plain))) <= 1e-5 * float(_tree.norm(plain))


def models(loss: Loss, stretch: Stretch) -> Iterator[Model]:
    """All flows considered."""
    h, step_map = stretch.step_size, stretch.step_map
    if stretch.plain:
        yield Model("gradient flow", "gradient flow", GradientFlow(loss, h), log_coefficients(1))
        for order in _ORDERS:
            flow = EquationOfMotion(loss, h, order)
            kind = "equation of motion"
            yield Model(kind, f"{kind}, order {order}", flow, log_coefficients(order + 1))
    for m, found in stretch.found.items():
        bound = _MARGIN * float(np.abs(stretch.multipliers**m - 1).max())
        for points in range(2, found.order - _BEYOND + 1):
            weights = {"Taylor": log_coefficients(points)}
            if points > 2:
                weights["fitted"] = fitted_coefficients(found, points, points // 2)
            if points > 2 and bound < 1 and m == 1:
                weights["minimax"] = difference_coefficients(minimax_weights(points, bound))
            for kind, c in weights.items():
                b = None if kind == "Taylor" else weights_of_differences(c)
                kind += "" if m == 1 else f", stride {m}"
                interpolating = InterpolatingFlow(step_map, h, points, m, b)
                yield Model(kind, f"{points} points, {kind}", interpolating, c)


class Rated(NamedTuple):
    """A model with a solver: the error that it makes, and how it can be integrated.

    `model_error`: of the flow over the whole run; `stable`: the longest ODE step, and `strides`: how many there are.
    """

    model: Model
    model_error: float
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

    def candidate(
        self, tolerance: float, safety: float, dearer: Mapping[str, float] = MappingProxyType({})
    ) -> Candidate:
        """With the loosest ODE tolerance that leaves the total within `tolerance`, all errors taken times `safety`.

        Where the model is not within it, the solver may make half of its error. `dearer`: by how much the trials of a
        method took more steps than predicted.
        """
        method, root = self.lengths.method, math.sqrt(self.size)
        left = tolerance / safety - self.model_error
        allowed = left if self.fits(tolerance, safety) else 0.5 * max(self.model_error, tolerance)
        growth = next_growth = method.growth[0]
        for _ in range(6):  # the growth depends on the tolerance by way of the steps
            growth = next_growth
            atol = max(allowed / (growth * root), self.rounding / root)
            lengths = self.lengths.along(atol, self.stable, self.strides)
            limited = float(np.mean(lengths == self.stable))
            next_growth = 0.5 * (growth + (1 - limited) * method.growth[0] + limited * method.growth[1])
        ode_error = growth * root * atol
        steps = float(np.sum(1 / lengths)) * dearer.get(method.name, 1.0)
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
            predicted_error=safety * (self.model_error + ode_error),
            predicted_cost=self.model.flow.gradients * per_step,
        )

    def dearer(self, path: Trajectory) -> float:
        """The ODE steps that a run of this took over those predicted."""
        strides = int(path.steps[-1] - path.steps[0]) / self.model.flow.stride
        lengths = self.lengths.along(float(path.stats.atol), self.stable, strides)
        return int(path.stats.num_steps) / float(np.sum(1 / lengths))

    def fits(self, tolerance: float, safety: float) -> bool:
        """Whether the model leaves a tenth of the tolerance for the solver."""
        return safety * self.model_error <= 0.9 * tolerance


def rated(loss: Loss, stretch: Stretch) -> list[Rated]:
    """All models with all solvers; without those that make a decaying mode of the run grow."""
    lengths = {
        (m, method): step_lengths(method, found) for m, found in stretch.found.items() for method in METHODS
    }
    out = []
    for model in models(loss, stretch):
        m = model.flow.stride
        found, c = stretch.found[m], model.coefficients
        z = stretch.multipliers**m - 1
        rates = np.sum(c * z[:, None] ** np.arange(1, len(c) + 1), axis=1)
        if np.any((rates.real > 0) & (np.abs(1 + z) < 1)):
            continue
        left_out = np.pad(c, (0, found.order - len(c))) - log_coefficients(found.order)
        error = max(found.summed(left_out), found.limit(left_out))
        for method in METHODS:
            out.append(
                Rated(
                    model=model,
                    model_error=error,
                    lengths=lengths[m, method],
                    stable=stable_length(method, rates),
                    size=found.size,
                    rounding=stretch.rounding,
                    rtol=stretch.rtol,
                    strides=(stretch.num_steps - stretch.first) / m,
                )
            )
    return out
