"""What the telemetry of a run has seen, in a table and in words."""

import dataclasses
import io
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from eomdl import _check


NEAR = 0.9  # of the threshold, from which on a run is said to be at the edge,
MOSTLY = 0.75  # if it is so in this part of the looks that follow


@dataclasses.dataclass(frozen=True)
class EdgeReport:
    r"""What `EdgeTelemetry` has seen of a run: m looks along its steps, n looks at the edge.

    Along the step u, with f(c) the change of the loss in c times the step:

    - `steps`: shape (m,). `losses`: the loss before the step.
    - `multiples`: the critical multiple, f(c) = 0; mostly to within 2 %; 0 where u leads upwards, infinite where none was found.
    - `curvatures`: $u^\top H u / |u|^2$. `drops`: -f(1), and `predicted_drops`: $-g \cdot u - u^\top H u / 2$.
    - `evaluations`: forward passes.

    At the edge:

    - `edge_steps`: (n,). `values`: (n, k), the largest eigenvalues of R H, $\eta\lambda$ for one rate $\eta$; of H where the
        threshold is nan.
    - `thresholds`: (n,), the optimizer's own; nan where none is known.
    - `residuals`: (n, k), `converged`: (n, k), `matvecs`: (n,): as in `eomdl.curvature.Eigenpairs`. A value that has not converged
        is a lower bound.
    - `shares`: `{block: (n,)}`, the part of the first eigenvector in each leaf of the parameters, squared: they sum to 1.
    - `discreteness`: (n,), $\eta|\xi_0|/|g|$; `local_errors`: `{block: (n,)}`, $\eta^2 |\xi_0|$, what gradient flow is off in one step.
        With a rate for each parameter and a memory those of its flow in the long run. nan where the threshold is.
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
    shares: dict[str, Float[np.ndarray, " n"]]
    discreteness: Float[np.ndarray, " n"]
    local_errors: dict[str, Float[np.ndarray, " n"]]

    @property
    def ratios(self) -> Float[np.ndarray, " n"]:
        """The largest eigenvalue over the threshold: 1 is the edge."""
        return self.values[:, 0] / self.thresholds

    @property
    def verdict(self) -> str:
        """Whether the run is at the edge, since when, and which block limits its rate, in a line."""
        known = np.isfinite(self.ratios)
        if not known.any():
            return f"{self._without()}{self._steps_taken()}."
        return f"{self._at_edge(known)}; {self._limit(known)}."

    def _at_edge(self, known: np.ndarray) -> str:
        steps, ratios = self.edge_steps[known], self.ratios[known]
        near = ratios >= NEAR
        if not near.any():
            top = int(np.argmax(ratios))
            return f"below the edge: at most {ratios[top]:.0%} of the threshold, at step {steps[top]}"
        # A run hovers at its edge: now and then a look finds it a little below.
        from_there = np.cumsum(near[::-1])[::-1] / np.arange(len(near), 0, -1)
        since = np.flatnonzero(near & (from_there >= MOSTLY))
        if len(since):
            return f"at the edge since step {steps[since[0]]}"
        last = int(np.flatnonzero(near)[-1])
        now = f"{ratios[-1]:.0%} of the threshold at step {steps[-1]}"
        if last == 0:  # the first step of Adam, say, whose second moments are those of one gradient
            return f"below the edge but for the first look: {now}"
        return f"at the edge up to step {steps[last]}, then below: {now}"

    def _limit(self, known: np.ndarray) -> str:
        """The block with most of the eigenvector where the ratio is largest in the last quarter of the looks."""
        rows = np.flatnonzero(known)
        rows = rows[-max(len(rows) // 4, 1) :]
        at = rows[int(np.argmax(self.ratios[rows]))]
        block = max(self.shares, key=lambda name: self.shares[name][at])
        return (
            f"block {block or 'params'} limits the rate, with {self.shares[block][at]:.0%} of the eigenvector"
        )

    def _without(self) -> str:
        if len(self.edge_steps) == 0:
            return ""
        return "no threshold is known for this optimizer; "

    def _steps_taken(self) -> str:
        if len(self.steps) == 0:
            return "nothing was seen along the steps"
        last = self.multiples[-max(len(self.steps) // 4, 1) :]
        return f"the loss begins to rise at {np.median(last):.2g} times the step (median of the last {len(last)} looks)"

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know of the numbers."""
        notes = []
        loose = int(np.sum(~self.converged.all(axis=1)))
        if loose:
            notes.append(
                f"In {loose} of {len(self.edge_steps)} looks the eigensolver did not converge: those values are lower bounds."
            )
        unknown = int(np.sum(np.isnan(self.thresholds)))
        if unknown:
            notes.append(
                f"In {unknown} of {len(self.edge_steps)} looks the optimizer's update was not linear in the gradient and one memory, "
                "so there is no threshold: the values are eigenvalues of H only, and discreteness is not given. What "
                "is along the step holds for every optimizer."
            )
        broken = int(np.sum(~np.isfinite(self.values).all(axis=1)))
        if broken:
            notes.append(f"In {broken} looks the curvature was not finite.")
        return tuple(notes)

    def table(self, rows: int = 12) -> str:
        """The verdict, one row for each of up to `rows` looks of both kinds, and the notes, as text."""
        rows = _check.integer("rows", rows, 1)
        heads: tuple[str, ...] = ("step", "loss", "critical multiple", "drop", "predicted")
        cells: list[tuple[str, ...]] = [
            (str(step), *(f"{x:.3g}" for x in values))
            for step, *values in zip(
                self.steps, self.losses, self.multiples, self.drops, self.predicted_drops, strict=True
            )
        ]
        text = _table("Along the steps", heads, cells, rows) if cells else ""
        heads = ("step", "eta lambda", "threshold", "ratio", "limited by", "eta|xi_0|/|g|")
        names = np.array(list(self.shares))
        most = np.argmax(np.stack(list(self.shares.values())), axis=0) if self.shares else []
        numbers = zip(self.values[:, 0], self.thresholds, self.ratios, strict=True)
        cells = [
            (str(step), *_numbers(*some, is_bound=not ok[0]), names[i], f"{d:.2g}")
            for step, some, i, d, ok in zip(
                self.edge_steps, numbers, most, self.discreteness, self.converged, strict=True
            )
        ]
        text += _table("At the edge", heads, cells, rows) if cells else ""
        return f"{self.verdict}\n{text}" + "".join(f"! {note}\n" for note in self.notes)

    def __str__(self) -> str:
        return self.table()

    def plot(self) -> Any:
        """The eigenvalue against the threshold over training, by block, and the critical multiple, as a matplotlib figure."""
        from eomdl.plotting import plot_edge

        return plot_edge(self)


