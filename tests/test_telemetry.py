"""Telemetry of a run: along its steps, at its edge, and since when it is there."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import NET, NET_ARGS, flat, net_loss, normal, quadratic_loss, symmetric

import eomdl
from eomdl.telemetry.along import along
from eomdl.telemetry.at_edge import Stay, find_stay


SHARPNESS = jax.jit(eomdl.sharpness(net_loss, 30))


# ------------------------------------------------------------- along the step


@pytest.mark.parametrize("eta", [0.05, 0.9, 1.1, 3.0])
def test_along_a_step_on_a_quadratic(eta):
    params, args = (
        {"a": normal(0, 4), "b": normal(1, 1)},
        (jnp.asarray(symmetric([0.1, 0.3, 0.5, 1, 2])), jnp.zeros(5)),
    )
    g, h = flat(jax.grad(quadratic_loss)(params, args)), np.asarray(args[0])
    found = jax.jit(along, static_argnums=0)(
        quadratic_loss, params, jax.tree.map(lambda x: -eta * x, jax.grad(quadratic_loss)(params, args)), args
    )
    bend = g @ h @ g
    np.testing.assert_allclose(found.slope, -eta * g @ g, rtol=1e-12)
    np.testing.assert_allclose(found.curvature, eta**2 * bend, rtol=1e-12)
    np.testing.assert_allclose(found.multiple, 2 * g @ g / bend / eta, rtol=1e-10)
    np.testing.assert_allclose(found.drop, eta * g @ g - eta**2 * bend / 2, rtol=1e-10)
    assert int(found.evaluations) <= 4


def test_critical_multiple_of_a_network_by_bisection():
    gradient = jax.grad(net_loss)(NET, NET_ARGS)
    value = jax.jit(lambda c: net_loss(jax.tree.map(lambda p, g: p - c * g, NET, gradient), NET_ARGS))
    low, high = 0.0, 64.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if value(middle) < value(0.0) else (low, middle)
    searched = jax.jit(along, static_argnums=0)
    for eta in (0.02, 0.5, 4.0):
        found = searched(net_loss, NET, jax.tree.map(lambda g, e=eta: -e * g, gradient), NET_ARGS)
        np.testing.assert_allclose(found.multiple * eta, low, rtol=0.02)
        np.testing.assert_allclose(found.drop, value(0.0) - value(eta), rtol=1e-9)
        assert int(found.evaluations) < 10


def softmax_loss(params, args):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(args[0] @ params, args[1]))


def test_critical_multiples_along_a_run_are_those_by_bisection():
    """Far from the edge, where f(c)/c rises ever slower: from one look to the next, in few passes."""
    args, start = (normal(3, 12, 8), jnp.arange(12) % 4), normal(4, 8, 4)
    telemetry = eomdl.telemetry.EdgeTelemetry(softmax_loss, optax.sgd(0.1), along_every=10, edge_every=None)
    run = eomdl.descend(
        softmax_loss, start, optax.sgd(0.1), 200, args=args, save_steps=10, monitors=[telemetry]
    )
    report = telemetry.results()

    @jax.jit
    def bisected(params):
        gradient, value = jax.grad(softmax_loss)(params, args), softmax_loss(params, args)

        def halved(_, ends):
            middle = sum(ends) / 2
            is_lower = softmax_loss(params - 0.1 * middle * gradient, args) < value
            return jnp.where(is_lower, middle, ends[0]), jnp.where(is_lower, ends[1], middle)

        return jax.lax.fori_loop(0, 50, halved, (0.0, 1e5))[0]

    exact = np.array([bisected(run.params[i]) for i in range(len(report.steps))])
    assert exact.max() > 100
    np.testing.assert_allclose(report.multiples, exact, rtol=0.05)
    assert report.evaluations[1:].mean() < 3


def test_a_step_upwards_and_a_step_without_end():
    up = along(net_loss, NET, jax.grad(net_loss)(NET, NET_ARGS), NET_ARGS)
    assert float(up.multiple) == 0
    assert float(up.drop) < 0
    down = along(lambda x, _: -jnp.sum(x), jnp.ones(2), jnp.ones(2), None)
    assert float(down.multiple) == np.inf
    assert int(down.evaluations) < 10
    # a step whose change is lost in the rounding of the loss: the quadratic model's
    lost = along(lambda x, _: 1 + jnp.sum(x**2), jnp.full(2, 1e-9), jnp.full(2, -1e-9), None)
    np.testing.assert_allclose(lost.multiple, 2.0)
    wild = along(lambda x, _: jnp.sum(jnp.exp(x**4) - x), jnp.ones(2), 10 * jnp.ones(2), None)
    assert not np.isfinite(float(wild.drop))


# ------------------------------------------------------------------------ telemetry


def test_the_edge_of_a_quadratic_in_a_loop_and_in_descend():
    args = (jnp.asarray(symmetric([0.1, 0.3, 0.5, 1.0, 2.0])), jnp.zeros(5))
    start = {"a": normal(0, 3), "b": normal(1, 2)}
    optimizer = optax.sgd(0.9, 0.5)
    loop, within = (
        eomdl.telemetry.EdgeTelemetry(quadratic_loss, optimizer, along_every=4, edge_every=8, k=2)
        for _ in "ab"
    )
    params, state = start, optimizer.init(start)
    for step in range(20):
        gradient = jax.grad(quadratic_loss)(params, args)
        loop.measure(step, params, state, args, gradient=gradient)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    eomdl.descend(quadratic_loss, start, optimizer, 20, args=args, monitors=[within])
    report = loop.results()
    np.testing.assert_array_equal(report.steps, np.arange(0, 20, 4))
    np.testing.assert_array_equal(report.edge_steps, [0, 8, 16])
    np.testing.assert_allclose(report.values, 0.9 * np.array([[2.0, 1.0]] * 3), rtol=1e-6)
    np.testing.assert_allclose(report.thresholds, 3.0, rtol=1e-9)
    np.testing.assert_allclose(report.ratios, 0.6, rtol=1e-6)
    np.testing.assert_allclose(sum(report.fractions.values()), 1, rtol=1e-10)
    np.testing.assert_allclose(report.drops, report.predicted_drops, rtol=1e-8, atol=1e-12)
    assert report.matvecs[1] <= 12
    assert report.verdict.startswith("below the edge: at most 60% of the threshold, at step")
    assert not report.notes
    for name in ("values", "multiples", "drops", "discreteness", "losses"):
        np.testing.assert_allclose(getattr(within.results(), name), getattr(report, name), rtol=1e-5)


def test_discreteness_is_the_counter_term():
    eta = 0.3
    telemetry = eomdl.telemetry.EdgeTelemetry(net_loss, optax.sgd(eta), along_every=None)
    telemetry.measure(0, NET, optax.sgd(eta).init(NET), NET_ARGS)
    report = telemetry.results()
    (xi,) = eomdl.counterterms(net_loss, NET, 1, NET_ARGS)
    gradient = jax.grad(net_loss)(NET, NET_ARGS)
    np.testing.assert_allclose(
        report.discreteness[0], eta * np.linalg.norm(flat(xi)) / np.linalg.norm(flat(gradient)), rtol=1e-10
    )
    np.testing.assert_allclose(
        report.local_errors["layer0.w"][0], eta**2 * np.linalg.norm(xi["layer0"]["w"]), rtol=1e-10
    )
    assert len(report.steps) == 0
    np.testing.assert_allclose(report.values[0], eta * SHARPNESS(NET, NET_ARGS), rtol=1e-3)


def test_an_optimizer_without_a_threshold_says_what_it_can_give():
    optimizer = optax.sign_sgd(1e-3)
    telemetry = eomdl.telemetry.EdgeTelemetry(net_loss, optimizer, along_every=2, edge_every=2)
    eomdl.descend(net_loss, NET, optimizer, 4, args=NET_ARGS, monitors=[telemetry])
    report = telemetry.results()
    assert report.verdict.startswith("no threshold is known for this optimizer; the loss begins to rise at")
    assert np.all(np.isnan(report.thresholds))
    assert "there is no threshold" in report.notes[0]
    np.testing.assert_allclose(report.values[0], SHARPNESS(NET, NET_ARGS), rtol=1e-3)
    assert "critical multiple" in report.table()


def test_a_schedule_through_the_edge():
    args = (jnp.asarray(symmetric([0.1, 0.3, 0.5, 1.0, 2.0])), jnp.zeros(5))
    start = {"a": normal(0, 3), "b": normal(1, 2)}
    rises = optax.sgd(lambda k: jnp.where(k < 20, 0.2, 0.95))
    telemetry = eomdl.telemetry.EdgeTelemetry(quadratic_loss, rises, along_every=None, edge_every=10)
    eomdl.descend(quadratic_loss, start, rises, 50, args=args, monitors=[telemetry])
    report = telemetry.results()
    np.testing.assert_allclose(report.ratios, [0.2, 0.2, 0.95, 0.95, 0.95], rtol=1e-4)
    assert report.verdict.startswith("at the edge since step 20; block ")
    vector = np.linalg.eigh(args[0])[1][:, -1]
    np.testing.assert_allclose(report.fractions["a"][-1], np.sum(vector[:3] ** 2), rtol=1e-3)
    figure = report.plot()
    assert len(figure.axes) == 1


def test_telemetry_of_wrong_arguments():
    telemetry = eomdl.telemetry.EdgeTelemetry(net_loss, optax.sgd(0.1), k=100)
    with pytest.raises(ValueError, match="k: expected"):
        telemetry.measure(0, NET, optax.sgd(0.1).init(NET), NET_ARGS)
    telemetry.measure(1, None, None, None)  # not looked at
    with pytest.raises(ValueError, match="monitors: expected a run outside jit"):
        jax.jit(
            lambda p: (
                eomdl.descend(
                    net_loss, p, optax.sgd(0.1), 2, args=NET_ARGS, monitors=[telemetry]
                ).final_params
            )
        )(NET)
    for wrong in (3, [3]):
        with pytest.raises(ValueError, match="monitors: expected a sequence of eomdl"):
            eomdl.descend(net_loss, NET, optax.sgd(0.1), 2, args=NET_ARGS, monitors=wrong)
    assert telemetry.results().verdict == "nothing was measured along the steps."


def test_parameters_in_float32_with_data_in_float64():
    data, w = jnp.asarray([1.0, 3.0]), jnp.ones(2, jnp.float32)
    sgd = optax.sgd(0.25)
    telemetry = eomdl.telemetry.EdgeTelemetry(lambda w, h: jnp.sum(h * w**2) / 2, sgd)
    telemetry.measure(0, w, sgd.init(w), data)
    report = telemetry.results()
    # f(c) = -c eta |H w|^2 + c^2 eta^2 (H w)' H (H w) / 2 is zero at 2 * 10 / (0.25 * 28).
    np.testing.assert_allclose(report.multiples, [20 / 7], rtol=1e-6)
    np.testing.assert_allclose(report.values, [[0.75]], rtol=1e-6)


@pytest.mark.parametrize(
    ("ratios", "stay"),
    [
        ([0.1, 0.5, 0.89], None),
        ([0.5, 0.9, 1.1, 1.0], Stay(1, 3, lasts=True)),
        ([1.0, 1.0, 0.8, 1.0], Stay(0, 3, lasts=True)),  # it hovers
        ([4.0, 0.3, 0.4, 0.5, 0.95, 1.0, 1.1], Stay(4, 6, lasts=True)),  # the first one is no stay
        ([4.0, 0.3, 0.4, 0.5, 0.6], Stay(0, 0, lasts=False)),
        ([0.5, 1.0, 1.0, 0.5, 0.4], Stay(1, 2, lasts=False)),
    ],
)
def test_since_when(ratios, stay):
    assert find_stay(np.asarray(ratios)) == stay
