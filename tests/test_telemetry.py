"""Telemetry of a run: along its steps, at its edge, and since when it is there."""

import pickle
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import NET, NET_ARGS, flat, net_loss, normal, quadratic_loss, symmetric

import eomdl
from eomdl.telemetry.along import along
from eomdl.telemetry.at_edge import NEAR, find_intervals, find_since, say_when


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
    ("ratios", "since", "words"),
    [
        ([0.1, 0.5, 0.89], None, "below the edge: at most 89% of the threshold, at step 2"),
        ([0.5, 0.9, 1.1, 1.0], 1, "at the edge since step 1"),
        ([1.0, 1.0, 0.8, 1.0], 0, "at the edge since step 0 (in 3 of 4 measurements)"),  # it hovers
        (
            [4.0, 0.3, 0.4, 1.0],
            3,
            "at the edge since step 3, and before at step 0 (up to 400% of the threshold)",
        ),
        (
            [4.0, 0.3, 0.4, 0.5],
            None,
            "below the edge but for the first measurement: 50% of the threshold at step 3",
        ),
        (
            [0.5, 1.0, 1.0, 0.8, 0.9, 0.5, 0.4],
            None,
            "at the edge from step 1 to 2 and at step 4, now below: 40% of the threshold at step 6",
        ),
        (
            [1.0, 20.0, 22.0],
            0,
            "beyond the edge, 22 times the threshold at step 2: at the edge or beyond since step 0",
        ),
    ],
)
def test_when(ratios, since, words):
    assert find_since(np.asarray(ratios)) == since
    assert say_when(np.arange(len(ratios)), np.asarray(ratios)).startswith(words)


def test_the_intervals_in_the_words_are_those_of_the_ratios():
    """Every step that the words name is at the edge, and every step at the edge is named, or counted."""
    rng = np.random.default_rng(0)
    for _ in range(500):
        count = rng.integers(1, 40)
        ratios = 0.9 + 0.15 * np.cumsum(rng.normal(size=count)) * rng.choice([0.2, 1, 3]) / np.sqrt(count)
        steps, near = 10 * np.arange(count), ratios >= NEAR
        rows = np.concatenate([np.arange(i.first, i.last + 1) for i in find_intervals(ratios)] or [[]])
        np.testing.assert_array_equal(rows, np.flatnonzero(near))
        words = say_when(steps, ratios)
        if words.startswith("below the edge"):
            assert not near[1:].any()
            continue
        ranges = [(int(a), int(b)) for a, b in re.findall(r"from step (\d+) to (\d+)", words)]
        named = words.split(", now below")[0].split(": at the edge or beyond")[-1]
        ranges += [(int(a), int(a)) for a in re.findall(r"at step (\d+)", named)]
        since = re.search(r"since step (\d+)", words)
        ranges += [(int(since[1]), steps[-1])] if since else []
        said = np.any([(a <= steps) & (steps <= b) for a, b in ranges], axis=0)
        counts = [tuple(map(int, found)) for found in re.findall(r"in (\d+) of (?:the )?(\d+) meas", words)]
        if counts:  # one or two of the ranges are counted
            assert said[near].all()
            assert sum(a - b for a, b in counts) == near.sum() - said.sum()
        else:
            np.testing.assert_array_equal(said, near)


# ------------------------------------------------- what people train with


def every_step(loss, optimizer, along_every=None):
    """A telemetry of every step, all of whose measurements are one program."""
    return eomdl.telemetry.EdgeTelemetry(
        loss, optimizer, along_every=along_every, edge_every=1, num_matvecs=16
    )


def measured(loss, params, optimizer, args, steps=1, along_every=None):
    """The report on the first steps of a run."""
    telemetry, state = every_step(loss, optimizer, along_every), optimizer.init(params)
    for step in range(steps):
        gradient = jax.grad(loss)(params, args)
        telemetry.measure(step, params, state, args, gradient=gradient)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return telemetry.results()


SGD = optax.sgd(0.4)
STEEP = (jnp.diag(jnp.array([4.0, 1.0])), jnp.zeros(2))
W = jnp.array([3.0, -2.0])


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.chain(optax.clip_by_global_norm(0.01), optax.adam(0.01)),
        optax.chain(optax.clip(8.9), optax.sgd(0.4)),  # of the gradient (12, -2)
    ],
    ids=["before Adam", "of one entry"],
)
def test_clipping_is_noticed(optimizer):
    report = measured(quadratic_loss, W, optimizer, STEEP)
    assert np.isnan(report.thresholds).all()
    assert "no threshold is known" in report.verdict
    assert "clipped" in report.notes[0]
    np.testing.assert_allclose(report.values, [[4.0]])


