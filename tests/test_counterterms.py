"""Counter terms: closed forms, dense derivatives, and three routes to the same numbers."""

import itertools
from functools import partial
from math import factorial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    LABEL_ARGS,
    NET,
    NET_ARGS,
    PROBLEMS,
    QUADRATIC,
    SQUARE_SERIES,
    VALLEY,
    assert_close,
    cubic_loss,
    flat,
    label_loss,
    net,
    net_loss,
    net_params,
    normal,
    quadratic_loss,
    valley_loss,
)
from jax.flatten_util import ravel_pytree
from registry import EQUATIONS

import eomdl
from benchmarks.power_series import modified_field_series


counterterms = jax.jit(eomdl.counterterms, static_argnums=(0, 2))


@partial(jax.jit, static_argnums=(0, 2))
def series_route(loss, params, order, args=None):
    """xi from the power series of the iterates: xi_a = -F_(a + 2)."""
    field = modified_field_series(
        lambda p: jax.tree.map(jnp.negative, jax.grad(loss)(p, args)), params, order
    )
    return tuple(jax.tree.map(jnp.negative, f) for f in field[1:])


@partial(jax.jit, static_argnums=(0, 2))
def lie_route(loss, params, order, args=None):
    """xi from the Lie-derivative recursion of backward error analysis (theory.md, section 2)."""
    x0, unravel = ravel_pytree(params)
    fields = {1: lambda x: -jax.grad(lambda x: loss(unravel(x), args))(x)}

    def lie(along, field):
        return lambda x: jax.jvp(field, (x,), (along(x),))[1]

    def next_field(j):
        terms = []
        for i in range(2, j + 1):
            for ks in itertools.product(range(1, j), repeat=i):
                if sum(ks) == j:
                    field = fields[ks[-1]]
                    for k in reversed(ks[:-1]):
                        field = lie(fields[k], field)
                    terms.append((1 / factorial(i), field))
        return lambda x: -sum(c * field(x) for c, field in terms)

    for j in range(2, order + 2):
        fields[j] = next_field(j)
    return tuple(unravel(-fields[j](x0)) for j in range(2, order + 2))


# ------------------------------------------------------------- closed forms


@pytest.mark.parametrize("order", range(7))
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_closed_form(problem, order):
    xi = counterterms(problem.loss, problem.params, order, problem.args)
    expected = problem.counterterms(problem.params, problem.args, order)
    assert len(xi) == len(expected) == order
    for a, b in zip(xi, expected, strict=True):
        assert_close(a, b, rtol=1e-12)


@pytest.mark.parametrize("flow", EQUATIONS, ids=lambda f: f.name)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_field_is_the_gradient_and_the_counter_terms(problem, flow):
    # theta' = -g - eta sum_a eta^a xi_a
    eta = 0.3
    xi = problem.counterterms(problem.params, problem.args, flow.terms)
    expected = jax.tree.map(jnp.negative, jax.grad(problem.loss)(problem.params, problem.args))
    for a, term in enumerate(xi):
        expected = jax.tree.map(lambda e, t, a=a: e - eta ** (a + 1) * t, expected, term)
    field = flow.make(problem.loss, eta)(0.0, problem.params, problem.args)
    assert_close(field, expected, rtol=1e-12)


def test_quadratic_sums_to_the_logarithm():
    # F = log(1 - eta H)/(eta H) g: the truncated series closes in on it, term after term.
    eta, (hessian, b) = 0.2, QUADRATIC.args
    eigenvalues, q = np.linalg.eigh(hessian)
    x, unravel = ravel_pytree(QUADRATIC.params)
    exact = q @ (np.log1p(-eta * eigenvalues) / (eta * eigenvalues) * (q.T @ (hessian @ x - b)))
    errors = []
    for flow in EQUATIONS[1:]:
        field = flow.make(quadratic_loss, eta)(0.0, QUADRATIC.params, QUADRATIC.args)
        errors.append(np.linalg.norm(flat(field) - flat(unravel(exact))))
    ratios = np.array(errors[1:]) / np.array(errors[:-1])
    assert np.all(ratios < 0.4)  # eta * lambda_max = 0.4 bounds the ratio of a geometric tail


