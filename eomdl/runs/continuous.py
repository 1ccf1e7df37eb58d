"""Integrate a flow with its discrete optimizer's clock."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Unpack

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from eomdl import _check, _devices, _structure, _tree
from eomdl._end import Diagnostic, End, Stats
from eomdl._types import STATIC, Params, State, StateObservable, record_type
from eomdl.flows.base import AbstractFlow
from eomdl.runs.data import Window
from eomdl.runs.dynamics import AbstractDynamics, Advanced, Span, as_row
from eomdl.runs.identity import identity
from eomdl.runs.integrator import Integrator, default_controller, diagnostics_at, integrate, params_at
from eomdl.runs.options import RunOptions, Setup, set_up
from eomdl.runs.tolerances import default_tolerances, distances, measured_tolerances, state_units
from eomdl.runs.trajectory import Trajectory


_FLAT = 2**20  # numbers in a state up to which it is integrated as one vector
_LOOSER = 16.0  # times the tolerances for the second run: about twice as long steps of a solver of order 5


def solve(
    flow: AbstractFlow,
    params: Params,
    num_steps: int,
    *,
    observe_state: Mapping[str, StateObservable] | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    solver: diffrax.AbstractSolver | None = None,
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
    dt0: ArrayLike = 1.0,
    max_steps: int = 16384,
    estimate_error: bool = True,
    diagnose: bool = True,
    **options: Unpack[RunOptions],
) -> Trajectory:
    r"""Integrate $\dot x = F(t, x)$ from $t = 0$ to `num_steps` * step_size.

    The clock inside is in steps, $dx/ds = h F$, so the learning rate may be traced.

    ```python
    path = eomdl.solve(eomdl.EquationOfMotion(loss, 0.1, order=1), params, 100, args=data)
    ```

    **Arguments:** `params` and `num_steps` as in `eomdl.descend`; `options`: `args`, `batches`, `observe`,
    `save_params`, `save_steps`, `progress`, `resume`, `checkpoints`, `throw`: see `eomdl.runs.RunOptions`. With
    `batches` the flow follows the equation of motion of step k's own batch for the time of that step.

    - `flow`: an `eomdl.AbstractFlow`. One of stride m passes through every m-th iterate; at
        the steps between, the rows are those iterates moved on by the map itself.
    - `observe_state`: `{name: function (t, state, args) -> array}`, functions of the flow's
        whole state recorded at every saved step, such as `flow.last_difference`.
    - `resume`: one of this flow's runs, or a real run (`descend`, `iterate`), at whose end the flow then
        begins, with the optimizer's state where the flow carries it. The rows of a real run have an ODE error of 0.
    - `rtol`, `atol`: tolerances of one ODE step (root mean square over the state; the state
        of an optimizer counts by the relative change it makes in a step of the parameters).
        By default they are measured: 1/2000 of the flow's own one-step error at the
        start, so that the error of the ODE solver stays under about 1 % of the error of
        the model, and no digit is paid for that the model does not have. A run of the same flow goes on
        with the tolerances it has.
    - `solver`: default `diffrax.Tsit5()`. `stepsize_controller`: default
        `diffrax.PIDController(rtol, atol)`; if given, `rtol` and `atol` are not used and
        no error is estimated. `dt0`: the first ODE step tried, in steps of the optimizer, at most half of the way (with
        `diffrax.ConstantStepSize()` every one of them, as it is). `adjoint`: default `diffrax.RecursiveCheckpointAdjoint()`.
    - `max_steps`: limit on ODE steps in one stretch, which is at most 1024 steps of the
        optimizer (one step with `batches`).
    - `estimate_error`: integrate a second time with 16 times the tolerances and twice the first and the longest step
        (half of the way there is, in the run itself); the distance
        of the two runs is `Trajectory.ode_error`. It is the error of the looser run: an upper estimate, about ten
        times the error of the run returned or more, but for single steps at which the difference changes its sign.
        Costs about 75 % more.
    - `diagnose`: measure the flow's diagnostics at the start, every 64 to 1024 steps, and at the end. Of
        `eomdl.EquationOfMotion` a look takes 2 to 11 Hessian-vector products; `eta*lambda_max` is a lower bound (on
        digits at most 0.1 % too low).

    **Returns:** `eomdl.Trajectory`; `stats` holds the ODE steps taken and rejected by both
    runs together, the tolerances, and the flow's diagnostics along the path (such as
    `eta*lambda_max`); `warnings` says which of them left their limits. If the solver hits
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
    _check.kind("flow", flow, AbstractFlow, "an eomdl.AbstractFlow")
    max_steps = _check.integer("max_steps", max_steps, 1)
    estimate_error = _check.flag("estimate_error", estimate_error)
    diagnose = _check.flag("diagnose", diagnose)
    solver = diffrax.Tsit5() if solver is None else solver
    adjoint = diffrax.RecursiveCheckpointAdjoint() if adjoint is None else adjoint
    _check.kind("solver", solver, diffrax.AbstractSolver, "a diffrax.AbstractSolver")
    _check.kind("adjoint", adjoint, diffrax.AbstractAdjoint, "a diffrax.AbstractAdjoint")
    if stepsize_controller is not None:
        expected = "a diffrax.AbstractStepSizeController"
        _check.kind("stepsize_controller", stepsize_controller, diffrax.AbstractStepSizeController, expected)
    setup = set_up("solve", params, num_steps, options, flow.stride)
    example = setup.data.example
    flow.validate(setup.params, example)
    state = flow.init(setup.starting_params, example)
    _devices.require_auto("params", setup.params)
    _check.wide_enough("params", setup.params)
    _check.wide_enough("the state of flow", state)
    observe_state = _check.state_observables(observe_state, state, example)
    traced = _tree.is_traced(flow, state, setup.data.args, example)
    estimate = estimate_error and not traced and stepsize_controller is None
    setup, start = _begun(setup, flow, state, estimate)
    dynamics = FlowDynamics(
        flow=flow,
        name="" if traced else identity(flow),
        integrator=Integrator(
            solver,
            adjoint,
            max_steps,
            _check.positive_scalar("dt0", dt0),
            flat=not traced and _is_small(state),
            layout=_devices.layout(state),
        ),
        controller=stepsize_controller,
        rtol=None if rtol is None else _check.positive_scalar("rtol", rtol),
        atol=None if atol is None else _check.positive_scalar("atol", atol),
        observe_state=observe_state,
        diagnosed=diagnose,
    )
    return setup.run(
        dynamics.ready(setup.params) if traced else dynamics.known(setup.begin), start, observe_state
    )


