"""Observables, and what symmetry says about the weights (theory.md, section 5)."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    LABEL_ARGS,
    NET,
    NET_ARGS,
    QUADRATIC,
    VALLEY,
    flat,
    label_loss,
    linear_loss,
    net_loss,
    net_params,
    normal,
    quadratic_loss,
    valley_loss,
)
from jax.flatten_util import ravel_pytree

import eomdl


def last_layer(params):
    return params["layer1"]["w"]


# ------------------------------------------------------------------- curvature


@jax.jit
def dense_hessian(params):
    x, unravel = ravel_pytree(params)
    return jax.hessian(lambda x: net_loss(unravel(x), NET_ARGS))(x)


net_sharpness = jax.jit(eomdl.sharpness(net_loss))


@pytest.mark.parametrize("seed", range(3))
def test_sharpness_is_the_largest_eigenvalue(seed):
    params = net_params(seed)
    exact = np.linalg.eigvalsh(dense_hessian(params))[-1]
    measured = net_sharpness(params, NET_ARGS)
    np.testing.assert_allclose(measured, exact, rtol=1e-3)
    assert measured <= exact * (1 + 1e-12)  # Lanczos: a lower bound


def test_sharpness_is_exact_once_the_depth_is_the_dimension():
    exact = np.linalg.eigvalsh(QUADRATIC.args[0])[-1]
    np.testing.assert_allclose(
        eomdl.sharpness(quadratic_loss)(QUADRATIC.params, QUADRATIC.args), exact, rtol=1e-12
    )
    crude = eomdl.sharpness(quadratic_loss, num_matvecs=1)(QUADRATIC.params, QUADRATIC.args)
    assert crude < exact * 0.99


def test_sharpness_of_a_linear_loss_is_zero():
    assert float(eomdl.sharpness(linear_loss)(jnp.ones(3), jnp.ones(3))) == 0.0


def test_sharpness_is_the_largest_and_not_the_largest_in_modulus():
    hessian = jnp.diag(jnp.array([-5.0, 1.0, 2.0]))
    sharpness = eomdl.sharpness(quadratic_loss)(jnp.ones(3), (hessian, jnp.zeros(3)))
    np.testing.assert_allclose(sharpness, 2.0, rtol=1e-10)


# ----------------------------------------------------------------------- norms


def test_block_norm():
    np.testing.assert_allclose(eomdl.block_norm()(NET, None), np.linalg.norm(flat(NET)), rtol=1e-14)
    layer = eomdl.block_norm(lambda p: p["layer1"])(NET, None)
    np.testing.assert_allclose(layer, np.linalg.norm(flat(NET["layer1"])), rtol=1e-14)


def test_shift_component():
    w = last_layer(NET)
    np.testing.assert_allclose(
        eomdl.shift_component(last_layer)(NET, None), w @ np.ones(2) / np.sqrt(2), rtol=1e-13
    )
    np.testing.assert_allclose(
        eomdl.shift_component(last_layer, axis=0)(NET, None), np.ones(4) @ w / 2, rtol=1e-13
    )


def test_decay_rate():
    eta, rate = 0.1, 0.7
    values = 3 * np.exp(-rate * eta * np.arange(6))
    np.testing.assert_allclose(eomdl.decay_rate(values, eta), rate * np.ones(5), rtol=1e-12)
    vectors = values[:, None, None] * np.array([[1.0, -2.0]])
    np.testing.assert_allclose(eomdl.decay_rate(vectors, eta), rate * np.ones(5), rtol=1e-12)


def test_rate_is_the_velocity_of_an_observable():
    flow = eomdl.EquationOfMotion(valley_loss, 0.3, order=2)
    norm = eomdl.block_norm()
    velocity, position = flat(flow(0.0, VALLEY, None)), flat(VALLEY)
    expected = position @ velocity / np.linalg.norm(position)
    np.testing.assert_allclose(eomdl.rate(norm, flow)(VALLEY, None), expected, rtol=1e-13)
    # ... and of the integrated path: central difference over one short step each way
    h = 1e-3
    there = eomdl.solve(eomdl.EquationOfMotion(valley_loss, h, 0), VALLEY, 2, rtol=1e-12, atol=1e-12)
    norms = [np.linalg.norm(flat(there.at(k))) for k in range(3)]
    middle = eomdl.rate(norm, eomdl.GradientFlow(valley_loss, h))(there.at(1), None)
    np.testing.assert_allclose(middle, (norms[2] - norms[0]) / (2 * h), rtol=1e-5)


def test_angle_per_step():
    for angle in (1e-9, 0.3, np.pi):
        turns = np.arange(4) * angle
        radius = np.array([1.0, 2.0, 0.5, 3.0])
        block = {"a": radius * np.cos(turns), "b": (radius * np.sin(turns))[:, None]}
        np.testing.assert_allclose(eomdl.angle_per_step(block), angle * np.ones(3), rtol=1e-6)


# ------------------------------------------------------------ does it hold at all?


def scale_invariant_loss(params, args):
    """The weights act through their direction alone; the gain does not."""
    x, y = args
    w = params["w"]
    return jnp.mean((params["gain"] * jnp.tanh(x @ w / jnp.sqrt(jnp.sum(w**2))) - y) ** 2)


SCALE = {"w": normal(20, 3), "gain": jnp.array(1.3)}
SCALE_ARGS = (normal(21, 6, 3), normal(22, 6))


def test_check_translation():
    holds = eomdl.check_translation(label_loss, NET, last_layer, args=LABEL_ARGS)
    assert holds.holds
    assert holds.gradient < 1e-13 and holds.value < 1e-13
    assert "translation symmetry holds" in holds.message
    for where, axis in ((last_layer, 0), (lambda p: p["layer0"]["w"], -1)):
        broken = eomdl.check_translation(label_loss, NET, where, axis, args=LABEL_ARGS)
        assert not broken.holds
        assert broken.gradient > 1e-3 and broken.value > 1e-3
        assert "does not hold" in broken.message and f"{broken.gradient:.1e}" in broken.message


def test_check_scale():
    holds = eomdl.check_scale(scale_invariant_loss, SCALE, lambda p: p["w"], args=SCALE_ARGS)
    assert holds.holds
    assert holds.gradient < 1e-13 and holds.value < 1e-13
    assert "scale symmetry holds" in holds.message
    for where in (lambda p: p["gain"], lambda p: p):
        broken = eomdl.check_scale(scale_invariant_loss, SCALE, where, args=SCALE_ARGS)
        assert not broken.holds
        assert broken.gradient > 1e-3 and broken.value > 1e-3


def test_checks_take_weight_decay_off():
    def decayed(loss):
        return eomdl.WeightDecay(eomdl.WeightDecay(loss, 0.1), 0.2)

    assert eomdl.check_translation(decayed(label_loss), NET, last_layer, args=LABEL_ARGS).holds
    assert eomdl.check_scale(decayed(scale_invariant_loss), SCALE, lambda p: p["w"], args=SCALE_ARGS).holds


def test_checks_see_a_slight_violation():
    def slightly(params, args):
        return label_loss(params, args) + 1e-4 * jnp.sum(last_layer(params))

    assert not eomdl.check_translation(slightly, NET, last_layer, args=LABEL_ARGS).holds
    assert eomdl.check_translation(slightly, NET, last_layer, args=LABEL_ARGS, tolerance=0.1).holds


def test_hessian_along_a_scale_invariant_block_is_minus_the_gradient():
    # H theta_A = -grad f (theory.md, section 5), which the norm's law at order 1 uses
    w = SCALE["w"]

    def f(w):
        return scale_invariant_loss({"w": w, "gain": SCALE["gain"]}, SCALE_ARGS)

    np.testing.assert_allclose(jax.hessian(f)(w) @ w, -jax.grad(f)(w), rtol=1e-11)


# ----------------------------------------------------------------------- laws

ETA, DECAY = 0.05, 0.4


def test_translation_law_of_gradient_descent_is_exact():
    # p_(k+1) = (1 - eta lambda) p_k: the rate is -log(1 - eta lambda)/eta at every step
    loss = eomdl.WeightDecay(label_loss, DECAY)
    observe = {"p": eomdl.shift_component(last_layer)}
    run = eomdl.descend(loss, NET, optax.sgd(ETA), 10, args=LABEL_ARGS, observe=observe)
    p = run.observables["p"]
    np.testing.assert_allclose(p, p[0][None] * (1 - ETA * DECAY) ** np.arange(11)[:, None], rtol=1e-10)
    exact = eomdl.translation_decay_rate(ETA, DECAY, None)
    np.testing.assert_allclose(exact, -np.log(1 - ETA * DECAY) / ETA, rtol=1e-14)
    np.testing.assert_allclose(eomdl.decay_rate(p, ETA), exact, rtol=1e-10)


@pytest.mark.parametrize("order", range(4))
def test_translation_law_of_the_flows(order):
    loss = eomdl.WeightDecay(label_loss, DECAY)
    flow = eomdl.EquationOfMotion(loss, ETA, order)
    observable = eomdl.shift_component(last_layer)
    series = sum(ETA ** (j - 1) * DECAY**j / j for j in range(1, order + 2))
    predicted = eomdl.translation_decay_rate(ETA, DECAY, order)
    np.testing.assert_allclose(predicted, series, rtol=1e-14)
    velocity = eqx.filter_jit(eomdl.rate(observable, flow))(NET, LABEL_ARGS)
    np.testing.assert_allclose(velocity, -predicted * observable(NET, None), rtol=1e-10)


def test_translation_numbers_of_the_paper():
    rates = [eomdl.translation_decay_rate(0.01, 0.01, n) for n in (0, 1, 2, None)]
    np.testing.assert_allclose(rates[:2], [0.01, 0.0100005], rtol=1e-14)
    np.testing.assert_allclose(rates[2], 0.0100005 + 1e-4 * 1e-6 / 3, rtol=1e-14)
    np.testing.assert_allclose(rates[3], 0.010000500033, atol=1e-12)
    assert eomdl.translation_decay_rate(0.1, 0.0, 3) == 0.0


def scale_only_loss(w, args):
    return scale_invariant_loss({"w": w, "gain": 1.3}, args)


def test_scale_law_of_gradient_descent_is_exact():
    loss = eomdl.WeightDecay(scale_only_loss, DECAY)
    gradient = lambda w, args: jnp.linalg.norm(jax.grad(scale_only_loss)(w, args))
    observe = {"norm": eomdl.block_norm(), "gradient": gradient}
    run = eomdl.descend(loss, SCALE["w"], optax.sgd(ETA), 20, args=SCALE_ARGS, observe=observe)
    norm, gradient = run.observables["norm"], run.observables["gradient"]
    after = eomdl.scale_norm_after_step(norm[:-1], gradient[:-1], ETA, DECAY)
    np.testing.assert_allclose(norm[1:], after, rtol=1e-13)
    np.testing.assert_allclose(
        norm[1:] ** 2, (1 - ETA * DECAY) ** 2 * norm[:-1] ** 2 + ETA**2 * gradient[:-1] ** 2, rtol=1e-13
    )


@pytest.mark.parametrize("order", [0, 1])
def test_scale_law_of_the_flows(order):
    # d log |w|^2 / dt = 2 <w, F(w)> / |w|^2
    flow = eomdl.EquationOfMotion(eomdl.WeightDecay(scale_only_loss, DECAY), ETA, order)
    w = SCALE["w"]
    norm = jnp.linalg.norm(w)
    gradient = jnp.linalg.norm(jax.grad(scale_only_loss)(w, SCALE_ARGS))
    rate = eomdl.rate(lambda w, args: jnp.log(jnp.sum(w**2)), flow)(w, SCALE_ARGS)
    np.testing.assert_allclose(eomdl.scale_norm_rate(norm, gradient, ETA, DECAY, order), rate, rtol=1e-12)
    by_hand = [-2 * DECAY, -(2 * DECAY + ETA * DECAY**2) + ETA * gradient**2 / norm**2][order]
    np.testing.assert_allclose(rate, by_hand, rtol=1e-12)


def test_equilibrium_norm_and_angle():
    # A constant tangential force c/|w| keeps the norm where decay and growth balance, and turns by
    # arccos(1 - eta lambda) a step: w' = (1 - eta lambda) w - eta (c / r) t, |t| = 1, t _|_ w.
    eta, decay, c = 0.1, 0.3, 1.7
    w = np.array([2.0, 0.0])
    radii, angles = [], []
    for _ in range(2000):
        r = np.linalg.norm(w)
        tangent = np.array([-w[1], w[0]]) / r
        new = (1 - eta * decay) * w - eta * (c / r) * tangent
        angles.append(np.arccos(w @ new / (r * np.linalg.norm(new))))
        radii.append(r)
        w = new
    assert radii[0] != pytest.approx(radii[-1], rel=0.1)
    start = eomdl.equilibrium_norm(radii[0], c / radii[0], eta, decay)
    end = eomdl.equilibrium_norm(radii[-1], c / radii[-1], eta, decay)
    np.testing.assert_allclose([start, end], radii[-1], rtol=1e-10)
    np.testing.assert_allclose(end**4, eta * c**2 / (decay * (2 - eta * decay)), rtol=1e-13)
    np.testing.assert_allclose(eomdl.equilibrium_angle(eta, decay), angles[-1], rtol=1e-10)
    np.testing.assert_allclose(eomdl.equilibrium_angle(1e-4, 1e-2), np.sqrt(2e-6), rtol=1e-6)


def test_rescaling_law():
    # f(a u, v/a) = f(u, v): gradient flow conserves |u|^2 - |v|^2; the counter term changes it by
    # eta (|grad_u f|^2 - |grad_v f|^2), since gradient descent does by eta^2 times that a step
    def loss(params, args):
        x, y = args
        return jnp.mean((jnp.outer(x @ params["u"], params["v"]) - y) ** 2)

    params = {"u": normal(23, 3), "v": normal(24, 2)}
    balance = lambda p, args: jnp.sum(p["u"] ** 2) - jnp.sum(p["v"] ** 2)
    conserved = eomdl.rate(balance, eomdl.GradientFlow(loss, ETA))(params, NET_ARGS)
    np.testing.assert_allclose(conserved, 0, atol=1e-12)
    broken = eomdl.rate(balance, eomdl.EquationOfMotion(loss, ETA, 1))(params, NET_ARGS)
    expected = ETA * balance(jax.grad(loss)(params, NET_ARGS), None)
    np.testing.assert_allclose(broken, expected, rtol=1e-10)
    assert abs(expected) > 1e-3
