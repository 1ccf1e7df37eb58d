"""Real runs: any optax optimizer, or any step map, step by step."""

import dataclasses
from typing import Any, ClassVar, Unpack

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from typing_extensions import override

from eomdl import _check, _devices, _processes, _structure, _tree
from eomdl._end import RESULTS, Diagnostic
from eomdl._fingerprint import fingerprint
from eomdl._types import STATIC, Args, Loss, Params, State, record_type
from eomdl.maps.optimizer import ExtraArgs, gradient_update
from eomdl.maps.step_map import StepFunction, StepMap, as_step_map, check_step
from eomdl.observe.curvature import sharpness
from eomdl.runs.chunk import Chunk
from eomdl.runs.data import ChunkData
from eomdl.runs.dynamics import AbstractDynamics, Advanced, first_record, scan_records
from eomdl.runs.ensemble import AbstractMembers, Ensemble, Single, as_members
from eomdl.runs.ensemble_dynamics import MemberMap
from eomdl.runs.options import RunOptions, set_up
from eomdl.runs.run import Run
from eomdl.runs.trajectory import Trajectory


def descend(
    loss: Loss,
    params: Params,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    *,
    step_size: ArrayLike | None = None,
    extra_args: ExtraArgs | None = None,
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
    - `options`: `args`, `batches`, `observe`, `monitors`, `save_params`, `save_steps`, `progress`, `resume`,
        `checkpoints`, `throw`: see `eomdl.runs.RunOptions`.

    **Returns:** `eomdl.Trajectory`. A run that becomes non-finite, runs out of batches or
    is interrupted (Ctrl-C) returns the part computed, with a `result` and `message` that
    say so.

    **Cost:** one gradient per step, the observables, and the monitors.

    **Raises:** `ValueError` for a wrong argument.
    """
    _check.optimizer(optimizer)
    if extra_args is not None:
        _check.function("extra_args", extra_args, "a function (params, args) -> dict")
    run = set_up("descend", params, num_steps, options)
    _check.loss_is_scalar(loss, run.params, run.data.example, run.data.source)
    trajectory = _run(Single(_Descent(loss, optimizer, extra_args)), run, step_size, gradients=1)
    if _tree.is_traced(trajectory.result) or not bool(trajectory.result == RESULTS.nonfinite):
        return trajectory
    return _with_stable_rate(trajectory, loss, run)


def _with_stable_rate(trajectory: Trajectory, loss: Loss, run: Run) -> Trajectory:
    """A run that diverged, with the largest stable rate of gradient descent where it began."""
    try:
        largest = float(sharpness(loss, rtol=0.05)(run.starting_params, run.data.example))
    except Exception:  # a loss without second derivatives, a device without memory: the run is worth more
        return trajectory
    if not largest > 0 or not np.isfinite(largest):
        return trajectory
    meaning = "Gradient descent is stable on a quadratic with that curvature below this rate; adaptive optimizers have another limit."
    rate = Diagnostic(np.array([2 / largest]), limit=0.0, meaning=meaning, is_fault=False)
    end = trajectory.end.with_diagnostics({"2 / sharpness at the start": rate})
    return dataclasses.replace(trajectory, end=end)


def iterate(
    step_map: StepMap | StepFunction | Ensemble,
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

    **Arguments:** `step_map`, an `eomdl.StepMap`, a function `(state, args, k) -> state` whose state
    is the parameters, or an `eomdl.Ensemble` of one of these; `params`, `num_steps` and `step_size` as in `eomdl.descend`; `options`: see
    `eomdl.runs.RunOptions`.

    **Returns:** `eomdl.Trajectory`; its `end.state` is the state of the map.

    **Cost:** one evaluation of the map per step, and the observables.

    **Raises:** `ValueError` for a wrong argument, and for a map that changes the structure,
    shapes or dtypes of its state.
    """
    members = as_members(step_map)
    members = dataclasses.replace(members, member=as_step_map(members.member))
    run = set_up("iterate", params, num_steps, options)
    members.check_params(run.params)
    check_step(members.member, members.first(run.params), members.first_args(run.data.example))
    return _run(members, run, step_size, gradients=0)


class _Descent(StepMap):
    """The optimizer as optax has it: the counters in its state are integers, and k is not used."""

    loss: Loss
    optimizer: optax.GradientTransformation
    extra_args: ExtraArgs | None = None

    @override
    def init(self, params: Params) -> State:
        return params, self.optimizer.init(params)

    @override
    def params(self, state: State) -> Params:
        return state[0]

    @override
    def memory(self, state: State) -> State:
        return state[1]

    @override
    def __call__(self, state: State, args: Args, k: ArrayLike) -> State:
        update = gradient_update(self.loss, self.optimizer, self.extra_args)
        params, optimizer_state = state
        updates, optimizer_state = update(params, optimizer_state, args)
        return optax.apply_updates(params, updates), optimizer_state


@record_type
class StepDynamics(AbstractDynamics):
    """A step map, step by step; `gradients` are counted for each step."""

    # A map comes to the same bits wherever its run is cut, so longer chunks only save time.
    max_records: ClassVar[int] = 1024

    step_map: StepMap
    time_step: Any
    gradients: int = dataclasses.field(metadata=STATIC)

    @property
    @override
    def step_size(self) -> Any:
        return self.time_step

    @override
    def fingerprint(self, params: Params, args: Args) -> str:
        return fingerprint(self.step_map, params, args)

    @override
    def as_member(self) -> "StepDynamics":
        return dataclasses.replace(self, step_map=MemberMap(self.step_map))

    @override
    def advance(self, state: State, chunk: Chunk) -> Advanced:
        start, shardings = state, _devices.shardings(state)
        state, params, steps = _iterate(self.step_map, self.gradients, shardings, state, chunk)
        params = first_record(self.step_map.params(start)) if params is None else params
        counts = {"gradient_evaluations": steps}
        return Advanced(state, params, {}, None, RESULTS.successful, counts)

    @override
    def params(self, state: State, step: int, data: ChunkData) -> Params:
        return self.step_map.params(state)

    @override
    def monitor_state(self, state: State) -> State:
        return self.step_map.memory(state)


def _run(members: AbstractMembers, run: Run, step_size: ArrayLike | None, gradients: int) -> Trajectory:
    time_step = jnp.nan if step_size is None else _check.positive_scalar("step_size", step_size)
    step_map: StepMap = members.member
    state = members.start(step_map.init, run.start)(run.starting_params)
    if run.begin is not None and run.begin.state is not None:
        hint = "another optimizer begins afresh with `resume.without_state()`"
        state = _structure.restore("resume.end.state", run.begin.state, state, hint)
        is_here = not _tree.is_traced(state, run.starting_params) and not _processes.is_distributed()
        if isinstance(members, Single) and is_here:
            _require_params(step_map.params(state), run.starting_params)
    return run.run(members.vectorize(StepDynamics(step_map, time_step, gradients)), state)


def _require_params(in_state: Params, params: Params) -> None:
    """Raise where an end was given other parameters by hand: a run goes on from those in its state."""
    for a, b in zip(jax.tree.leaves(in_state), jax.tree.leaves(params), strict=True):
        # To rounding: a step map may compute its parameters from the state.
        rounding = 1e3 * float(jnp.finfo(a.dtype).eps)
        if not bool(jnp.allclose(a, b, rtol=rounding, atol=0, equal_nan=True)):
            raise ValueError(
                "resume.end.params: expected the parameters in resume.end.state, got others; change them in the state, or begin "
                "there with a new state by `resume.without_state()`"
            )


@eqx.filter_jit
def _iterate(
    step_map: StepMap, gradients: int, shardings: Any, state: State, chunk: Chunk
) -> tuple[State, Params | None, jax.Array]:
    """The state at the end, the parameters of every record (None for the start only), the number of gradients."""

    def step(k: jax.Array, state: State) -> State:
        new = step_map(state, chunk.data.at(k), k.astype(jnp.result_type(float)))
        return _devices.with_shardings(new, shardings)

    def read(k: jax.Array, state: State) -> Params | None:
        return None if chunk.has_one_record else step_map.params(state)

    state, params = scan_records(step, state, read, chunk)
    return state, params, gradients * jnp.sum(chunk.steps_between)
