"""Semidefinite linear complementarity: symmetric matrices X and S = C + M[X], both positive semidefinite, whose product is 0."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


_START = 1e3  # times the identity, far inside of the cone in units in which C and M have the size of 1
# The gap that a step aims at, as a fraction of the present gap: after a long step, and after a short one.
_CENTERING = (0.1, 0.7)
_BOUNDARY_FRACTION = 0.98  # a step goes no further than this on the way to the boundary of the cone
_NEWTON_FROM = 1e-9  # the gap at which Newton's method on the conditions themselves takes over
_MAX_STEPS = 60


class ComplementaritySolution(NamedTuple):
    """A solution: `matrix` X, shape (k, k), and `error`, what is left of the conditions, relative to C."""

    matrix: jax.Array
    error: jax.Array


def symmetric_basis(k: int) -> np.ndarray:
    r"""Return an orthonormal basis $B_a$ of the symmetric k x k matrices, shape (k(k+1)/2, k, k), in the order of `numpy.triu_indices`."""
    rows, columns = np.triu_indices(k)
    basis = np.zeros((len(rows), k, k))
    size = np.where(rows == columns, 1.0, np.sqrt(0.5))
    basis[np.arange(len(rows)), rows, columns] = size
    basis[np.arange(len(rows)), columns, rows] = size
    return basis


def solve_complementarity(
    constant: jax.Array, gram: jax.Array, resolution: float = 1e-12
) -> ComplementaritySolution:
    r"""Return the symmetric X with $X \succeq 0$, $S = C + M[X] \succeq 0$, $\langle X, S \rangle = 0$.

    $M[X] = \sum_{ab} B_a M_{ab} \langle B_b, X \rangle$ in the basis of `symmetric_basis`: off-diagonal elements count on both
    sides. X minimizes $\frac12 \langle X, M[X] \rangle + \langle C, X \rangle$ over the cone. It is exactly 0 where
    $C \succeq 0$, and in closed form, $\max(0, -C/M)$, for k = 1. Else a primal-dual interior-point method (the direction of
    Helmberg, Rendl, Vanderbei & Wolkowicz 1996) comes near in about 8 steps of k(k+1)/2 linear equations, and
    a semismooth Newton method (Qi & Sun 1993) ends in about 3.

    Where no X lifts C, X is huge, or 0 if M is 0, and `error` is of the size of 1.

    What M does not see of X is undetermined: of all solutions that are the same to M, the one of least norm is returned (where it is in the
    cone). Without this rule the least error of C decides: with $M_{12} = 0$ any $C_{12} \ne 0$ makes S, and so X, singular.

    **Arguments:** `constant`: C, shape (k, k), symmetric; `gram`: $M_{ab}$, (k(k+1)/2, k(k+1)/2), positive semidefinite;
    `resolution`: eigenvalues of M below this part of their mean are taken to be 0.
    """
    k = len(constant)
    basis = jnp.asarray(symmetric_basis(k), constant.dtype)
    # In units in which M has the size of 1: X is scaled back at the end.
    unit = jnp.trace(gram) / len(gram)
    can_lift = unit > 0
    unit = jnp.where(can_lift, unit, 1)
    size = jnp.max(jnp.abs(constant))
    size = jnp.where(size > 0, size, 1)
    problem = _Problem(basis, constant / size, gram / unit)
    if k == 1:
        matrix = jnp.maximum(-problem.constant, 0)
        matrix = jnp.where(can_lift, matrix, 0)
    else:
        is_zero = (jnp.linalg.eigvalsh(constant)[0] >= 0) | ~can_lift
        matrix = jax.lax.cond(is_zero, lambda: jnp.zeros_like(constant), problem.solve)
    error = problem.error(matrix)
    if k > 1:
        matrix = problem.without_unseen(matrix, resolution)
    return ComplementaritySolution(matrix * (size / unit), error)


class _Problem(NamedTuple):
    """A problem in units in which C and M have the size of 1; x is the vector of X in the basis."""

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
        r"""Return X less the projection of $X - S$ on the cone, which is 0 at a solution, and the derivative of that projection."""
        values, vectors = jnp.linalg.eigh(self.matrix(x) - self.matrix(self.gram @ x) - self.constant)
        positive = jnp.maximum(values, 0)
        difference = values[:, None] - values[None]
        is_equal = jnp.abs(difference) < jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values))
        mean = (values > 0).astype(values.dtype)
        ratio = jnp.where(
            is_equal,
            mean[:, None] * jnp.ones_like(difference),
            (positive[:, None] - positive[None]) / jnp.where(is_equal, 1, difference),
        )
        rotated = jnp.einsum("im,aij,jn->amn", vectors, self.basis, vectors)
        derivative = jnp.einsum("amn,mn,bmn->ab", rotated, ratio, rotated)
        return x - self.vector((vectors * positive[None]) @ vectors.T), derivative

    def error(self, matrix: jax.Array) -> jax.Array:
        """Return how far X is from a solution, or how far S lies below 0, if that is more."""
        x = self.vector(matrix)
        distance = jnp.max(jnp.abs(self.residual(x)[0])) / (1 + jnp.max(jnp.abs(x)))
        return jnp.maximum(distance, -jnp.linalg.eigvalsh(self.slack(x))[0])

    def solve(self) -> jax.Array:
        """Return X: from the middle of the cone by interior points, then by Newton's method on the residual."""
        return self.matrix(self.polish(self.vector(self.find_interior())))

    def without_unseen(self, matrix: jax.Array, resolution: float) -> jax.Array:
        """Return X without its part in the null space of M, if that is in the cone."""
        values, vectors = jnp.linalg.eigh(self.gram)
        # A smooth step, so that X does not jump.
        kept = values**2 / (values**2 + resolution**2)
        least = self.matrix(vectors @ (kept * (vectors.T @ self.vector(matrix))))
        rounding = 1e3 * jnp.finfo(matrix.dtype).eps * jnp.max(jnp.abs(matrix))
        return jnp.where(jnp.linalg.eigvalsh(least)[0] >= -rounding, least, matrix)

    def polish(self, x: jax.Array) -> jax.Array:
        """Return x after Newton's steps (Qi & Sun 1993) as long as they come nearer."""
        identity = jnp.eye(len(x), dtype=x.dtype)

        def advance(carry: tuple) -> tuple:
            i, best, residual, derivative = carry
            x = best - jnp.linalg.solve(identity - derivative + derivative @ self.gram, residual)
            new = (x, *self.residual(x))
            is_nearer = jnp.max(jnp.abs(new[1])) < jnp.max(jnp.abs(residual))
            best = jax.tree.map(lambda a, b: jnp.where(is_nearer, a, b), new, carry[1:])
            return (jnp.where(is_nearer, i + 1, _MAX_STEPS), *best)

        def goes_on(carry: tuple) -> jax.Array:
            return (carry[0] < _MAX_STEPS) & (jnp.max(jnp.abs(carry[2])) > 0)

        return jax.lax.while_loop(goes_on, advance, (jnp.asarray(0), x, *self.residual(x)))[1]

    def find_interior(self) -> jax.Array:
        """Return an X near the solution, by interior points."""
        eye = jnp.eye(len(self.constant), dtype=self.constant.dtype)

        def goes_on(carry: tuple) -> jax.Array:
            i, x, s, _ = carry
            missing = jnp.max(jnp.abs(self.slack(self.vector(x)) - s))
            return (i < _MAX_STEPS) & (jnp.maximum(missing, jnp.sum(x * s)) > _NEWTON_FROM)

        def advance(carry: tuple) -> tuple:
            i, x, s, reach = carry
            long, short = _CENTERING
            gap = jnp.where(reach > 0.5, long, short) * jnp.sum(x * s) / len(x)
            dx, ds = self.direction(x, s, gap)
            # One length for both: the conditions come nearer as the gap closes, not after it.
            reach = jnp.minimum(_reach(x, dx), _reach(s, ds))
            new = x + reach * dx, s + reach * ds
            is_finite = jnp.all(jnp.isfinite(new[0])) & jnp.all(jnp.isfinite(new[1]))
            # Not finite at the limit of rounding: the present point is the best.
            best = jax.tree.map(lambda a, b: jnp.where(is_finite, a, b), new, (x, s))
            return (jnp.where(is_finite, i + 1, _MAX_STEPS), *best, reach)

        start = (jnp.asarray(0), _START * eye, _START * eye, jnp.ones((), eye.dtype))
        return jax.lax.while_loop(goes_on, advance, start)[1]

    def direction(self, x: jax.Array, s: jax.Array, gap: jax.Array) -> tuple[jax.Array, jax.Array]:
        r"""Return Newton's direction for $X S = \mu I$ made symmetric, and $S = C + M[X]$."""
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
    """Return the largest fraction of a step, at most 1, that stays inside of the cone."""
    root = jnp.linalg.cholesky(x)
    half = jax.scipy.linalg.solve_triangular(root, step, lower=True)
    lowest = jnp.linalg.eigvalsh(jax.scipy.linalg.solve_triangular(root, half.T, lower=True))[0]
    return jnp.minimum(1.0, _BOUNDARY_FRACTION / jnp.maximum(-lowest, _BOUNDARY_FRACTION))
