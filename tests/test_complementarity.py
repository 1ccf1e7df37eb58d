"""The semidefinite complementarity problem against a dense reference, and by its conditions."""

import jax
import numpy as np
import pytest

from eomdl.linalg.complementarity import solve_complementarity, symmetric_basis


SOLVE = jax.jit(solve_complementarity)


def reference(constant, gram):
    """Accelerated projected gradients in NumPy, to rounding."""
    basis = symmetric_basis(len(constant))
    c, length = np.einsum("aij,ij->a", basis, constant), np.linalg.eigvalsh(gram)[-1]
    x, y, t = (z := np.zeros(len(gram))), z, 1.0
    for _ in range(20000):
        values, vectors = np.linalg.eigh(np.tensordot(y - (gram @ y + c) / length, basis, 1))
        new = np.einsum("aij,ij->a", basis, (vectors * np.maximum(values, 0)[None]) @ vectors.T)
        t = 1.0 if (y - new) @ (new - x) > 0 else t
        faster = (1 + np.sqrt(1 + 4 * t * t)) / 2
        y, moved = new + (t - 1) / faster * (new - x), np.abs(new - x).max()
        x, t = new, faster
        if moved <= 1e-15 * np.abs(x).max():
            break
    return np.tensordot(x, basis, 1)


def problem(k, seed):
    rng = np.random.default_rng(seed)
    p = k * (k + 1) // 2
    half, constant = rng.normal(size=(p + 2, p)), rng.normal(size=(k, k))
    return (constant + constant.T) * 10.0 ** rng.uniform(-4, 0), half.T @ half * 10.0 ** rng.uniform(-2, 2)


def by_hand(constant, gram, matrix):
    """S = C + M[X], with both off-diagonals counted: the sum over all i, j of X."""
    basis = symmetric_basis(len(constant))
    return constant + np.einsum("aij,ab,bkl,kl->ij", basis, gram, basis, matrix)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_against_a_dense_reference(k):
    kinds = set()
    for seed in range(8):
        constant, gram = problem(k, seed)
        found = SOLVE(constant, gram)
        expected = reference(constant, gram)
        np.testing.assert_allclose(found.matrix, expected, atol=1e-8 * max(np.abs(expected).max(), 1e-12))
        assert found.error < 1e-10
        kinds.add(np.linalg.matrix_rank(expected, tol=1e-9 * max(np.abs(expected).max(), 1e-9)))
    assert len(kinds) >= 2  # not the same number of critical directions everywhere


def test_the_conditions_hold_in_badly_scaled_problems():
    rng = np.random.default_rng(0)
    for _ in range(20):
        half = rng.normal(size=(6, 6)) * 10 ** rng.uniform(-1, 1, size=(1, 6))
        constant = np.diag(10 ** rng.uniform(-6, -0.3, size=3) * rng.choice([1, -0.1], size=3))
        gram = half.T @ half
        matrix = np.asarray(SOLVE(constant, gram).matrix)
        slack, size = by_hand(constant, gram, matrix), np.abs(constant).max()
        assert np.linalg.eigvalsh(matrix)[0] >= -1e-9 * np.abs(matrix).max()
        assert np.linalg.eigvalsh(slack)[0] > -1e-9 * size
        assert abs(np.sum(matrix * slack)) < 1e-8 * max(np.abs(matrix).max(), 1) * size


def test_one_direction_in_closed_form():
    found = SOLVE(np.array([[-0.3]]), np.array([[2.0]]))
    np.testing.assert_allclose(found.matrix, [[0.15]], rtol=1e-14)
    assert SOLVE(np.array([[0.3]]), np.array([[2.0]])).matrix == 0


def test_nothing_where_nothing_is_critical():
    constant = np.diag([0.0, 1e-12, 0.4])
    np.testing.assert_array_equal(SOLVE(constant, np.eye(6)).matrix, 0)


def test_what_cannot_be_lifted_is_told():
    for gram in (np.zeros((3, 3)), np.diag([1.0, 0.0, 0.0])):
        found = SOLVE(np.diag([0.2, -0.3]), gram)
        assert np.all(np.isfinite(found.matrix))
        assert found.error > 0.1


@pytest.mark.parametrize("noise", [0.0, 1e-12, -1e-6, 1e-4])
def test_what_the_response_does_not_see_is_not_decided_by_noise(noise):
    """Two directions that do not couple: X_12 changes nothing, and any C_12 would make X singular."""
    constant = np.array([[-0.1, noise], [noise, -0.06]])
    found = jax.jit(solve_complementarity, static_argnums=2)(constant, np.diag([1.0, 0.0, 1.0]), 1e-4)
    np.testing.assert_allclose(found.matrix, np.diag([0.1, 0.06]), atol=max(2 * abs(noise), 1e-9))


def test_the_solution_of_least_norm_in_any_basis():
    """The same in a basis that mixes the two directions."""
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(2, 2)))[0]
    basis = symmetric_basis(2)
    change = np.einsum("aij,ki,lj,bkl->ba", basis, turn, turn, basis)
    constant = turn @ np.diag([-0.1, -0.06]) @ turn.T + 1e-7 * np.ones((2, 2))
    found = SOLVE(constant, change @ np.diag([1.0, 0.0, 1.0]) @ change.T)
    np.testing.assert_allclose(found.matrix, turn @ np.diag([0.1, 0.06]) @ turn.T, atol=1e-6)
