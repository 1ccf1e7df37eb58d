"""Telemetry of a run: thresholds against real runs just below and just above them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import NET, NET_ARGS, flat, net_loss, normal, quadratic_loss, symmetric

import eomdl
from eomdl.observe.along import along
from eomdl.observe.response import linear_response


LR = 0.01
SHARPNESS = jax.jit(eomdl.sharpness(net_loss, 30))
THRESHOLDS = {
    "gd": (optax.sgd(LR), 2.0),
    "heavy ball": (optax.sgd(LR, 0.9), 2 + 2 * 0.9),
    "nesterov": (optax.sgd(LR, 0.9, nesterov=True), (2 + 2 * 0.9) / (1 + 2 * 0.9)),
    "rmsprop": (optax.rmsprop(LR, 0.9), 2.0),
    "rmsprop, momentum": (optax.rmsprop(LR, 0.9, momentum=0.5), 3.0),
    "adam": (optax.adam(LR, 0.9, 0.99), 2 * 1.9 / 0.1),
    "adamw, schedule": (optax.adamw(optax.cosine_decay_schedule(LR, 100), 0.8), 2 * 1.8 / 0.2),
}


def at_step(optimizer, count=5):
    """The optimizer's state after a few steps, with the next gradient."""
    state, params = optimizer.init(NET), NET
    for _ in range(count):
        gradient = jax.grad(net_loss)(params, NET_ARGS)
        updates, new = optimizer.update(gradient, state, params)
        params, state = optax.apply_updates(params, updates), new
    return state, jax.grad(net_loss)(params, NET_ARGS), params


@pytest.mark.parametrize("name", THRESHOLDS)
def test_thresholds_of_known_optimizers(name):
    optimizer, threshold = THRESHOLDS[name]
    found = linear_response(optimizer, *at_step(optimizer))
    assert bool(found.is_linear)
    np.testing.assert_allclose(found.threshold, threshold, rtol=1e-6)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.lion(LR),
        optax.sign_sgd(LR),
        optax.adagrad(LR),
        optax.amsgrad(LR),
        optax.adabelief(LR),
        optax.chain(optax.ema(0.9), optax.scale(-LR)),
        optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(LR)),
        optax.sgd(-LR),
    ],
    ids=["lion", "sign", "adagrad", "amsgrad", "adabelief", "ema", "clipping", "ascent"],
)
def test_what_is_not_known_has_no_threshold(optimizer):
    found = linear_response(optimizer, *at_step(optimizer))
    assert not bool(found.is_linear)


def test_rates_are_those_of_adam():
    optimizer = optax.chain(optax.clip_by_global_norm(1e3), optax.adam(LR, 0.9, 0.99, eps=1e-3))
    state, gradient, params = at_step(optimizer)
    found = linear_response(optimizer, state, gradient, params)
    nu = 0.99 * flat(state[1][0].nu) + 0.01 * flat(gradient) ** 2
    expected = LR / (np.sqrt(nu / (1 - 0.99**6)) + 1e-3) / (1 - 0.9**6)
    np.testing.assert_allclose(flat(found.rates), expected, rtol=1e-9)
    np.testing.assert_allclose(found.gain, 1)
    momentum = linear_response(optax.sgd(LR, 0.9), *at_step(optax.sgd(LR, 0.9)))
    np.testing.assert_allclose(flat(momentum.rates), LR, rtol=1e-12)
    np.testing.assert_allclose([momentum.gain, momentum.memory_factor], [10, 19], rtol=1e-9)


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
    telemetry = eomdl.observe.EdgeTelemetry(softmax_loss, optax.sgd(0.1), along_every=10, edge_every=None)
    run = eomdl.descend(
        softmax_loss, start, optax.sgd(0.1), 200, args=args, save_steps=10, telemetry=telemetry
    )
    report = telemetry.report()

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


# --------------------------------------------------------------- thresholds, really


