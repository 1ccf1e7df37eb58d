"""Real runs: any optax optimizer, step by step."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from eomdl import _check
from eomdl._march import Batches, Chunk, batch_at, march, scan_rows
from eomdl._types import Args, Loss, Observable, Params, State
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
    progress: bool | diffrax.AbstractProgressMeter = False,
    resume: Trajectory | None = None,
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
        With `batches` the observables still see `args`: the full data set, say.
    - `save_params`: False keeps observables alone; memory is then flat in `num_steps` but
        for them.
    - `save_steps`: an integer n saves steps 0, n, 2n, ... and the last; a sequence saves
        these step numbers. (Reverse-mode `jax.grad` through the run needs n = 1.)
    - `step_size`: time per step, for `Trajectory.times`; nan if not given, since optax
        does not tell an optimizer's learning rate. `compare` works on steps.
    - `progress`: True for a tqdm bar, or a diffrax progress meter.
    - `resume`: a trajectory to go on from, to `num_steps` in all; its rows come first.
        An iterator in `batches` must then begin at the first step still to do.
    - `throw`: raise `RuntimeError` where the run fails instead of returning what it has.

    **Returns:** `eomdl.Trajectory`. A run that becomes non-finite, runs out of batches or
    is interrupted (Ctrl-C) returns the part computed, with a `result` and `message` that
    say so.

    **Cost:** one gradient a step, and the observables.

    **Raises:** `ValueError` for a wrong argument.
    """
    num_steps = _check.integer("num_steps", num_steps, 1)
    params = _check.params("params", params)
    if not (callable(getattr(optimizer, "init", None)) and callable(getattr(optimizer, "update", None))):
        raise ValueError(f"optimizer: expected an optax.GradientTransformation, got {optimizer!r}")
    observe = _check.observables(observe, params, args)
    source = Batches(batches, num_steps, args, resume)
    _check.loss_is_scalar(loss, params, source.example)
    state = (params, optimizer.init(params))
    time = jnp.nan if step_size is None else _check.positive_scalar("step_size", step_size)

    def advance(state, start, gaps, batches, offset, every):
        state, rows = _descend_chunk(loss, optimizer, state, start, gaps, batches, offset, args, every)
        return Chunk(state, rows, None, RESULTS.successful, {"gradient_evaluations": jnp.sum(gaps)}, {})

    return march(
        advance,
        state,
        num_steps,
        params=params,
        step_size=time,
        save_steps=save_steps,
        observe=observe,
        args=args,
        source=source,
        save_params=save_params,
        progress=progress,
        resume=resume,
        throw=throw,
    )


@eqx.filter_jit
def _descend_chunk(
    loss: Loss,
    optimizer: optax.GradientTransformation,
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
        params, optimizer_state = state
        gradient = jax.grad(loss)(params, batch_at(batches, k - offset, args))
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        return optax.apply_updates(params, updates), optimizer_state

    return scan_rows(step, state, lambda state: state[0], start, gaps, every)
