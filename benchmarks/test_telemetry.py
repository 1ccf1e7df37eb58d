"""What telemetry adds to a training loop of the user's own, on the digits MLP 64-32-32-10."""

import time
from functools import partial
from typing import Any

import jax
import optax
import pytest

from benchmarks.conftest import Record, Size
from benchmarks.measure import bar_row
from benchmarks.problems import Problem, digits_mlp
from eomdl.telemetry import EdgeTelemetry


ROUNDS, SMOKE_ROUNDS = 16, 2  # the first one warms up; the shortest of many short ones is least disturbed
KINDS: dict[str, tuple[dict[str, Any], float]] = {
    "along the step, every 10 steps": ({"along_every": 10, "edge_every": None}, 0.2),
    "eigenvalue, every 50 steps": ({"along_every": None, "edge_every": 50}, 0.5),
}


class _Training:
    """The loop of the guide "Telemetry of a training run"."""

    def __init__(self, case: Problem, optimizer: optax.GradientTransformation):
        self.case, self.optimizer = case, optimizer
        self._gradient = jax.jit(jax.grad(case.loss))
        self._applied = jax.jit(self._apply)

    def _apply(self, params: Any, state: Any, gradient: Any) -> tuple[Any, Any]:
        updates, state = self.optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    def seconds(self, num_steps: int, telemetry: EdgeTelemetry | None) -> float:
        """Of so many steps from the start."""
        params, args = self.case.params, self.case.args
        state = self.optimizer.init(params)
        start = time.perf_counter()
        for step in range(num_steps):
            gradient = self._gradient(params, args)
            if telemetry is not None:
                telemetry.measure(step, params, state, args, gradient=gradient)
            params, state = self._applied(params, state, gradient)
        jax.block_until_ready(params)
        return time.perf_counter() - start


def _overhead(kind: str, num_steps: int, rounds: int) -> dict[str, Any]:
    """Return the time with measurements over that without, the shortest of interleaved rounds, and what was measured."""
    case = digits_mlp(32, 500)
    optimizer = optax.sgd(case.learning_rate)
    training, options = _Training(case, optimizer), KINDS[kind][0]
    made = partial(EdgeTelemetry, case.loss, optimizer, **options)
    bare, watched = [], []
    for _ in range(rounds):
        telemetry = made()
        bare.append(training.seconds(num_steps, None))
        watched.append(training.seconds(num_steps, telemetry))
    report = telemetry.results()
    row = bar_row(f"telemetry {kind}: overhead", min(watched[1:]) / min(bare[1:]) - 1, KINDS[kind][1])
    return row | {
        "problem": case.name,
        "bare_ms_a_step": 1e3 * min(bare[1:]) / num_steps,
        "passes_per_measurement": float(report.evaluations.mean()) if len(report.steps) else None,
        "products_per_measurement": float(report.matvecs.mean()) if len(report.edge_steps) else None,
        "converged": int(report.converged.sum()),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_telemetry(record: Record, size: Size, kind: str) -> None:
    """Looks cost at most their part of the training time; timed in full size only."""
    row = record("bar", _overhead, kind, *((100, SMOKE_ROUNDS) if size.smoke else (300, ROUNDS)))
    assert row["passed"] or size.smoke
