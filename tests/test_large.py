"""Large states: row by row, with few looks, from rows on disk. The limits are lowered, so that the problems stay small."""

import jax
import numpy as np
import optax
import pytest
from helpers import VALLEY, valley_loss

import eomdl


@pytest.mark.parametrize("stride", [1, 2])
def test_a_state_too_large_for_rows_in_memory_is_carried_row_by_row(monkeypatch, stride):
    flow = eomdl.InterpolatingFlow(
        eomdl.optimizer_step(valley_loss, optax.sgd(0.1)), 0.1, points=3, stride=stride
    )
    options = {"save_steps": 4, "rtol": 1e-9, "atol": 1e-11}
    whole = eomdl.solve(flow, VALLEY, 13, **options)
    monkeypatch.setattr("eomdl.runs.plan.MAX_SCALARS", 1)
    monkeypatch.setattr("eomdl.runs.continuous._FLAT", 0)
    single = eomdl.solve(flow, VALLEY, 13, **options)
    np.testing.assert_array_equal(single.steps, whole.steps)
    for a, b in zip(jax.tree.leaves(single.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7)


def test_a_look_at_the_diagnostics_is_not_taken_at_every_row_of_a_large_state(monkeypatch):
    monkeypatch.setattr("eomdl.runs.plan.MAX_SCALARS", 1)
    flow = eomdl.EquationOfMotion(valley_loss, 0.05, order=1)
    path = eomdl.solve(flow, VALLEY, 80, save_steps=10, rtol=1e-6, atol=1e-8)
    looks = path.stats.diagnostics["eta*lambda_max"].value
    assert len(looks) == 3  # at the start, past step 64, and at the end
    path = eomdl.solve(flow, VALLEY, 3, rtol=1e-6, atol=1e-8)
    assert len(path.stats.diagnostics["eta*lambda_max"].value) == 2


def test_tolerances_are_measured_in_one_ode_step(monkeypatch):
    from eomdl.runs import continuous

    counts = []

    def spy(*arguments):
        out = integrate(*arguments)
        counts.append(int(out[3]["num_steps"]))
        return out

    integrate = continuous.integrate
    monkeypatch.setattr(continuous, "integrate", spy)
    flow = eomdl.EquationOfMotion(valley_loss, 0.1, order=1)
    eomdl.solve(flow, VALLEY, 20, estimate_error=False, save_steps=[20])
    assert counts[0] == 1
    assert len(counts) == 2
