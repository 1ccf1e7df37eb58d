"""How far is the run from gradient flow, predicted and measured?"""

import dataclasses

import numpy as np

from eomdl.errors.predicted import PredictedError
from eomdl.plotting._study import move_legend_below
from eomdl.reports.finding import Finding, NoAnswer, Table, block, number, percent
from eomdl.reports.study import Study


TITLE = "How far is the run from gradient flow?"
GOOD = 0.2  # relative difference of prediction and measurement up to which the prediction is said to hold
SHOWN = 8  # blocks in the picture

_MEANING = (
    "Gradient flow is gradient descent with infinitely small steps: the path that theories of training most often speak of. "
    "The distance is the Euclidean distance of all parameters at the same time, to be compared with the distance that the run has "
    "travelled from its start."
)
_BATCHES = "Gradient flow sees the same minibatches as the run, each for the time of its step."


def ask(study: Study) -> Finding:
    """Compare the distance of gradient flow, predicted along the flow itself, with that measured to the run."""
    if study.rule is None:
        raise NoAnswer(
            "Gradient flow is the limit of gradient descent. This optimizer rescales its steps or changes them with time, so "
            "small steps lead it along another flow; see below for the flow of its own."
        )
    compared = study.comparisons.get("gradient flow")
    if compared is None:
        raise NoAnswer(f"Gradient flow could not be integrated: {study.flows['gradient flow']}")
    measured, travelled = compared.distance["gradient flow"], compared.travelled
    fraction = measured[-1] / travelled[-1] if travelled[-1] > 0 else 0.0
    answer = f"After {compared.steps[-1]} steps gradient flow is {number(measured[-1])} away, {percent(fraction)} of the distance "
    answer += "travelled."
    numbers = {
        "distance at the end, measured": number(measured[-1]),
        "largest distance, measured": f"{number(measured.max())} (step {compared.steps[np.argmax(measured)]})",
        "distance travelled from the start": number(travelled[-1]),
        "distance over distance travelled, at the end": percent(fraction),
    }
    if not study.is_gradient_descent:
        return Finding(
            answer=f"{answer} No prediction is known for an optimizer with a memory.",
            meaning=_MEANING,
            numbers=numbers,
            data={"steps": compared.steps, "measured": measured, "travelled": travelled},
            notes=(
                "A step takes the time η / (1 - β): over that time gradient flow goes as far along a constant gradient.",
            ),
        )
    predicted = study.prediction
    measured = measured[: len(predicted.norm)]
    predicted_norm = predicted.norm[: len(measured)]
    numbers["distance at the end, predicted"] = number(predicted_norm[-1])
    blocks = predicted.block_norm
    order = sorted(blocks, key=lambda name: -blocks[name][-1])
    shown = _select(predicted, order[:SHOWN], len(measured))
    rows = tuple(
        (block(name), float(blocks[name][-1]), float(compared.block_distance["gradient flow"][name][-1]))
        for name in order
    )
    return Finding(
        answer=f"{answer} {_judge(predicted_norm[-1], measured[-1])}",
        meaning=_MEANING,
        numbers=numbers,
        tables={"by block of the parameters, at the end": Table(("block", "predicted", "measured"), rows)},
        pictures={"predicted": move_legend_below(shown.plot(measured=measured))},
        data={
            "steps": compared.steps,
            "measured": measured,
            "predicted": predicted_norm,
            "travelled": travelled,
        },
        notes=(*predicted.notes, *([_BATCHES] if study.batches is not None else [])),
    )


def _judge(predicted: float, measured: float) -> str:
    """Say how far the prediction is off at the end."""
    off = abs(predicted / measured - 1) if measured > 0 else np.inf
    if off <= GOOD:
        return f"Predicted before the run, without a step of gradient descent: {number(predicted)}, {percent(off)} off."
    return (
        f"The prediction before the run was {number(predicted)}, and is not to be trusted here: the learning rate is too "
        "large for the leading term to be the whole error."
    )


def _select(predicted: PredictedError, blocks: list[str], count: int) -> PredictedError:
    """Return the prediction of these blocks only, at the first steps."""
    return dataclasses.replace(
        predicted,
        steps=predicted.steps[:count],
        norm=predicted.norm[:count],
        block_norm={block(name): predicted.block_norm[name][:count] for name in blocks},
    )
