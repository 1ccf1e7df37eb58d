"""Observables, and what symmetry says about the weights (theory.md, section 5)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    NET,
    NET_ARGS,
    QUADRATIC,
    VALLEY,
    flat,
    linear_loss,
    net_loss,
    net_params,
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


@pytest.mark.parametrize("rtol", [0.2, 0.05])
def test_sharpness_stops_at_a_residual(rtol):
    hessian = jnp.diag(jnp.array([10.0, 4.0, 1.0, 0.5, -2.0, 0.1]))
    start = (jnp.ones(6), (hessian, jnp.zeros(6)))
    stopped = float(eomdl.sharpness(quadratic_loss, rtol=rtol)(*start))
    values = [float(eomdl.sharpness(quadratic_loss, depth)(*start)) for depth in range(1, 7)]
    (depth,) = np.flatnonzero(np.isclose(values, stopped, rtol=1e-12))
    assert depth < 5
    assert abs(stopped - 10.0) <= rtol * stopped
    assert abs(values[0] - 10.0) > rtol * 10.0


def test_sharpness_evaluates_the_loss_once():
    evaluations = []

    def counted(params, args):
        jax.debug.callback(lambda: evaluations.append(1))
        return quadratic_loss(params, args)

    eomdl.sharpness(counted)(QUADRATIC.params, QUADRATIC.args)
    jax.effects_barrier()
    assert len(evaluations) == 1


def test_sharpness_has_a_derivative_in_both_modes():
    start, direction = net_params(0), net_params(1)
    value = eomdl.sharpness(net_loss, rtol=1e-3)
    backward = jax.jit(jax.grad(value))(start, NET_ARGS)
    forward = jax.jit(lambda p, v: jax.jvp(lambda p: value(p, NET_ARGS), (p,), (v,))[1])(start, direction)
    np.testing.assert_allclose(flat(backward) @ flat(direction), forward, rtol=1e-8)


# ----------------------------------------------------------------------- norms


def test_block_norm():
    np.testing.assert_allclose(eomdl.observe.block_norm()(NET, None), np.linalg.norm(flat(NET)), rtol=1e-14)
    layer = eomdl.observe.block_norm(lambda p: p["layer1"])(NET, None)
    np.testing.assert_allclose(layer, np.linalg.norm(flat(NET["layer1"])), rtol=1e-14)


def test_shift_component():
    w = last_layer(NET)
    np.testing.assert_allclose(
        eomdl.observe.shift_component(last_layer)(NET, None), w @ np.ones(2) / np.sqrt(2), rtol=1e-13
    )
    np.testing.assert_allclose(
        eomdl.observe.shift_component(last_layer, axis=0)(NET, None), np.ones(4) @ w / 2, rtol=1e-13
    )


def test_decay_rate():
    eta, rate = 0.1, 0.7
    values = 3 * np.exp(-rate * eta * np.arange(6))
    np.testing.assert_allclose(eomdl.observe.decay_rate(values, eta), rate * np.ones(5), rtol=1e-12)
    vectors = values[:, None, None] * np.array([[1.0, -2.0]])
    np.testing.assert_allclose(eomdl.observe.decay_rate(vectors, eta), rate * np.ones(5), rtol=1e-12)


def test_rate_is_the_velocity_of_an_observable():
    flow = eomdl.EquationOfMotion(valley_loss, 0.3, order=2)
    norm = eomdl.observe.block_norm()
    velocity, position = flat(flow(0.0, VALLEY, None)), flat(VALLEY)
    expected = position @ velocity / np.linalg.norm(position)
    np.testing.assert_allclose(eomdl.observe.lie_derivative(norm, flow)(VALLEY, None), expected, rtol=1e-13)
    # ... and of the integrated path: central difference over one short step each way
    h = 1e-3
    there = eomdl.solve(eomdl.EquationOfMotion(valley_loss, h, 0), VALLEY, 2, rtol=1e-12, atol=1e-12)
    norms = [np.linalg.norm(flat(there.at(k))) for k in range(3)]
    middle = eomdl.observe.lie_derivative(norm, eomdl.GradientFlow(valley_loss, h))(there.at(1), None)
    np.testing.assert_allclose(middle, (norms[2] - norms[0]) / (2 * h), rtol=1e-5)


def test_angle_per_step():
    for angle in (1e-9, 0.3, np.pi):
        turns = np.arange(4) * angle
        radius = np.array([1.0, 2.0, 0.5, 3.0])
        block = {"a": radius * np.cos(turns), "b": (radius * np.sin(turns))[:, None]}
        np.testing.assert_allclose(eomdl.observe.angle_per_step(block), angle * np.ones(3), rtol=1e-6)


@pytest.mark.parametrize("name", ["sharpness", "Lie derivative"])
def test_an_observable_of_a_loss_with_numbers_in_it_can_be_compiled(name):
    loss = eomdl.WeightDecay(valley_loss, 0.1)
    flow = eomdl.GradientFlow(loss, 0.1)
    observable = {
        "sharpness": eomdl.sharpness(loss),
        "Lie derivative": eomdl.observe.lie_derivative(loss, flow),
    }[name]
    np.testing.assert_allclose(jax.jit(observable)(VALLEY, None), observable(VALLEY, None), rtol=1e-12)
    assert observable == observable
    assert observable != eomdl.sharpness(loss)