def test_accumulated_gradients_make_one_step():
    optimizer = optax.MultiSteps(optax.sgd(0.6), 3).gradient_transformation()
    report = measured(quadratic_loss, W, optimizer, STEEP, 4, along_every=1)
    np.testing.assert_allclose(report.ratios, 1.2, rtol=1e-6)  # a step multiplies by 1 - 0.6 * 4 = -1.4
    np.testing.assert_allclose(report.multiples[:3], 2 * 148 / (0.6 * 580), rtol=0.02)
    assert any("after several gradients" in note for note in report.notes)
    summed = optax.MultiSteps(optax.sgd(0.2), 3, use_grad_mean=False).gradient_transformation()
    np.testing.assert_allclose(measured(quadratic_loss, W, summed, STEEP).ratios, 1.2, rtol=1e-6)


def test_a_step_without_length_is_not_called_a_rise():
    warm_up = optax.sgd(optax.linear_schedule(0.0, 0.5, 10))
    report = measured(quadratic_loss, W, warm_up, STEEP, 2, along_every=1)
    assert np.isnan(report.multiples[0])
    assert report.reasons == ("its rate was 0", "")
    np.testing.assert_allclose(report.ratios[1], 0.05 * 4 / 2, rtol=1e-6)
    assert any("it had no length" in note for note in report.notes)


def test_frozen_parts_and_groups_with_memories():
    params = {"a": W, "b": jnp.array([0.5])}
    args = (jnp.diag(jnp.array([4.0, 1.0, 50.0])), jnp.zeros(3))
    for kind, threshold in ((optax.adam(0.01), 38.0), (optax.sgd(0.1, 0.9), 3.8)):
        optimizer = optax.partition(
            {"train": kind, "freeze": optax.set_to_zero()}, {"a": "train", "b": "freeze"}
        )
        report = measured(quadratic_loss, params, optimizer, args)
        np.testing.assert_allclose(report.thresholds, threshold, rtol=1e-6)
        assert report.fractions["b"][0] < 1e-20
    both = optax.partition({"a": optax.sgd(0.1, 0.9), "b": optax.sgd(0.06)}, {"a": "a", "b": "b"})
    report = measured(quadratic_loss, params, both, args)
    np.testing.assert_allclose(report.ratios, 0.06 * 50 / 2, rtol=1e-6)
    assert "block b limits the rate" in report.verdict


def test_weight_decay_before_a_memory_is_that_in_the_loss():
    optimizer = optax.chain(optax.add_decayed_weights(0.3), optax.sgd(0.2, 0.9))
    report = measured(quadratic_loss, W, optimizer, STEEP)
    inside = measured(eomdl.WeightDecay(quadratic_loss, 0.3), W, optax.sgd(0.2, 0.9), STEEP)
    np.testing.assert_allclose(report.ratios, 0.2 * 4.3 / 3.8, rtol=1e-6)
    for name in ("ratios", "discreteness"):
        np.testing.assert_allclose(getattr(report, name), getattr(inside, name), rtol=1e-4)


def uncoupled_loss(params, args):
    del args
    return 6 * params["a"] ** 2 + params["y"] * params["b"] ** 2 / 2 - params["y"] / 2


def test_a_direction_that_overtakes_without_coupling_is_found():
    sgd = optax.sgd(0.1)
    telemetry = every_step(uncoupled_loss, sgd)
    for step, y in enumerate((1.0, 5.0, 13.0, 20.0, 41.0)):
        params = {"a": jnp.asarray(1e-3), "b": jnp.zeros(()), "y": jnp.asarray(y)}
        telemetry.measure(step, params, sgd.init(params), None)
    report = telemetry.results()
    np.testing.assert_allclose(report.ratios, [0.6, 0.6, 0.65, 1.0, 2.05], rtol=1e-3)
    np.testing.assert_allclose(report.fractions["b"][2:], 1, rtol=1e-3)


