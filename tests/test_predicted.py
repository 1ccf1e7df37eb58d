"""The predicted error of a flow: closed forms, orders, minibatches, memory, strides, and where it does not hold."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import NET, NET_ARGS, NET_BATCHES, VALLEY, assert_close, net_loss, valley_loss

import eomdl
from eomdl.errors import predict_error


LAMBDA, START, ETA = 1.3, jnp.array(0.7), 0.1


def parabola(w, args):
    del args
    return LAMBDA * w**2 / 2


def exact(order: int, t: np.ndarray) -> np.ndarray:
    """e' = -lambda e + eta^(n+1) xi_n with xi_0 = lambda^2 w / 2, xi_1 = lambda^3 w / 3, on the flow's own w(t)."""
    if order == 0:
        return ETA * LAMBDA**2 / 2 * t * np.exp(-LAMBDA * t) * START
    slower = ETA * LAMBDA**2 / 2
    return ETA**2 * LAMBDA**3 / 3 * START * np.exp(-LAMBDA * t) * -np.expm1(-slower * t) / slower


@pytest.mark.parametrize("order", [0, 1])
def test_leading_error_of_a_parabola(order):
    flow = eomdl.EquationOfMotion(parabola, ETA, order) if order else eomdl.GradientFlow(parabola, ETA)
    found = predict_error(flow, START, 20, check=False)
    np.testing.assert_allclose(found.vector, exact(order, found.times), rtol=1e-3, atol=1e-9)
    assert_close(found.norm, np.abs(found.vector))
    assert found.embedded is None


def test_linearized_error_of_a_parabola_is_exact():
    """The map is linear there."""
    found = predict_error(eomdl.GradientFlow(parabola, ETA), START, 20, leading=False, check=False)
    real = START * (1 - ETA * LAMBDA) ** found.steps
    np.testing.assert_allclose(found.vector, found.path.params - real, rtol=1e-10, atol=1e-14)
    assert_close(found.travelled, np.abs(found.path.params - START))


def test_linearized_error_of_a_schedule_is_exact_too():
    """Every step of a stride has a rate of its own."""

    def step(w, args, k):
        return w * (1 - ETA * LAMBDA * 0.9**k)

    flow = eomdl.InterpolatingFlow(step, 0.5, points=1, stride=2)
    found = predict_error(flow, START, 12, check=False, save_steps=2)
    real = START * np.append(1, np.cumprod(1 - ETA * LAMBDA * 0.9 ** np.arange(12)))[::2]
    np.testing.assert_allclose(found.vector, found.path.params - real, rtol=1e-9, atol=1e-13)


def kinked(w, args):
    """A parabola, and a slope that begins at 1/2 in one of two directions."""
    del args
    return LAMBDA * jnp.sum(w**2) / 2 + 0.3 * jax.nn.relu(w[0] - 0.5)


@pytest.mark.parametrize("leading", [True, False])
def test_kinks_on_the_way_are_found_and_measured(leading):
    flow = eomdl.EquationOfMotion(kinked, ETA, 1)
    found = predict_error(flow, jnp.array([1.0, 0.2]), 20, leading=leading)
    crossed = found.path.params[:, 0] < 0.5
    np.testing.assert_allclose(found.kinks, np.where(crossed, ETA * 0.3 / 2, 0), rtol=1e-9)
    (note,) = (note for note in found.notes if "kinks" in note)
    assert note.is_fault
    assert "at kinks" in found.table()
    assert not any("leading=False" in note for note in found.notes)


def relative(predicted, optimizer, steps, **options) -> float:
    """|predicted - true| / |true| of the error vectors at the end."""
    real = eomdl.descend(net_loss, NET, optimizer, steps, save_steps=[steps], **options)
    true = jax.tree.map(lambda a, b: np.ravel(a[-1] - b[-1]), predicted.path.params, real.params)
    found = jax.tree.map(lambda a: np.ravel(a[-1]), predicted.vector)
    off, size = (np.concatenate(jax.tree.leaves(x)) for x in (jax.tree.map(np.subtract, found, true), true))
    return float(np.linalg.norm(off) / np.linalg.norm(size))


@pytest.mark.parametrize("order", [0, 1])
def test_vectors_agree_on_a_network_to_first_order_in_the_learning_rate(order):
    off = {}
    for eta in (0.04, 0.02):
        flow, steps = eomdl.EquationOfMotion(net_loss, eta, order), round(1 / eta)
        found = predict_error(flow, NET, steps, args=NET_ARGS, save_steps=[steps], check=False)
        off[eta] = relative(found, optax.sgd(eta), steps, args=NET_ARGS)
    assert off[0.02] < 0.05
    assert eomdl.errors.observed_order(list(off), list(off.values())) == pytest.approx(1, abs=0.1)


def test_the_corrected_path_is_nearer_and_the_two_routes_agree():
    flow = eomdl.GradientFlow(valley_loss, 0.02)
    found = predict_error(flow, VALLEY, 50)
    real = eomdl.descend(valley_loss, VALLEY, optax.sgd(0.02), 50)
    distance = eomdl.compare(real, {"flow": found.path, "corrected": found.corrected}).distance
    assert distance["corrected"][-1] < 0.1 * distance["flow"][-1]
    assert_close(found.corrected.final_params, found.corrected.at(50))
    assert found.difference[-1] < 0.1 * found.norm[-1]
    assert found.kinks[-1] < 1e-6 * found.norm[-1]
    assert_close(found.norm**2, sum(norm**2 for norm in found.block_norm.values()))
    assert found.notes == ()


def test_minibatches_see_their_own_step():
    flow, steps, optimizer = eomdl.EquationOfMotion(net_loss, 0.05, 1), 12, optax.sgd(0.05)
    for leading, limit in ((True, 0.15), (False, 0.02)):
        found = predict_error(flow, NET, steps, batches=NET_BATCHES, leading=leading, check=False)
        assert relative(found, optimizer, steps, batches=NET_BATCHES) < limit


def test_a_flow_that_carries_the_optimizer_s_memory():
    optimizer = optax.sgd(0.02, momentum=0.5)
    step = eomdl.optimizer_step(net_loss, optimizer)
    begin = eomdl.iterate(step, NET, 10, args=NET_ARGS).end
    flow = eomdl.InterpolatingFlow(step, 0.04, points=2)
    options = {"args": NET_ARGS, "resume": begin}
    found = predict_error(flow, NET, 40, **options)
    assert relative(found, optimizer, 40, **options) < 0.01
    # The other route, with 3 points, has the size right.
    assert found.embedded[-1] == pytest.approx(found.norm[-1], rel=0.5)


def test_a_flow_of_stride_2():
    optimizer = optax.sgd(0.3)
    step = eomdl.optimizer_step(net_loss, optimizer)
    flow = eomdl.InterpolatingFlow(step, 0.3, points=2, stride=2)
    for steps in (20, 21):
        found = predict_error(flow, NET, steps, args=NET_ARGS, check=False)
        assert relative(found, optimizer, steps, args=NET_ARGS) < 0.05


def test_it_says_where_the_leading_term_is_not_the_error():
    found = predict_error(eomdl.GradientFlow(parabola, 0.9), START, 12)
    assert any("differ by more than 50%" in note for note in found.notes)
    assert any("eta*lambda_max" in note for note in found.notes)
    assert "! From step" in found.table()
    with pytest.warns(UserWarning, match="eta"):
        assert eomdl.compare(found.path, {"same": found.path}).notes


def test_a_run_that_fails_is_told():
    found = predict_error(eomdl.GradientFlow(lambda w, _: -(w**4), 0.02), START, 40)
    assert len(found.steps) < 41
    assert found.embedded.shape == found.norm.shape
    assert any("Stopped after step" in note for note in found.notes)


def test_table_and_picture():
    found = predict_error(eomdl.GradientFlow(valley_loss, 0.05), VALLEY, 12, save_steps=4)
    table = found.table()
    assert "by one term more" in table
    assert "of x" in table
    labels = [line.get_label() for line in found.plot().axes[0].lines]
    assert labels == ["predicted", "by one term more", "x", "y"]
    assert len(found.plot(measured=found.norm).axes[0].lines) == 5
    with pytest.raises(ValueError, match=r"measured: expected shape \(4,\), got \(2,\)"):
        found.plot(measured=[1.0, 2.0])


def test_single_precision():
    with jax.enable_x64(False):
        start = jnp.float32(0.7)
        found = predict_error(eomdl.GradientFlow(parabola, 0.1), start, 10, check=False)
        assert found.vector.dtype == np.float32
        np.testing.assert_allclose(found.vector, exact(0, found.times), rtol=2e-2, atol=1e-6)


class Without(eomdl.AbstractFlow):
    """A flow that does not know the optimizer's step."""

    step_size: jax.Array

    def __call__(self, t, state, args):
        return -state


@pytest.mark.parametrize(
    ("flow", "options", "message"),
    [
        (
            Without(jnp.array(0.1)),
            {},
            "flow: expected one that defines `map`, the step that it models, got Without",
        ),
        (
            eomdl.flows.ReshufflingFlow(parabola, 0.1),
            {"args": jnp.ones(3)},
            "flow: expected a model of single steps, got ReshufflingFlow",
        ),
        (eomdl.flows.MomentumFlow(parabola, 0.1, 0.5), {"leading": True}, "leading: expected False"),
        (eomdl.EquationOfMotion(parabola, 0.1, 10), {}, "flow: expected at most 9 counter terms, got 10"),
        (eomdl.GradientFlow(parabola, 0.1), {"save_params": False}, "save_params: expected True, got False"),
    ],
)
def test_what_cannot_be_predicted(flow, options, message):
    with pytest.raises(ValueError, match=message):
        predict_error(flow, START, 10, **options)
