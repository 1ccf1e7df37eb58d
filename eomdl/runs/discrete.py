"""Real runs: any optax optimizer, or any step map, step by step."""

import dataclasses
from typing import Any, ClassVar, Unpack

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from eomdl import _check, _devices, _structure
from eomdl._end import RESULTS
from eomdl._types import STATIC, Args, Loss, Params, State, record_type
from eomdl.maps.optimizer import ExtraArgs, gradient_update
from eomdl.maps.step_map import StepFunction, StepMap, as_step_map, check_step
from eomdl.observe.telemetry import EdgeTelemetry
from eomdl.runs.data import Window
from eomdl.runs.dynamics import AbstractDynamics, AbstractWatch, Advanced, Span, as_row, scan_rows
from eomdl.runs.identity import identity
from eomdl.runs.options import RunOptions, Setup, set_up
from eomdl.runs.trajectory import Trajectory


def descend(
    loss: Loss,
    params: Params,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    *,
    step_size: ArrayLike | None = None,
    extra_args: ExtraArgs | None = None,
    telemetry: EdgeTelemetry | None = None,
    **options: Unpack[RunOptions],
) -> Trajectory:
    r"""Train: `num_steps` steps of an optax optimizer, $\theta_{k+1} = \theta_k + u(\nabla L(\theta_k))$.

    ```python
    run = eomdl.descend(loss, params, optax.sgd(0.1), 100, args=data, observe={"loss": loss})
    ```

    **Arguments:**

    - `loss`: function `(params, args) -> scalar`.
    - `params`: where to start; a pytree of floating-point arrays.
    - `optimizer`: any `optax.GradientTransformation`. The same object twice compiles once.
    - `num_steps`: number of steps from the beginning of the run.
    - `step_size`: time per step, for `Trajectory.times`; nan if not given, since optax
        does not tell an optimizer's learning rate. `compare` works on steps.
    - `extra_args`: as in `eomdl.optimizer_step`, for optimizers whose update needs more
        than the gradient.
    - `telemetry`: an `eomdl.observe.EdgeTelemetry`, which looks at the steps that are due.
    - `options`: `args`, `batches`, `observe`, `save_params`, `save_steps`, `progress`, `resume`,
        `checkpoints`, `throw`: see `eomdl.runs.RunOptions`.

    **Returns:** `eomdl.Trajectory`. A run that becomes non-finite, runs out of batches or
    is interrupted (Ctrl-C) returns the part computed, with a `result` and `message` that
    say so.

    **Cost:** one gradient a step, the observables, and the looks of the telemetry.

    **Raises:** `ValueError` for a wrong argument.
    """
    _check.optimizer(optimizer)
    if extra_args is not None:
        _check.function("extra_args", extra_args, "a function (params, args) -> dict")
    setup = set_up("descend", params, num_steps, options)
    _check.loss_is_scalar(loss, setup.params, setup.data.example, setup.data.source)
    _check.kind("telemetry", telemetry, EdgeTelemetry | None, "an eomdl.observe.EdgeTelemetry or None")
    return _run(_Descent(loss, optimizer, extra_args), setup, step_size, gradients=1, telemetry=telemetry)


def iterate(
    step_map: StepMap | StepFunction,
    params: Params,
    num_steps: int,
    *,
    step_size: ArrayLike | None = None,
    **options: Unpack[RunOptions],
) -> Trajectory:
    r"""Run any step map, $x_{k+1} = \Psi(x_k, k)$: `eomdl.descend` for maps of your own.

    ```python
    run = eomdl.iterate(lambda w, args, k: 0.9 * w, jnp.ones(3), 100)
    ```

    **Arguments:** `step_map`, an `eomdl.StepMap` or a function `(state, args, k) -> state` whose state
    is the parameters; `params`, `num_steps` and `step_size` as in `eomdl.descend`; `options`: see
    `eomdl.runs.RunOptions`.

    **Returns:** `eomdl.Trajectory`; its `end.state` is the state of the map.

    **Cost:** one evaluation of the map a step, and the observables.

    **Raises:** `ValueError` for a wrong argument, and for a map that changes the structure,
    shapes or dtypes of its state.
    """
    step_map = as_step_map(step_map)
    setup = set_up("iterate", params, num_steps, options)
    check_step(step_map, setup.params, setup.data.example)
    return _run(step_map, setup, step_size, gradients=0)


