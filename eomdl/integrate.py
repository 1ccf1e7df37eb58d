"""Integrate a flow: the only file that calls diffrax's solver."""

import dataclasses
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eomdl import _check, _tree
from eomdl._batches import Batches, batch_at, batch_of
from eomdl._march import Chunk, march, scan_rows, starting_params
from eomdl._tolerances import default_tolerances, distance_of, measured_tolerances, units as state_units
from eomdl._types import Args, Observable, Params, State, StateObservable
from eomdl.checkpoints import CHECKPOINT, Checkpoints
from eomdl.flows.base import AbstractFlow
from eomdl.trajectory import RESULTS, Trajectory, result_where


_LOOSER = 10.0  # the tolerances of the second run, whose distance estimates the ODE error


def solve(
    flow: AbstractFlow,
    params: Params,
    num_steps: int,
    *,
    args: Args = None,
    batches: Any | Iterable[Any] = None,
    observe: Mapping[str, Observable] | None = None,
    observe_state: Mapping[str, StateObservable] | None = None,
    save_params: bool = True,
    save_steps: int | Sequence[int] = 1,
    rtol: float | None = None,
    atol: float | None = None,
    solver: diffrax.AbstractSolver | None = None,
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
    dt0: float = 1.0,
    max_steps: int = 16384,
    estimate_error: bool = True,
    progress: bool | diffrax.AbstractProgressMeter = False,
    resume: Trajectory | None = None,
    checkpoints: Checkpoints | None = None,
    throw: bool = False,
) -> Trajectory:
    """Integrate $\\dot x = F(t, x)$ from $t = 0$ to `num_steps` * step_size.

    The clock inside is in steps, $dx/ds = h F$, so the learning rate may be traced.

    **Arguments:** `params`, `num_steps`, `args`, `batches`, `observe`, `save_params`,
    `save_steps`, `checkpoints`, `progress` and `throw` as in `eomdl.descend`. With `batches`
    the flow follows the equation of motion of step k's own batch for the time of that step.

    - `flow`: an `eomdl.AbstractFlow`. One of stride m passes through every m-th iterate; at
        the steps between, the rows are those iterates moved on by the map itself.
    - `observe_state`: `{name: function (t, state, args) -> array}`, functions of the flow's
        whole state recorded at every saved step, such as `flow.last_difference`.
    - `resume`: a trajectory to go on from: one of this flow, or a real run (`descend`,
        `iterate`), at whose end the flow then begins, with the optimizer's state where the
        flow carries it. The rows of that run come first, with an ODE error of 0.
    - `rtol`, `atol`: tolerances of one ODE step (root mean square over the state; the state
        of an optimizer counts by the relative change it makes in a step of the parameters).
        By default they are measured: 1/2000 of the flow's own one-step error at the
        start, so that the error of the ODE solver stays under about 1 % of the error of
        the model, and no digit is paid for that the model does not have.
    - `solver`: default `diffrax.Tsit5()`. `stepsize_controller`: default
        `diffrax.PIDController(rtol, atol)`; if given, `rtol` and `atol` are not used and
        no error is estimated. `dt0`: the first ODE step tried, in steps of the optimizer (with
        `diffrax.ConstantStepSize()` every one of them). `adjoint`: default `diffrax.RecursiveCheckpointAdjoint()`.
    - `max_steps`: limit on ODE steps in one stretch, which is at most 1024 steps of the
        optimizer (one step with `batches`).
    - `estimate_error`: integrate a second time with ten times the tolerances; the distance
        of the two runs is `Trajectory.ode_error`. It is the error of the looser run, so
        the run returned is several times closer than that. Costs about 75 % more
        (three times as much with `batches`, where every step is an ODE problem of its own).

    **Returns:** `eomdl.Trajectory`; `stats` holds the ODE steps taken and rejected by both
    runs together, the tolerances, and the flow's diagnostics along the path (such as
    `eta_lambda_max`, at the start and at the end of every stretch). If the solver hits
    `max_steps` or the state becomes non-finite, the part computed is returned with a `result`
    and `message` that say so.
    Under `jit`, `vmap` or `grad` values are not known, so there `rtol` and `atol` default
    to 1e-7 (float32: 1e-5) and there is no error estimate and no diagnosis.

    **Cost:** 6 evaluations of the flow an ODE step with Tsit5; ODE steps span several
    steps of the optimizer where the path is smooth. With `batches` at least one ODE
    step a step.

    **Raises:** `ValueError` for a wrong argument. **Warns** where the floating-point
    precision is too coarse to resolve the order asked for.
    """
    if not isinstance(flow, AbstractFlow):
        raise ValueError(f"flow: expected an eomdl.AbstractFlow, got {type(flow).__name__}")
    num_steps = _check.integer("num_steps", num_steps, 1)
    max_steps = _check.integer("max_steps", max_steps, 1)
    params = _check.params("params", params)
    source = Batches(batches, num_steps, args, resume, flow.stride)
    observe = _check.observables(observe, params, source.seen_by)
    flow.validate(params, source.example)
    state = flow.init(starting_params(params, resume), source.example)
    observe_state = _check.state_observables(observe_state, state, source.example)
    dtype = _tree.dtype(state)
    traced = _tree.is_traced(flow, state, args, source.example)
    solver = diffrax.Tsit5() if solver is None else solver
    adjoint = diffrax.RecursiveCheckpointAdjoint() if adjoint is None else adjoint
    estimate_error = estimate_error and not traced and stepsize_controller is None
    copies = 2 if estimate_error else 1
    if resume is not None:
        resume = _taken_over(resume, (state,) * copies, flow.step_size, flow.stride)

    first = _check.positive_scalar("dt0", dt0)
    flow_number = None if traced else _fingerprint(flow)
    if resume is not None and resume.stats.get("flow") == flow_number:
        # A run goes on with the tolerances it has; another flow has others.
        rtol = resume.stats.get("rtol") if rtol is None else rtol
        atol = resume.stats.get("atol") if atol is None else atol
    given = [
        None if tol is None else _check.positive_scalar(name, tol)
        for name, tol in (("rtol", rtol), ("atol", atol))
    ]
    default = default_tolerances(params) if traced else None
    used: list[Any] = [None, None]
    units = None

    def integrate(controller: Any, dt0: jax.Array, *chunk: Any) -> Any:
        settings = (solver, controller, adjoint, max_steps, dt0)
        return _integrate(flow, settings, units, observe_state, args, *chunk)

    def advance(state, start, gaps, batches, offset, every):
        nonlocal default, units
        every = every and batches is not None  # else it changes nothing but the compiled program's key
        here = start - start % flow.stride
        data = batch_at(batches, here - offset, args, flow.stride)
        if units is None and not traced:
            units = state_units(flow, here * flow.step_size, state[0], data)
        if stepsize_controller is not None:
            controllers = [stepsize_controller]
        else:
            if default is None and None in given:
                one_stride = jnp.zeros_like(gaps).at[0].set(flow.stride)
                default = measured_tolerances(
                    flow,
                    here * flow.step_size,
                    state[0],
                    data,
                    lambda c: integrate(c, first, state[0], here, one_stride, batches, offset, every),
                )
            used[:] = [d if g is None else g for g, d in zip(given, default or given, strict=True)]
            rtol, atol = used
            controllers = [
                diffrax.PIDController(jnp.asarray(c * rtol, dtype), jnp.asarray(c * atol, dtype))
                for c in ((1.0, _LOOSER) if estimate_error else (1.0,))
            ]
        runs = [
            # Half the first step for the second run: with the same one, what neither run rejects
            # would be the same to the last bit, and no error would show.
            integrate(controller, first if i == 0 else 0.5 * first, x, start, gaps, batches, offset, every)
            for i, (controller, x) in enumerate(zip(controllers, state, strict=True))
        ]
        states, rows, results, counts = zip(*runs, strict=True)
        (params_rows, observed), *looser = rows
        error = _distances(params_rows, looser[0][0]) if estimate_error else None
        points = []
        if not traced:
            end = start + jnp.sum(gaps)
            end = end - end % flow.stride
            last = batch_at(batches, end - flow.stride - offset, args, flow.stride)
            points = [(here, state[0], data)] * int(start == 0) + [(end, states[0], last)]
        return Chunk(
            state=states,
            params=params_rows,
            ode_error=error,
            result=results[0],
            observables=observed,
            counts=jax.tree.map(lambda *n: sum(n), *counts),
            diagnostics=_diagnose(flow, points),
        )

    def stats() -> dict[str, Any]:
        tolerances = {} if stepsize_controller is not None else {"rtol": used[0], "atol": used[1]}
        number = {} if flow_number is None else {"flow": flow_number}
        return {"stride": flow.stride} | number | tolerances

    return march(
        advance,
        (state,) * copies,
        num_steps,
        params=params,
        step_size=flow.step_size,
        save_steps=save_steps,
        observe=observe,
        args=args,
        source=source,
        save_params=save_params,
        progress=progress,
        resume=resume,
        checkpoints=checkpoints,
        throw=throw,
        state_observables=observe_state,
        stats=stats,
    )


