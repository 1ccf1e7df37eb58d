"""Up to which learning rate is gradient flow a fair picture?"""

from typing import NamedTuple

import numpy as np

from eomdl.errors.rates import LEADING_FRACTION, notes_on, rates_within
from eomdl.reports.finding import Finding, NoAnswer, Table, block, number, percent
from eomdl.reports.study import Study


TITLE = "Up to which learning rate is gradient flow a fair picture?"
FAIR = 0.05  # of the distance travelled in the whole time

_MEANING = (
    f"Fair means here: over the whole time of this run, gradient flow is never further from gradient descent than {percent(FAIR)} "
    "of the distance that it has travelled at the end. A smaller learning rate takes more steps for the same time. The limiting block is "
    "the part of the parameters with the largest part of the error at the moment that decides."
)


class Largest(NamedTuple):
    """The largest rate, and what limits it: when and where."""

    value: float
    limited_at: float
    limited_by: str
    by_block: dict[str, float]
    tolerance: float
    sharpness: float
    capped: bool


def ask(study: Study) -> Finding:
    """Find the largest rate within the tolerance, and the block that limits it."""
    if study.batches is not None:
        raise NoAnswer(
            "The answer comes from one integration of gradient flow on the whole data, and this run takes minibatches."
        )
    if not study.is_gradient_descent:
        raise NoAnswer(
            "The answer is known for plain gradient descent, without momentum and without rescaling."
        )
    rate = _largest(study)
    answer, summary = _answer(rate, study.learning_rate)
    blocks = sorted(rate.by_block.items(), key=lambda pair: pair[1])
    table = Table(("block", "rate"), tuple((block(name), float(value)) for name, value in blocks))
    return Finding(
        answer=answer,
        summary=summary,
        meaning=_MEANING,
        numbers={
            "largest rate": number(rate.value),
            f"tolerance, {percent(FAIR)} of the distance travelled": number(rate.tolerance),
            "time of the run, steps times rate": number(study.learning_rate * study.reached),
            "η λ there": number(rate.value * rate.sharpness),
        },
        tables={}
        if rate.capped
        else {"by block: the rate at which its own error is at the tolerance": table},
        data=rate._asdict(),
        notes=() if rate.capped else notes_on(rate.value, rate.value * rate.sharpness),
    )


def _answer(rate: Largest, eta: float) -> tuple[str, str]:
    """Return the answer, and the summary in one sentence."""
    if not np.isfinite(rate.value):
        return "Any rate would do: on this path there is nothing that gradient flow leaves out.", ""
    yours, largest, ratio = number(eta), number(rate.value), number(eta / rate.value)
    if rate.capped:
        limit = "the estimate ends there, where η λ reaches 1, with the error still within the tolerance"
        held = f"Gradient flow is a fair picture up to a learning rate of at least {largest}"
    else:
        by = f", by {block(rate.limited_by)}" if len(rate.by_block) > 1 else ""
        limit = f"limited at time {number(rate.limited_at)}{by}"
        held = f"Gradient flow is a fair picture up to a learning rate of {largest}"
    least = " at least" if rate.capped else ""
    if eta <= rate.value:
        return (
            f"Up to {largest}{least}, so yours, {yours}, is within it ({limit}).",
            f"{held}; yours is within it.",
        )
    return (
        f"Up to {largest}{least}; yours, {yours}, is {ratio} times that ({limit}).",
        f"{held}; yours is {ratio} times that.",
    )


def _largest(study: Study) -> Largest:
    r"""Return the rate that `eomdl.errors.largest_learning_rate` finds.

    Its $E(t)$ is the predicted error of gradient flow over the learning rate: no second integration.
    """
    predicted, eta = study.prediction, study.learning_rate
    tolerance = FAIR * float(predicted.travelled.max())
    if not (np.isfinite(tolerance) and tolerance > 0):
        raise NoAnswer("Gradient flow does not move, or does not stay finite, over the time of the run.")
    allowed = np.full(len(predicted.norm), LEADING_FRACTION * tolerance)
    rates = rates_within(allowed, predicted.norm / eta, 0)
    blocks = {name: rates_within(allowed, norm / eta, 0) for name, norm in predicted.block_norm.items()}
    at, sharpness = int(np.argmin(rates)), float(np.nanmax(study.sharpness))
    edge = (
        1 / sharpness if sharpness > 0 else np.inf
    )  # from there on the leading term says nothing about the error
    return Largest(
        min(float(rates[at]), edge),
        float(predicted.times[at]),
        min(blocks, key=lambda name: blocks[name][at]),
        {name: float(own.min()) for name, own in blocks.items()},
        tolerance,
        sharpness,
        capped=bool(rates[at] > edge),
    )
