"""Integrate a flow on the clock of its discrete optimizer."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Unpack

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from eomdl import _check, _devices, _structure, _tree, _warn
from eomdl._end import RESULTS, Stats, real_part, succeeded
from eomdl._fingerprint import fingerprint
from eomdl._types import Args, Params, State, StateObservable
from eomdl.flows.base import AbstractFlow, as_ode
from eomdl.runs.ensemble import AbstractMembers, Ensemble, as_members
from eomdl.runs.ensemble_dynamics import EnsembleState
from eomdl.runs.integrator import (
    OdeProblem,
)
from eomdl.runs.ode import FlowState, OdeRequest
from eomdl.runs.options import RunOptions, set_up
from eomdl.runs.run import Run
from eomdl.runs.tolerances import jump_where_stopped
from eomdl.runs.trajectory import Trajectory
from eomdl.runs.warmup import warm_up


_MODEL = "an eomdl.AbstractFlow or an eomdl.Ensemble of one"
MAX_FLAT_SIZE = 2**20  # numbers in a state up to which it is integrated as one vector


@_warn.of_faults
def solve(
    flow: AbstractFlow | Ensemble,
    params: Params,
    num_steps: int,
    *,
    observe_state: Mapping[str, StateObservable] | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    solver: diffrax.AbstractSolver | None = None,
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
    dt0: ArrayLike | None = None,
    max_steps: int = 16384,
    estimate_error: bool = True,
    diagnose: bool = True,
    warmup: int | None = None,
    **options: Unpack[RunOptions],
) -> Trajectory:
    r"""Integrate $\dot x = F(t, x)$ from $t = 0$ to `num_steps` * step_size.

    The clock inside is in steps, $dx/ds = h F$, so the learning rate may be traced.

    ```python
    path = eomdl.solve(eomdl.EquationOfMotion(loss, 0.1, order=1), params, 100, args=data)
    ```

    **Arguments:** `params` and `num_steps` as in `eomdl.descend`; `options`: `args`, `batches`, `observe`, `monitors`,
    `save_params`, `save_steps`, `progress`, `resume`, `checkpoints`, `throw`: see `eomdl.runs.RunOptions`. With
    `batches` the flow follows the equation of motion of step k's own batch for the time of that step.

    - `flow`: an `eomdl.AbstractFlow`, or an `eomdl.Ensemble` of one. A flow of stride m passes through every m-th iterate;
        the saved steps between are those iterates moved on by the map itself.
    - `observe_state`: `{name: function (t, state, args) -> array or pytree of arrays}`, functions of the flow's
        whole state recorded at every saved step, such as `flow.last_difference`.
    - `resume`: one of this flow's runs, or a real run (`descend`, `iterate`), at whose end the flow then
        begins, with the optimizer's state where the flow carries it. The saved steps of a real run have an ODE error of 0.
    - `rtol`, `atol`: tolerances of one ODE step (root mean square over the state; the state
        of an optimizer counts by the relative change it makes in a step of the parameters).
        By default they are measured: 1/2000 of the flow's own one-step error at the
        start, so that the error of the ODE solver stays under about 1 % of the error of
        the model. Fewer digits would hide the model's error, and more would cost time for nothing. A run of the same flow
        continues with the tolerances that it has.
    - `solver`: default `diffrax.Tsit5()`. `stepsize_controller`: default
        `diffrax.PIDController(rtol, atol)`; if given, `rtol` and `atol` are not used and
        no error is estimated. `dt0`: the first ODE step tried, in steps of the optimizer, by default 1, at most half of
        the way (with `diffrax.ConstantStepSize()` every one of them, as it is). Where none of these nor `rtol` or `atol`
        is given, a flow's `recommended_solver` takes their place: for `eomdl.flows.RodFlow` and `EdgeFlow` Euler with
        constant steps.
    - `adjoint`: default `diffrax.RecursiveCheckpointAdjoint()`.
    - `max_steps`: limit on ODE steps in one chunk, which is at most 1024 steps of the
        optimizer (one step with `batches`).
    - `estimate_error`: integrate a second time with 16 times the tolerances and twice the first and the longest step
        (half of the way there is, in the run itself); the distance
        of the two runs is `Trajectory.ode_error`. It is the error of the second run: an upper estimate, about ten
        times the error of the run returned or more, except at single steps where the difference changes its sign.
        Costs about 75 % more.
    - `diagnose`: measure the flow's diagnostics at the start, every 64 to 1024 steps, and at the end. For
        `eomdl.EquationOfMotion` a measurement takes 2 to 11 Hessian-vector products; its `eta*lambda_max` is a lower bound.

    - `warmup`: how many real steps of the optimizer come first, with an ODE error of 0. From an empty memory the steps of Adam
        and of what else is scaled by its memory follow no smooth path. By default a flow that asks for it takes as many as its
        `warmup` says, at most half of the run, where the optimizer begins with such a memory; the notes say so. 0 begins at once.
        With `observe_state` those steps are not saved.

    **Returns:** `eomdl.Trajectory`; `stats` holds the ODE steps taken and rejected by both
    runs together, the tolerances, and the flow's diagnostics along the path (such as
    `eta*lambda_max`); `notes` says which of them left their limits, and a warning too. If the solver reaches
    `max_steps` or the state becomes non-finite, the part computed is returned with a `result`
    and `message` that say so.
    Under `jit`, `vmap` or `grad` values are not known, so there `rtol` and `atol` default
    to 1e-7 (float32: 1e-5), and there are no error estimate and no diagnostics.

    **Cost:** 6 evaluations of the flow per ODE step with Tsit5; ODE steps span several
    steps of the optimizer where the path is smooth. With `batches` at least one ODE step per step.

    **Raises:** `ValueError` for a wrong argument. **Warns** where the floating-point
    precision is too coarse to resolve the order asked for, and where the flow leaves what it is valid for.
    """
    members = as_members(flow)
    model = as_ode(members.member, _MODEL)
    max_steps = _check.integer("max_steps", max_steps, 1)
    estimate_error = _check.flag("estimate_error", estimate_error)
    diagnose = _check.flag("diagnose", diagnose)
    solver, stepsize_controller, dt0 = _solver_options(
        model, (solver, stepsize_controller, dt0), (rtol, atol)
    )
    adjoint = _check_adjoint(diffrax.RecursiveCheckpointAdjoint() if adjoint is None else adjoint)
    run = set_up("solve", params, num_steps, options, model.stride)
    members.check_params(run.params)
    example = members.first_args(run.data.example)
    keep_saved = not isinstance(observe_state, Mapping) or not observe_state
    run, real = warm_up(model, members, run, warmup, keep_saved)
    if real is not None and (not succeeded(real.result) or real.end.step == run.num_steps):
        return real
    estimated = estimate_error and stepsize_controller is None
    run, state, traced = _starting_state(run, members, estimated, (rtol, atol, dt0, stepsize_controller))
    one = members.first(state.members if isinstance(state, EnsembleState) else state).flow
    _require_integrable(run.params, one)
    observe_state = _check.state_observables(observe_state, one, example)
    request = OdeRequest(
        problem=OdeProblem(
            model,
            solver,
            adjoint,
            max_steps,
            jnp.asarray(dt0),
            flat=not traced and _is_small(one),
            # The ensemble chooses the shardings of its members.
            shardings=() if isinstance(state, EnsembleState) else _devices.shardings(one),
            observe_state=observe_state,
        ),
        name="" if traced else fingerprint(model, members.first(run.params), example),
        controller=stepsize_controller,
        rtol=None if rtol is None else _check.positive_scalar("rtol", rtol),
        atol=None if atol is None else _check.positive_scalar("atol", atol),
        diagnosed=diagnose,
        before=None if run.begin is None else run.begin.stats,
    )
    prepared = request.with_default_tolerances(run.params) if traced else request
    return _with_kink(run.run(members.vectorize(prepared), state, observe_state), request, example)


def _with_kink(path: Trajectory, request: OdeRequest, args: Args) -> Trajectory:
    """A run, and where it has used up its ODE steps whether a kink holds it up there."""
    if not request.diagnosed or _tree.is_traced(path.result) or path.result != RESULTS.max_steps_reached:
        return path
    found = jump_where_stopped(request.problem.flow, path.end, args)
    return dataclasses.replace(path, end=path.end.with_diagnostics(found))


def _solver_options(flow: AbstractFlow, chosen: tuple, tolerances: tuple) -> tuple:
    """Solver, controller and first step: what the user chose, else what the flow recommends, else the default."""
    if flow.recommended_solver is not None and all(x is None for x in (*chosen, *tolerances)):
        return flow.recommended_solver
    solver, controller, dt0 = chosen
    solver, dt0 = diffrax.Tsit5() if solver is None else solver, 1.0 if dt0 is None else dt0
    _check.kind("solver", solver, diffrax.AbstractSolver, "a diffrax.AbstractSolver")
    if controller is not None:
        expected = "a diffrax.AbstractStepSizeController"
        _check.kind("stepsize_controller", controller, diffrax.AbstractStepSizeController, expected)
    return solver, controller, _check.positive_scalar("dt0", dt0)


def _check_adjoint(adjoint: Any) -> diffrax.AbstractAdjoint:
    return _check.kind("adjoint", adjoint, diffrax.AbstractAdjoint, "a diffrax.AbstractAdjoint")


def _require_integrable(params: Params, state: State) -> None:
    _devices.require_auto("params", params)
    _check.wide_enough("params", params)
    _check.wide_enough("the state of flow", state)


def _is_small(state: State) -> bool:
    """Whether it is on one device, and copies of it count for little."""
    leaves = jax.tree.leaves(real_part(state))
    return sum(leaf.size for leaf in leaves) <= MAX_FLAT_SIZE and all(len(x.devices()) == 1 for x in leaves)


def _starting_state(
    run: Run, members: AbstractMembers, estimate: bool, given: tuple
) -> tuple[Run, Any, bool]:
    """Where the flow begins: at the params, in its own state, or where a real run ended; and whether values are traced."""
    flow, params, example = members.member, run.starting_params, run.data.example
    fresh = members.start(flow.init, run.start)(params, example)
    traced = _tree.is_traced(flow, fresh, run.data.args, example, given)

    def pair(state: State, coarse: State) -> FlowState:
        return FlowState(state, coarse if estimate and not traced else None)

    if isinstance(fresh, EnsembleState):
        fresh = fresh._replace(members=pair(fresh.members, fresh.members))
    else:
        fresh = pair(fresh, fresh)
    if run.begin is None:
        return run, fresh, traced
    end, before = run.begin, run.before
    old = end.state.members if isinstance(end.state, EnsembleState) else end.state
    new = fresh.members if isinstance(fresh, EnsembleState) else fresh
    if isinstance(old, FlowState):
        hint = "another flow begins afresh with `resume.without_state()`"
        state = _structure.restore("resume.end.state", old.flow, new.flow, hint)
        coarse = old.flow if old.coarse is None else old.coarse
        coarse = _structure.restore("resume.end.state", coarse, new.flow)
        return run, _with_members(end.state, fresh, pair(state, coarse)), traced
    if end.step % flow.stride:
        raise ValueError(
            f"resume: expected a real run of a multiple of the flow's stride {flow.stride}, got {end.step} steps"
        )
    if end.state is not None:
        t = end.step * flow.step_size
        state = members.each(lambda p, a, s: flow.begin(t, p, s, a))(params, example, old)
        fresh = _with_members(end.state, fresh, pair(state, state))
    if before is not None:
        steps = np.asarray(before.steps)
        error = np.zeros(len(steps)) if before.ode_error is None else before.ode_error
        times = steps * np.asarray(flow.step_size)
        before = dataclasses.replace(before, times=times, ode_error=error if estimate else None)
    end = dataclasses.replace(end, stats=_only_counts(end.stats))
    return dataclasses.replace(run, begin=end, before=before), fresh, traced


def _only_counts(stats: Stats) -> Stats:
    """What a real run before a flow leaves in its stats: the gradients and steps of its warm-up."""
    if not stats.warmup:
        return Stats()
    return Stats(gradient_evaluations=stats.gradient_evaluations, warmup=stats.warmup)


def _with_members(end: State, fresh: State, state: FlowState) -> State:
    """The state of one run, or that of an ensemble whose members are as alive as where it ended."""
    if not isinstance(fresh, EnsembleState):
        return state
    if not isinstance(end, EnsembleState):
        raise ValueError(
            f"resume.end.state: expected the state of an ensemble, got a {type(end).__name__}; begin with the state of a "
            "new run by `resume.without_state()`"
        )
    alive, reached = _structure.restore(
        "resume.end.state", (end.alive, end.reached), (fresh.alive, fresh.reached)
    )
    return EnsembleState(state, alive, reached)