def _is_small(state: State) -> bool:
    """Whether it is on one device, and copies of it count for little."""
    return _tree.size(state) <= _FLAT and all(len(x.devices()) == 1 for x in jax.tree.leaves(state))


class FlowState(NamedTuple):
    """The state of a flow's run: of the run itself, and of the looser one that estimates its error (or None)."""

    flow: State
    looser: State


def _begun(setup: Setup, flow: AbstractFlow, state: State, estimate: bool) -> tuple[Setup, FlowState]:
    """Where the flow goes on: in its own state, or where a real run ended."""
    if setup.begin is None:
        return setup, FlowState(state, state if estimate else None)
    end, before = setup.begin, setup.before
    if isinstance(end.state, FlowState):
        hint = "another flow begins anew with `resume.without_state()`"
        state = _structure.restore("resume.end.state", end.state.flow, state, hint)
        looser = end.state.flow if end.state.looser is None else end.state.looser
        return setup, FlowState(
            state, _structure.restore("resume.end.state", looser, state) if estimate else None
        )
    if end.step % flow.stride:
        raise ValueError(
            f"resume: expected a real run of a multiple of the flow's stride {flow.stride}, got {end.step} steps"
        )
    if end.state is not None:
        state = flow.begin(end.step * flow.step_size, setup.starting_params, end.state, setup.data.example)
    if before is not None:
        steps = np.asarray(before.steps)
        error = np.zeros(len(steps)) if before.ode_error is None else before.ode_error
        times = steps * np.asarray(flow.step_size)
        before = dataclasses.replace(before, times=times, ode_error=error if estimate else None)
    end = dataclasses.replace(end, stats=Stats())
    return dataclasses.replace(setup, begin=end, before=before), FlowState(state, state if estimate else None)