def held(name, state):
    """The optimizer's state with second moments that stay as they are."""
    nu = {"a": jnp.array([1.0, 4.0, 0.5]), "b": jnp.array([2.0, 0.3])}
    if "adam" in name:
        count = jnp.asarray(10**6)
        return (state[0]._replace(count=count, nu=jax.tree.map(lambda v: 1e-3 * v, nu)), *state[1:])
    return (state[0]._replace(nu=nu), *state[1:]) if "rms" in name else state


REAL = {
    "gd": lambda lr: optax.sgd(lr),
    "heavy ball": lambda lr: optax.sgd(lr, 0.9),
    "nesterov": lambda lr: optax.sgd(lr, 0.9, nesterov=True),
    "rmsprop": lambda lr: optax.rmsprop(lr, 1 - 1e-9),
    "adam": lambda lr: optax.adam(lr, 0.9, 1 - 1e-9),
}


@pytest.mark.parametrize("name", REAL)
def test_a_real_run_is_stable_below_the_threshold_and_not_above(name):
    args = (jnp.asarray(symmetric([0.1, 0.3, 0.5, 1.0, 2.0])), jnp.zeros(5))
    start = {"a": 1e-6 * normal(0, 3), "b": 1e-6 * normal(1, 2)}
    gradient = jax.grad(quadratic_loss)(start, args)
    small = REAL[name](1e-3)
    found = linear_response(small, held(name, small.init(start)), gradient, start)
    r = np.sqrt(flat(found.rates))
    largest = np.linalg.eigvalsh(r[:, None] * np.asarray(args[0]) * r)[-1]

    @jax.jit
    def norms(lr):
        optimizer = REAL[name](lr)

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(quadratic_loss)(params, args), state, params)
            size = jnp.linalg.norm(jnp.concatenate(jax.tree.leaves(params)))
            return (optax.apply_updates(params, updates), state), size

        begin = (start, held(name, optimizer.init(start)))
        return jax.lax.scan(step, begin, length=500)[1]

    edge = 1e-3 * found.threshold / largest
    assert bool(found.is_linear)
    below, above = norms(0.98 * edge), norms(1.02 * edge)
    assert below[-1] < 0.1 * below[0]
    assert np.max(above) > 10 * np.max(
        below
    )  # there is a transient with a memory; later its squares hold it back


# ------------------------------------------------------------------------ telemetry


def test_the_edge_of_a_quadratic_in_a_loop_and_in_descend():
    args = (jnp.asarray(symmetric([0.1, 0.3, 0.5, 1.0, 2.0])), jnp.zeros(5))
    start = {"a": normal(0, 3), "b": normal(1, 2)}
    optimizer = optax.sgd(0.9, 0.5)
    loop, within = (
        eomdl.observe.EdgeTelemetry(quadratic_loss, optimizer, along_every=4, edge_every=8, k=2) for _ in "ab"
    )
    params, state = start, optimizer.init(start)
    for step in range(20):
        gradient = jax.grad(quadratic_loss)(params, args)
        loop.look(step, params, state, args, gradient=gradient)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    eomdl.descend(quadratic_loss, start, optimizer, 20, args=args, telemetry=within)
    report = loop.report()
    np.testing.assert_array_equal(report.steps, np.arange(0, 20, 4))
    np.testing.assert_array_equal(report.edge_steps, [0, 8, 16])
    np.testing.assert_allclose(report.values, 0.9 * np.array([[2.0, 1.0]] * 3), rtol=1e-6)
    np.testing.assert_allclose(report.thresholds, 3.0, rtol=1e-9)
    np.testing.assert_allclose(report.ratios, 0.6, rtol=1e-6)
    np.testing.assert_allclose(sum(report.shares.values()), 1, rtol=1e-10)
    np.testing.assert_allclose(report.drops, report.predicted_drops, rtol=1e-8, atol=1e-12)
    assert report.matvecs[1] <= 12
    assert report.verdict.startswith("below the edge: at most 60% of the threshold, at step")
    assert not report.notes
    for name in ("values", "multiples", "drops", "discreteness", "losses"):
        np.testing.assert_allclose(getattr(within.report(), name), getattr(report, name), rtol=1e-5)


