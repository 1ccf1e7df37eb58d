"""The largest learning rate: closed forms, real runs at that rate, schedules, blocks, and edges."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import NET, NET_ARGS, VALLEY, net_loss, valley_loss

import eomdl
from eomdl.errors import largest_learning_rate


LAMBDA, START = 1.3, jnp.array(0.7, float)


def parabola(w, args):
    del args
    return LAMBDA * w**2 / 2


def test_a_parabola_in_closed_form():
    """E(t) = lambda^2 t exp(-lambda t) w / 2 is largest at t = 1/lambda; xi_0 = lambda^2 w / 2."""
    found = largest_learning_rate(parabola, START, time=2.0, tolerance=1e-3, points=130)
    worst = LAMBDA * float(START) * np.exp(-1) / 2
    np.testing.assert_allclose(found.value, 0.9e-3 / worst, rtol=1e-3)
    np.testing.assert_allclose(found.limited_at, 1 / LAMBDA, atol=0.02)
    path = START * np.exp(-LAMBDA * found.times)
    np.testing.assert_allclose(found.local, np.sqrt(2e-3 / (LAMBDA**2 * path)), rtol=1e-4)
    np.testing.assert_allclose(found.eta_lambda_max, found.value * LAMBDA, rtol=1e-6)
    assert found.notes == ()


def test_relative_to_the_distance_travelled():
    """|E| / (w0 - w) falls from lambda / 2 at t = 0."""
    found = largest_learning_rate(parabola, START, time=2.0, tolerance=1e-2, relative=True)
    np.testing.assert_allclose(found.value, 0.9e-2 * 2 / LAMBDA, rtol=1e-4)
    assert found.limited_at == 0
    np.testing.assert_allclose(found.local, 2e-2 / LAMBDA, rtol=1e-4)


@pytest.mark.parametrize(("order", "tolerance"), [(0, 1e-2), (1, 3e-4)])
def test_real_runs_at_that_rate_use_most_of_the_tolerance(order, tolerance):
    found = largest_learning_rate(net_loss, NET, 1.0, tolerance, order, args=NET_ARGS)
    assert found.notes == ()
    steps = int(np.ceil(1.0 / found.value))
    real = eomdl.descend(net_loss, NET, optax.sgd(found.value), steps, args=NET_ARGS)
    flow = eomdl.EquationOfMotion(net_loss, found.value, order)
    path = eomdl.solve(flow, NET, steps, args=NET_ARGS, estimate_error=False)
    measured = eomdl.compare(real, {"flow": path}).distance["flow"].max()
    assert 0.5 * tolerance < measured < tolerance


def test_the_block_that_limits_has_the_lowest_rate_of_its_own():
    found = largest_learning_rate(valley_loss, VALLEY, 1.0, 1e-3)
    assert found.limited_by == min(found.block_value, key=lambda name: found.block_value[name])
    assert found.value <= min(found.block_value.values())


def test_it_says_where_the_answer_is_not_to_be_trusted():
    assert "no limit" in largest_learning_rate(parabola, START, 2.0, 1.0).notes[0]
    assert "more than the tenth" in largest_learning_rate(parabola, START, 2.0, 0.08).notes[0]
    straight = largest_learning_rate(lambda w, _: w, START, 1.0, 1e-3)
    assert straight.value == np.inf
    assert "No rate is too large" in straight.notes[0]


def test_a_start_at_rest_has_no_largest_rate():
    """Gradient and counter terms are zero there: no division by them."""
    for relative in (False, True):
        found = largest_learning_rate(parabola, jnp.array(0.0), 1.0, 1e-3, relative=relative)
        assert found.value == np.inf
        assert np.all(found.local == np.inf)


def test_gradient_flow_that_does_not_reach_the_time():
    with pytest.raises(ValueError, match="time: expected gradient flow to reach 10, got to"):
        largest_learning_rate(lambda w, _: -(w**4), START, 10.0, 1e-3)


def test_picture_with_and_without_a_largest_rate():
    rate = largest_learning_rate(parabola, START, 2.0, 1e-3, points=4)
    labels = [t.get_text() for t in rate.plot().axes[0].get_legend().get_texts()]
    assert labels == ["for one step from there", "for the whole time", "reached here"]
    straight = largest_learning_rate(lambda w, _: w, START, 1.0, 1e-3, points=4)
    assert len(straight.plot().axes[0].lines) == 1