@record_type
class FlowDynamics(AbstractDynamics):
    """A flow and how it is integrated.

    `rtol`, `atol` and `units` are None until they are measured, by `prepared`.
    """

    flow: AbstractFlow
    name: str = dataclasses.field(metadata=STATIC)
    integrator: Integrator
    controller: diffrax.AbstractStepSizeController | None
    rtol: Any
    atol: Any
    observe_state: dict[str, StateObservable]
    diagnosed: bool = dataclasses.field(metadata=STATIC)
    units: State = None
    is_ready: bool = dataclasses.field(metadata=STATIC, default=False)

    @property
    def step_size(self) -> Any:
        """The time of one step."""
        return self.flow.step_size

    @property
    def identity(self) -> str:
        """Which flow, with its numbers."""
        return self.name

    def known(self, begin: End | None) -> "FlowDynamics":
        """With the tolerances of an earlier run of the same flow."""
        if begin is None or begin.stats.flow != self.name or begin.stats.rtol is None:
            return self
        known = [
            jnp.asarray(old) if new is None else new
            for new, old in ((self.rtol, begin.stats.rtol), (self.atol, begin.stats.atol))
        ]
        return dataclasses.replace(self, rtol=known[0], atol=known[1])

    def ready(self, params: Params) -> "FlowDynamics":
        """With the tolerances that it has where nothing can be measured."""
        rtol, atol = default_tolerances(_tree.dtype(params))
        return dataclasses.replace(
            self,
            rtol=jnp.asarray(rtol) if self.rtol is None else self.rtol,
            atol=jnp.asarray(atol) if self.atol is None else self.atol,
            is_ready=True,
        )

    def prepared(self, state: FlowState, span: Span, window: Window) -> "FlowDynamics":
        """With units and tolerances measured over the first steps, where none were given."""
        if self.is_ready:
            return self
        units = state_units(self.flow, state.flow, span, window)
        measured = dataclasses.replace(self, units=units, is_ready=True)
        if self.controller is not None or (self.rtol is not None and self.atol is not None):
            return measured
        default = measured_tolerances(self.flow, state.flow, span, window, measured._one_step)
        both = zip((self.rtol, self.atol), default, strict=True)
        dtype = _tree.dtype(state.flow)
        rtol, atol = (jnp.asarray(new if given is None else given, dtype) for given, new in both)
        return dataclasses.replace(measured, rtol=rtol, atol=atol)

    def advance(self, state: FlowState, span: Span, window: Window) -> Advanced:
        """Integrate over a span, and once more with looser tolerances where the error is estimated."""
        x, (rows, observed), result, counts = self._integrate(state.flow, span, window, 1.0)
        if state.looser is None:
            return Advanced(FlowState(x, None), rows, observed, None, result, counts)
        looser, (loose_rows, _), _, more = self._integrate(state.looser, span, window, _LOOSER)
        counts = {name: n + more[name] for name, n in counts.items()}
        return Advanced(FlowState(x, looser), rows, observed, distances(rows, loose_rows), result, counts)

    def params(self, state: FlowState, step: int, window: Window) -> Params:
        """The parameters at a step; between two strides, by steps of the discrete map from the last one."""
        if step % self.flow.stride == 0:
            return self.flow.params(state.flow)
        return params_at(self.flow, np.asarray(step), state.flow, window)

    def diagnose(self, state: FlowState, step: int, window: Window) -> dict[str, Diagnostic]:
        """The flow's diagnostics at a step; none where they are switched off."""
        if not self.diagnosed:
            return {}
        return diagnostics_at(self.flow, np.asarray(step), state.flow, window)

    def stats(self, stats: Stats) -> Stats:
        """With the flow's name, stride, target and tolerances; diagnostics of another flow are dropped."""
        if stats.flow != self.name:
            stats = dataclasses.replace(stats, diagnostics={})
        stats = dataclasses.replace(stats, flow=self.name, rtol=self.rtol, atol=self.atol)
        return dataclasses.replace(stats, stride=self.flow.stride, target=self.flow.target)

    def _integrate(self, x: State, span: Span, window: Window, looser: float) -> tuple:
        if self.controller is not None:
            return self._with(self.controller, None, x, span, window)
        controller = default_controller(self.rtol * looser, self.atol * looser, _tree.dtype(x))
        # Twice the first step and the longest one for the looser run: with the same ones, what neither run rejects
        # would be the same to the last bit, and no error would show.
        return self._with(controller, 1.0 if looser == 1.0 else 2.0, x, span, window)

    def _one_step(self, rtol: float, atol: float, x: State, span: Span, window: Window) -> State:
        """The state after the gaps of a span, with these tolerances."""
        # Twice as wide: the whole span in one ODE step, where the tolerances allow it.
        return self._with(default_controller(rtol, atol, _tree.dtype(x)), 2.0, x, span, window)[0]

    def _with(self, controller: Any, widen: float | None, x: State, span: Span, window: Window) -> tuple:
        # An array, since a number would be a constant of the program: one compilation for each.
        integrator = dataclasses.replace(self.integrator, widen=None if widen is None else jnp.asarray(widen))
        final, (rows, observed), result, counts = integrate(
            self.flow, integrator, controller, self.units, self.observe_state, x, span, window
        )
        rows = as_row(self.flow.params(x)) if rows is None else rows
        return final, (rows, observed), result, counts
