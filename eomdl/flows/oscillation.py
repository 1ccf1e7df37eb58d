"""The oscillation at the edge of stability that the central flow carries: how large it is where the curvature is held at its bound."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eomdl import _tree
from eomdl._types import Args, Loss, Params
from eomdl.curvature import third_derivative
from eomdl.curvature.tracker import RTOL, TrackedPairs
from eomdl.flows.preconditioners import AbstractPreconditioner
from eomdl.linalg.complementarity import ComplementaritySolution, solve_complementarity, symmetric_basis


THRESHOLD = 2.0  # of the curvature of P^-1 H: beyond it iterates oscillate and grow
# From here on a direction is near the threshold: it is tracked. Those below are left out of the complementarity problem.
NEAR = 0.9 * THRESHOLD


class Oscillation(NamedTuple):
    """The part of `CentralState` that is held over a step; `error` is that of the complementarity problem."""

    force: Params
    squares: Any
    variance: jax.Array
    error: jax.Array


class Balance(eqx.Module):
    r"""The complementarity problem at one place: $\Sigma = U X U^\top$ that holds the curvature of the tracked directions at its bound.

    - `loss`, `preconditioner`, `learning_rate`: of the flow; `params`, `moment`, `diagonal` P: where it is.
    - `pairs`: the tracked pairs of $P^{-1} H$, largest first; 0 in places that are not active.
    """

    loss: Loss
    preconditioner: AbstractPreconditioner
    learning_rate: jax.Array
    params: Params
    moment: Any
    diagonal: Params
    pairs: TrackedPairs
    args: Args

    def solve(self) -> Oscillation:
        """Return X, and what follows from it; third derivatives cost nothing where nothing is critical."""
        top = self.pairs.values[0]
        # NaN is near: the run has to stop.
        return jax.lax.cond((top >= NEAR) | jnp.isnan(top), lambda: self._solve(), lambda: self._still())

    def _still(self) -> Oscillation:
        """Return the oscillation where there is none."""
        k, dtype = len(self.pairs.values), self.pairs.values.dtype
        force, squares = _tree.zeros_like(self.params), _tree.zeros_like(self.moment)
        return Oscillation(force, squares, jnp.zeros((k, k), dtype), jnp.zeros((), dtype))

    def _solve(self) -> Oscillation:
        r"""Return X and what follows from it, in the basis $B_a$ of symmetric matrices.

        With $T_a = \sum_{ij} B_{a,ij} T[u_i, u_j]$ and $q_a = \sum_{ij} B_{a,ij} u_i u_j$.
        """
        optimizer, k, dtype = self.preconditioner, len(self.pairs.values), self.pairs.values.dtype
        gradient = jax.grad(self.loss)(self.params, self.args)
        thirds, products = self._thirds(), self._products()
        divided = jax.vmap(lambda x: jax.tree.map(jnp.divide, x, self.diagonal))(thirds)
        one = jax.tree.map(lambda x: x[None], gradient)
        # How the curvature moves in a step: by the gradient, by each X_a, and as P moves.
        drift = -_tree.gram(divided, one)[:, 0]
        response = _tree.gram(divided, thirds) / 2
        squares = jax.tree.map(jnp.square, gradient)
        drift = drift - self._stiffening(products, optimizer.collect(squares), self.moment)
        unmoved = _tree.zeros_like(self.moment)
        rows = jax.vmap(lambda of_a: self._stiffening(products, self._squares(of_a), unmoved))(products)
        response = response + rows.T
        # Any number > 0 where a direction is far: X is 0 there, and the problem stays regular.
        response = response + jnp.diag(jnp.where(self._far(), jnp.trace(response) / len(response), 0))
        basis = jnp.asarray(symmetric_basis(k), dtype)
        constant = THRESHOLD * jnp.eye(k) - jnp.diag(self.pairs.values)
        constant = (constant - jnp.tensordot(drift, basis, 1)).astype(dtype)
        solution = self._solve_complementarity(constant, ((response + response.T) / 2).astype(dtype))
        x = jnp.tensordot(basis, solution.matrix, 2)
        force = _tree.combine(x / 2, thirds)
        return Oscillation(force, self._squares(_tree.combine(x, products)), solution.matrix, solution.error)

    def _solve_complementarity(self, constant: jax.Array, response: jax.Array) -> ComplementaritySolution:
        """Return X, in closed form where no direction but the first is near the threshold."""

        def solve_first() -> ComplementaritySolution:
            first = solve_complementarity(constant[:1, :1], response[:1, :1])
            return first._replace(matrix=jnp.zeros_like(constant).at[:1, :1].set(first.matrix))

        several = jnp.any(self.pairs.values[1:] >= NEAR)
        return jax.lax.cond(several, lambda: solve_complementarity(constant, response, RTOL**2), solve_first)

    def _stiffening(self, products: Params, squares: Any, moment: Any) -> jax.Array:
        r"""Return by how much P moving lowers the curvature in a step: $2 u_i^\top \dot P u_j$ at the threshold, for each $B_a$."""
        optimizer = self.preconditioner
        rate = optimizer.rate(moment, squares)
        moved = optimizer.diagonal_rate(self.learning_rate, self.diagonal, rate)
        return THRESHOLD * _tree.gram(products, jax.tree.map(lambda x: x[None], moved))[:, 0]

    def _squares(self, covariance: Params) -> Any:
        r"""Return what an oscillation with this diagonal of $\Sigma$ adds to the squared gradient: $4 P^2 \operatorname{diag} \Sigma$."""
        squares = jax.tree.map(lambda c, p: THRESHOLD**2 * p**2 * c, covariance, self.diagonal)
        return self.preconditioner.collect(squares)

    def _places(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows, columns = np.triu_indices(len(self.pairs.values))
        return rows, columns, np.where(rows == columns, 1.0, np.sqrt(2.0))

    def _products(self) -> Params:
        rows, columns, size = self._places()

        def of(u: jax.Array) -> jax.Array:
            scale = jnp.asarray(size, u.dtype).reshape(-1, *[1] * (u.ndim - 1))
            return scale * u[rows] * u[columns]

        return jax.tree.map(of, self.pairs.vectors)

    def _thirds(self) -> Params:
        """Return third derivatives for pairs of directions near the threshold, one at a time; 0 for others."""
        rows, columns, size = self._places()

        def one(place: tuple) -> Params:
            i, j, scale, far = place

            def derivative() -> Params:
                u, v = (jax.tree.map(lambda x, n=n: x[n], self.pairs.vectors) for n in (i, j))
                third = third_derivative(self.loss, self.params, self.args, u, v)
                return _tree.scale(scale, third)

            return jax.lax.cond(far, lambda: _tree.zeros_like(self.params), derivative)

        return jax.lax.map(one, (*map(jnp.asarray, (rows, columns, size)), self._far()))

    def _far(self) -> jax.Array:
        """Return of which elements of X a direction is far from the threshold."""
        rows, columns, _ = self._places()
        far = self.pairs.values < NEAR
        return far[rows] | far[columns]
