"""Which symmetries has the loss, and what becomes of their charges?"""

from typing import Any, NamedTuple

import numpy as np

from eomdl import _blocks, _tree
from eomdl._result import Table, plot
from eomdl._types import Params
from eomdl.losses.penalties import WeightDecay
from eomdl.plotting._inline import stack_panels
from eomdl.reports.finding import Finding, percent
from eomdl.reports.study import Study
from eomdl.symmetry.charges import conservation
from eomdl.symmetry.checks import propose
from eomdl.symmetry.groups import Scaling, Translation


TITLE = "Which symmetries has the loss, and does the run keep what they conserve?"
SHOWN = 12  # charges in the table
EXACT = 1e-6  # relative error of a law from which on it is said to be exact
KEPT = 1e4  # machine epsilons of drift that are rounding

_MEANING = (
    "A symmetry is a change of the parameters that leaves the loss as it is: adding one number to all weights into a softmax, "
    "scaling the weights before a normalization. Each has a charge, a number that gradient flow keeps for ever (or lets decay "
    "with the weight decay). Finite steps break that: how a charge drifts shows what the steps do, free of the loss."
)


def ask(study: Study) -> Finding:
    """Find symmetries by trying, and the drift of their charges."""
    start, end = study.at(0), study.at(-1)
    # Where training ends: at a start of zeros a bias would scale without a change.
    proposed = propose(study.loss, end, study.whole_data)
    by_label: dict[str, Any] = {check.symmetry.label: check.symmetry for check in proposed}
    if not by_label:
        return Finding(
            answer="None of those that can be found by trying (translations and scalings of one block or two), so there is no "
            "charge to follow.",
            meaning=_MEANING,
            data={"symmetries": ()},
        )
    drifts = {label: _drift(symmetry, start, end) for label, symmetry in by_label.items()}
    order = sorted(by_label, key=lambda label: -drifts[label].relative)
    top = order[0]
    count = f"{len(by_label)} {'symmetry' if len(by_label) == 1 else 'symmetries'}"
    answer = f"{count} found by trying: {'; '.join(order[:4])}{'; …' * (len(order) > 4)}."
    kept = drifts[top].relative < KEPT * float(np.finfo(_tree.dtype(start)).eps)
    if kept:
        answer += " The run keeps all their charges, to rounding."
        summary = f"The loss has {count}, and the run keeps their charges to rounding."
    else:
        answer += f" Over the run the charge of '{top}' drifts most, by {percent(drifts[top].relative)} of its scale."
        summary = f"The loss has {count}; finite steps let the charge that drifts most change by {percent(drifts[top].relative)}."
    law, pictures, notes = _law(study, by_label[top], kept)
    columns = ("symmetry", "size of the charge at the start", "change over the run", "change / scale")
    rows = tuple((label, *drifts[label]) for label in order[:SHOWN])
    cut = f"the {SHOWN} that drift most, of {len(order)}" if len(order) > SHOWN else ""
    return Finding(
        answer=f"{answer} {law}".strip(),
        summary=summary,
        meaning=_MEANING,
        tables={"charges": Table(columns, rows, caption=cut, fractions=(3,))},
        pictures=pictures,
        data={"symmetries": tuple(order), "drifts": {label: drifts[label]._asdict() for label in order}},
        notes=notes,
    )


class Drift(NamedTuple):
    """The size of a charge at the start, its change, and that over the scale of what the charge is made of."""

    charge: float
    change: float
    relative: float


def _drift(symmetry: Translation | Scaling, start: Params, end: Params) -> Drift:
    first, last = (np.asarray(symmetry.charge(params), float) for params in (start, end))
    if isinstance(symmetry, Translation):
        scale = max(_norm([symmetry.block], params) for params in (start, end))
    else:
        members = [block for block, _ in (*symmetry.incoming, *symmetry.outgoing)]
        scale = max(_norm(members, params) for params in (start, end)) ** 2
    change = float(np.linalg.norm(last - first))
    return Drift(float(np.linalg.norm(first)), change, change / scale if scale > 0 else 0.0)


def _norm(blocks: list, params: Params) -> float:
    return float(_tree.norm([_blocks.select(params, block) for block in blocks]))


def _law(
    study: Study, symmetry: Translation | Scaling, kept: bool
) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """Compare the charge with its laws along the run, where they are known: words, a picture, caveats."""
    rule, consecutive = study.rule, int(min(study.dense, study.reached)) + 1
    if rule is None or rule.nesterov:
        return (
            "Laws for the drift are known for gradient descent, without momentum or with heavy-ball momentum.",
            {},
            (),
        )
    if kept or consecutive < 2:
        return "", {}, ()
    run = study.real.rows(slice(consecutive))
    decay = study.loss.weight_decay if isinstance(study.loss, WeightDecay) else 0.0
    options: Any = {"learning_rate": rule.learning_rate, "momentum": rule.momentum, "weight_decay": decay}
    charge = conservation(run, symmetry, **options)
    notes = (
        ()
        if consecutive > study.reached
        else (
            f"The picture and the law are of the first {consecutive - 1} steps, of which all parameters are kept; the rest would take "
            "too much memory.",
        )
    )
    error = float(np.max(charge.errors["first order"])) / charge.change if charge.change > 0 else 0.0
    how_well = "wrongly" if error > 1 else "to rounding" if error < EXACT else f"to {percent(error)}"
    figure = stack_panels(plot({"charge": charge}))
    figure.axes[0].set_title("")  # it is in the answer, and too long for a phone
    return (
        f"From the sizes of the steps, the law of first order in the learning rate predicts it {how_well}.",
        {"charge": figure},
        notes,
    )
