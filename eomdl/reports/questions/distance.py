"""How far is the run from gradient flow, predicted and measured?"""

import dataclasses

import numpy as np

from eomdl.errors.predicted import PredictedError
from eomdl.plotting._study import with_legend_below
from eomdl.plotting.predicted import plot_predicted_error
from eomdl.reports.finding import Finding, Table, Unanswered, block, number, percent
from eomdl.reports.study import Study


TITLE = "How far is the run from gradient flow?"
GOOD = 0.2  # relative difference of prediction and measurement up to which the prediction is said to hold
SHOWN = 8  # blocks in the picture

_MEANING = (
    "Gradient flow is gradient descent with infinitely small steps: the path that theories of training most often speak of. "
    "The distance is the Euclidean distance of all parameters at the same time, to be held against the way that the run has "
    "come from its start."
)
_BATCHES = "Gradient flow sees the same minibatches as the run, each for the time of its step."


def ask(study: Study) -> Finding:
    """The distance of gradient flow, foretold along the flow itself and measured against the run."""
    if study.rule is None:
        raise Unanswered(
            "Gradient flow is the limit of gradient descent. This optimizer rescales its steps or changes them with time, so "
            "small steps lead it along another flow; see below for the flow of its own."
        )
    compared = study.comparisons.get("gradient flow")
    if compared is None:
        raise Unanswered(f"Gradient flow could not be integrated: {study.flows['gradient flow']}")
    measured, travelled = compared.distance["gradient flow"], compared.travelled
    share = measured[-1] / travelled[-1] if travelled[-1] > 0 else 0.0
    last = int(compared.steps[-1])
    said = (
        f"After {last} steps gradient flow is {number(measured[-1])} away, {percent(share)} of the way come."
    )
    numbers = {
        "distance at the end, measured": number(measured[-1]),
        "largest distance, measured": f"{number(measured.max())} (step {compared.steps[np.argmax(measured)]})",
        "way come from the start": number(travelled[-1]),
        "distance over way, at the end": percent(share),
    }
    if not study.is_plain:
        return Finding(
            answer=f"{said} No prediction is known for an optimizer with a memory.",
            meaning=_MEANING,
            numbers=numbers,
            data={"steps": compared.steps, "measured": measured, "travelled": travelled},
            notes=("A step is taken for the time η / (1 - β), which a constant gradient makes of it.",),
        )
    predicted = study.prediction
    measured = measured[: len(predicted.norm)]
    foretold = predicted.norm[: len(measured)]
    numbers["distance at the end, predicted"] = number(foretold[-1])
    off = abs(foretold[-1] / measured[-1] - 1) if measured[-1] > 0 else np.inf
    if off <= GOOD:
        verdict = f"Predicted before the run, without a step of gradient descent: {number(foretold[-1])}, {percent(off)} off."
    else:
        verdict = (
            f"The prediction before the run was {number(foretold[-1])}, and is not to be trusted here: the learning rate is too "
            "large for the leading term to be the whole error."
        )
    blocks = predicted.block_norm
    order = sorted(blocks, key=lambda name: -blocks[name][-1])
    shown = _few(predicted, order[:SHOWN], len(measured))
    rows = tuple(
        (block(name), float(blocks[name][-1]), float(compared.block_distance["gradient flow"][name][-1]))
        for name in order
    )
    return Finding(
        answer=f"{said} {verdict}",
        meaning=_MEANING,
        numbers=numbers,
        tables={"by block of the parameters, at the end": Table(("block", "predicted", "measured"), rows)},
        pictures={"predicted": with_legend_below(plot_predicted_error(shown, measured))},
        data={"steps": compared.steps, "measured": measured, "predicted": foretold, "travelled": travelled},
        notes=(*predicted.notes, *([_BATCHES] if study.batches is not None else [])),
    )


def _few(predicted: PredictedError, blocks: list[str], rows: int) -> PredictedError:
    """Only these blocks, and the first rows."""
    return dataclasses.replace(
        predicted,
        steps=predicted.steps[:rows],
        norm=predicted.norm[:rows],
        block_norm={block(name): predicted.block_norm[name][:rows] for name in blocks},
    )