def test_square_is_exact_at_the_level_of_the_map():
    # The modified field of y' = y^2 up to h^6, integrated for a time h, is y + h y^2 up to O(h^8).
    def defect(h):
        def field(y):
            return np.sum(SQUARE_SERIES * h ** np.arange(7) * y ** np.arange(2, 9))

        y, n = 1.0, 200
        for _ in range(n):  # RK4
            k1 = field(y)
            k2 = field(y + h / n / 2 * k1)
            k3 = field(y + h / n / 2 * k2)
            k4 = field(y + h / n * k3)
            y += h / n / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return abs(y - (1 + h))

    assert eomdl.errors.observed_order([0.04, 0.08], [defect(0.04), defect(0.08)]) == pytest.approx(
        8, abs=0.6
    )
    xi = counterterms(cubic_loss, jnp.array(1.0), 6)
    np.testing.assert_allclose([-x for x in xi], SQUARE_SERIES[1:], rtol=1e-13)


# ----------------------------------------------------- the dense definitions


@partial(jax.jit, static_argnums=0)
def dense_xi(loss, params, args):
    """xi_0 = 1/2 H g and xi_1 = 1/3 H H g + 1/12 T[g, g] from the whole Hessian."""
    x, unravel = ravel_pytree(params)

    def f(x):
        return loss(unravel(x), args)

    g = jax.grad(f)(x)
    hessian = jax.hessian(f)
    h = hessian(x)
    t_gg = jax.grad(lambda x: g @ hessian(x) @ g)(x)
    return unravel(0.5 * h @ g), unravel(h @ h @ g / 3 + t_gg / 12)


@pytest.mark.parametrize("seed", range(3))
def test_first_two_from_dense_derivatives(seed):
    params = net_params(seed)
    xi = counterterms(net_loss, params, 2, NET_ARGS)
    for a, b in zip(xi, dense_xi(net_loss, params, NET_ARGS), strict=True):
        assert_close(a, b)


def test_first_is_implicit_gradient_regularization():
    # xi_0 = grad |grad L|^2 / 4 (Barrett & Dherin 2021)
    def penalty(params):
        return sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(net_loss)(params, NET_ARGS))) / 4

    (xi_0,) = counterterms(net_loss, NET, 1, NET_ARGS)
    assert_close(xi_0, jax.grad(penalty)(NET))


def test_second_is_not_a_gradient():
    # The Jacobian of a gradient is symmetric; that of xi_1 is not, and that of xi_0 is.
    x, unravel = ravel_pytree(VALLEY)

    @jax.jit
    @jax.jacfwd
    def jacobians(x):
        return [ravel_pytree(xi)[0] for xi in eomdl.counterterms(valley_loss, unravel(x), 2)]

    asymmetry = [float(jnp.linalg.norm(j - j.T) / jnp.linalg.norm(j)) for j in jacobians(x)]
    assert asymmetry[0] < 1e-14
    assert asymmetry[1] > 1e-3


# ------------------------------------------------- routes against each other


def tangled_loss(params, args):
    """Few operations, all parameters tangled, on a pytree of several node types and a 0-d leaf."""
    del args
    a, (b, c) = params["a"], params["b"]
    return jnp.sin(a[0] * b) + jnp.exp(0.3 * a[1] - c[0]) + 0.5 * (b - c[0] * a[0]) ** 2


def tangled_params(seed):
    values = normal(seed, 4, scale=0.5)
    return {"a": values[:2], "b": (values[2], [values[3]])}


def small_loss(params, args):
    """Fewer still: order 5 of the power series compiles in seconds."""
    del args
    a, [b] = params
    return jnp.sin(a * b) + jnp.exp(0.3 * a - b)


def small_params(seed):
    a, b = normal(seed, 2)
    return a, [b]


@pytest.mark.parametrize(
    ("loss", "start", "order"), [(tangled_loss, tangled_params, 3), (small_loss, small_params, 5)]
)
def test_trees_against_series(loss, start, order):
    for seed in range(3):
        trees = counterterms(loss, start(seed), order)
        series = series_route(loss, start(seed), order)
        assert len(trees) == len(series) == order
        for a, b in zip(trees, series, strict=True):
            assert_close(a, b, rtol=1e-10)


@pytest.mark.parametrize(
    ("loss", "start", "order"), [(tangled_loss, tangled_params, 3), (small_loss, small_params, 4)]
)
def test_trees_against_lie_derivatives(loss, start, order):
    for seed in range(3):
        trees = counterterms(loss, start(seed), order)
        for a, b in zip(trees, lie_route(loss, start(seed), order), strict=True):
            assert_close(a, b, rtol=1e-10)


