"""Which differential equation describes the run, how well, and at what cost?"""

from typing import Any, NamedTuple

import diffrax
import numpy as np

from eomdl._costs import evaluations_per_step
from eomdl._end import RESULTS
from eomdl.plotting._study import distances_picture, lines_picture
from eomdl.reports.finding import Finding, NoAnswer, Table, number, percent
from eomdl.reports.study import Study
from eomdl.runs.trajectory import Trajectory


TITLE = "Which differential equation describes this run?"
POOR = 0.25  # of the distance travelled: further away than that a flow does not describe a run
_EVALUATIONS = evaluations_per_step(diffrax.Tsit5())  # the default of `solve`, with which the flows run

_MEANING = (
    "A differential equation whose path passes the steps closely can stand for the run, and be reasoned about. Gradient flow "
    "leaves the learning rate out; the equation of motion adds the force of the finite steps, term by term; an interpolating "
    "flow is made of the optimizer's own steps, and works for any optimizer that is smooth. The cost is in gradients of "
    "the loss for each step of the run; the run itself takes 1."
)


class Row(NamedTuple):
    """A row of the table of models; NaN and empty where there is nothing to say."""

    name: str
    distance: float = np.nan
    fraction: float = np.nan
    ode_error: float = np.nan
    cost: float = np.nan
    remark: str = ""


COLUMNS = (
    "equation",
    "distance at the end",
    "largest distance / distance travelled",
    "of it, ODE solver",
    "gradients per step",
    "remark",
)


def ask(study: Study) -> Finding:
    """Compare every model of the run: its distance and its cost."""
    rows = [_row(study, name) for name in study.models]
    runs = {name: run for name, run in study.flows.items() if isinstance(run, Trajectory)}
    notes = [
        f"{name}: {note}" for name, run in runs.items() for note in _notes(run, study.resolution.ode_steps)
    ]
    whole = [row for row in rows if row.remark == "" and np.isfinite(row.fraction)]
    if not whole:
        reasons = [f"{row.name}: {row.remark}." for row in rows]
        raise NoAnswer(" ".join(["None of the flows came to the end of the run.", *reasons, *notes]))
    best = min(whole, key=lambda row: row.fraction)
    the = best.name if best.name == "gradient flow" else f"the {best.name}"
    answer = f"Best: {the}, never further from the run than {percent(best.fraction)} of the distance travelled, for {number(best.cost)} "
    answer += "gradients per step."
    short = f"Of the differential equations tried, {the} describes the run best, to {percent(best.fraction)} of the distance travelled"
    if best.fraction > POOR:
        answer = f"None does to the end. The nearest is {the}, up to {percent(best.fraction)} of the distance travelled from the run."
        short = f"No differential equation that was tried describes the run: the nearest, {the}, only to {percent(best.fraction)}"
    flow = next((row for row in whole if row.name == "gradient flow"), best)
    if flow is not best and best.fraction > 0:
        answer += (
            f" Gradient flow: {percent(flow.fraction)}, {number(flow.fraction / best.fraction)} times as far."
        )
        short += f"; gradient flow to {percent(flow.fraction)}"
    if study.is_gradient_descent and study.largest_product >= 1:
        notes.append(
            f"η λ reaches {number(study.largest_product)}. From 1 on the series in the learning rate has no limit, so a second term of the "
            "equation of motion is not tried."
        )
    first = max(model.first for model in study.models.values())
    if first:
        notes.append(
            f"The flows begin at step {first} of the real run: before, the optimizer's averages fill, and its steps change too "
            "much from one to the next for any flow."
        )
    kept = [i for i in range(len(COLUMNS)) if any(row[i] == row[i] and row[i] != "" for row in rows)]
    cells = tuple(tuple(row[i] for i in kept) for row in rows)
    return Finding(
        answer=answer,
        summary=f"{short}.",
        meaning=_MEANING,
        tables={"equations": Table(tuple(COLUMNS[i] for i in kept), cells, fractions=(kept.index(2),))},
        pictures=_pictures(study),
        data={"models": {row.name: row._asdict() for row in rows}},
        notes=tuple(dict.fromkeys(notes)),
    )


def _notes(run: Trajectory, most: int) -> tuple[str, ...]:
    """Return a flow's own notes; where it was given up, in other words than those to a programmer."""
    if bool(run.result == RESULTS.max_steps_reached):
        given_up = f"given up at step {run.steps[-1]}, where it takes more than {most} steps of the ODE solver for each of the run."
        return (given_up, *(note for note in run.notes if note.is_fault and note != run.message))
    return run.notes


def _row(study: Study, name: str) -> Row:
    run, model = study.flows[name], study.models[name]
    if not isinstance(run, Trajectory):
        return Row(name, remark=f"not run: {run}")
    compared = study.comparisons[name]
    distance, travelled = compared.distance[name], float(compared.travelled.max())
    steps = max(int(run.end.step) - model.first, 1)
    return Row(
        name,
        float(distance[-1]),
        float(distance.max() / travelled) if travelled > 0 else 0.0,
        float(compared.ode_error[name].max()) if name in compared.ode_error else np.nan,
        _EVALUATIONS * model.flow.gradient_cost * float(run.stats.num_steps) / steps,
        "" if int(compared.steps[-1]) == study.reached else f"stopped at step {compared.steps[-1]}",
    )


def _pictures(study: Study) -> dict[str, Any]:
    compared = study.comparisons
    steps = {name: one.steps for name, one in compared.items()}
    distances = {name: one.distance[name] for name, one in compared.items()}
    errors = {name: one.ode_error[name] for name, one in compared.items() if name in one.ode_error}
    pictures = {"distances": distances_picture(steps, distances, errors)}
    try:
        losses = {"the run": (study.steps, study.losses(study.path))}
        losses |= {
            name: (np.asarray(run.steps), study.losses(run))
            for name, run in study.flows.items()
            if isinstance(run, Trajectory)
        }
    except NoAnswer:
        return pictures
    scale = "log" if all(np.all(values > 0) for _, values in losses.values()) else "linear"
    return pictures | {"loss": lines_picture(losses, "loss on the whole data", scale)}
