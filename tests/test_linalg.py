"""Lanczos and Arnoldi on pytrees: their defining equations, and what they do where the Krylov space ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal, symmetric

from eomdl import _tree
from eomdl.linalg.arnoldi import arnoldi
from eomdl.linalg.lanczos import lanczos
from eomdl.linalg.symmetric import are_converged, largest_eigenpairs, ritz_quadrature


def pack(x):
    """A vector as a pytree of two leaves, of shapes (n - 1,) and (1, 1)."""
    return {"a": x[..., :-1], "b": x[..., -1:, None]}


def unpack(tree):
    return jnp.concatenate([tree["a"], tree["b"][..., 0]], axis=-1)


def on_pytrees(matrix):
    return lambda v: pack(jnp.asarray(matrix) @ unpack(v))


def general(n, seed=0):
    return np.asarray(normal(seed, n, n))


LOW_RANK = symmetric([3.0, 2.0, 0.0, 0.0, 0.0, 0.0])
# What ends the Krylov space: (matrix, dimension of the space of a random vector)
ENDING = {
    "identity": (np.eye(6), 1),
    "zero": (np.zeros((6, 6)), 1),
    "rank one": (symmetric([2.0] + [0.0] * 5), 2),
    "rank two": (LOW_RANK, 3),
    "twice the same": (symmetric([2.0, 2.0, 1.0, 1.0, 1.0, -1.0]), 3),
    "dimension 2": (np.diag([2.0, -1.0]), 2),
    "dimension 1": (np.array([[-3.0]]), 1),
}


def start(n):
    # A pytree of one leaf where there is no place for two.
    return normal(3, n)


@pytest.mark.parametrize("seed", range(2))
def test_arnoldi_equation(seed):
    matrix = general(7, seed)
    krylov = arnoldi(on_pytrees(matrix), pack(normal(seed, 7)), 4)
    v = np.asarray(unpack(krylov.vectors))
    np.testing.assert_allclose(v @ v.T, np.eye(5), atol=1e-14)
    np.testing.assert_allclose(matrix @ v[:4].T, v.T @ krylov.products, atol=1e-13)
    np.testing.assert_allclose(np.tril(krylov.products, -2), 0, atol=0)
    np.testing.assert_allclose(v[0], normal(seed, 7) / np.linalg.norm(normal(seed, 7)), rtol=1e-14)
    np.testing.assert_array_equal(krylov.matrix_of_start, krylov.matrix)
    wrong = arnoldi(on_pytrees(matrix + 1e-3 * general(7, 9)), pack(normal(seed, 7)), 4)
    assert np.abs(matrix @ v[:4].T - v.T @ wrong.products).max() > 1e-4


def test_arnoldi_of_a_complex_operator():
    matrix = general(6) + 1j * general(6, 1)
    begin = normal(2, 6) + 1j * normal(3, 6)
    krylov = arnoldi(lambda v: jnp.asarray(matrix) @ v, begin, 4)
    v = np.asarray(krylov.vectors)
    np.testing.assert_allclose(v.conj() @ v.T, np.eye(5), atol=1e-14)
    np.testing.assert_allclose(matrix @ v[:4].T, v.T @ krylov.products, atol=1e-13)


@pytest.mark.parametrize("seed", range(2))
def test_lanczos_equation(seed):
    matrix = symmetric(np.linspace(-1, 3, 8), seed)
    found, basis = lanczos(on_pytrees(matrix), pack(normal(seed, 8)), 5, keep_basis=True)
    q = np.asarray(unpack(basis))
    np.testing.assert_allclose(q @ q.T, np.eye(5), atol=1e-12)
    np.testing.assert_allclose(q @ matrix @ q.T, found.matrix, atol=1e-12)
    outside = matrix @ q[-1] - q.T @ (q @ matrix @ q[-1])
    np.testing.assert_allclose(np.linalg.norm(outside), found.residual, rtol=1e-12)
    assert int(found.num_products) == 5


def test_lanczos_takes_no_product_after_it_is_enough():
    products = []

    def operator(v):
        jax.debug.callback(lambda: products.append(1))
        return jnp.linspace(1.0, 2.0, 9) * v

    found, _ = lanczos(operator, normal(0, 9), 6, lambda found: found.num_products == 4)
    jax.effects_barrier()
    assert len(products) == 4 == int(found.num_products)


@pytest.mark.parametrize("name", ENDING)
def test_lanczos_stops_where_the_space_ends(name):
    matrix, dimension = ENDING[name]
    n = len(matrix)
    found, basis = lanczos(lambda v: jnp.asarray(matrix) @ v, start(n), n + 2, keep_basis=True)
    assert int(found.num_products) == dimension
    assert float(found.residual) == 0
    np.testing.assert_array_equal(basis[dimension:], 0)
    values, vectors = np.linalg.eigh(found.matrix)
    np.testing.assert_allclose(values[-1], np.linalg.eigvalsh(matrix)[-1], atol=1e-12)
    # A function of the operator times the start vector: nothing of it is missing.
    scale = np.linalg.norm(start(n))
    exact = jax.scipy.linalg.expm(matrix) @ start(n)
    np.testing.assert_allclose(scale * basis.T @ (vectors @ (np.exp(values) * vectors[0])), exact, rtol=1e-10)


@pytest.mark.parametrize("name", ENDING)
def test_arnoldi_goes_on_where_the_space_ends(name):
    matrix, dimension = ENDING[name]
    n = len(matrix)
    krylov = arnoldi(lambda v: jnp.asarray(matrix) @ v, start(n), n)
    v = np.asarray(krylov.vectors)
    np.testing.assert_allclose(v[:n] @ v[:n].T, np.eye(n), atol=1e-12)
    np.testing.assert_array_equal(v[n:], 0)  # the space is full
    np.testing.assert_allclose(matrix @ v[:n].T, v.T @ krylov.products, atol=1e-12)
    # All eigenvalues, as often as they occur; those of the start alone in `matrix_of_start`.
    np.testing.assert_allclose(
        np.sort(np.linalg.eigvals(krylov.matrix).real), np.linalg.eigvalsh(matrix), atol=1e-7
    )
    of_start = np.asarray(krylov.matrix_of_start)
    np.testing.assert_array_equal(of_start[dimension:], 0)
    np.testing.assert_array_equal(of_start[:, dimension:], 0)
    np.testing.assert_array_equal(of_start[:dimension, :dimension], krylov.matrix[:dimension, :dimension])
    exact = jax.scipy.linalg.expm(matrix) @ start(n)
    found = jax.scipy.linalg.expm(of_start)[:, 0] @ v[:n] * np.linalg.norm(start(n))
    np.testing.assert_allclose(found, exact, rtol=1e-10)


def test_a_nilpotent_operator_ends_the_space():
    """A shift: the space of the last unit vector is everything, that of the first one itself only."""
    shift = jnp.diag(jnp.ones(3), 1)
    for place, dimension in ((0, 1), (3, 4)):
        krylov = arnoldi(lambda v: shift @ v, jnp.eye(4)[place], 4)
        assert np.count_nonzero(np.any(krylov.matrix_of_start != 0, axis=0)) == dimension - 1
        np.testing.assert_allclose(shift @ krylov.basis.T, krylov.basis.T @ krylov.matrix, atol=1e-14)


@pytest.mark.parametrize("name", ENDING)
def test_eigenpairs_and_quadrature_where_the_space_ends(name):
    matrix, _ = ENDING[name]
    n = len(matrix)
    exact = np.linalg.eigvalsh(matrix)[::-1]
    k = min(n, 3)
    pairs, products = largest_eigenpairs(
        lambda v: jnp.asarray(matrix) @ v, jnp.zeros((k, n)), k, n + 2, 1e-10
    )
    np.testing.assert_allclose(pairs.values, exact[:k], atol=1e-12)
    assert np.all(are_converged(pairs, 1e-10))
    assert int(products) <= n
    values, weights = ritz_quadrature(lambda v: jnp.asarray(matrix) @ v, start(n), n)
    for power in range(3):
        moment = start(n) @ np.linalg.matrix_power(matrix, power) @ start(n) / (start(n) @ start(n))
        np.testing.assert_allclose(weights @ values**power, moment, atol=1e-12)


@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev])
def test_derivatives_are_finite_where_the_space_ends(mode):
    """Of functions of s A along b, where A b = 2 b."""
    matrix, b = jnp.diag(jnp.array([2.0, 2.0, 1.0])), jnp.array([1.0, 1.0, 0.0])

    def by_lanczos(s):
        found, basis = lanczos(lambda v: s * (matrix @ v), b, 3, keep_basis=True)
        values, vectors = jnp.linalg.eigh(found.matrix)
        return jnp.linalg.norm(b) * _tree.combine(vectors @ (jnp.exp(values) * vectors[0]), basis)

    np.testing.assert_allclose(by_lanczos(0.5), np.exp(1.0) * b, rtol=1e-12)
    value = mode(lambda s: lanczos(lambda v: s * (matrix @ v), b, 3)[0].diagonal[0])(0.5)
    np.testing.assert_allclose(value, 2.0, rtol=1e-12)

    def by_arnoldi(s):
        krylov = arnoldi(lambda v: s * (matrix @ v), b, 3)
        powers = krylov.matrix_of_start @ krylov.matrix_of_start[:, 0]
        return jnp.linalg.norm(b) * _tree.combine(powers, krylov.basis)

    np.testing.assert_allclose(by_arnoldi(0.5), b, rtol=1e-12)
    np.testing.assert_allclose(mode(by_arnoldi)(0.5), 4 * b, rtol=1e-12)


def test_what_is_not_finite_is_not_taken_for_an_end():
    broken = lambda v: jnp.nan * v
    assert np.isnan(lanczos(broken, jnp.ones(3), 2)[0].diagonal[0])
    krylov = arnoldi(broken, jnp.ones(3), 2)
    assert np.isnan(krylov.matrix_of_start[0, 0])
    assert np.all(np.isfinite(krylov.vectors))