class _Descent(StepMap):
    """The optimizer as optax has it: the counters in its state are integers, k is not looked at."""

    loss: Loss
    optimizer: optax.GradientTransformation
    extra_args: ExtraArgs | None = None

    def init(self, params: Params) -> State:
        return params, self.optimizer.init(params)

    def params(self, state: State) -> Params:
        return state[0]

    def __call__(self, state: State, args: Args, k: ArrayLike) -> State:
        update = gradient_update(self.loss, self.optimizer, self.extra_args)
        params, optimizer_state = state
        updates, optimizer_state = update(params, optimizer_state, args)
        return optax.apply_updates(params, updates), optimizer_state


@record_type
class _Discrete(AbstractDynamics):
    """A step map, step by step; `gradients` are counted for each step."""

    # A map comes to the same bits wherever its run is cut, so longer stretches only save time.
    max_rows: ClassVar[int] = 1024

    step_map: StepMap
    time_step: Any
    gradients: int = dataclasses.field(metadata=STATIC)

    @property
    def step_size(self) -> Any:
        return self.time_step

    @property
    def identity(self) -> str:
        return identity(self.step_map)

    def advance(self, state: State, span: Span, window: Window) -> Advanced:
        start, layout = state, _devices.layout(state)
        state, rows, steps = _iterate(self.step_map, self.gradients, layout, state, span, window)
        rows = as_row(self.step_map.params(start)) if rows is None else rows
        counts = {"gradient_evaluations": steps}
        return Advanced(state, rows, {}, None, RESULTS.successful, counts)

    def params(self, state: State, step: int, window: Window) -> Params:
        return self.step_map.params(state)


class _Watch(AbstractWatch):
    """Telemetry of a descent, whose state is the parameters and the optimizer's state."""

    def __init__(self, telemetry: EdgeTelemetry):
        self._telemetry = telemetry

    def is_due(self, step: int) -> bool:
        return self._telemetry.due(step)

    def look(self, step: int, state: State, window: Window) -> None:
        params, optimizer_state = state
        self._telemetry.look(step, params, optimizer_state, window.at(np.asarray(step)))


def _run(
    step_map: StepMap,
    setup: Setup,
    step_size: ArrayLike | None,
    gradients: int,
    telemetry: EdgeTelemetry | None = None,
) -> Trajectory:
    time_step = jnp.nan if step_size is None else _check.positive_scalar("step_size", step_size)
    state = step_map.init(setup.starting_params)
    if setup.begin is not None and setup.begin.state is not None:
        hint = "another optimizer begins anew with `resume.without_state()`"
        state = _structure.restore("resume.end.state", setup.begin.state, state, hint)
    watch = None if telemetry is None else _Watch(telemetry)
    return setup.run(_Discrete(step_map, time_step, gradients), state, watch=watch)


@eqx.filter_jit
def _iterate(
    step_map: StepMap, gradients: int, layout: Any, state: State, span: Span, window: Window
) -> tuple[State, Params | None, jax.Array]:
    """The state at the end, the parameters of every row (None for the start only), the number of gradients."""

    def step(k: jax.Array, state: State) -> State:
        new = step_map(state, window.at(k), k.astype(jnp.result_type(float)))
        return _devices.laid_out(new, layout)

    def read(k: jax.Array, state: State) -> Params | None:
        return None if span.is_one_row else step_map.params(state)

    state, rows = scan_rows(step, state, read, span)
    return state, rows, gradients * jnp.sum(span.gaps)
