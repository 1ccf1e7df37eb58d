"""Is the learning rate at the edge of stability, and since when?"""

import numpy as np

from eomdl.plotting._study import lines_picture, sharpness_picture
from eomdl.reports.finding import Finding, number, percent
from eomdl.reports.study import Study


TITLE = "Is this learning rate at the edge of stability?"
NEAR = 0.9  # of the threshold, from which on the run is said to be at the edge

_MEANING = (
    "The sharpness λ is the largest curvature of the loss: how steep the steepest valley is. A step of length η "
    "overshoots in a valley that is too steep. For {name} the limit is η λ = {threshold}; beyond it the steps bounce from "
    "wall to wall. Networks often drift towards that limit by themselves and stay there, which is called the edge of "
    "stability. Near it, no differential equation with gradients only is a good picture of the run."
)
_OTHER = (
    "The sharpness λ is the largest curvature of the loss. For plain gradient descent the limit is η λ = 2. This optimizer "
    "rescales its steps, or changes them with time, so that limit is not its own, and eomdl does not know its own."
)


def ask(study: Study) -> Finding:
    """The sharpness along the run against the optimizer's threshold."""
    steps, rule, eta = study.steps[study.looks], study.rule, study.learning_rate
    products = eta * study.sharpness
    threshold = None if rule is None else rule.threshold
    answer, summary = _stopped(study)
    said, short = _verdict(steps, products, threshold)
    notes = []
    if study.batches is not None:
        notes.append(
            "The sharpness is that of the loss on the whole data. With minibatches the noise of the steps keeps it below "
            "the threshold, so a run may be at its edge earlier than these numbers say."
        )
    numbers = {
        "learning rate η": number(eta),
        "sharpness λ at the start": number(study.sharpness[0]),
        "sharpness λ at the end": number(study.sharpness[-1]),
        "largest η λ": number(np.nanmax(products)),
    }
    if threshold is not None:
        numbers["threshold of η λ"] = number(threshold)
    losses = {"the run": (study.steps, study.losses(study.path))}
    return Finding(
        answer=" ".join(filter(None, (answer, said))),
        summary=" ".join(filter(None, (summary, short))),
        meaning=_OTHER if rule is None else _MEANING.format(name=rule.name, threshold=number(rule.threshold)),
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
            "threshold": threshold,
            "losses": losses["the run"][1],
        },
        notes=tuple(notes),
    )


def _stopped(study: Study) -> tuple[str, str]:
    """A run that did not get to its end."""
    if not study.real.message:
        return "", ""
    return (
        f"The run broke down: after step {study.reached} of {study.num_steps} it was no longer finite. All that follows is "
        "about the steps before.",
        f"The run broke down after step {study.reached}.",
    )


def _verdict(steps: np.ndarray, products: np.ndarray, threshold: float | None) -> tuple[str, str]:
    first, last, top = products[0], products[-1], float(np.nanmax(products))
    trend = f"from {number(first)} at the start to {number(last)} at the end"
    if threshold is None:
        said = f"There is no answer for this optimizer. Measured, η λ goes {trend}."
        return said, f"For this optimizer no edge of stability is known; η λ goes {trend}."
    reached = np.flatnonzero(products >= NEAR * threshold)
    share = percent(top / threshold)
    if len(reached) == 0:
        said = f"No. η λ goes {trend}; at most it is {number(top)}, {share} of the threshold {number(threshold)}."
        return (
            said,
            f"The learning rate is below the edge of stability: η λ is at most {share} of the threshold.",
        )
    at = int(steps[reached[0]])
    left = last < NEAR * threshold
    end = "at the end it is below again" if left else "it is there at the end"
    if at == 0:
        said = (
            f"Yes, from the first step on: η λ is {number(first)} at the start, with a threshold of {number(threshold)}; {end}"
            f" ({number(last)})."
        )
        return said, f"The learning rate is at the edge of stability from the start; {end}."
    said = (
        f"Yes, from about step {at} on: there η λ reaches {number(products[reached[0]])}, with a threshold of "
        f"{number(threshold)}. It goes {trend}; {end}."
    )
    return said, f"The run comes to the edge of stability at about step {at}; {end}."
