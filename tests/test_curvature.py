"""Curvature, matrix-free: eigenpairs against dense ones, third derivatives against differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    LABEL_ARGS,
    NET,
    NET_ARGS,
    QUADRATIC,
    assert_close,
    flat,
    label_loss,
    linear_loss,
    net_loss,
    net_params,
    normal,
    quadratic_loss,
    symmetric,
)
from jax.flatten_util import ravel_pytree

import eomdl
from eomdl.curvature import eigenpairs, eigenvalue_gradient, third_derivative
from eomdl.curvature.pairs import preconditioned_pairs


def rows(vectors):
    """The vectors of a stack as rows of a matrix."""
    return np.asarray(jax.vmap(lambda tree: ravel_pytree(tree)[0])(vectors))


def taken(vectors, i):
    return jax.tree.map(lambda leaf: leaf[i], vectors)


@jax.jit
def dense_hessian(params):
    x, unravel = ravel_pytree(params)
    return jax.hessian(lambda x: net_loss(unravel(x), NET_ARGS))(x)


def quadratic(eigenvalues, seed=0):
    """Parameters and arguments of a quadratic with these eigenvalues."""
    n = len(eigenvalues)
    return {"a": normal(seed, n - 1), "b": normal(seed + 1, 1)}, (
        jnp.asarray(symmetric(eigenvalues, seed)),
        jnp.zeros(n),
    )


# ------------------------------------------------------------------ eigenpairs


@pytest.mark.parametrize("seed", range(2))
def test_pairs_are_those_of_the_dense_hessian(seed):
    params = net_params(seed)
    values, vectors = np.linalg.eigh(dense_hessian(params))
    found = eigenpairs(net_loss, params, NET_ARGS, 3, rtol=1e-9)
    np.testing.assert_allclose(found.values, values[::-1][:3], rtol=1e-10)
    assert np.all(found.converged)
    u = rows(found.vectors)
    np.testing.assert_allclose(u @ u.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(np.abs(u @ vectors[:, ::-1][:, :3]), np.eye(3), atol=1e-6)
    assert jax.tree.structure(found.vectors) == jax.tree.structure(params)


def test_a_residual_is_that_of_the_product():
    found = eigenpairs(net_loss, NET, NET_ARGS, 2, num_matvecs=3)
    hessian, u = np.asarray(dense_hessian(NET)), rows(found.vectors)
    true = np.linalg.norm(u @ hessian - np.asarray(found.values)[:, None] * u, axis=1)
    np.testing.assert_allclose(found.residuals, true, rtol=1e-10)
    assert int(found.matvecs) == 6


@pytest.mark.parametrize(
    "spectrum", [[5.0, 4.0, 3.0, 1.0, 0.5, 0.1, -1.0], [0.5, 0.4, 0.1, -1.0, -2.0, -8.0]]
)
def test_converged_are_those_whose_residual_is_within_rtol(spectrum):
    """Of the largest of the values found in modulus, on both sides of the limit."""
    params, args = quadratic(spectrum)

    def measure(rtol):
        found = eigenpairs(quadratic_loss, params, args, 2, num_matvecs=2, rtol=rtol)
        return np.asarray(found.residuals / jnp.max(jnp.abs(found.values))), np.asarray(found.converged)

    limits, _ = measure(0.0)
    assert np.all(limits > 1e-3)
    for rtol in np.outer(limits, [1 / 3, 0.99, 1.01]).ravel():
        relative, converged = measure(rtol)
        np.testing.assert_array_equal(converged, relative <= rtol)
    assert not np.any(measure(limits.min() / 3)[1])
    assert np.all(measure(1.01 * limits.max())[1])


def test_what_is_not_converged_is_said():
    params, args = quadratic(np.linspace(1, 2, 60))
    found = eigenpairs(quadratic_loss, params, args, 2, num_matvecs=3)
    assert not np.any(found.converged)
    assert np.all(np.asarray(found.values) < 2)


def test_an_eigenvalue_that_occurs_twice_is_found_twice():
    params, args = quadratic([5.0, 5.0, 3.0, 1.0, 1.0, 1.0, 0.0, -9.0])
    found = eigenpairs(quadratic_loss, params, args, 3, rtol=1e-10)
    np.testing.assert_allclose(found.values, [5, 5, 3], rtol=1e-10)
    assert np.all(found.converged)


@pytest.mark.parametrize("k", [1, 4])
def test_a_hessian_of_low_rank_ends_the_krylov_space(k):
    params, args = quadratic([3.0, 2.0] + [0.0] * 18)
    found = eigenpairs(quadratic_loss, params, args, k, rtol=1e-10)
    np.testing.assert_allclose(found.values, [3, 2, 0, 0][:k], atol=1e-12)
    assert np.all(found.converged)
    np.testing.assert_allclose(rows(found.vectors) @ rows(found.vectors).T, np.eye(k), atol=1e-12)


def test_all_pairs_of_a_small_problem():
    # n < 5 k, where JAX's LOBPCG raises
    exact = np.linalg.eigvalsh(QUADRATIC.args[0])[::-1]
    found = eigenpairs(quadratic_loss, QUADRATIC.params, QUADRATIC.args, 5, rtol=1e-10)
    np.testing.assert_allclose(found.values, exact, rtol=1e-10)
    flat_loss = eigenpairs(linear_loss, jnp.ones(3), jnp.ones(3), 3)
    np.testing.assert_array_equal(flat_loss.values, np.zeros(3))


def test_warm_pairs_follow_a_rotating_quadratic():
    eigenvalues = np.concatenate([[4.0, 3.0], np.linspace(1, 0, 18)])
    params, (hessian, b) = quadratic(eigenvalues)
    turn = np.eye(20)
    angle = 0.02
    turn[:2, :2] = turn[2:4, 2:4] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    basis = np.linalg.eigh(hessian)[1][:, ::-1][:, [0, 5, 1, 6, *range(7, 20), 2, 3, 4]]
    turn = jnp.asarray(basis @ turn @ basis.T)
    found = eigenpairs(quadratic_loss, params, (hessian, b), 2, rtol=1e-6)
    for _ in range(5):
        hessian = turn @ hessian @ turn.T
        cold = eigenpairs(quadratic_loss, params, (hessian, b), 2, num_matvecs=3, rtol=1e-4)
        found = eigenpairs(
            quadratic_loss, params, (hessian, b), 2, start=found.vectors, num_matvecs=3, rtol=1e-4
        )
        np.testing.assert_allclose(found.values, [4, 3], rtol=1e-7)
        assert np.all(found.converged)
        assert not np.any(cold.converged)


def test_one_product_for_each_vector_where_nothing_has_changed():
    found = eigenpairs(net_loss, NET, NET_ARGS, 3, rtol=1e-8)
    start = taken(found.vectors, jnp.arange(2))
    again = eigenpairs(net_loss, NET, NET_ARGS, 2, start=start, rtol=1e-7)
    assert int(again.matvecs) == 2
    np.testing.assert_allclose(again.values, found.values[:2], rtol=1e-12)


def test_start_vectors_may_be_fewer_more_or_dependent():
    exact = np.linalg.eigvalsh(dense_hessian(NET))[::-1][:2]
    found = eigenpairs(net_loss, NET, NET_ARGS, 3, rtol=1e-8)
    for places in ([0], [0, 1, 2], [0, 0]):
        start = taken(found.vectors, jnp.array(places))
        again = eigenpairs(net_loss, NET, NET_ARGS, 2, start=start, rtol=1e-7)
        np.testing.assert_allclose(again.values, exact, rtol=1e-9)
        assert np.shape(again.values) == (2,)


def test_preconditioned_pairs():
    weights = jax.tree.map(lambda x: 0.5 + x**2, NET)
    p = flat(weights)
    values = np.linalg.eigvalsh(np.asarray(dense_hessian(NET)) / np.sqrt(np.outer(p, p)))[::-1][:2]
    found = eigenpairs(net_loss, NET, NET_ARGS, 2, preconditioner=weights, rtol=1e-8)
    np.testing.assert_allclose(found.values, values, rtol=1e-10)
    u = rows(found.vectors)
    np.testing.assert_allclose(u @ (p[:, None] * u.T), np.eye(2), atol=1e-12)
    left = u @ np.asarray(dense_hessian(NET)) - np.asarray(found.values)[:, None] * p * u
    np.testing.assert_allclose(left, 0, atol=1e-6)
    again = eigenpairs(net_loss, NET, NET_ARGS, 2, preconditioner=weights, start=found.vectors, rtol=1e-7)
    assert int(again.matvecs) == 2


def test_float32_and_float16():
    small = jax.tree.map(lambda x: x.astype(jnp.float32), (NET, NET_ARGS))
    found = eigenpairs(net_loss, *small, 2, rtol=1e-4)
    assert found.values.dtype == jnp.float32
    np.testing.assert_allclose(found.values, np.linalg.eigvalsh(dense_hessian(NET))[::-1][:2], rtol=1e-4)
    assert np.all(found.converged)
    half = jax.tree.map(lambda x: x.astype(jnp.float16), NET)
    assert eigenpairs(net_loss, half, small[1], 1).values.dtype == jnp.float32


def test_jit_vmap_and_chunks():
    alone = [eigenpairs(net_loss, net_params(seed), NET_ARGS, 3, rtol=1e-6) for seed in range(2)]
    many = eomdl.runs.stack([net_params(0), net_params(1)])
    mapped = jax.jit(jax.vmap(lambda params: eigenpairs(net_loss, params, NET_ARGS, 3, rtol=1e-6).values))(
        many
    )
    np.testing.assert_allclose(mapped, [found.values for found in alone], rtol=1e-8)
    chunked = eomdl.losses.MeanOverChunks(net_loss, 3)
    np.testing.assert_allclose(
        eigenpairs(chunked, NET, NET_ARGS, 3, rtol=1e-6).values, alone[0].values, rtol=1e-8
    )


def test_curvature_that_is_not_finite_is_never_converged():
    def broken(params, args):
        return jnp.sum(jnp.abs(params) ** 1.5)  # no second derivative at 0

    found = eigenpairs(broken, jnp.zeros(4), None, 1)
    assert not np.any(found.converged)
    assert not np.any(np.isfinite(found.values))


def test_wrong_arguments_that_depend_on_each_other():
    with pytest.raises(ValueError, match=r"k: expected an integer >= 1 and <= 2"):
        eigenpairs(linear_loss, jnp.ones(2), jnp.ones(2), 3)
    with pytest.raises(ValueError, match="start: expected vectors like params"):
        eigenpairs(linear_loss, jnp.ones(2), jnp.ones(2), 1, start=jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="one of start"):
        eigenpairs(linear_loss, jnp.ones(2), jnp.ones(2), 1, start=jnp.ones((1, 3)))
    with pytest.raises(ValueError, match="preconditioner: expected finite numbers > 0"):
        eigenpairs(linear_loss, jnp.ones(2), jnp.ones(2), 1, preconditioner=jnp.array([1.0, 0.0]))


# ------------------------------------------------------------- third derivatives


def test_third_derivative_of_a_polynomial():
    # sum_i c_i x_i^3 + x_0 x_1 x_2: T = 6 diag(c) on the diagonal, 1 on every order of (0, 1, 2)
    def loss(x, c):
        return jnp.sum(c * x**3) + x[0] * x[1] * x[2]

    c, u, v = jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, 2.0, -1.0]), jnp.array([0.5, 1.0, 3.0])
    cross = jnp.array([u[1] * v[2] + u[2] * v[1], u[0] * v[2] + u[2] * v[0], u[0] * v[1] + u[1] * v[0]])
    np.testing.assert_allclose(
        third_derivative(loss, normal(0, 3), c, u, v), 6 * c * u * v + cross, rtol=1e-12
    )


def test_gradient_of_an_eigenvalue_is_its_difference():
    direction, h = net_params(5), 1e-4

    def values(along):
        moved = jax.tree.map(lambda p, d: p + along * d, NET, direction)
        return eigenpairs(label_loss, moved, LABEL_ARGS, 2, rtol=1e-10).values

    top = eigenpairs(label_loss, NET, LABEL_ARGS, 2, rtol=1e-10)
    ascent = jax.jit(eigenvalue_gradient, static_argnums=0)
    slopes = [
        flat(ascent(label_loss, NET, LABEL_ARGS, taken(top.vectors, i))) @ flat(direction) for i in range(2)
    ]
    np.testing.assert_allclose(slopes, (values(h) - values(-h)) / (2 * h), rtol=1e-5)


def test_third_derivative_is_symmetric():
    u, v, w = (net_params(seed) for seed in (6, 7, 8))
    third = jax.jit(third_derivative, static_argnums=0)
    uv, vu, wv = (third(label_loss, NET, LABEL_ARGS, *pair) for pair in ((u, v), (v, u), (w, v)))
    assert_close(uv, vu)
    np.testing.assert_allclose(flat(wv) @ flat(u), flat(uv) @ flat(w), rtol=1e-10)


def test_active_vectors_of_a_block_and_deflation():
    """Two active vectors of four give the two largest pairs; without those two, the third is the largest."""
    curvature = jnp.array([5.0, 4.0, 2.0, -1.0, 0.5])
    weights = jnp.array([1.0, 2.0, 4.0, 0.5, 1.0])

    def loss(w, args):
        return 0.5 * jnp.sum(curvature * weights * w**2)

    w = jnp.ones(5)
    start = jnp.zeros((4, 5))
    found = preconditioned_pairs(loss, w, None, 4, start, weights, 5, 1e-10, num_active=jnp.asarray(2))
    np.testing.assert_allclose(found.values, [5.0, 4.0, 0.0, 0.0], atol=1e-9)
    np.testing.assert_array_equal(found.vectors[2:], 0)
    np.testing.assert_array_equal(found.residuals[2:], 0)
    third = preconditioned_pairs(loss, w, None, 1, None, weights, 5, 1e-10, deflate=found.vectors)
    np.testing.assert_allclose(third.values, [2.0], atol=1e-9)
    np.testing.assert_allclose(found.vectors @ jnp.diag(weights) @ third.vectors[0], 0, atol=1e-9)