@pytest.mark.parametrize(("loss", "args"), [(net_loss, NET_ARGS), (label_loss, LABEL_ARGS)])
def test_trees_against_series_on_networks(loss, args):
    for seed in range(3):
        params = net_params(seed)
        trees = counterterms(loss, params, 3, args)
        for a, b in zip(trees, series_route(loss, params, 3, args), strict=True):
            assert_close(a, b)


def test_terms_do_not_depend_on_the_order_asked_for():
    six = counterterms(small_loss, small_params(0), 6)
    for order in range(1, 6):
        lower = counterterms(small_loss, small_params(0), order)
        assert len(lower) == order
        for a, b in zip(lower, six, strict=False):
            assert_close(a, b, rtol=1e-12)


# ------------------------------------------------------ what a loss may hold


def relu_loss(params, args):
    x, y = args
    return jnp.mean((net(params, x, jax.nn.relu) ** 3 - y) ** 2)


def checkpoint_loss(params, args):
    x, y = args
    return jnp.mean((jax.checkpoint(net)(params, x) - y) ** 2)


def scan_loss(params, args):
    """A recurrent network: lax.scan over time."""
    x, y = args
    w, u = params

    def cell(h, x):
        h = jnp.tanh(w @ h + u @ x)
        return h, h

    _, h = jax.lax.scan(cell, jnp.zeros(2), x)
    return jnp.mean((h - y) ** 2)


def convolution_loss(params, args):
    """Convolution, max-pool, softplus, dense layer, integer labels."""
    images, labels = args
    h = jax.lax.conv(images, params["kernel"], (1, 1), "VALID")  # (n, 2, 4, 4)
    h = jax.lax.reduce_window(jax.nn.softplus(h), -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    logits = h.reshape(len(images), -1) @ params["out"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def batch_norm_loss(params, args):
    """Batch norm in training mode: statistics of the batch, inside the loss."""
    x, y = args
    h = x @ params["w"]
    h = (h - jnp.mean(h, axis=0, keepdims=True)) / jnp.sqrt(jnp.var(h, axis=0, keepdims=True) + 1e-5)
    return jnp.mean((jnp.tanh(h * params["gain"][None] + params["bias"][None]) - y) ** 2)


LOSSES = {
    "relu": (relu_loss, NET, NET_ARGS),
    "checkpoint": (checkpoint_loss, NET, NET_ARGS),
    "integer labels": (label_loss, NET, LABEL_ARGS),
    "scan": (scan_loss, (normal(5, 2, 2), normal(6, 2, 3)), (normal(7, 5, 3), normal(8, 5, 2))),
    "convolution and max-pool": (
        convolution_loss,
        {"kernel": normal(9, 2, 1, 2, 2), "out": normal(10, 8, 2)},
        (normal(11, 3, 1, 5, 5), jnp.array([0, 1, 1])),
    ),
    "batch norm": (
        batch_norm_loss,
        {"w": normal(12, 3, 2), "gain": normal(13, 2), "bias": normal(14, 2)},
        (normal(15, 6, 3), normal(16, 6, 2)),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_taylor_mode_cannot_do(name):
    if "max-pool" in name and jax.default_backend() == "gpu":
        pytest.skip("on a GPU JAX warns: second derivatives of max-pooling have reduced precision there")
    loss, params, args = LOSSES[name]
    xi = counterterms(loss, params, 2, args)
    assert all(np.linalg.norm(flat(x)) > 1e-8 for x in xi)
    for a, b in zip(xi, dense_xi(loss, params, args), strict=True):
        assert_close(a, b)


def test_checkpoint_changes_nothing():
    for a, b in zip(
        counterterms(checkpoint_loss, NET, 2, NET_ARGS),
        counterterms(net_loss, NET, 2, NET_ARGS),
        strict=True,
    ):
        assert_close(a, b, rtol=1e-13)


def test_float32_agrees_with_float64():
    def single(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    double = counterterms(net_loss, NET, 3, NET_ARGS)
    for a, b in zip(counterterms(net_loss, single(NET), 3, single(NET_ARGS)), double, strict=True):
        assert {leaf.dtype for leaf in jax.tree.leaves(a)} == {jnp.dtype("float32")}
        assert_close(a, b, rtol=1e-4)
