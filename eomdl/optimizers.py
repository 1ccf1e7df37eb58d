"""Real runs: any optax optimizer, or any step map, step by step."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from eomdl import _check
from eomdl._batches import Batches, batch_at
from eomdl._march import Chunk, march, scan_rows, starting_params
from eomdl._types import Args, Loss, Observable, Params, State
from eomdl.checkpoints import Checkpoints
from eomdl.step_maps import ExtraArgs, StepMap, as_step_map, check_step, gradient_update
from eomdl.trajectory import RESULTS, Trajectory


def descend(
    loss: Loss,
    params: Params,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    *,
    args: Args = None,
    batches: Any | Iterable[Any] = None,
    observe: Mapping[str, Observable] | None = None,
    save_params: bool = True,
    save_steps: int | Sequence[int] = 1,
    step_size: ArrayLike | None = None,
    extra_args: ExtraArgs | None = None,
    progress: bool | diffrax.AbstractProgressMeter = False,
    resume: Trajectory | None = None,
    checkpoints: Checkpoints | None = None,
    throw: bool = False,
) -> Trajectory:
    """Train: `num_steps` steps of an optax optimizer, $\\theta_{k+1} = \\theta_k + u(\\nabla L(\\theta_k))$.

    **Arguments:**

    - `loss`: function `(params, args) -> scalar`.
    - `params`: where to start; a pytree of floating-point arrays.
    - `optimizer`: any `optax.GradientTransformation`. The same object twice compiles once.
    - `num_steps`: number of steps from the beginning of the run.
    - `args`: data, passed to `loss` (unless there are `batches`) and to the observables.
    - `batches`: data for `loss`, a batch a step: a pytree of arrays with leading axis
        `num_steps`, or a list or iterator that yields one batch a step.
    - `observe`: `{name: function (params, args) -> array}`, recorded at every saved step.
        With `batches` the observables still see `args`, the full data set, say; those made by
        `eomdl.on_batch` see the step's own batch.
    - `save_params`: False keeps observables alone; memory is then flat in `num_steps` but
        for them.
    - `save_steps`: an integer n saves steps 0, n, 2n, ... and the last; a sequence saves
        these step numbers. (Reverse-mode `jax.grad` through the run needs n = 1.)
    - `step_size`: time per step, for `Trajectory.times`; nan if not given, since optax
        does not tell an optimizer's learning rate. `compare` works on steps.
    - `extra_args`: as in `eomdl.optimizer_step`, for optimizers whose update needs more
        than the gradient.
    - `progress`: True for a tqdm bar, or a diffrax progress meter.
    - `resume`: a trajectory to go on from, to `num_steps` in all; its rows come first (of a checkpoint,
        which has one row, that row is recorded anew). What is changed in the call makes a branch: the
        learning rate, `batches`, the loss; with `resume.without_state()` another optimizer. (A rate that sits
        in the optimizer's state, as with `optax.inject_hyperparams`, stays the old one.)
        An iterator in `batches` must begin at the first step still to do.
    - `checkpoints`: an `eomdl.Checkpoints`, which writes the whole state to disk on its schedule.
    - `throw`: raise `RuntimeError` where the run fails instead of returning what it has.

    **Returns:** `eomdl.Trajectory`. A run that becomes non-finite, runs out of batches or
    is interrupted (Ctrl-C) returns the part computed, with a `result` and `message` that
    say so.

    **Cost:** one gradient a step, and the observables.

    **Raises:** `ValueError` for a wrong argument.
    """
    num_steps = _check.integer("num_steps", num_steps, 1)
    params = _check.params("params", params)
    _check.optimizer(optimizer)
    source = Batches(batches, num_steps, args, resume)
    observe = _check.observables(observe, params, source.seen_by)
    _check.loss_is_scalar(loss, params, source.example)
    return _run(
        _Descent(loss, optimizer, extra_args),
        params,
        num_steps,
        step_size,
        args,
        source,
        gradients=1,
        observe=observe,
        save_params=save_params,
        save_steps=save_steps,
        progress=progress,
        resume=resume,
        checkpoints=checkpoints,
        throw=throw,
    )


def iterate(
    step_map: StepMap,
    params: Params,
    num_steps: int,
    *,
    args: Args = None,
    batches: Any | Iterable[Any] = None,
    observe: Mapping[str, Observable] | None = None,
    save_params: bool = True,
    save_steps: int | Sequence[int] = 1,
    step_size: ArrayLike | None = None,
    progress: bool | diffrax.AbstractProgressMeter = False,
    resume: Trajectory | None = None,
    checkpoints: Checkpoints | None = None,
    throw: bool = False,
) -> Trajectory:
    """Run any step map, $x_{k+1} = \\Psi(x_k, k)$: `eomdl.descend` for maps of your own.

    **Arguments:** `step_map`, an `eomdl.StepMap` or a function `(state, args, k) -> state` whose state
    is the parameters; the rest as in `eomdl.descend`.

    **Returns:** `eomdl.Trajectory`; its `final` is the state of the map.

    **Cost:** one evaluation of the map a step, and the observables.

    **Raises:** `ValueError` for a wrong argument, and for a map that changes the structure,
    shapes or dtypes of its state.
    """
    num_steps = _check.integer("num_steps", num_steps, 1)
    params = _check.params("params", params)
    step_map = as_step_map(step_map)
    source = Batches(batches, num_steps, args, resume)
    observe = _check.observables(observe, params, source.seen_by)
    check_step(step_map, params, source.example)
    return _run(
        step_map,
        params,
        num_steps,
        step_size,
        args,
        source,
        gradients=None,
        observe=observe,
        save_params=save_params,
        save_steps=save_steps,
        progress=progress,
        resume=resume,
        checkpoints=checkpoints,
        throw=throw,
    )


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


def _run(
    step_map: StepMap,
    params: Params,
    num_steps: int,
    step_size: ArrayLike | None,
    args: Args,
    source: Batches,
    *,
    gradients: int | None,
    **options: Any,
) -> Trajectory:
    def advance(state, start, gaps, batches, offset, every):
        state, rows = _iterate_chunk(step_map, state, start, gaps, batches, offset, args, every)
        counts = {} if gradients is None else {"gradient_evaluations": gradients * jnp.sum(gaps)}
        return Chunk(state, rows, None, RESULTS.successful, {}, counts, {})

    return march(
        advance,
        step_map.init(starting_params(params, options["resume"])),
        num_steps,
        params=params,
        step_size=jnp.nan if step_size is None else _check.positive_scalar("step_size", step_size),
        args=args,
        source=source,
        **options,
    )


@eqx.filter_jit
def _iterate_chunk(
    step_map: StepMap,
    state: State,
    start: ArrayLike,
    gaps: jax.Array,
    batches: Any,
    offset: ArrayLike,
    args: Args,
    every: bool,
) -> tuple[State, Params]:
    """Record, then advance by the gap, for every gap: the final state and the R records."""

    def step(k: jax.Array, state: State) -> State:
        return step_map(state, batch_at(batches, k - offset, args), k.astype(jnp.result_type(float)))

    return scan_rows(step, state, lambda k, state: step_map.params(state), start, gaps, every)