def test_batches_are_told_from_the_whole_data():
    telemetry, state = every_step(quadratic_loss, SGD), SGD.init(W)
    for step, scale in enumerate((1.0, 1.1)):
        telemetry.measure(step, W, state, (scale * STEEP[0], STEEP[1]), gradient=W)
    report = telemetry.results()
    assert report.is_batched
    assert report.verdict.startswith("one batch against the threshold for the whole data: ")
    assert any("batch sharpness" in note for note in report.notes)
    assert not measured(quadratic_loss, W, SGD, STEEP, 2).is_batched


def test_far_beyond_the_edge():
    steep = (3.75 * STEEP[0], STEEP[1])
    report = measured(quadratic_loss, W, SGD, steep, 4, along_every=1)
    words = "beyond the edge, 300% of the threshold at step 3: at the edge or beyond since step 0"
    assert report.verdict.startswith(words)
    assert "; it diverges: the loss goes from 75 to " in report.verdict
    assert "a quadratic loss would diverge there" in measured(quadratic_loss, W, SGD, steep).verdict
    infinite = measured(
        quadratic_loss, jnp.full(2, 1e200), SGD, steep, along_every=1
    )  # no warning of NumPy's
    assert infinite.table()
    lost = measured(quadratic_loss, W, SGD, (jnp.full((2, 2), jnp.nan), STEEP[1]))
    assert any("curvature was not finite" in note for note in lost.notes)


def test_what_raises_in_a_measurement_does_not_end_the_run():
    def update(gradient, state, params):
        raise RuntimeError("no update for you\nsecond line")

    broken = optax.GradientTransformation(optax.init_empty_state, update)
    telemetry = every_step(quadratic_loss, broken, along_every=1)
    for step in range(5):
        telemetry.measure(step, W, (), STEEP)
    report = telemetry.results()
    assert np.isnan(report.multiples).all()
    assert np.isnan(report.thresholds).all()
    np.testing.assert_allclose(report.values, 4.0)
    (note,) = (note for note in report.notes if "RuntimeError" in note)
    assert note == "Not measured: along the step (RuntimeError: no update for you) at 3 steps from 0 to 2"
    assert "along the last steps nothing could be measured" in report.verdict
    assert report.table()


class NamedVariable(NamedTuple):
    """A box for each leaf of a state, as flax.nnx has."""

    value: Any


class Boxed(NamedTuple):
    """What has an optimizer and its state, as flax.nnx.Optimizer and the TrainState of flax do."""

    tx: Any
    opt_state: Any


def test_an_optimizer_that_keeps_its_state_itself():
    adam = optax.adam(0.01)
    boxed = Boxed(adam, jax.tree.map(NamedVariable, adam.init(W)))
    telemetry, gradient = every_step(quadratic_loss, boxed), jax.grad(quadratic_loss)(W, STEEP)
    telemetry.measure(0, W, boxed, STEEP, gradient=gradient)
    expected = measured(quadratic_loss, W, adam, STEEP)
    np.testing.assert_allclose(telemetry.results().ratios, expected.ratios, rtol=1e-6)


def test_a_pickled_telemetry_has_its_measurements():
    telemetry = every_step(quadratic_loss, SGD, along_every=1)
    telemetry.measure(0, W, SGD.init(W), STEEP, gradient=W)
    again = pickle.loads(pickle.dumps(telemetry))
    assert again.summary() == telemetry.summary()
    with pytest.raises(ValueError, match="measure: expected a telemetry with a loss and an optimizer"):
        again.measure(1, W, SGD.init(W), STEEP)


def semi_gradient_loss(w, args):
    """The gradient of a squared error whose target is held, as in temporal differences."""
    hessian, _ = args
    return jnp.vdot(w, hessian @ (w - 1.5 * jax.lax.stop_gradient(w)))


def test_a_hessian_that_is_not_the_derivative_of_the_gradient_is_said():
    report = measured(semi_gradient_loss, W, SGD, STEEP, 2)
    # The gradient is H (w - 1.5 w) + H w = H w / 2, the Hessian 2 H.
    np.testing.assert_allclose(report.mismatch, 0.75, rtol=1e-6)
    assert report.verdict.startswith("of a Hessian that is not the derivative of the gradient: ")
    (note,) = (note for note in report.notes if "stop_gradient" in note)
    assert note.is_fault
    assert "75%" in note
    assert measured(quadratic_loss, W, SGD, STEEP).mismatch == 0
