"""The equation of motion and gradient flow: what each field is. (`test_flow_laws.py`: what every flow does.)"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    NET,
    NET_ARGS,
    PROBLEMS,
    QUADRATIC,
    VALLEY,
    assert_close,
    flat,
    net_loss,
    net_params,
    quadratic_loss,
    valley_loss,
)
from registry import EQUATIONS

import eomdl


@pytest.mark.parametrize("flow", EQUATIONS, ids=lambda f: f.name)
def test_learning_rate_is_the_only_array_leaf(flow):
    made = flow.make(valley_loss, 0.25)
    assert [float(leaf) for leaf in jax.tree.leaves(eqx.filter(made, eqx.is_array))] == [0.25]
    assert float(made.step_size) == 0.25
    assert jax.tree.structure(made) == jax.tree.structure(flow.make(valley_loss, 3))  # an int is welcome


@eqx.filter_jit  # op by op every operation is a program to compile
def take_step(flow, params, args):
    return flow.params(flow.map(flow.init(params, args), args, 0.0))


@pytest.mark.parametrize("flow", EQUATIONS, ids=lambda f: f.name)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_step_is_gradient_descent(problem, flow):
    gradient = jax.jit(jax.grad(problem.loss))(problem.params, problem.args)
    expected = jax.tree.map(lambda p, g: np.asarray(p) - 0.3 * np.asarray(g), problem.params, gradient)
    stepped = take_step(flow.make(problem.loss, 0.3), problem.params, problem.args)
    assert_close(stepped, expected, rtol=1e-15)


@pytest.mark.parametrize("order", range(4))
def test_equation_of_motion_is_its_definition(order):
    # theta' = -g - eta sum_a eta^a xi_a, xi from `counterterms`; the field shares work between terms
    eta, params = 0.4, net_params(3)
    expected = jax.tree.map(jnp.negative, jax.grad(net_loss)(params, NET_ARGS))
    xi = jax.jit(eomdl.counterterms, static_argnums=(0, 2))(net_loss, params, order, NET_ARGS)
    for a, term in enumerate(xi):
        expected = jax.tree.map(lambda e, t, a=a: e - eta ** (a + 1) * t, expected, term)
    field = eqx.filter_jit(eomdl.EquationOfMotion(net_loss, eta, order))(0.0, params, NET_ARGS)
    assert_close(field, expected, rtol=1e-12)


def test_order_zero_is_gradient_flow():
    for eta in (0.1, 0.7):
        assert_close(
            eomdl.EquationOfMotion(net_loss, eta, 0)(0.0, NET, NET_ARGS),
            eomdl.GradientFlow(net_loss, eta)(0.0, NET, NET_ARGS),
            rtol=0,
            atol=0.0,
        )


def test_gradient_flow_does_not_depend_on_the_learning_rate():
    slow, fast = (eomdl.GradientFlow(net_loss, eta)(0.0, NET, NET_ARGS) for eta in (0.01, 0.9))
    assert_close(slow, fast, atol=0.0)


def test_by_default_it_is_implicit_gradient_regularization():
    # Barrett & Dherin 2021: gradient flow on L + eta/4 |grad L|^2
    penalized = eomdl.GradientFlow(eomdl.losses.GradientPenalty(net_loss, 0.3 / 4), 0.3)
    flow = eomdl.EquationOfMotion(net_loss, 0.3)
    assert_close(flow(0.0, NET, NET_ARGS), penalized(0.0, NET, NET_ARGS), rtol=1e-12)


def test_diagnostics_measure_eta_lambda_max():
    eta, largest = 0.3, np.linalg.eigvalsh(QUADRATIC.args[0])[-1]
    for flow in EQUATIONS:
        diagnostics = flow.make(quadratic_loss, eta).diagnostics(0.0, QUADRATIC.params, QUADRATIC.args)
        if flow.terms == 0:
            assert diagnostics == {}
        else:
            (diagnostic,) = diagnostics.values()
            # From below: the look stops at a residual of 1 %, whose square is the error.
            assert (1 - 1e-4) * eta * largest < diagnostic.value <= eta * largest * (1 + 1e-10)
            assert not diagnostic.exceeded
            assert diagnostic.limit == 1


# ------------------------------------------------------------- weight decay


def test_weight_decay_is_the_quadratic_penalty():
    decayed = eomdl.WeightDecay(net_loss, 0.2)
    squared = np.sum(flat(NET) ** 2)
    np.testing.assert_allclose(decayed(NET, NET_ARGS), net_loss(NET, NET_ARGS) + 0.1 * squared, rtol=1e-14)
    plain = jax.grad(net_loss)(NET, NET_ARGS)
    assert_close(
        jax.grad(decayed)(NET, NET_ARGS), jax.tree.map(lambda g, p: g + 0.2 * p, plain, NET), rtol=1e-14
    )


def test_weight_decay_is_that_of_optax():
    in_loss = eomdl.descend(eomdl.WeightDecay(valley_loss, 0.3), VALLEY, optax.sgd(0.2), 20)
    chained = optax.chain(optax.add_decayed_weights(0.3), optax.sgd(0.2))
    in_optimizer = eomdl.descend(valley_loss, VALLEY, chained, 20)
    assert_close(in_loss.params, in_optimizer.params, rtol=1e-13)


def test_zero_weight_decay_changes_nothing():
    assert float(eomdl.WeightDecay(net_loss, 0)(NET, NET_ARGS)) == float(net_loss(NET, NET_ARGS))


def test_weight_decay_keeps_the_dtype():
    params = jnp.ones(2, jnp.float32)
    loss = eomdl.WeightDecay(lambda p, args: jnp.sum(p), 0.1)
    assert loss(params, None).dtype == jnp.float32
    assert jax.grad(loss)(params, None).dtype == jnp.float32