def _taken_over(resume: Trajectory, state: tuple, step_size: Any, stride: int) -> Trajectory:
    """`resume`, or, if it is a real run, a run of the flow that ends where the real one does."""
    if "stride" in resume.stats:
        return resume
    if resume.final_step % stride:
        raise ValueError(
            f"resume: expected a real run of a multiple of the flow's stride {stride}, got {resume.final_step} steps"
        )
    # A real run carries (params, optimizer state), maybe with counters: the flow carries what it needs.
    old = _tree.real_leaves(resume.final)
    final = None if resume.final is None else tuple(old[: len(jax.tree.leaves(one))] for one in state)
    steps = np.asarray(resume.steps)
    error = np.zeros(len(steps)) if len(state) > 1 else None
    stats = {CHECKPOINT: resume.stats[CHECKPOINT]} if CHECKPOINT in resume.stats else {}
    return dataclasses.replace(
        resume, times=steps * np.asarray(step_size), ode_error=error, stats=stats, final=final
    )


def _fingerprint(flow: AbstractFlow) -> int:
    """A number that another flow, or another learning rate, has not: not of a loss, whose name alone counts."""
    leaves, structure = jax.tree.flatten(flow)
    parts = [
        np.asarray(x).tobytes() if eqx.is_array_like(x) else getattr(x, "__qualname__", "").encode()
        for x in leaves
    ]
    return zlib.crc32(b"|".join([str(structure).encode(), *parts]))


