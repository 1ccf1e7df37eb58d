"""What a path says about its logarithm: how many points, which weights, how far from the identity."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import QUADRATIC, VALLEY, assert_close, flat, quadratic_loss, symmetric, valley_loss

import eomdl
from eomdl.choice.differences import starting_state
from eomdl.choice.points import multipliers
from eomdl.series.weights import taylor_weights


ETA = 0.4
SGD = optax.sgd(ETA)
HEAVY_BALL = optax.sgd(ETA, momentum=0.6)
ADAM = optax.adam(ETA)
QUADRATIC_SGD = eomdl.optimizer_step(quadratic_loss, SGD)
QUADRATIC_HEAVY_BALL = eomdl.optimizer_step(quadratic_loss, HEAVY_BALL)
VALLEY_HEAVY_BALL = eomdl.optimizer_step(valley_loss, HEAVY_BALL)


# ----------------------------------------------------------------- weights


def assert_order(weights, order):
    for m in range(order):
        moment = sum(b * math.comb(i, m) for i, b in enumerate(weights))
        np.testing.assert_allclose(moment, (-1) ** m / (m + 1), atol=1e-13 * np.abs(weights).max() * 2**m)


@pytest.mark.parametrize("points", [1, 2, 5, 10])
def test_taylor_weights_have_full_order(points):
    assert_order(taylor_weights(points), points)


@pytest.mark.parametrize(
    ("points", "bound", "order"), [(6, 0.6, 3), (8, 0.8, 4), (8, 0.95, None), (4, 0.3, 4)]
)
def test_minimax_weights_have_their_order_and_beat_taylor(points, bound, order):
    weights = eomdl.flows.minimax_weights(points, bound, order)
    assert_order(weights, points // 2 if order is None else order)
    z = np.linspace(1 - bound, 1 - 1e-6, 500)
    error = {
        name: np.abs(np.polyval(b[::-1], z) - np.log(z) / (z - 1)).max()
        for name, b in (("taylor", taylor_weights(points)), ("minimax", weights))
    }
    assert error["minimax"] <= (0.5 if order != points else 1 + 1e-6) * error["taylor"]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("points", (0, 0.5)),
        ("bound", (4, 0.0)),
        ("bound", (4, 1.0)),
        ("bound", (4, np.nan)),
        ("order", (4, 0.5, 0)),
        ("order", (4, 0.5, 5)),
    ],
)
def test_wrong_weights_are_named(name, arguments):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        eomdl.flows.minimax_weights(*arguments)


# -------------------------------------------------- multipliers of a step map


def departure(step_map, params, args=None, stride=1, start=None):
    r"""Return $\max |\mu - 1|$ over the multipliers: from 1 on the Taylor series of the logarithm diverges."""
    state, first = starting_state(step_map, params, start)
    size = sum(leaf.size for leaf in jax.tree.leaves(state))
    return np.abs(multipliers(step_map, state, first, args, stride, size) - 1).max()


@pytest.mark.parametrize("eigenvalues", [[0.1, 0.7, 2.0], [-1.5, 0.1, 0.7]])
def test_departure_of_gradient_descent_is_eta_times_the_largest_eigenvalue(eigenvalues):
    args = (jnp.asarray(symmetric(eigenvalues)), jnp.zeros(3))
    for stride in (1, 2):
        expected = np.abs((1 - ETA * np.array(eigenvalues)) ** stride - 1).max()
        measured = departure(QUADRATIC_SGD, jnp.ones(3), args=args, stride=stride)
        np.testing.assert_allclose(measured, expected, rtol=1e-8)


def test_departure_of_heavy_ball_is_that_of_its_companion_matrices():
    eigenvalues = np.linalg.eigvalsh(QUADRATIC.args[0])
    # (x, m) -> (x - eta (beta m + lambda x), beta m + lambda x)
    companions = [np.array([[1 - ETA * l, -ETA * 0.6], [l, 0.6]]) for l in eigenvalues]
    expected = max(np.abs(np.linalg.eigvals(c) - 1).max() for c in companions)
    measured = departure(QUADRATIC_HEAVY_BALL, QUADRATIC.params, args=QUADRATIC.args)
    np.testing.assert_allclose(measured, expected, rtol=1e-8)


def test_departure_is_measured_where_the_real_run_ended():
    run = eomdl.iterate(eomdl.optimizer_step(valley_loss, SGD), VALLEY, 6)
    there = departure(eomdl.optimizer_step(valley_loss, SGD), VALLEY, start=run.end)
    unravelled = lambda x: valley_loss({"x": x[0], "y": x[1]}, None)
    hessian = jax.hessian(unravelled)(jnp.asarray(flat(run.at(6))))
    np.testing.assert_allclose(there, ETA * np.abs(np.linalg.eigvalsh(hessian)).max(), rtol=1e-8)


# ---------------------------------------------------------- number of points


@pytest.mark.parametrize("stride", [1, 2])
def test_terms_are_differences_of_the_real_iterates(stride):
    found = eomdl.choice.choose_points(VALLEY_HEAVY_BALL, VALLEY, 12, stride=stride, max_points=3)
    real = eomdl.descend(valley_loss, VALLEY, HEAVY_BALL, 12 + 4 * stride)
    x = np.stack([real.params["x"], real.params["y"]], axis=1)[::stride]
    rows = 12 // stride
    sizes = np.array([np.linalg.norm(np.diff(x, n=j, axis=0)[:rows], axis=1).mean() / j for j in range(1, 5)])
    np.testing.assert_allclose(found.terms, sizes[1:] / sizes[0], rtol=1e-10)
    assert found.points == np.argmin(sizes[1:]) + 1


def test_terms_after_a_real_run_are_those_of_its_rest():
    start = eomdl.descend(valley_loss, VALLEY, HEAVY_BALL, 8)
    found = eomdl.choice.choose_points(VALLEY_HEAVY_BALL, VALLEY, 20, max_points=3, start=start.end)
    real = eomdl.descend(valley_loss, VALLEY, HEAVY_BALL, 24)
    x = np.stack([real.params["x"], real.params["y"]], axis=1)[8:]
    sizes = np.array([np.linalg.norm(np.diff(x, n=j, axis=0)[:12], axis=1).mean() / j for j in range(1, 5)])
    np.testing.assert_allclose(found.terms, sizes[1:] / sizes[0], rtol=1e-10)


def test_terms_after_a_real_run_whose_state_is_dropped_begin_with_a_new_one():
    run = eomdl.descend(valley_loss, VALLEY, HEAVY_BALL, 8)
    after = eomdl.choice.choose_points(
        VALLEY_HEAVY_BALL, VALLEY, 20, max_points=3, start=run.end.without_state()
    )
    new = eomdl.choice.choose_points(VALLEY_HEAVY_BALL, run.final_params, 12, max_points=3)
    np.testing.assert_allclose(after.terms, new.terms, rtol=1e-12)


def test_points_are_few_where_the_series_diverges_and_many_where_it_converges():
    def points(largest, stride):
        args = (jnp.diag(jnp.array([0.1, largest / ETA])), jnp.zeros(2))
        return eomdl.choice.choose_points(QUADRATIC_SGD, jnp.ones(2), 4, args=args, stride=stride).points

    assert points(1.7, stride=1) == 1
    assert points(0.4, stride=1) == 8
    assert points(1.7, stride=2) == 8  # 1 - 0.7^2 = 0.51 from the identity


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("step_map", {"step_map": SGD}),
        ("num_steps", {"num_steps": 0}),
        ("stride", {"stride": 0}),
        ("max_points", {"max_points": 0}),
    ],
)
def test_wrong_arguments_are_named(name, options):
    right = {"step_map": VALLEY_HEAVY_BALL, "params": VALLEY, "num_steps": 5}
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        eomdl.choice.choose_points(**right | options)


def test_runs_that_do_not_fit_are_refused():
    short = eomdl.descend(valley_loss, VALLEY, HEAVY_BALL, 5)
    with pytest.raises(ValueError, match=r"^num_steps: expected more than the 5 steps of start"):
        eomdl.choice.choose_points(VALLEY_HEAVY_BALL, VALLEY, 5, start=short.end)
    other = eomdl.iterate(lambda x, args, k: x, jnp.ones(3), 2)
    with pytest.raises(ValueError, match=r"^end\.state: expected the structure of this run"):
        eomdl.choice.choose_points(VALLEY_HEAVY_BALL, VALLEY, 5, start=other.end)
    with pytest.raises(ValueError, match=r"^params: expected a run that stays finite"):
        eomdl.choice.choose_points(lambda x, args, k: x**5, jnp.array(30.0), 8)


# ------------------------------------------------------- the smoothed path

# eta lambda = 1.9 and 0.04: one direction alternates
EDGE_ARGS = (jnp.diag(jnp.array([1.9 / ETA, 0.1])), jnp.zeros(2))
OBSERVE = {"loss": quadratic_loss}
STRIDED = eomdl.InterpolatingFlow(QUADRATIC_SGD, ETA, 4, stride=2)


@pytest.fixture(scope="module")
def real():
    return eomdl.descend(quadratic_loss, jnp.ones(2), SGD, 10, args=EDGE_ARGS, observe=OBSERVE, step_size=ETA)


@pytest.mark.parametrize("window", [1, 2, 3])
def test_smoothed_is_the_sliding_mean(real, window):
    smoothed = real.smoothed(window)
    rows = 12 - window
    expected = np.mean([real.params[i : i + rows] for i in range(window)], axis=0)
    np.testing.assert_allclose(smoothed.params, expected, rtol=1e-14)
    loss = np.mean([real.observables["loss"][i : i + rows] for i in range(window)], axis=0)
    np.testing.assert_allclose(smoothed.observables["loss"], loss, rtol=1e-14)
    np.testing.assert_array_equal(smoothed.steps, np.arange(rows))
    np.testing.assert_allclose(smoothed.times, ETA * np.arange(rows), rtol=1e-14)


def test_smoothed_refuses_gaps_and_short_runs(real):
    gaps = eomdl.descend(quadratic_loss, jnp.ones(2), SGD, 10, args=EDGE_ARGS, save_steps=2)
    for run, window in ((gaps, 2), (real, 12), (real, 0)):
        with pytest.raises(
            ValueError, match=r"^window: expected an integer >= 1|^window: expected an integer from 1"
        ):
            run.smoothed(window)


def test_comparison_smooths_both_and_picks_multiples(real):
    run = eomdl.solve(STRIDED, jnp.ones(2), 10, args=EDGE_ARGS, observe=OBSERVE)
    plain, smooth = (eomdl.compare(real, {"flow": run}, smooth=n) for n in (1, 2))
    by_hand = eomdl.compare(real.smoothed(2), {"flow": run.smoothed(2)})
    for field in ("steps", "travelled", "distance", "ode_error", "differences"):
        assert_close(getattr(smooth, field), getattr(by_hand, field), atol=0.0)
    np.testing.assert_array_equal(smooth.steps, np.arange(10))
    np.testing.assert_allclose(
        run.smoothed(2).ode_error, np.maximum(run.ode_error[1:], run.ode_error[:-1]), rtol=0
    )
    even = plain.at_multiples_of(2)
    np.testing.assert_array_equal(even.steps, np.arange(0, 11, 2))
    for field in ("times", "travelled", "distance", "block_distance", "ode_error", "differences"):
        expected = jax.tree.map(lambda x: x[::2], getattr(plain, field))
        assert_close(getattr(even, field), expected, atol=0.0)
    for comparison in (plain, smooth, even):
        assert any("flow of stride 2 predicts the multiples of 2" in note for note in comparison.notes)
    assert "stride 2" in even.table()


def test_wrong_multiples_and_windows_are_named(real):
    comparison = eomdl.compare(real, {"same": real})
    assert not any("stride" in note for note in comparison.notes)
    with pytest.raises(ValueError, match=r"^stride: expected an integer >= 1"):
        comparison.at_multiples_of(0)
    late = eomdl.descend(quadratic_loss, jnp.ones(2), SGD, 10, args=EDGE_ARGS, save_steps=[3, 5])
    with pytest.raises(ValueError, match=r"^stride: expected a divisor of a saved step"):
        eomdl.compare(late, {"same": late}).at_multiples_of(4)
    with pytest.raises(ValueError, match=r"^smooth: expected an integer >= 1"):
        eomdl.compare(real, {"same": real}, smooth=0)


def test_multipliers_of_a_step_without_a_derivative_are_not_known():
    """A parameter that has had no gradient: the root of its second moment in Adam has no derivative at 0."""
    step_map = eomdl.optimizer_step(lambda w, _: w[0] ** 2, ADAM)
    state, first = starting_state(step_map, jnp.ones(2), None)
    assert np.isnan(multipliers(step_map, state, first, None, 1, 3)).all()
