"""Is the learning rate at the edge of stability, and since when?"""

import numpy as np

from eomdl.plotting._study import lines_picture, sharpness_picture
from eomdl.reports.finding import Finding, number, percent
from eomdl.reports.stability import Stability
from eomdl.reports.study import Study
from eomdl.runs.tolerances import MAX_MISMATCH, hessian_mismatch
from eomdl.telemetry.at_edge import NEAR, Interval, find_intervals, find_since, say_intervals
from eomdl.telemetry.edge_report import MISMATCHED


TITLE = "Is this learning rate at the edge of stability?"

_MEANING = (
    "The sharpness λ is the largest curvature of the loss: how steep the steepest valley is. A step of length η "
    "overshoots in a valley that is too steep. For {name} the limit is η λ = {threshold}; beyond it the steps bounce from "
    "wall to wall. Networks often drift towards that limit by themselves and stay there, which is called the edge of "
    "stability. Near it, no differential equation with gradients only is a good picture of the run."
)
_PRECONDITIONED = (
    " This optimizer gives each parameter a rate of its own, so η λ is here the largest curvature once the parameters are "
    "measured in units of those rates."
)
_OTHER = (
    "The sharpness λ is the largest curvature of the loss. For plain gradient descent the limit is η λ = 2. This optimizer "
    "rescales its steps, or changes them with time, so that limit is not its own, and eomdl does not know its own."
)


def ask(study: Study) -> Finding:
    """Compare the sharpness along the run with the optimizer's threshold."""
    steps, stability = study.steps[study.measured], study.stability
    products, known = stability.products, np.isfinite(stability.thresholds)
    threshold = float(stability.thresholds[known][-1]) if known.any() else None
    stopped, stopped_short = _say_where_it_stopped(study)
    answer, summary, since = _verdict(steps, stability)
    numbers = {
        "learning rate η": number(study.learning_rate),
        "sharpness λ at the start": number(study.sharpness[0]),
        "sharpness λ at the end": number(study.sharpness[-1]),
        "largest η λ": number(np.nanmax(products)),
    }
    if threshold is not None:
        numbers["threshold of η λ"] = number(threshold)
    losses = {"the run": (study.steps, study.losses(study.path))}
    return Finding(
        answer=" ".join(filter(None, (stopped, answer))),
        summary=" ".join(filter(None, (stopped_short, summary))),
        meaning=_meaning(study, threshold),
        numbers=numbers,
        pictures={
            "sharpness": sharpness_picture(steps, products, threshold, "sharpness"),
            "loss": lines_picture(
                losses, "loss on the whole data", "log" if np.all(losses["the run"][1] > 0) else "linear"
            ),
        },
        data={
            "steps": steps,
            "sharpness": study.sharpness,
            "eta_lambda": products,
            "threshold": threshold,
            "since": since,
            "losses": losses["the run"][1],
        },
        notes=_notes(study, known),
    )


def _meaning(study: Study, threshold: float | None) -> str:
    """Explain the words of the answer."""
    if threshold is None:
        return _OTHER
    name = "this optimizer" if study.rule is None else study.rule.name
    text = _MEANING.format(name=name, threshold=number(threshold))
    return text + _PRECONDITIONED * study.stability.is_preconditioned


def _notes(study: Study, known: np.ndarray) -> tuple[str, ...]:
    notes = []
    mismatch = float(hessian_mismatch(study.loss, study.params, study.whole_data))
    if mismatch >= MAX_MISMATCH:
        notes.append(MISMATCHED.format(mismatch))
    if study.batches is not None:
        notes.append(
            "The sharpness is that of the loss on the whole data. With minibatches the noise of the steps keeps it below "
            "the threshold, so a run may be at its edge earlier than these numbers say."
        )
    if study.stability.is_preconditioned and not known.all():
        reasons = "; ".join(sorted({reason for reason in study.stability.reasons if reason}))
        notes.append(
            f"At {np.sum(~known)} of the {len(known)} measured steps there is no threshold: of the optimizer, {reasons}."
        )
    return tuple(notes)


def _say_where_it_stopped(study: Study) -> tuple[str, str]:
    """Return the answer and the summary for a run that did not get to its end; empty for one that did."""
    if not study.real.message:
        return "", ""
    return (
        f"The run broke down: after step {study.reached} of {study.num_steps} it was no longer finite. All that follows is "
        "about the steps before.",
        f"The run broke down after step {study.reached}.",
    )


def _verdict(steps: np.ndarray, stability: Stability) -> tuple[str, str, int | None]:
    """Return the answer, the summary, and the step since which the run is at its edge (None for none)."""
    known = np.isfinite(stability.products / stability.thresholds)
    if not known.any():
        trend = _trend(stability.products)
        answer = f"There is no answer for this optimizer. Measured, η λ goes {trend}."
        return answer, f"For this optimizer no edge of stability is known; η λ goes {trend}.", None
    steps, products, thresholds = (x[known] for x in (steps, stability.products, stability.thresholds))
    ratios, trend = products / thresholds, _trend(products)
    intervals, row = find_intervals(ratios), find_since(ratios)
    if not intervals:
        top = int(np.argmax(ratios))
        highest = f"{percent(ratios[top])} of the threshold"
        answer = f"No. η λ goes {trend}; at most it is {number(products[top])}, {highest} {number(thresholds[top])}."
        return answer, f"The learning rate is below the edge of stability: η λ is at most {highest}.", None
    first = intervals[0].first if row is None else row
    there = f"η λ {{}} {number(products[first])}, with a threshold of {number(thresholds[first])}"
    if row is None:
        if intervals == [Interval(0, 0)]:  # of Adam, say, whose second moments are those of one gradient
            answer = f"No, but for the first step: there {there.format('is')}. It goes {trend}."
            return answer, "The learning rate is below the edge of stability but for the first step.", None
        when = say_intervals(steps, ratios, intervals)
        answer = f"No longer; it was {when}: at step {steps[first]} {there.format('is')}. It goes {trend}."
        return answer, f"The run is at the edge of stability {when}; at the end it is below again.", None
    end = "the last measurement is below" if ratios[-1] < NEAR else "at the end it is there"
    since = int(steps[row])
    if since == 0:
        answer = f"Yes, from the first step on: there {there.format('is')} at the start; {end} ({number(products[-1])})."
        return answer, f"The learning rate is at the edge of stability from the start; {end}.", since
    answer = f"Yes, from about step {since} on: there {there.format('reaches')}. It goes {trend}; {end}."
    return answer, f"The run comes to the edge of stability at about step {since}; {end}.", since


def _trend(products: np.ndarray) -> str:
    return f"from {number(products[0])} at the start to {number(products[-1])} at the end"