@eqx.filter_jit
def _integrate(
    flow: AbstractFlow,
    settings: tuple,
    units: State | None,
    observe_state: dict[str, StateObservable],
    args: Args,
    state: State,
    start: Any,
    gaps: jax.Array,
    batches: Any,
    offset: Any,
    every: bool,
) -> tuple[State, tuple, Any, dict[str, jax.Array]]:
    """Record, then integrate over the gap, for every gap: final state, R records, result.

    A flow of stride m is carried from one multiple of m to the next: `state` is that at
    the last multiple of m up to `start`.
    """
    solver, controller, adjoint, max_steps, dt0 = settings
    time = _tree.dtype(state)
    h, m = flow.step_size, flow.stride
    base = start - start % m

    def field(s: Any, y: State, args: Args) -> State:
        velocity = flow((base + s) * h, _out_of(units, y), args)
        return _tree.scale(h, _into(units, velocity))

    def segment(x: State, s0: Any, s1: Any, args: Args, **saveat: Any) -> diffrax.Solution:
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            solver,
            jnp.asarray(s0, time),
            jnp.asarray(s1, time),
            dt0.astype(time),
            _into(units, x),
            args,
            saveat=diffrax.SaveAt(**saveat),
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=max_steps,
            throw=False,
        )

    def record(k: Any, x: State, args: Args) -> tuple[Params, dict[str, jax.Array]]:
        """The prediction of iterate k from the state at the multiple of m before it."""
        for n in range(m - 1):
            t, batch = (k - k % m + n) * h, batch_of(args, n)
            # By cond, so that steps not taken cost nothing.
            x = jax.lax.cond(n < k % m, lambda x, t=t, b=batch: flow.step(t, x, b), lambda x: x, x)
        return flow.params(x), {name: f(k * h, x, args) for name, f in observe_state.items()}

    records: Any
    if batches is None:
        steps = start + jnp.cumsum(gaps) - gaps
        end = start + jnp.sum(gaps)
        ts = (steps - steps % m - base).astype(time)
        plain = m == 1 and not observe_state

        def save(s: Any, y: State, args: Args) -> Any:
            return flow.params(_out_of(units, y)) if plain else y

        rows = diffrax.SubSaveAt(ts=ts, fn=save)
        sol = segment(state, 0, end - end % m - base, args, subs=(rows, diffrax.SubSaveAt(t1=True)))
        rows, last = cast(tuple, sol.ys)
        if plain:
            records = (rows, {})
        else:
            records = jax.lax.map(lambda row: record(row[0], _out_of(units, row[1]), args), (steps, rows))
        return _out_of(units, jax.tree.map(lambda x: x[0], last)), records, _result(sol), _counts(sol)

    def batch(k: jax.Array) -> Args:
        """The data of the stride that step k is in."""
        return batch_at(batches, k - k % m - offset, args, m)

    def step(k: jax.Array, carry: tuple) -> tuple:
        x, result, counts = carry
        sol = segment(x, k - k % m - base, k - k % m - base + m, batch(k), t1=True)
        # Once failed, non-finite from there on: the rows after it must not pass for a path.
        failed = sol.result != diffrax.RESULTS.successful
        new = _out_of(units, jax.tree.map(lambda leaf: leaf[0], sol.ys))
        x = jax.tree.map(lambda leaf: jnp.where(failed, jnp.nan, leaf), new)
        result = result_where(result == RESULTS.successful, _result(sol), result)
        return x, result, jax.tree.map(jnp.add, counts, _counts(sol))

    def stride(k: jax.Array, carry: tuple) -> tuple:
        return step(k, carry) if m == 1 else jax.lax.cond(k % m == m - 1, step, lambda k, c: c, k, carry)

    zero = jnp.zeros((), jnp.asarray(0).dtype)
    carry = (state, jax.tree.map(jnp.asarray, RESULTS.successful), dict.fromkeys(_COUNTS, zero))
    (state, result, counts), records = scan_rows(
        stride, carry, lambda k, c: record(k, c[0], batch(k)), start, gaps, every
    )
    return state, records, result, counts