def _numbers(value: float, threshold: float, ratio: float, is_bound: bool) -> tuple[str, str, str]:
    """An eigenvalue that has not converged is a lower bound, and so is its ratio."""
    sign = ">= " * is_bound
    return f"{sign}{value:.3g}", f"{threshold:.3g}", f"{sign}{ratio:.3g}"


def _table(title: str, heads: tuple[str, ...], cells: list[tuple[str, ...]], rows: int) -> str:
    """A table of up to so many of the rows, evenly spaced, the last one among them."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for head in heads:
        table.add_column(head, justify="right")
    for i in np.unique(np.linspace(0, len(cells) - 1, min(rows, len(cells))).round().astype(int)):
        table.add_row(*cells[i])
    text = io.StringIO()
    Console(file=text, width=120, legacy_windows=False).print(table)
    return text.getvalue()


def report(names: list[str], along: tuple[np.ndarray, Any], edge: tuple[np.ndarray, Any]) -> EdgeReport:
    """From the steps of each kind of looks, and the looks stacked along a leading axis (None for none)."""
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
        shares={} if e is None else _by_block(names, e.shares),
        discreteness=none if e is None else e.discreteness,
        local_errors={} if e is None else _by_block(names, e.local_errors),
    )


def _by_block(names: list[str], columns: np.ndarray) -> dict[str, np.ndarray]:
    return {name: columns[:, i] for i, name in enumerate(names)}
