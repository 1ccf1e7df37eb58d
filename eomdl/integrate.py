"""Integrate a flow: the only file that calls diffrax's solver."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eomdl import _check, _tree
from eomdl._march import Batches, Chunk, batch_at, march, scan_rows
from eomdl._types import Args, Observable, Params, State
from eomdl.flows.base import AbstractFlow
from eomdl.trajectory import RESULTS, Trajectory, result_where


_LOOSER = 10.0  # the tolerances of the second run, whose distance estimates the ODE error
_FRACTION = 5e-4  # of the flow's one-step error: the ODE error allowed in one ODE step


def solve(
    flow: AbstractFlow,
    params: Params,
    num_steps: int,
    *,
    args: Args = None,
    batches: Any | Iterable[Any] = None,
    observe: Mapping[str, Observable] | None = None,
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
    throw: bool = False,
) -> Trajectory:
    """Integrate $\\dot x = F(t, x)$ from $t = 0$ to `num_steps` * step_size.

    The clock inside is in steps, $dx/ds = h F$, so the learning rate may be traced.

    **Arguments:** `params`, `num_steps`, `args`, `batches`, `observe`, `save_params`,
    `save_steps`, `progress`, `resume` and `throw` as in `eomdl.descend`. With `batches`
    the flow follows the equation of motion of step k's own batch for the time of that step.

    - `flow`: an `eomdl.AbstractFlow`.
    - `rtol`, `atol`: tolerances of one ODE step (root mean square over the parameters).
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
    observe = _check.observables(observe, params, args)
    source = Batches(batches, num_steps, args, resume)
    flow.validate(params, source.example)
    state = flow.init(params, source.example)
    dtype = _tree.dtype(state)
    traced = _tree.is_traced(flow, state, args, source.example)
    solver = diffrax.Tsit5() if solver is None else solver
    adjoint = diffrax.RecursiveCheckpointAdjoint() if adjoint is None else adjoint
    estimate_error = estimate_error and not traced and stepsize_controller is None

    first = _check.positive_scalar("dt0", dt0)

    def integrate(controller: Any, dt0: jax.Array, *chunk: Any) -> Any:
        return _integrate(flow, solver, controller, adjoint, max_steps, dt0, args, *chunk)

    default = _default_tolerances(params) if traced else None
    given = [
        None if tol is None else _check.positive_scalar(name, tol)
        for name, tol in (("rtol", rtol), ("atol", atol))
    ]
    used: list[Any] = [None, None]

    def advance(state, start, gaps, batches, offset, every):
        nonlocal default
        every = every and batches is not None  # else it changes nothing but the compiled program's key
        if stepsize_controller is not None:
            controllers = [stepsize_controller]
        else:
            if default is None and None in given:
                rest = (start, jnp.zeros_like(gaps).at[0].set(1), batches, offset, every)
                default = _measured_tolerances(
                    flow, state[0], source.example, lambda c: integrate(c, first, state[0], *rest)
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
        error = _distances(*rows) if estimate_error else None
        points = []
        if not traced:
            last = batch_at(batches, start - offset + jnp.sum(gaps) - 1, args)
            points = [(state[0], source.example)] * int(start == 0) + [(states[0], last)]
        return Chunk(
            state=states,
            params=rows[0],
            ode_error=error,
            result=results[0],
            counts=jax.tree.map(lambda *n: sum(n), *counts),
            diagnostics=_diagnose(flow, points),
        )

    trajectory = march(
        advance,
        (state, state) if estimate_error else (state,),
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
        throw=throw,
    )
    stats = dict(trajectory.stats)
    if stepsize_controller is None:
        stats |= {"rtol": used[0], "atol": used[1]}
    return eqx.tree_at(lambda t: t.stats, trajectory, stats, is_leaf=lambda x: x is trajectory.stats)


def _default_tolerances(params: Params) -> tuple[float, float]:
    tol = 1e-7 if _tree.dtype(params) == jnp.float64 else 1e-5
    return tol, tol


def _measured_tolerances(
    flow: AbstractFlow, state: State, args: Args, one_step: Callable[[Any], Any]
) -> tuple[float, float]:
    """Tolerances from the flow's defect: its distance after one step to the discrete step.

    The tolerance is lowered until the defect stands clear of the error of the ODE solver,
    so it costs a few ODE steps; `one_step(controller)` integrates over one step.
    """
    target = flow.step(state, args)
    if target is None:
        return _default_tolerances(state)
    dtype = _tree.dtype(state)
    eps = float(jnp.finfo(dtype).eps)
    root = np.sqrt(_tree.size(state))
    noise = eps * float(_tree.norm(state))  # of the discrete step itself, which rounds x
    floor = max(noise / root, float(jnp.finfo(dtype).tiny))
    rtol = 4 * eps
    tol = max(1e-2 * float(_distance_of(target, state)) / root, floor)
    while True:
        controller = diffrax.PIDController(jnp.asarray(rtol, dtype), jnp.asarray(tol, dtype))
        defect = float(_distance_of(one_step(controller)[0], target))
        if not np.isfinite(defect):
            return _default_tolerances(state)
        if defect / root > 20 * tol or tol == floor:
            break
        tol = max(tol / 100, floor)
    if dtype != jnp.float64 and defect <= noise:
        warnings.warn(
            f"{dtype} cannot carry this order here: the one-step error of {type(flow).__name__} is "
            f"{defect:.1e}, and the rounding noise of one step is {noise:.1e} (Euclidean norms). Use "
            "float64 (jax.config.update('jax_enable_x64', True)) or a lower order.",
            stacklevel=5,
        )
    return rtol, max(_FRACTION * defect / root, floor)


@eqx.filter_jit
def _integrate(
    flow: AbstractFlow,
    solver: diffrax.AbstractSolver,
    controller: diffrax.AbstractStepSizeController,
    adjoint: diffrax.AbstractAdjoint,
    max_steps: int,
    dt0: jax.Array,
    args: Args,
    state: State,
    start: Any,
    gaps: jax.Array,
    batches: Any,
    offset: Any,
    every: bool,
) -> tuple[State, Params, Any, dict[str, jax.Array]]:
    """Record, then integrate over the gap, for every gap: final state, R records, result."""
    time = _tree.dtype(state)
    h = flow.step_size

    def field(s: Any, x: State, args: Args) -> State:
        return _tree.scale(h, flow((start + s) * h, x, args))

    def segment(x: State, s0: Any, s1: Any, args: Args, **saveat: Any) -> diffrax.Solution:
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            solver,
            jnp.asarray(s0, time),
            jnp.asarray(s1, time),
            dt0.astype(time),
            x,
            args,
            saveat=diffrax.SaveAt(**saveat),
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=max_steps,
            throw=False,
        )

    if batches is None:
        ends = jnp.cumsum(gaps).astype(time)
        begins = ends - gaps.astype(time)
        rows = diffrax.SubSaveAt(ts=begins, fn=lambda s, x, args: flow.params(x))
        sol = segment(state, 0, ends[-1], args, subs=(rows, diffrax.SubSaveAt(t1=True)))
        rows, last = cast(tuple, sol.ys)
        return jax.tree.map(lambda x: x[0], last), rows, _result(sol), _counts(sol)

    def step(k: jax.Array, carry: tuple) -> tuple:
        x, result, counts = carry
        sol = segment(x, k - start, k - start + 1, batch_at(batches, k - offset, args), t1=True)
        # Once failed, non-finite from there on: the rows after it must not pass for a path.
        failed = sol.result != diffrax.RESULTS.successful
        x = jax.tree.map(lambda new: jnp.where(failed, jnp.nan, new[0]), sol.ys)
        result = result_where(result == RESULTS.successful, _result(sol), result)
        return x, result, jax.tree.map(jnp.add, counts, _counts(sol))

    zero = jnp.zeros((), jnp.asarray(0).dtype)
    carry = (state, jax.tree.map(jnp.asarray, RESULTS.successful), dict.fromkeys(_COUNTS, zero))
    (state, result, counts), rows = scan_rows(step, carry, lambda c: flow.params(c[0]), start, gaps, every)
    return state, rows, result, counts


_COUNTS = ("num_steps", "num_accepted_steps", "num_rejected_steps")


def _counts(sol: diffrax.Solution) -> dict[str, jax.Array]:
    return {name: jnp.asarray(sol.stats[name], jnp.asarray(0).dtype) for name in _COUNTS}


def _result(sol: diffrax.Solution) -> Any:
    ok = sol.result == diffrax.RESULTS.successful
    return result_where(ok, RESULTS.successful, RESULTS.max_steps_reached)


@eqx.filter_jit
def _diagnose_at(flow: AbstractFlow, state: State, args: Args) -> dict[str, jax.Array]:
    return flow.diagnostics(state, args)


def _diagnose(flow: AbstractFlow, points: list[tuple[State, Args]]) -> dict[str, Any]:
    values = [_diagnose_at(flow, state, args) for state, args in points]
    return jax.tree.map(lambda *v: np.stack(v), *values) if values else {}


@eqx.filter_jit
def _distance_of(a: Params, b: Params) -> jax.Array:
    return _tree.norm(_tree.sub(a, b))


_distances = eqx.filter_vmap(_distance_of)