def _into(units: State | None, x: State) -> State:
    return x if units is None else jax.tree.map(jnp.multiply, units, x)


def _out_of(units: State | None, y: State) -> State:
    return y if units is None else jax.tree.map(jnp.divide, y, units)


_COUNTS = ("num_steps", "num_accepted_steps", "num_rejected_steps")


def _counts(sol: diffrax.Solution) -> dict[str, jax.Array]:
    return {name: jnp.asarray(sol.stats[name], jnp.asarray(0).dtype) for name in _COUNTS}


def _result(sol: diffrax.Solution) -> Any:
    ok = sol.result == diffrax.RESULTS.successful
    return result_where(ok, RESULTS.successful, RESULTS.max_steps_reached)


@eqx.filter_jit
def _diagnose_at(flow: AbstractFlow, step: Any, state: State, args: Args) -> dict[str, jax.Array]:
    return flow.diagnostics(step * flow.step_size, state, args)


def _diagnose(flow: AbstractFlow, points: list[tuple[Any, State, Args]]) -> dict[str, Any]:
    values = [_diagnose_at(flow, jnp.asarray(step), state, args) for step, state, args in points]
    return jax.tree.map(lambda *v: np.stack(v), *values) if values else {}


_distances = eqx.filter_vmap(distance_of)