def test_discreteness_is_the_counter_term():
    eta = 0.3
    telemetry = eomdl.observe.EdgeTelemetry(net_loss, optax.sgd(eta), along_every=None)
    telemetry.look(0, NET, optax.sgd(eta).init(NET), NET_ARGS)
    report = telemetry.report()
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
    telemetry = eomdl.observe.EdgeTelemetry(net_loss, optimizer, along_every=2, edge_every=2)
    eomdl.descend(net_loss, NET, optimizer, 4, args=NET_ARGS, telemetry=telemetry)
    report = telemetry.report()
    assert report.verdict.startswith("no threshold is known for this optimizer; the loss begins to rise at")
    assert np.all(np.isnan(report.thresholds))
    assert "there is no threshold" in report.notes[0]
    np.testing.assert_allclose(report.values[0], SHARPNESS(NET, NET_ARGS), rtol=1e-3)
    assert "critical multiple" in report.table()


def test_a_schedule_through_the_edge():
    args = (jnp.asarray(symmetric([0.1, 0.3, 0.5, 1.0, 2.0])), jnp.zeros(5))
    start = {"a": normal(0, 3), "b": normal(1, 2)}
    rises = optax.sgd(lambda k: jnp.where(k < 20, 0.2, 0.95))
    telemetry = eomdl.observe.EdgeTelemetry(quadratic_loss, rises, along_every=None, edge_every=10)
    eomdl.descend(quadratic_loss, start, rises, 50, args=args, telemetry=telemetry)
    report = telemetry.report()
    np.testing.assert_allclose(report.ratios, [0.2, 0.2, 0.95, 0.95, 0.95], rtol=1e-4)
    assert report.verdict.startswith("at the edge since step 20; block ")
    vector = np.linalg.eigh(args[0])[1][:, -1]
    np.testing.assert_allclose(report.shares["a"][-1], np.sum(vector[:3] ** 2), rtol=1e-3)
    figure = report.plot()
    assert len(figure.axes) == 1


def test_telemetry_of_wrong_arguments():
    telemetry = eomdl.observe.EdgeTelemetry(net_loss, optax.sgd(0.1), k=100)
    with pytest.raises(ValueError, match="k: expected"):
        telemetry.look(0, NET, optax.sgd(0.1).init(NET), NET_ARGS)
    telemetry.look(1, None, None, None)  # not looked at
    with pytest.raises(ValueError, match="telemetry: expected a run outside jit"):
        jax.jit(
            lambda p: (
                eomdl.descend(net_loss, p, optax.sgd(0.1), 2, args=NET_ARGS, telemetry=telemetry).final_params
            )
        )(NET)
    with pytest.raises(ValueError, match="telemetry: expected an eomdl"):
        eomdl.descend(net_loss, NET, optax.sgd(0.1), 2, args=NET_ARGS, telemetry=3)
    assert telemetry.report().verdict == "nothing was seen along the steps."


def test_parameters_in_float32_with_data_in_float64():
    data, w = jnp.asarray([1.0, 3.0]), jnp.ones(2, jnp.float32)
    sgd = optax.sgd(0.25)
    telemetry = eomdl.observe.EdgeTelemetry(lambda w, h: jnp.sum(h * w**2) / 2, sgd)
    telemetry.look(0, w, sgd.init(w), data)
    report = telemetry.report()
    # f(c) = -c eta |H w|^2 + c^2 eta^2 (H w)' H (H w) / 2 is zero at 2 * 10 / (0.25 * 28).
    np.testing.assert_allclose(report.multiples, [20 / 7], rtol=1e-6)
    np.testing.assert_allclose(report.values, [[0.75]], rtol=1e-6)
