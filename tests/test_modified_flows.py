"""First-order modified flows in closed form: momentum, Adam, RMSProp, reshuffling, gradient penalty."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    NET,
    NET_ARGS,
    QUADRATIC,
    VALLEY,
    assert_close,
    flat,
    net_loss,
    pulled_loss,
    quadratic_loss,
    valley_loss,
)
from registry import PULLS, TIGHT, MeanEpoch

import eomdl


# --------------------------------------------------------- gradient penalty


def test_penalty_adds_the_squared_gradient():
    c = 0.3
    penalized = eomdl.losses.GradientPenalty(quadratic_loss, c)
    hessian, b = QUADRATIC.args
    x = flat(QUADRATIC.params)
    g = hessian @ x - b
    value = penalized(QUADRATIC.params, QUADRATIC.args)
    np.testing.assert_allclose(
        value, quadratic_loss(QUADRATIC.params, QUADRATIC.args) + c * g @ g, rtol=1e-13
    )
    gradient = jax.grad(penalized)(QUADRATIC.params, QUADRATIC.args)
    np.testing.assert_allclose(flat(gradient), g + 2 * c * hessian @ g, rtol=1e-12)


def test_penalty_keeps_the_dtype_and_its_coefficient_is_a_leaf():
    penalized = eomdl.losses.GradientPenalty(lambda p, args: jnp.sum(p**2), 0.1)
    params = jnp.ones(2, jnp.float32)
    assert penalized(params, None).dtype == jax.grad(penalized)(params, None).dtype == jnp.float32
    slope = jax.grad(lambda c: eomdl.losses.GradientPenalty(valley_loss, c)(VALLEY, None))(0.1)
    gradient = flat(jax.grad(valley_loss)(VALLEY, None))
    np.testing.assert_allclose(slope, gradient @ gradient, rtol=1e-12)


def test_zero_penalty_changes_nothing():
    assert float(eomdl.losses.GradientPenalty(valley_loss, 0)(VALLEY, None)) == float(
        valley_loss(VALLEY, None)
    )


# ----------------------------------------------------------------- momentum


@pytest.mark.parametrize("nesterov", [False, True])
def test_without_momentum_it_is_the_equation_of_motion(nesterov):
    eta = 0.4
    flow = eomdl.flows.MomentumFlow(net_loss, eta, 0.0, nesterov)
    field = flow(0.0, NET, NET_ARGS)
    assert float(flow.step_size) == eta
    assert_close(field, eomdl.EquationOfMotion(net_loss, eta, 1)(0.0, NET, NET_ARGS), rtol=1e-12)
    penalized = eomdl.GradientFlow(eomdl.losses.GradientPenalty(net_loss, eta / 4), eta)
    assert_close(field, penalized(0.0, NET, NET_ARGS), rtol=1e-12)


@pytest.mark.parametrize(("nesterov", "factor"), [(False, 9.0), (True, 1 + 2 * 0.64 / 0.2)])
def test_momentum_is_gradient_flow_on_its_modified_loss(nesterov, factor):
    flow = eomdl.flows.MomentumFlow(valley_loss, 0.01, 0.8, nesterov)
    h = 0.01 / (1 - 0.8)
    np.testing.assert_allclose(flow.step_size, h, rtol=1e-15)
    penalized = eomdl.GradientFlow(eomdl.losses.GradientPenalty(valley_loss, h / 4 * factor), h)
    assert_close(flow(0.0, VALLEY, None), penalized(0.0, VALLEY, None), rtol=1e-12)


# --------------------------------------------------------------------- Adam


def adam_field(g, hessian, h, b1, b2, eps, eps_root):
    """The equation in the docstring, componentwise in NumPy."""
    r = np.sqrt(g**2 + eps_root)
    d = r + eps
    now, memory = (1 + b1) / (1 - b1), (1 + b2) / (1 - b2)
    return -g / d - h / (2 * d) * (now - memory * g**2 / (r * d)) * (hessian @ (g / d))


@pytest.mark.parametrize(("eps", "eps_root"), [(0.1, 0.05), (0.1, 0.0), (0.0, 0.05), (0.0, 0.0)])
def test_adam_on_a_quadratic(eps, eps_root):
    hessian, b = (np.asarray(a) for a in QUADRATIC.args)
    g = hessian @ flat(QUADRATIC.params) - b
    for order, h in ((1, 0.02), (0, 0.0)):
        flow = eomdl.flows.AdamFlow(quadratic_loss, 0.02, 0.8, 0.9, eps, eps_root, order=order)
        field = flow(0.0, QUADRATIC.params, QUADRATIC.args)
        np.testing.assert_allclose(
            flat(field), adam_field(g, hessian, h, 0.8, 0.9, eps, eps_root), rtol=1e-11
        )
    leading, whole = (adam_field(g, hessian, h, 0.8, 0.9, eps, eps_root) for h in (0.0, 0.02))
    (ratio,) = flow.diagnostics(0.0, QUADRATIC.params, QUADRATIC.args).values()
    expected = np.linalg.norm(whole - leading) / np.linalg.norm(leading)
    np.testing.assert_allclose(ratio.value, expected, rtol=1e-9)


def test_adam_with_a_small_eps_says_that_its_path_says_nothing():
    """Near a zero of a gradient the correction is as large as 1/eps."""
    params, hessian = jnp.array([1e-3, 1.0]), jnp.diag(jnp.array([1.0, 0.2]))
    args = (hessian, jnp.zeros(2))
    for eps, fails in ((1e-8, True), (1.0, False)):
        path = eomdl.solve(eomdl.flows.AdamFlow(quadratic_loss, 0.02, eps=eps), params, 30, args=args)
        assert (
            any(note.startswith("the first correction / the leading term reached") for note in path.notes)
            == fails
        )


def test_adam_is_the_equation_of_cattaneo():
    # eps inside the root: the correction is a gradient of the smoothed 1-norm of the gradient
    h, b1, b2, eps = 0.02, 0.8, 0.9, 0.05
    gradient = jax.grad(valley_loss)
    now, memory = (1 + b1) / (1 - b1), (1 + b2) / (1 - b2)

    def one_norm(params):
        return sum(jnp.sqrt(g**2 + eps) for g in jax.tree.leaves(gradient(params, None)))

    def component(g, n):
        c = h / 2 * (now - memory + memory * eps / (g**2 + eps)) * n
        return -(g + c) / jnp.sqrt(g**2 + eps)

    expected = jax.tree.map(component, gradient(VALLEY, None), jax.grad(one_norm)(VALLEY))
    assert_close(
        eomdl.flows.AdamFlow(valley_loss, h, b1, b2, 0.0, eps)(0.0, VALLEY, None), expected, rtol=1e-12
    )


def test_rmsprop_is_adam_without_momentum():
    rmsprop = eomdl.flows.rmsprop_flow(valley_loss, 0.02, 0.8, 0.05)
    adam = eomdl.flows.AdamFlow(valley_loss, 0.02, 0.0, 0.8, 0.0, 0.05)
    assert_close(rmsprop(0.0, VALLEY, None), adam(0.0, VALLEY, None), atol=0.0)


def test_adam_rests_where_the_gradient_is_zero():
    for eps, eps_root in ((0.0, 0.0), (1e-8, 0.0), (0.0, 1e-8)):
        flow = eomdl.flows.AdamFlow(quadratic_loss, 0.1, eps=eps, eps_root=eps_root)
        field = flow(0.0, jnp.zeros(2), (jnp.eye(2), jnp.zeros(2)))
        np.testing.assert_array_equal(field, np.zeros(2))


@pytest.mark.parametrize(
    ("flow", "leaves"),
    [
        (eomdl.flows.MomentumFlow(valley_loss, 0.1), 2),
        (eomdl.flows.AdamFlow(valley_loss, 0.1), 5),
        (eomdl.flows.rmsprop_flow(valley_loss, 0.1), 5),
    ],
    ids=["momentum", "adam", "rmsprop"],
)
def test_hyperparameters_are_leaves(flow, leaves):
    assert len(jax.tree.leaves(eqx.filter(flow, eqx.is_array))) == leaves


# -------------------------------------------------------------- reshuffling


def mean_loss(params, pulls):
    return jnp.mean(jax.vmap(pulled_loss, (None, 0))(params, pulls))


def test_gradient_flow_is_one_order_farther_from_the_mean_epoch():
    # The law suite proves order 3 in one epoch for `ReshufflingFlow`.
    rates, errors = [0.01, 0.005, 0.0025], []
    m = len(PULLS)
    for eta in rates:
        run = eomdl.solve(eomdl.GradientFlow(mean_loss, eta), VALLEY, m, args=PULLS, **TIGHT)
        epoch = eomdl.iterate(MeanEpoch(pulled_loss, jnp.asarray(eta)), VALLEY, 1, args=PULLS)
        errors.append(np.linalg.norm(flat(run.at(m)) - flat(epoch.at(1))))
    assert abs(eomdl.errors.observed_order(rates, errors) - 2) < 0.1


def test_reshuffling_is_the_mean_of_the_penalized_minibatches():
    eta = 0.3
    penalized = eomdl.losses.GradientPenalty(pulled_loss, eta / 4)
    gradient = jax.grad(lambda p: jnp.mean(jax.vmap(penalized, (None, 0))(p, PULLS)))(VALLEY)
    field = eomdl.flows.ReshufflingFlow(pulled_loss, eta)(0.0, VALLEY, PULLS)
    assert_close(field, jax.tree.map(jnp.negative, gradient), rtol=1e-12)


@pytest.mark.parametrize(
    "args", [None, jnp.array(1.0), (jnp.ones(3), jnp.ones(2))], ids=["none", "scalar", "two"]
)
def test_minibatches_must_be_stacked(args):
    with pytest.raises(ValueError, match=r"^args: expected the minibatches of an epoch stacked"):
        eomdl.solve(eomdl.flows.ReshufflingFlow(pulled_loss, 0.1), VALLEY, 3, args=args)


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("coefficient", lambda: eomdl.losses.GradientPenalty(valley_loss, -0.1)),
        ("coefficient", lambda: eomdl.losses.GradientPenalty(valley_loss, np.inf)),
        ("momentum", lambda: eomdl.flows.MomentumFlow(valley_loss, 0.1, 1.0)),
        ("b1", lambda: eomdl.flows.AdamFlow(valley_loss, 0.1, b1=1.0)),
        ("order", lambda: eomdl.flows.AdamFlow(valley_loss, 0.1, order=2)),
        ("learning_rate", lambda: eomdl.flows.rmsprop_flow(valley_loss, 0.0)),
        ("decay", lambda: eomdl.flows.rmsprop_flow(valley_loss, 0.1, 1.0)),
        ("eps", lambda: eomdl.flows.rmsprop_flow(valley_loss, 0.1, eps=-1.0)),
    ],
)
def test_wrong_arguments_are_named(name, make):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        make()
