"""Semidefinite linear complementarity: how much of each oscillation holds the curvature where it is stable."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


_START = 1e3  # times the identity, far inside of the cone in units in which C and M have the size of 1
_CENTERING = (
    0.1,
    0.7,
)  # the gap aimed at in a step, as a part of the gap there is: after a long step, a short one
_BOUNDARY = 0.98  # of the way to the boundary of the cone: a step goes no further
_NEAR = 1e-9  # where Newton's method on the conditions themselves takes over
_MOST = 60


class Complementary(NamedTuple):
    """A solution: `matrix` X, shape (k, k), and `error`, what is left of the conditions, relative to C."""

    matrix: jax.Array
    error: jax.Array


def symmetric_basis(k: int) -> np.ndarray:
    r"""An orthonormal basis $B_a$ of the symmetric k x k matrices, shape (k(k+1)/2, k, k), in the order of `numpy.triu_indices`."""
    rows, columns = np.triu_indices(k)
    basis = np.zeros((len(rows), k, k))
    size = np.where(rows == columns, 1.0, np.sqrt(0.5))
    basis[np.arange(len(rows)), rows, columns] = size
    basis[np.arange(len(rows)), columns, rows] = size
    return basis


def complementary(constant: jax.Array, gram: jax.Array) -> Complementary:
    r"""The symmetric X with $X \succeq 0$, $S = C + M[X] \succeq 0$, $\langle X, S \rangle = 0$.

    $M[X] = \sum_{ab} B_a M_{ab} \langle B_b, X \rangle$ in the basis of `symmetric_basis`: off-diagonal elements count on both
    sides. X minimizes $\frac12 \langle X, M[X] \rangle + \langle C, X \rangle$ over the cone. It is exactly 0 where
    $C \succeq 0$, and in closed form, $\max(0, -C/M)$, for k = 1. Else a primal-dual interior-point method (the direction of
    Helmberg, Rendl, Vanderbei & Wolkowicz 1996) comes near in about 8 steps of k(k+1)/2 linear equations, and
    a semismooth Newton method (Qi & Sun 1993) ends in about 3.

    Where no X lifts C, X is huge, or 0 if M is 0, and `error` is of the size of 1.

    **Arguments:** `constant`: C, shape (k, k), symmetric; `gram`: $M_{ab}$, (k(k+1)/2, k(k+1)/2), positive semidefinite.
    """
    k = len(constant)
    basis = jnp.asarray(symmetric_basis(k), constant.dtype)
    # In units in which M has the size of 1: X is scaled back at the end.
    unit = jnp.trace(gram) / len(gram)
    moves = unit > 0
    unit = jnp.where(moves, unit, 1)
    size = jnp.max(jnp.abs(constant))
    size = jnp.where(size > 0, size, 1)
    problem = _Problem(basis, constant / size, gram / unit)
    if k == 1:
        matrix = jnp.maximum(-problem.constant, 0)
        matrix = jnp.where(moves, matrix, 0)
    else:
        free = (jnp.linalg.eigvalsh(constant)[0] >= 0) | ~moves
        matrix = jax.lax.cond(free, lambda: jnp.zeros_like(constant), problem.solved)
    return Complementary(matrix * (size / unit), problem.error(matrix))


class _Problem(NamedTuple):
    basis: jax.Array
    constant: jax.Array
    gram: jax.Array

    def matrix(self, x: jax.Array) -> jax.Array:
        return jnp.tensordot(x, self.basis, 1)

    def vector(self, matrix: jax.Array) -> jax.Array:
        return jnp.tensordot(self.basis, matrix, 2)

    def slack(self, x: jax.Array) -> jax.Array:
        return self.constant + self.matrix(self.gram @ x)

    def residual(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        r"""X less the projection of $X - S$ on the cone, which is 0 at a solution, and the derivative of that projection."""
        values, vectors = jnp.linalg.eigh(self.matrix(x) - self.matrix(self.gram @ x) - self.constant)
        positive = jnp.maximum(values, 0)
        apart = values[:, None] - values[None]
        same = jnp.abs(apart) < jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values))
        mean = (values > 0).astype(values.dtype)
        ratio = jnp.where(
            same,
            mean[:, None] * jnp.ones_like(apart),
            (positive[:, None] - positive[None]) / jnp.where(same, 1, apart),
        )
        turned = jnp.einsum("im,aij,jn->amn", vectors, self.basis, vectors)
        derivative = jnp.einsum("amn,mn,bmn->ab", turned, ratio, turned)
        return x - self.vector((vectors * positive[None]) @ vectors.T), derivative

    def error(self, matrix: jax.Array) -> jax.Array:
        """How far from a solution, and how far S lies below 0."""
        x = self.vector(matrix)
        apart = jnp.max(jnp.abs(self.residual(x)[0])) / (1 + jnp.max(jnp.abs(x)))
        return jnp.maximum(apart, -jnp.linalg.eigvalsh(self.slack(x))[0])

    def solved(self) -> jax.Array:
        """From the middle of the cone by interior points, then by Newton's method on the residual."""
        return self.matrix(self.polished(self.vector(self.central())))

    def polished(self, x: jax.Array) -> jax.Array:
        """Newton's steps (Qi & Sun 1993) as long as they come nearer."""
        identity = jnp.eye(len(x), dtype=x.dtype)

        def advanced(carry: tuple) -> tuple:
            i, best, residual, derivative = carry
            new = best - jnp.linalg.solve(identity - derivative + derivative @ self.gram, residual)
            found = self.residual(new)
            nearer = jnp.max(jnp.abs(found[0])) < jnp.max(jnp.abs(residual))
            kept = jax.tree.map(lambda a, b: jnp.where(nearer, a, b), (new, *found), carry[1:])
            return (jnp.where(nearer, i + 1, _MOST), *kept)

        def goes_on(carry: tuple) -> jax.Array:
            return (carry[0] < _MOST) & (jnp.max(jnp.abs(carry[2])) > 0)

        return jax.lax.while_loop(goes_on, advanced, (jnp.asarray(0), x, *self.residual(x)))[1]

    def central(self) -> jax.Array:
        """A point near the solution, by interior points."""
        eye = jnp.eye(len(self.constant), dtype=self.constant.dtype)

        def goes_on(carry: tuple) -> jax.Array:
            i, x, s, _ = carry
            apart = jnp.max(jnp.abs(self.slack(self.vector(x)) - s))
            return (i < _MOST) & (jnp.maximum(apart, jnp.sum(x * s)) > _NEAR)

        def advanced(carry: tuple) -> tuple:
            i, x, s, reach = carry
            long, short = _CENTERING
            gap = jnp.where(reach > 0.5, long, short) * jnp.sum(x * s) / len(x)
            dx, ds = self.direction(x, s, gap)
            # One length for both: the conditions come nearer as the gap closes, not after it.
            reach = jnp.minimum(_reach(x, dx), _reach(s, ds))
            new = x + reach * dx, s + reach * ds
            sound = jnp.all(jnp.isfinite(new[0])) & jnp.all(jnp.isfinite(new[1]))
            # At the limit of rounding: what there is, is the best.
            kept = jax.tree.map(lambda a, b: jnp.where(sound, a, b), new, (x, s))
            return (jnp.where(sound, i + 1, _MOST), *kept, reach)

        start = (jnp.asarray(0), _START * eye, _START * eye, jnp.ones((), eye.dtype))
        return jax.lax.while_loop(goes_on, advanced, start)[1]

    def direction(self, x: jax.Array, s: jax.Array, gap: jax.Array) -> tuple[jax.Array, jax.Array]:
        r"""Newton's for $X S = \mu I$ made symmetric, and $S = C + M[X]$."""
        inverse = jnp.linalg.inv(s)
        inverse = (inverse + inverse.T) / 2
        # The map D -> (X D S^-1 + S^-1 D X)/2 in the basis.
        map_ = jnp.einsum("aij,jk,bkl,li->ab", self.basis, x, self.basis, inverse)
        map_ = (map_ + map_.T) / 2
        missing = self.vector(self.slack(self.vector(x)) - s)
        right = self.vector(gap * inverse - x) - map_ @ missing
        step = jnp.linalg.solve(jnp.eye(len(right), dtype=x.dtype) + map_ @ self.gram, right)
        return self.matrix(step), self.matrix(self.gram @ step + missing)


def _reach(x: jax.Array, step: jax.Array) -> jax.Array:
    """The longest part of a step, up to all of it, that stays inside of the cone."""
    root = jnp.linalg.cholesky(x)
    half = jax.scipy.linalg.solve_triangular(root, step, lower=True)
    lowest = jnp.linalg.eigvalsh(jax.scipy.linalg.solve_triangular(root, half.T, lower=True))[0]
    return jnp.minimum(1.0, _BOUNDARY / jnp.maximum(-lowest, _BOUNDARY))
