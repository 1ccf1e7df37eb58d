"""Which flow, with which solver and tolerance, describes a run to a given error at the least cost."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import optax
from jax.typing import ArrayLike
from typing_extensions import override

from eomdl import _check
from eomdl._end import End
from eomdl._result import AbstractResult, Note, Table
from eomdl._types import Args, Loss, Params
from eomdl.choice.candidates import Candidate, Probe, estimates, probe_run
from eomdl.choice.differences import starting_state
from eomdl.choice.trials import MISLEADING, Real, Trials, real_run, run_trials
from eomdl.errors.comparison import compare
from eomdl.flows.base import AbstractFlow
from eomdl.maps.optimizer import optimizer_step
from eomdl.maps.step_map import check_step
from eomdl.runs.trajectory import Trajectory


PROBE_FRACTION = 0.1  # of the run, on which flows have their trials,
MIN_PROBE_STEPS = 32  # but at least as many steps
_FEW_TERMS = 6  # of the series: a flow of two points and the four differences after it
_UNSTABLE = 10.0  # times that small errors may grow after the probe: beyond it their prediction means nothing


@dataclasses.dataclass(frozen=True)
class Choice(AbstractResult):
    """The result of `choose_flow`.

    - `chosen`: the candidate to take. `flow`, `solve_options`, `predicted_error`, `predicted_cost`: its fields.
    - `candidates`: all of them, the chosen one first, then those predicted to stay within the tolerance by their cost,
        then the others by their error.
    - `tolerance`: as asked for.
    - `cost`: the cost of the choice, in gradients.
    - `notes`: where it is not to be trusted, and why.

    Its table has one row for each flow, with its best solver. Its picture shows the predicted cost of each flow against its own error,
    log scales: dots, one colour for each kind; dashed, the tolerance; ring, the chosen one; crosses, what was `measured` of whole runs.
    No file can hold it, since a flow holds the loss: keep `to_frame()`.
    """

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    tolerance: float
    cost: float
    notes: tuple[Note, ...]

    @property
    def flow(self) -> AbstractFlow:
        """The flow of the candidate that was chosen."""
        return self.chosen.flow

    @property
    def solve_options(self) -> dict[str, Any]:
        """`rtol`, `atol`, `solver` and `estimate_error=False`, to be passed to `eomdl.solve`."""
        return self.chosen.solve_options

    @property
    def predicted_error(self) -> float:
        """The largest distance to the real run predicted, Euclidean over all parameters."""
        return self.chosen.predicted_error

    @property
    def predicted_cost(self) -> float:
        """The gradients per step of the optimizer."""
        return self.chosen.predicted_cost

    def with_runs(self, real: Trajectory, paths: Mapping[str, Trajectory]) -> "Choice":
        """Return the choice with the measured error and cost of candidates that have been run, `{candidate's name: its run}`.

        **Raises:** `ValueError` for a name that is not a candidate's, or runs that cannot be compared.
        """
        _check.kind("real", real, Trajectory, "an eomdl.Trajectory")
        _check.mapping("paths", paths, Trajectory, "eomdl.Trajectory")
        unknown = sorted(set(paths) - {c.name for c in self.candidates})
        if unknown:
            raise ValueError(
                f"paths: expected names of candidates, such as {self.chosen.name!r}, got {_check.show(unknown)}"
            )
        distance = compare(real, paths).distance
        candidates = tuple(
            c.with_run(paths[c.name], float(np.max(distance[c.name]))) if c.name in paths else c
            for c in self.candidates
        )
        return dataclasses.replace(self, chosen=candidates[0], candidates=candidates)

    def by_flow(self) -> tuple[Candidate, ...]:
        """Return the best candidate of each flow: one solver for each."""
        best: dict[str, Candidate] = {}
        for c in self.candidates:
            best.setdefault(c.model, c)
        return tuple(best.values())

    @property
    @override
    def verdict(self) -> str:
        return f"The choice of {self.chosen.name} has cost {self.cost:.0f} gradients."

    @override
    def _tables(self) -> tuple[Table, ...]:
        heads = ("of the flow", "of the solver", "both", "in the trial", "error, measured")
        rows = []
        for c in self.by_flow():
            errors = (c.model_error, c.ode_error, c.predicted_error, c.trial_error, c.measured_error)
            numbers = [None if np.isnan(x) else x for x in (*errors, c.predicted_cost, c.measured_cost)]
            rows.append((c.model, c.method, *numbers))
        columns = ("flow", "solver", *heads, "gradients per step", "gradients, measured")
        title = (
            f"Flows for a distance of {self.tolerance:.1e}: the largest error of each with its best solver"
        )
        return (Table(columns, tuple(rows), title=title),)


def choose_flow(
    loss: Loss,
    params: Params,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    tolerance: float,
    *,
    learning_rate: ArrayLike,
    args: Args = None,
    start: End | None = None,
    probe_steps: int | None = None,
    budget: float | None = None,
    progress: Any = False,
) -> Choice:
    r"""Choose the cheapest flow, solver and tolerance that stay within a distance of a run of an optimizer.

    ```python
    choice = eomdl.choice.choose_flow(loss, params, optax.sgd(0.1), 200, 1e-4, learning_rate=0.1, args=data)
    path = eomdl.solve(choice.flow, params, 200, args=data, **choice.solve_options)
    print(choice.table())
    ```

    **Candidates:** `InterpolatingFlow` of 2 to 14 points (float32: 6) with Taylor's weights, with minimax weights (where the multipliers
    allow them) and with weights fitted to the path (`eomdl.choice.fitted_weights`), stride 1, and stride 2 where a
    multiplier is further than 0.7 from 1; for plain gradient descent also `GradientFlow` and `EquationOfMotion` of
    order 1 and 2. Each with diffrax's Bosh3, Tsit5 and Dopri8.

    **How.** The differences of the real run on its first steps say what each flow leaves out. The sum of that over the run
    telescopes: it is complete when the differences have died away, so the first, fastest steps decide. The same differences are
    the derivatives of the path, which say how long the steps of each solver may be at a tolerance; the multipliers (16
    products with the map's derivative, at the end of the probe) say what is stable. The cheapest candidate then has a
    trial: it is integrated over the probe, the first steps of the run, and compared with the real run there. After it its error is
    taken to grow in each doubling of the steps as in the last one: by as much, or, for an optimizer with a memory, by the same
    factor, at most 2. If that is more than the tolerance, its error is corrected by the factor found (those of other flows by at most 5,
    until two kinds of flows agree on more), and the next has a trial, up to five. If none is predicted to be within the tolerance, the
    nearest has a trial; where that is 5 times off its prediction, also one cheap flow of each other kind.

    **Arguments:**

    - `loss`, `params`, `optimizer`, `num_steps`, `args`: as in `eomdl.descend`; the whole data, no minibatches.
    - `tolerance`: the largest Euclidean distance over all parameters, at any step.
    - `learning_rate`: the time of one step, which sets the flow's clock; for gradient descent its learning rate.
    - `start`: the end of a real run, to begin there (pass it to `solve` as `resume` too).
    - `probe_steps`: how many first steps to try a flow on, by default a tenth of the run and at least 32. Differences are taken in
        the first 32 of them, which should hold the fastest part of the path.
    - `budget`: the gradients that all trials together may cost, by default what a run of the first flow tried is predicted to cost over
        all the steps, or five real runs if these cost more. A trial ends at 4 times the ODE steps predicted.
    - `progress`: as in `eomdl.solve`, for the trials.

    **Returns:** `eomdl.choice.Choice`. If no candidate is within the tolerance, the nearest, and a note.

    **Cost:** a real run over the probe, 50 steps more (118 with stride 2), 43 gradients for the multipliers, and the trials, within
    `budget`; counted in `Choice.cost`. **Memory:** 54 copies of the parameters (float32: 30).

    **Raises:** `ValueError` for a wrong argument, an optimizer that has no flow, a run that does not stay finite.

    Source: Gelfreich & Vieiro 2018 (Nonlinearity 31) for the logarithm; Hairer, Norsett & Wanner 1993, II.4, and Hairer & Wanner
    1996, IV.2, for step lengths and stability.
    """
    _check.function("loss", loss)
    params = _check.params("params", params)
    _check.wide_enough("params", params)
    num_steps = _check.integer("num_steps", num_steps, 1)
    tolerance = float(_check.positive_scalar("tolerance", tolerance))
    step_size = _check.positive_scalar("learning_rate", learning_rate)
    budget = None if budget is None else float(_check.positive_scalar("budget", budget))
    step_map = optimizer_step(loss, optimizer)
    check_step(step_map, params, args)
    first = starting_state(step_map, params, start)[1]
    if first >= num_steps:
        raise ValueError(f"num_steps: expected more than the {first} steps of start, got {num_steps}")
    length = max(MIN_PROBE_STEPS, round(PROBE_FRACTION * (num_steps - first)))
    length = length if probe_steps is None else _check.integer("probe_steps", probe_steps, 2)
    last = min(first + length, num_steps)
    options: dict[str, Any] = dict(args=args, resume=start, progress=progress)
    run = real_run(step_map, params, last, step_size, options)
    real = Real(step_map, params, step_size, first, num_steps, options, run)
    probe = probe_run(step_map, params, step_size, args, start, run.end, num_steps)
    trials = run_trials(estimates(loss, probe), tolerance, real, probe.is_gradient_descent, budget)
    return _result(trials, tolerance, probe)


def _result(trials: Trials, tolerance: float, probe: Probe) -> Choice:
    """Return the chosen one first, then those within the tolerance by their cost, then the others by their error."""
    within = [c for c in trials.others if c.predicted_error <= tolerance]
    beyond = [c for c in trials.others if c.predicted_error > tolerance]
    unknown = [c for c in trials.others if np.isnan(c.predicted_error)]
    ranked = sorted(within, key=lambda c: c.predicted_cost)
    ranked += sorted(beyond, key=lambda c: (c.predicted_error, c.predicted_cost))
    ranked += sorted(unknown, key=lambda c: c.predicted_cost)
    candidates = (*trials.tried, *ranked)
    return Choice(
        chosen=candidates[0],
        candidates=candidates,
        tolerance=tolerance,
        cost=probe.cost + trials.cost,
        notes=(*_notes(candidates[0], tolerance, probe), *_trial_notes(candidates[0], tolerance, trials)),
    )


def _notes(chosen: Candidate, tolerance: float, probe: Probe) -> tuple[Note, ...]:
    notes = []
    if chosen.predicted_error > tolerance:
        notes.append(
            f"No candidate is within {tolerance:.1e} of the run: the nearest, {chosen.name}, is at "
            f"{chosen.predicted_error:.1e}. Raise the tolerance, lower the learning rate, or begin after the first, fastest "
            "steps (`start=` the end of a real run)."
        )
    if probe.departure >= 1:
        notes.append(
            f"The map departs from the identity by {probe.departure:.2f} (eta*lambda_max of gradient descent). From 1 on the "
            "series of the logarithm has no limit for stride 1, and what is left out of it is not known from its next terms."
        )
    if np.isnan(probe.departure):
        notes.append(
            "The optimizer's step has no finite derivative at the end of the probe (Adam where a parameter has had no gradient, a root at "
            "0): how far its map is from the identity, which ODE steps are stable and whether small errors grow is not known, and "
            "stride 2 and minimax weights were not tried. Believe what was measured in the trial."
        )
    noise = probe.rounding * np.sqrt(probe.num_steps - probe.first)
    if noise > 0.1 * tolerance:
        notes.append(
            f"The rounding of the real run itself may come to {noise:.1e} in this precision. Use float64 "
            "(jax.config.update('jax_enable_x64', True)) for such a tolerance."
        )
    if probe.num_terms <= _FEW_TERMS:
        notes.append(
            f"The differences of the run fall only up to order {probe.num_terms} (kinks of the loss, or steps too long for the series): "
            "what a flow leaves out was estimated from these few, and may be some times more."
        )
    if probe.instability > _UNSTABLE:
        notes.append(
            f"At the end of the probe the run is unstable: in the steps left an error may grow {probe.instability:.0f} times, which no "
            "prediction here contains. Raise `probe_steps`, and compare the flow with the real run."
        )
    growth = probe.growth
    if growth > 1.5:
        notes.append(
            f"The steps of the run are {growth:.1f} times as long at the end of the probe as at its start: the fastest part of "
            "the path may come later, and was not seen. Raise `probe_steps`."
        )
    return tuple(Note(text, is_fault=True) for text in notes)


def _trial_notes(chosen: Candidate, tolerance: float, trials: Trials) -> tuple[Note, ...]:
    """Return what the trials say of the choice: whether predictions mislead, and whether the search came to its end."""
    notes = []
    if trials.error_ratio >= MISLEADING and chosen.predicted_error > tolerance:
        off = (
            "did not get to the end"
            if np.isinf(trials.error_ratio)
            else f"was {trials.error_ratio:.0f} times as far from the run as predicted"
        )
        notes.append(
            f"A flow in a trial {off}: what flows leave out is not known from the first differences of this run (kinks, or steps too long "
            'for the series). Believe what stands under "in the trial"; of flows without a trial neither error nor cost is known.'
        )
    has_none = bool(np.isnan(chosen.trial_error))
    if trials.is_cut and (chosen.predicted_error > tolerance or has_none):
        notes.append(
            f"The trials have ended at their budget of {trials.budget:.0f} gradients, about what a run of a flow costs unless `budget=` "
            f"says more. A flow that had no trial may be nearer, or cheaper{': the chosen one had none' * has_none}."
        )
    return tuple(Note(text, is_fault=True) for text in notes)
