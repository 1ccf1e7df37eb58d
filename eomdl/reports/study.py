"""A training run under study: what the questions share, each run made once and when it is first asked for."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

from eomdl import _check, _tree, _warn
from eomdl._end import RESULTS
from eomdl._types import Args, Loss, Params
from eomdl.errors.comparison import Comparison, compare
from eomdl.errors.predicted import PredictedError, predict_error
from eomdl.flows.base import AbstractFlow
from eomdl.flows.equation_of_motion import EquationOfMotion
from eomdl.flows.gradient import GradientFlow
from eomdl.flows.interpolating import InterpolatingFlow
from eomdl.flows.momentum import MomentumFlow
from eomdl.maps.optimizer import optimizer_step
from eomdl.maps.response import MomentumRule, recognize_momentum
from eomdl.observe.curvature import sharpness
from eomdl.reports.finding import NoAnswer
from eomdl.reports.stability import Stability, measure_stability
from eomdl.runs.continuous import solve
from eomdl.runs.data import open_data
from eomdl.runs.discrete import descend
from eomdl.runs.trajectory import Trajectory


Optimizer: TypeAlias = optax.GradientTransformation | Callable[[float], optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Resolution:
    """How finely a run is studied.

    - `saved`: steps of a path that are saved and drawn; `measured`: those of which the sharpness is measured.
    - `grid`: points along each side of the plane of the loss.
    - `numbers`: of parameters that may be saved step by step, for the charges.
    - `ode_steps`: for each step of the run; a flow that needs more of them is given up.
    - `ode_error`: whether every flow is integrated a second time, to know the solver's own error.
    """

    saved: int
    measured: int
    grid: int
    numbers: int
    ode_error: bool
    ode_steps: int


FULL = Resolution(saved=120, measured=60, grid=31, numbers=20_000_000, ode_error=True, ode_steps=4)
QUICK = Resolution(saved=60, measured=16, grid=13, numbers=5_000_000, ode_error=False, ode_steps=2)
WARM = 50  # steps after which the averages of Adam and its kind are filled, so that a flow can begin


@dataclasses.dataclass(frozen=True)
class Model:
    """A flow that may describe the run.

    `first`: the step at which it begins. `series`: whether it is a series in the
    learning rate times the curvature, which has a limit below 1 only.
    """

    flow: AbstractFlow
    first: int = 0
    series: bool = False


@dataclasses.dataclass(frozen=True)
class Study:
    """The run, and all that the questions share about it, each computed once and when it is first asked for."""

    loss: Loss
    params: Params
    learning_rate: float
    num_steps: int
    optimizer: optax.GradientTransformation
    args: Args
    batches: Any
    resolution: Resolution

    @functools.cached_property
    def rule(self) -> MomentumRule | None:
        """The optimizer's rule, if it is gradient descent with momentum or without.

        **Raises:** `ValueError` if the optimizer has another learning rate than the one given.
        """
        rule = recognize_momentum(self.optimizer, self.params, self.num_steps)
        if rule is None:
            return None
        if abs(rule.learning_rate / self.learning_rate - 1) > 1e-3:
            raise ValueError(
                f"learning_rate: expected {rule.learning_rate:.6g}, the optimizer's own, got {self.learning_rate:.6g}; "
                "an optimizer that is a function of the learning rate takes any"
            )
        return dataclasses.replace(rule, learning_rate=self.learning_rate)

    @functools.cached_property
    def is_gradient_descent(self) -> bool:
        """Whether the run is gradient descent without momentum, with minibatches or without."""
        return self.rule is not None and self.rule.momentum == 0

    @functools.cached_property
    def step_size(self) -> float:
        """The time that a step takes on its flow."""
        return self.learning_rate if self.rule is None else self.rule.step_size

    @functools.cached_property
    def size(self) -> int:
        """The number of parameters, all leaves together."""
        return int(_tree.size(self.params))

    @functools.cached_property
    def dense(self) -> int:
        """The number of steps, from the first on, of which all are saved."""
        return int(min(self.num_steps, self.resolution.numbers // self.size))

    @functools.cached_property
    def real(self) -> Trajectory:
        """The run itself: the first steps one by one, then even ones."""
        steps = np.union1d(_even(self.num_steps, self.resolution.saved), np.arange(self.dense + 1))
        run = descend(
            self.loss,
            self.params,
            self.optimizer,
            self.num_steps,
            step_size=self.step_size,
            args=self.args,
            batches=self.batches,
            save_steps=steps.tolist(),
        )
        return _unless_interrupted(run)

    @functools.cached_property
    def reached(self) -> int:
        """The last step with finite parameters."""
        return int(self.real.steps[-1])

    @functools.cached_property
    def steps(self) -> Int[np.ndarray, " n"]:
        """The steps that are compared."""
        if self.reached == 0:
            raise NoAnswer(f"The run did not take a step. {self.real.message}")
        return _even(self.reached, self.resolution.saved)

    @functools.cached_property
    def path(self) -> Trajectory:
        """The run at the steps that are compared."""
        return self.real.rows(np.searchsorted(np.asarray(self.real.steps), self.steps))

    @functools.cached_property
    def whole_data(self) -> Args:
        """What the loss takes for the whole data. **Raises:** `NoAnswer` if there are minibatches only."""
        if self.batches is not None:
            try:
                jax.eval_shape(self.loss, self.params, self.args)
            except Exception as error:
                raise NoAnswer(
                    "This needs the loss on the whole data, and only minibatches are given: `args` is no data that the "
                    f"loss can take ({type(error).__name__})."
                ) from error
        return self.args

    @functools.cached_property
    def measured(self) -> Int[np.ndarray, " m"]:
        """Which of the saved steps are measured more closely."""
        return _even(len(self.steps) - 1, self.resolution.measured)

    @functools.cached_property
    def sharpness(self) -> Float[np.ndarray, " m"]:
        """The largest Hessian eigenvalue at the measured steps."""
        data, largest = self.whole_data, eqx.filter_jit(sharpness(self.loss))
        return np.asarray([largest(self.at(row), data) for row in self.measured], float)

    @functools.cached_property
    def stability(self) -> Stability:
        r"""$\eta\lambda$ against the optimizer's threshold at the measured steps, on the whole data."""
        products = self.learning_rate * self.sharpness
        if self.rule is not None:
            return Stability(products, np.full(len(products), self.rule.threshold))
        measured = measure_stability(
            self.loss,
            self.params,
            self.optimizer,
            self.steps[self.measured],
            self.whole_data,
            self._options(self.reached),
        )
        return Stability(products, np.full(len(products), np.nan)) if measured is None else measured

    @functools.cached_property
    def largest_product(self) -> float:
        """The largest learning rate times sharpness along the run; 0 where the whole data are not known."""
        try:
            return self.learning_rate * float(np.nanmax(self.sharpness))
        except NoAnswer:
            return 0.0

    def at(self, row: int) -> Params:
        """Return the parameters of the run at one of its saved steps."""
        return jax.tree.map(lambda x: jnp.asarray(x[row]), self.path.params)

    def losses(self, path: Trajectory) -> Float[np.ndarray, " n"]:
        """Return the loss on the whole data along a path."""
        return np.asarray(_losses(self.loss, path.params, self.whole_data), float)

    @functools.cached_property
    def prediction(self) -> PredictedError:
        """Gradient flow and its predicted error. Of gradient descent without momentum only."""
        return predict_error(
            self.gradient_flow,
            self.params,
            self.reached,
            check=False,
            diagnose=False,
            **self._options(self.reached),
        )

    @functools.cached_property
    def gradient_flow(self) -> GradientFlow:
        """The gradient flow with the run's learning rate."""
        return GradientFlow(self.loss, self.learning_rate)

    @functools.cached_property
    def models(self) -> dict[str, Model]:
        """The flows that may describe the run."""
        loss, eta, rule = self.loss, self.learning_rate, self.rule
        if rule is not None and rule.momentum == 0:
            flows = {
                "gradient flow": Model(self.gradient_flow),
                "equation of motion with 1 term": Model(EquationOfMotion(loss, eta, 1), series=True),
            }
            if self.largest_product < 1:
                second = Model(EquationOfMotion(loss, eta, 2), series=True)
                return flows | {"equation of motion with 2 terms": second}
            if self.batches is not None:
                return flows
            # The series has no limit there, and the run bounces with a period of two: every second step is smooth.
            step = optimizer_step(loss, self.optimizer)
            every_second = Model(InterpolatingFlow(step, eta, 3, stride=2))
            return flows | {"interpolating flow of every second step": every_second}
        step = optimizer_step(loss, self.optimizer)
        first = 0 if rule is not None else min(WARM, self.reached // 4)
        interpolating = {
            f"interpolating flow of {points} points": Model(
                InterpolatingFlow(step, self.step_size, points), first
            )
            for points in ((2, 4) if rule is None else (4,))
        }
        if rule is None:
            return interpolating
        return {
            "gradient flow": Model(GradientFlow(loss, rule.step_size)),
            "momentum flow": Model(MomentumFlow(loss, eta, rule.momentum, rule.nesterov)),
            **interpolating,
        }

    @functools.cached_property
    def flows(self) -> dict[str, Trajectory | str]:
        """The run of each model, or why there is none."""
        return {name: self._run(name, model) for name, model in self.models.items()}

    @functools.cached_property
    def comparisons(self) -> dict[str, Comparison]:
        """The run compared with each of its models that ran, one by one: one that stopped early does not cut the others."""
        runs = {name: run for name, run in self.flows.items() if isinstance(run, Trajectory)}
        if not runs:
            reasons = [f"{name}: {why}" for name, why in self.flows.items()]
            raise NoAnswer(" ".join(["No flow describes this run.", *reasons]))
        return {name: compare(self.path, {name: run}) for name, run in runs.items()}

    def _run(self, name: str, model: Model) -> Trajectory | str:
        if model.flow is self.gradient_flow and not self.resolution.ode_error:
            return self.prediction.path  # it was integrated beside its error: no second run
        options = self._options(self.reached)
        try:
            if model.first:
                begin = self._options(model.first)
                options["resume"] = descend(self.loss, self.params, self.optimizer, model.first, **begin)
            run = _warn.quietly(solve)(
                model.flow,
                self.params,
                self.reached,
                estimate_error=self.resolution.ode_error,
                diagnose=not model.series,  # its diagnosis is the sharpness, which is measured along the run
                max_steps=self.resolution.ode_steps * min(self.reached, 1024) + 100,
                **options,
            )
            return _unless_interrupted(run)
        except Exception as error:
            return f"{error}".splitlines()[0]

    def _options(self, last: int) -> Any:
        """Return the options of a run to a step, saved where it is compared."""
        steps = np.union1d(self.steps[self.steps <= last], [last])
        return {"args": self.args, "batches": first_batches(self.batches, last), "save_steps": steps.tolist()}


def _even(last: int, count: int) -> Int[np.ndarray, " n"]:
    """Return about `count` whole numbers from 0 to the last one, evenly spaced."""
    return np.unique(np.linspace(0, last, min(last, count) + 1).round().astype(int))


def _unless_interrupted(run: Trajectory) -> Trajectory:
    """Return the run. **Raises:** `KeyboardInterrupt` if it was interrupted: then the report is."""
    if bool(run.result == RESULTS.interrupted):
        raise KeyboardInterrupt
    return run


@eqx.filter_jit
def _losses(loss: Loss, params: Params, args: Args) -> jax.Array:
    return jax.lax.map(lambda p: loss(p, args), params)


def first_batches(batches: Any, count: int) -> Any:
    """Return the first `count` batches: of a list or an iterator as a list, of stacked arrays as arrays."""
    if batches is None:
        return None
    if isinstance(batches, list | Iterator) or (
        isinstance(batches, Iterable)
        and not isinstance(batches, tuple | Mapping | str | np.ndarray | jax.Array)
    ):
        return list(itertools.islice(batches, count))
    return jax.tree.map(lambda leaf: leaf[:count] if np.ndim(leaf) else leaf, batches)


def make_study(
    loss: Loss,
    params: Params,
    learning_rate: float,
    num_steps: int,
    optimizer: Optimizer,
    args: Args,
    batches: Any,
    resolution: Resolution,
) -> Study:
    """Check the arguments and make the study of them. **Raises:** `ValueError`."""
    rate = float(_check.positive_scalar("learning_rate", learning_rate))
    num_steps = _check.integer("num_steps", num_steps, 1)
    params = _check.params("params", params)
    _check.function("loss", loss)
    made = optimizer if isinstance(optimizer, optax.GradientTransformation) else _make(optimizer, rate)
    batches = first_batches(batches, num_steps)
    data = open_data(args, batches, num_steps, 0, 1)
    _check.loss_is_scalar(loss, params, data.example, data.source)
    return Study(loss, params, rate, num_steps, made, args, batches, resolution)


def _make(optimizer: Any, rate: float) -> optax.GradientTransformation:
    expected = "an optax.GradientTransformation, or a function learning_rate -> one"
    _check.function("optimizer", optimizer, expected, takes=1)
    try:
        made = optimizer(rate)
    except Exception as error:
        raise ValueError(
            f"optimizer: expected {expected}, got a function that raised {type(error).__name__}: {error!s:.200}"
        ) from error
    return _check.kind("optimizer", made, optax.GradientTransformation, expected)
