"""The measurements of a run at the edge of stability, in a table and in words."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from typing_extensions import override

from eomdl import _tree
from eomdl._result import AbstractResult, Note, Table, format_number, series_table
from eomdl.maps.sensitivity import Unknown
from eomdl.runs.tolerances import MAX_MISMATCH, WHY_MISMATCHED
from eomdl.telemetry.at_edge import BEYOND, find_since, say_when


_DIVERGED = 10  # times the loss where a run came to its edge, above which it diverges
_BATCHES = (
    "The data changed between the measurements. Each compares the largest eigenvalue of one batch with the threshold for training on the "
    "whole data, whose eigenvalue is smaller. What SGD keeps at its threshold is the batch sharpness E[g' H g] / E[|g|^2] over batches, "
    "with the gradient g and the Hessian H of a batch (arXiv 2412.20553); with momentum it has two levels (arXiv 2604.14108)."
)
MISMATCHED = (  # with the mismatch
    "The gradient changes along itself by another amount than the Hessian says: they differ by {:.0%} of the larger one in the first "
    "measurement. The eigenvalues, curvatures, predicted drops and counter terms here are those of another operator than the one that "
    f"moves this run, and its edge is not known. {WHY_MISMATCHED} Where the run holds its target (a target network), give the target's "
    "parameters in `args`."
)
_ACCUMULATION = (
    "The optimizer takes a step after several gradients. What is measured is that step, with the gradient of the measurement in the place "
    "of those still to come."
)


@dataclasses.dataclass(frozen=True)
class EdgeReport(AbstractResult):
    r"""The measurements of an `EdgeTelemetry`: m along the steps of a run, n at the edge.

    Along the step u, with f(c) the change of the loss in c times the step:

    - `steps`: shape (m,). `losses`: the loss before the step.
    - `multiples`: the critical multiple, f(c) = 0; mostly to within 2 %; 0 where u leads upwards, infinite where none was
        found, nan for a step of length 0.
    - `curvatures`: $u^\top H u / |u|^2$. `drops`: -f(1), and `predicted_drops`: $-g \cdot u - u^\top H u / 2$.
    - `evaluations`: forward passes.

    At the edge:

    - `edge_steps`: (n,). `values`: (n, k), the largest eigenvalues of R H, $\eta\lambda$ for one rate $\eta$, a decay of the weights
        included; of H where the threshold is nan.
    - `thresholds`: (n,), the optimizer's own, of several groups the smallest one; nan where none is known. `reasons`: (n,), why.
    - `residuals`: (n, k), `converged`: (n, k), `matvecs`: (n,): as in `eomdl.curvature.Eigenpairs`. A value that has not converged
        is a lower bound.
    - `fractions`: `{block: (n,)}`, the part of the first eigenvector in each leaf of the parameters, squared: they sum to 1.
    - `discreteness`: (n,), $\eta|\xi_0|/|g|$; `local_errors`: `{block: (n,)}`, $\eta^2 |\xi_0|$, what gradient flow is off in one step.
        With a rate for each parameter and a memory those of its flow in the long run. nan where the threshold is.

    Of all: `is_batched`, whether the data changed between the measurements at the edge; `accumulates`, whether the optimizer takes a
    step only after several gradients; `failures`, what could not be measured, and why; `mismatch`, the part of the gradient's change along
    itself that the Hessian misses, from the first measurement: where it is 0.01 or more a note says what that means. A number that
    could not be measured is nan.

    Its picture shows, on top, $\eta\lambda$ in black and the optimizer's threshold, dashed; the areas are the parts of the blocks in the
    eigenvector, the largest first, and hollow points did not converge (lower bounds). Below, on a log scale, how many times the step may
    be before the loss rises; below 1, dotted, the step itself raises it.
    """

    steps: Int[np.ndarray, " m"]
    losses: Float[np.ndarray, " m"]
    multiples: Float[np.ndarray, " m"]
    curvatures: Float[np.ndarray, " m"]
    drops: Float[np.ndarray, " m"]
    predicted_drops: Float[np.ndarray, " m"]
    evaluations: Int[np.ndarray, " m"]
    edge_steps: Int[np.ndarray, " n"]
    values: Float[np.ndarray, "n k"]
    thresholds: Float[np.ndarray, " n"]
    residuals: Float[np.ndarray, "n k"]
    converged: Bool[np.ndarray, "n k"]
    matvecs: Int[np.ndarray, " n"]
    fractions: dict[str, Float[np.ndarray, " n"]]
    discreteness: Float[np.ndarray, " n"]
    local_errors: dict[str, Float[np.ndarray, " n"]]
    reasons: tuple[str, ...] = ()
    is_batched: bool = False
    accumulates: bool = False
    failures: tuple[str, ...] = ()
    mismatch: float = np.nan

    @property
    @_tree.nonfinite_is_data
    def ratios(self) -> Float[np.ndarray, " n"]:
        """The largest eigenvalue over the threshold: 1 is the edge."""
        return self.values[:, 0] / self.thresholds

    @property
    def _is_lost(self) -> Bool[np.ndarray, " n"]:
        """Where the curvature was measured and was not finite."""
        reasons = np.array([bool(reason) for reason in self.reasons] or np.zeros(len(self.edge_steps), bool))
        return ~np.isfinite(self.values).all(axis=1) & (reasons | np.isfinite(self.thresholds))

    @property
    @override
    def verdict(self) -> str:
        """When the run is at the edge or beyond it, and which block limits its rate, in a line."""
        known = np.isfinite(self.ratios)
        if not known.any():
            return f"{self._without_threshold()}{self._along_steps()}."
        compared = "of a Hessian that is not the derivative of the gradient: " * self._is_mismatched
        compared += "one batch against the threshold for the whole data: " * self.is_batched
        when = say_when(self.edge_steps[known], self.ratios[known])
        return f"{compared}{when}{self._divergence(known)}; {self._limit(known)}."

    @property
    def _is_mismatched(self) -> bool:
        return self.mismatch >= MAX_MISMATCH  # not where it is nan

    def _divergence(self, known: np.ndarray) -> str:
        """Return whether a run that is beyond its edge diverges, in words; empty for others."""
        steps, ratios = self.edge_steps[known], self.ratios[known]
        lost = self._is_lost & (self.edge_steps > steps[-1])
        if lost.any():
            return f"; it diverged: from step {self.edge_steps[lost][0]} on the curvature is not finite"
        since = find_since(ratios)
        if since is None or ratios[-1] < BEYOND:
            return ""
        losses = self.losses[self.steps >= steps[since]]
        if len(losses) < 2:
            return "; a quadratic loss would diverge there"
        goes = f"the loss goes from {format_number(losses[0])} to {format_number(losses[-1])}"
        if not losses[-1] <= _DIVERGED * losses[0]:
            return f"; it diverges: {goes}"
        return f"; a quadratic loss would diverge there, and {goes}"

    def _limit(self, known: np.ndarray) -> str:
        """Return the block with most of the eigenvector where the ratio is largest in the last quarter of the measurements."""
        rows = np.flatnonzero(known)
        rows = rows[-max(len(rows) // 4, 1) :]
        at = rows[int(np.argmax(self.ratios[rows]))]
        block = max(self.fractions, key=lambda name: self.fractions[name][at])
        return f"block {block or 'params'} limits the rate, with {self.fractions[block][at]:.0%} of the eigenvector"

    def _without_threshold(self) -> str:
        if len(self.edge_steps) == 0:
            return ""
        return "no threshold is known for this optimizer; "

    def _along_steps(self) -> str:
        if len(self.steps) == 0:
            return "nothing was measured along the steps"
        last = self.multiples[-max(len(self.steps) // 4, 1) :]
        last = last[~np.isnan(last)]
        if len(last) == 0:
            return "along the last steps nothing could be measured"
        return f"the loss begins to rise at {np.median(last):.2g} times the step (median of the last {len(last)} measurements)"

    @property
    @override
    def notes(self) -> tuple[Note, ...]:
        notes = []
        many = len(self.edge_steps)
        loose = int(np.sum(~self.converged.all(axis=1) & np.isfinite(self.values).all(axis=1)))
        if loose:
            said = f"In {loose} of {many} measurements the eigensolver did not converge: those values are lower bounds."
            notes.append(Note(said, is_fault=True))
        for reason in sorted({reason for reason in self.reasons if reason}):
            said = (
                f"In {self.reasons.count(reason)} of {many} measurements there is no threshold: of the optimizer, {reason}. The "
                "values there are eigenvalues of H only, and discreteness is not given. What is along the step holds for every optimizer."
            )
            notes.append(Note(said))
        if self._is_mismatched:
            notes.append(Note(MISMATCHED.format(self.mismatch), is_fault=True))
        if self.is_batched and np.isfinite(self.thresholds).any():
            notes.append(Note(_BATCHES))
        if self.accumulates:
            notes.append(Note(_ACCUMULATION))
        still = int(np.sum(np.isnan(self.multiples) & np.isfinite(self.losses)))
        if still:
            notes.append(
                Note(f"In {still} of {len(self.steps)} measurements along the step it had no length.")
            )
        notes.extend(Note(f"Not measured: {failure}", is_fault=True) for failure in self.failures)
        broken = int(np.sum(self._is_lost))
        if broken:
            notes.append(Note(f"In {broken} measurements the curvature was not finite.", is_fault=True))
        return tuple(notes)

    @override
    def _tables(self) -> tuple[Table, ...]:
        along = {
            "step": self.steps,
            "loss": self.losses,
            "critical multiple": self.multiples,
            "drop": self.drops,
            "predicted": self.predicted_drops,
        }
        names = np.array([name or "params" for name in self.fractions])
        most = np.argmax([*self.fractions.values()], axis=0) if self.fractions else np.zeros(0, int)
        edge = {
            "step": self.edge_steps,
            "eta lambda": self.values[:, 0],
            "threshold": self.thresholds,
            "ratio": self.ratios,
            "converged": np.where(self.converged[:, 0], "yes", "no, a lower bound"),
            "limited by": names[most],
            "eta|xi_0|/|g|": self.discreteness,
        }
        tables = (series_table("Along the steps", along), series_table("At the edge", edge))
        return tuple(table for table in tables if table.rows) or tables


@_tree.nonfinite_is_data
def make_edge_report(
    names: list[str],
    along: tuple[np.ndarray, Any],
    edge: tuple[np.ndarray, Any],
    accumulates: bool,
    failures: Any,
    mismatch: float,
) -> EdgeReport:
    """Make the report from each kind's steps and measurements, stacked along a leading axis (None for none)."""
    steps, a = along
    edge_steps, e = edge
    none, no_rows = np.zeros(0), np.zeros((0, 1))
    lengths = None if a is None else a.curvature / np.where(a.length > 0, a.length, 1) ** 2
    return EdgeReport(
        steps=steps,
        losses=none if a is None else a.loss,
        multiples=none if a is None else a.multiple,
        curvatures=none if lengths is None else lengths,
        drops=none if a is None else a.drop,
        predicted_drops=none if a is None else -a.slope - a.curvature / 2,
        evaluations=steps if a is None else a.evaluations,
        edge_steps=edge_steps,
        values=no_rows if e is None else e.values,
        thresholds=none if e is None else e.threshold,
        residuals=no_rows if e is None else e.residuals,
        converged=no_rows.astype(bool) if e is None else e.converged,
        matvecs=edge_steps if e is None else e.matvecs,
        fractions={} if e is None else _by_block(names, e.fractions),
        discreteness=none if e is None else e.discreteness,
        local_errors={} if e is None else _by_block(names, e.local_errors),
        reasons=() if e is None else tuple(Unknown(int(i)).reason for i in e.unknown),
        is_batched=e is not None and _differ(e.data[np.isfinite(e.values[:, 0])]),
        accumulates=accumulates,
        failures=tuple(failures),
        mismatch=mismatch,
    )


def _differ(checksums: np.ndarray) -> bool:
    return bool(np.any(checksums != checksums[:1]))


def _by_block(names: list[str], columns: np.ndarray) -> dict[str, np.ndarray]:
    return {name: columns[:, i] for i, name in enumerate(names)}
