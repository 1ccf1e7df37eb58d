"""The curvature along a run against the stability threshold of an optimizer that is not gradient descent with momentum."""

import dataclasses
from typing import Any

import numpy as np
import optax
from jaxtyping import Float, Int
from typing_extensions import override

from eomdl._types import Args, Loss, Params, State
from eomdl.runs.discrete import descend
from eomdl.runs.monitor import AbstractMonitor
from eomdl.telemetry.edge_telemetry import EdgeTelemetry


@dataclasses.dataclass(frozen=True)
class Stability:
    r"""The curvature against the optimizer's stability threshold at m steps.

    - `products`: shape (m,), $\eta\lambda$; where `is_preconditioned` the largest eigenvalue of R H, with the optimizer's rate R of
        each parameter; nan where none is known.
    - `thresholds`: (m,), the optimizer's own; nan where none is known, and the `reasons` why.
    """

    products: Float[np.ndarray, " m"]
    thresholds: Float[np.ndarray, " m"]
    is_preconditioned: bool = False
    reasons: tuple[str, ...] = ()


def measure_stability(
    loss: Loss,
    params: Params,
    optimizer: optax.GradientTransformation,
    steps: Int[np.ndarray, " m"],
    whole_data: Args,
    options: dict[str, Any],
) -> Stability | None:
    """Run the optimizer to the last of these steps and measure its response and the curvature at each of them.

    None where it has no threshold in any of them. `options`: of `eomdl.descend`.

    **Cost:** a gradient for each step, and at most 10 more (first 25) for each measurement.
    """
    telemetry = EdgeTelemetry(loss, optimizer, along_every=None, edge_every=1)
    monitor = _OnWholeData(telemetry, frozenset(steps.tolist()), whole_data)
    run = descend(loss, params, optimizer, int(steps[-1]), monitors=[monitor], **options)
    last, state = run.end.state
    monitor.measure(int(steps[-1]), last, state, None)  # no step of the run begins at the last one
    report = telemetry.results()
    known = np.isfinite(report.thresholds)
    if not known.any():
        return None
    # Without a threshold the values are eigenvalues of H, which do not compare with the others.
    products = np.where(known, report.values[:, 0], np.nan)
    return Stability(products, report.thresholds, is_preconditioned=True, reasons=report.reasons)


@dataclasses.dataclass(frozen=True)
class _OnWholeData(AbstractMonitor):
    """Telemetry at given steps, with the optimizer's own state, of the loss on the whole data instead of that of the step."""

    telemetry: EdgeTelemetry
    steps: frozenset[int]
    data: Args

    @override
    def is_due(self, step: int) -> bool:
        return step in self.steps

    @override
    def measure(self, step: int, params: Params, state: State, args: Args) -> None:
        self.telemetry.measure(step, params, state, self.data)
