"""The central flow: gradient descent, RMSProp and scalar RMSProp at the edge of stability."""

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from eomdl import _check, _tree
from eomdl._end import Diagnostic
from eomdl._target import SMOOTHED, Target
from eomdl._types import Args, Loss, Params
from eomdl.curvature import Eigenpairs, eigenpairs, third_derivative
from eomdl.flows.complementarity import Complementary, complementary, symmetric_basis
from eomdl.flows.descent import AbstractDescentFlow
from eomdl.flows.preconditioners import DESCENT, AbstractPreconditioner


_THRESHOLD = 2.0  # of the curvature of P^-1 H: beyond it iterates oscillate and grow
_NEAR = 0.9  # of that: directions below are far from it, and are left out of the complementarity problem
_COLD, _WARM = 16, 4  # Hessian-vector products for each direction at the start, and at most at a step
_RTOL = (
    1e-2  # of the largest eigenvalue: the residual of a tracked pair; the value is wrong by about its square
)


class CentralState(NamedTuple):
    r"""Where a central flow is, and what it holds from one step to the next.

    - `params`; `moment`: $\nu$ of RMSProp, None for gradient descent.
    - `vectors`: the k tracked directions, with $u_i^\top P u_j = \delta_{ij}$, a leading axis k on every leaf.
    - `force`: $\frac12 \nabla \langle H, \Sigma \rangle$, like the parameters.
    - `squares`: what oscillations add to the squared gradient that the moment averages.
    - `variance`: X, shape (k, k), with $\Sigma = \sum_{ij} X_{ij} u_i u_j^\top$.
    - `curvature`: eigenvalues of $P^{-1} H$ in the tracked directions, (k,), largest first; critical at 2.
    - `worst`: of all steps so far, (2,): the largest residual of a pair near the threshold, as a part of the largest
        eigenvalue, and the largest error of the complementarity problem.
    """

    params: Params
    moment: Any
    vectors: Params
    force: Params
    squares: Any
    variance: jax.Array
    curvature: jax.Array
    worst: jax.Array


class CentralFlow(AbstractDescentFlow):
    r"""The smoothed path of gradient descent, of RMSProp or of scalar RMSProp through the edge of stability.

    ```python
    flow = eomdl.flows.CentralFlow(loss, learning_rate=0.1, directions=2)
    path = eomdl.solve(flow, params, 1000, args=data, observe_state={"loss": flow.mean_loss})
    ```

    $$\dot\theta = -\frac{1}{\eta} P^{-1} \Big[ \nabla L + \tfrac12 \nabla \langle H, \Sigma \rangle \Big], \qquad
    \dot\nu = \frac{1}{\eta} \frac{1-\beta_2}{\beta_2} \big[ g^2 + 4 \operatorname{diag}(P \Sigma P) - \nu \big],$$

    with $P = 1/\eta$ and no $\nu$ for gradient descent, $P = \sqrt{\nu + \epsilon}/\eta$ for RMSProp. $\Sigma \succeq 0$ is the
    covariance of the oscillation in the critical directions, the eigenvectors of $P^{-1} H$ whose curvature A is at its bound 2:
    $\Sigma = U X U^\top$ solves a semidefinite complementarity problem,

    $$X \succeq 0, \qquad 2 I - A - \dot A[X] \succeq 0, \qquad \text{their product } 0,$$

    where $\dot A$ is the rate of A per step. So the bound is looked at one step ahead: the curvature comes to it within
    a step and drifts no further than a step's nonlinearity. For one direction of gradient descent at the edge
    $\Sigma = \max(0, 2 \langle -g, T \rangle / |T|^2)$ along u, $T = \nabla (u^\top H u)$. Where nothing is critical this is gradient flow.

    It predicts the smoothed path (its `target`), and of the oscillation around it `mean_loss`, `mean_squared_gradient`
    and `variances`, to be recorded by `observe_state`: each is that of the step before its row.

    **Arguments:**

    - `loss`; `learning_rate` $\eta$, a leaf of the pytree, and the time of a step.
    - `directions`: k, how many directions are tracked. Directions beyond are not held at the bound: the diagnostic
        `curvature of the next direction` then says to raise it.
    - `preconditioner`: by default gradient descent's; `eomdl.flows.SecondMoment` is RMSProp's.

    **Cost** of a step: about 1.2 k Hessian-vector products and, of the $m \le k$ directions within 10 % of the bound, $m(m+1)/2$ third
    derivatives (3 gradients each on the benchmarks), at the start of the step; $\Sigma$ is held over it. Then one gradient
    for each evaluation of the field. Memory: $k(k+1)/2 + 6 k$ copies of the parameters.

    **Limits:** the model assumes that oscillations are small and in balance. Where they set in, the real run first
    overshoots the bound for some tens of steps. A loss that is quadratic there has no balance: the diagnostic
    `complementarity error` says so.

    **Raises:** `ValueError` for a wrong argument, and for more directions than parameters.

    Source: Cohen, Damian, Talwalkar, Kolter & Lee 2025 (arXiv 2410.24206).
    """

    references: ClassVar[tuple[str, ...]] = ("cohen2025",)

    loss: Loss = eqx.field(converter=lambda f: _check.function("loss", f))
    learning_rate: jax.Array = eqx.field(converter=lambda x: _check.positive_scalar("learning_rate", x))
    directions: int = eqx.field(
        default=1, static=True, converter=lambda n: _check.integer("directions", n, 1)
    )
    preconditioner: AbstractPreconditioner = eqx.field(
        default=DESCENT,
        converter=lambda p: _check.kind(
            "preconditioner", p, AbstractPreconditioner, "an eomdl.flows.SecondMoment"
        ),
    )

    if TYPE_CHECKING:  # a checker knows no converters, and takes an AbstractVar for an argument

        def __init__(
            self,
            loss: Loss,
            learning_rate: ArrayLike,
            directions: int = 1,
            preconditioner: AbstractPreconditioner = DESCENT,
        ) -> None: ...

    @property
    def target(self) -> Target:
        """The smoothed path."""
        return SMOOTHED

    @property
    def refreshes(self) -> bool:
        """True: directions and oscillation are found anew at every step."""
        return True

    @property
    def gradients(self) -> float:
        """One; what a step costs beside is in the class's docstring."""
        return 1.0

    def validate(self, params: Params, args: Args) -> None:
        """Raise `ValueError` if the loss is no real number, or there are fewer parameters than directions."""
        _check.loss_is_scalar(self.loss, params, args)
        _check.integer("directions", self.directions, 1, _tree.size(params))

    def init(self, params: Params, args: Args) -> CentralState:
        """Nothing oscillates yet; the moment is the squared gradient."""
        return self._started(params, self.preconditioner.init(jax.grad(self.loss)(params, args)), args)

    def begin(self, params: Params, state: Any, args: Args) -> CentralState:
        """From where a real run ended, with its moment."""
        return self._started(params, self.preconditioner.read(state), args)

    def params(self, state: CentralState) -> Params:
        """The parameters."""
        return state.params

    def __call__(self, t: ArrayLike, state: CentralState, args: Args) -> CentralState:
        """The velocity with the oscillation as it was found at the last step."""
        del t
        gradient = jax.grad(self.loss)(state.params, args)
        diagonal = self._diagonal(state)
        whole = _tree.add(gradient, state.force)
        still = jax.tree.map(jnp.zeros_like, state)
        squares = self.preconditioner.collected(jax.tree.map(jnp.square, gradient))
        rate = self.preconditioner.rate(state.moment, _tree.add(squares, state.squares))
        return still._replace(
            params=jax.tree.map(lambda g, p: -g / (p * self._rate(g)), whole, diagonal),
            moment=_tree.scale(1 / self.learning_rate, rate),
        )

    def step(self, t: ArrayLike, state: CentralState, args: Args) -> CentralState:
        """One step of the optimizer."""
        del t
        gradient = jax.grad(self.loss)(state.params, args)
        squares = self.preconditioner.collected(jax.tree.map(jnp.square, gradient))
        state = state._replace(moment=self.preconditioner.next(state.moment, squares))
        moved = jax.tree.map(lambda w, g, p: w - g / p, state.params, gradient, self._diagonal(state))
        return state._replace(params=moved)

    def refresh(self, t: ArrayLike, state: CentralState, args: Args) -> CentralState:
        """Directions tracked from those there are, and the oscillation that holds their curvature over the step."""
        del t
        diagonal = self._diagonal(state)
        pairs = self._pairs(state, args, self.directions, _WARM)
        problem = _Problem(self, state, diagonal, pairs, args)
        is_near = pairs.values[0] >= _NEAR * _THRESHOLD
        # By cond, so that third derivatives cost nothing where nothing is critical. NaN is near: the run has to stop.
        found = jax.lax.cond(
            is_near | jnp.isnan(pairs.values[0]), lambda: problem.solved(), lambda: problem.still()
        )
        relative = pairs.residuals / jnp.max(jnp.abs(pairs.values))
        residual = jnp.max(jnp.where(pairs.values >= _NEAR * _THRESHOLD, relative, 0))
        worst = jnp.stack([residual, found.error]).astype(state.worst.dtype)
        return state._replace(
            vectors=pairs.vectors,
            force=found.force,
            squares=found.squares,
            variance=found.variance,
            curvature=pairs.values,
            worst=jnp.maximum(state.worst, worst),
        )

    def mean_loss(self, t: ArrayLike, state: CentralState, args: Args) -> Float[jax.Array, ""]:
        r"""The loss averaged over the oscillation, $L + \frac12 \langle H, \Sigma \rangle$.

        For gradient descent $L + \operatorname{tr} \Sigma / \eta$.
        """
        del t
        return self.loss(state.params, args) + _THRESHOLD / 2 * jnp.trace(state.variance)

    def mean_squared_gradient(self, t: ArrayLike, state: CentralState, args: Args) -> Float[jax.Array, ""]:
        r"""The squared norm of the gradient averaged over the oscillation, $|g|^2 + 4 \operatorname{tr}(P \Sigma P)$.

        For gradient descent $|g|^2 + 4 \operatorname{tr} \Sigma / \eta^2$.
        """
        del t
        gradient = jax.grad(self.loss)(state.params, args)
        weighted = jax.vmap(lambda u: jax.tree.map(jnp.multiply, u, self._diagonal(state)))(state.vectors)
        return _tree.vdot(gradient, gradient) + _THRESHOLD**2 * jnp.sum(
            state.variance * _tree.gram(weighted, weighted)
        )

    def variances(self, t: ArrayLike, state: CentralState, args: Args) -> Float[jax.Array, " k"]:
        r"""The variances of the iterates around the path along the critical directions: eigenvalues of $\Sigma$, largest first."""
        del t, args
        root = jnp.linalg.cholesky(_tree.gram(state.vectors, state.vectors))
        return jnp.linalg.eigvalsh(root.T @ state.variance @ root)[::-1]

    def diagnostics(self, t: ArrayLike, state: CentralState, args: Args) -> dict[str, Diagnostic]:
        """Whether all critical directions are tracked, whether they were found, and whether the bound could be held."""
        del t
        more = min(self.directions + 1, _tree.size(state.params))
        beyond = self._pairs(state, args, more, _COLD).values[self.directions :]
        found = {
            "residual of the tracked directions": Diagnostic(
                state.worst[0],
                10 * _RTOL,
                "The eigenvectors change faster than they are tracked: the curvature is not known to better than about 1 %.",
            ),
            "complementarity error": Diagnostic(
                state.worst[1],
                1e-3,
                "No oscillation in the tracked directions holds the curvature at its bound: the loss is too near a quadratic "
                "there, or the steps are too large for the model. Lower the learning rate.",
            ),
        }
        if more > self.directions:
            found["curvature of the next direction"] = Diagnostic(
                beyond[0],
                _THRESHOLD * (1 - _RTOL / 10),
                f"More directions are critical than the {self.directions} tracked. Raise `directions`.",
            )
        return found

    def _started(self, params: Params, moment: Any, args: Args) -> CentralState:
        k, dtype = self.directions, _tree.dtype(params)
        stack = jax.tree.map(lambda x: jnp.zeros((k, *x.shape), x.dtype), params)
        state = CentralState(
            params=params,
            moment=moment,
            vectors=stack,
            force=_tree.zeros_like(params),
            squares=_tree.zeros_like(moment),
            variance=jnp.zeros((k, k), dtype),
            curvature=jnp.zeros(k, dtype),
            worst=jnp.zeros(2, dtype),
        )
        # Rows of zeros are filled with random vectors.
        pairs = self._pairs(state, args, k, _COLD)
        return state._replace(vectors=pairs.vectors, curvature=pairs.values)

    def _pairs(self, state: CentralState, args: Args, k: int, num_matvecs: int) -> Eigenpairs:
        """The k largest pairs of P^-1 H in the dtype of the state."""
        diagonal = self._diagonal(state)
        found = eigenpairs(
            self.loss,
            state.params,
            args,
            k,
            start=state.vectors,
            preconditioner=diagonal,
            num_matvecs=num_matvecs,
            rtol=_RTOL,
        )
        vectors = jax.tree.map(lambda x, like: x.astype(like.dtype), found.vectors, state.vectors)
        dtype = state.curvature.dtype
        return eqx.tree_at(
            lambda p: (p.values, p.vectors, p.residuals),
            found,
            (found.values.astype(dtype), vectors, found.residuals.astype(dtype)),
        )

    def _diagonal(self, state: CentralState) -> Params:
        return self.preconditioner.diagonal(self.learning_rate, state.moment, state.params)

    def _rate(self, like: jax.Array) -> jax.Array:
        return self.learning_rate.astype(like.dtype)


class _Oscillation(NamedTuple):
    """What is held over a step, see `CentralState`."""

    force: Params
    squares: Any
    variance: jax.Array
    error: jax.Array


class _Problem(eqx.Module):
    """The complementarity problem at one point of the flow."""

    flow: CentralFlow
    state: CentralState
    diagonal: Params
    pairs: Eigenpairs
    args: Args

    def still(self) -> _Oscillation:
        """Nothing oscillates."""
        state = self.state
        error = jnp.zeros((), state.variance.dtype)
        force, squares = _tree.zeros_like(state.params), _tree.zeros_like(state.moment)
        return _Oscillation(force, squares, _tree.zeros_like(state.variance), error)

    def solved(self) -> _Oscillation:
        r"""X in the basis $B_a$ of symmetric matrices: $T_a = \sum_{ij} B_{a,ij} T[u_i, u_j]$, $q_a = \sum_{ij} B_{a,ij} u_i u_j$."""
        flow, optimizer = self.flow, self.flow.preconditioner
        dtype = self.state.variance.dtype
        gradient = jax.grad(flow.loss)(self.state.params, self.args)
        thirds, products = self._thirds(), self._products()
        divided = jax.vmap(lambda x: jax.tree.map(jnp.divide, x, self.diagonal))(thirds)
        one = jax.tree.map(lambda x: x[None], gradient)
        # How the curvature moves in a step: by the gradient, by each X_a, and as P moves.
        drift = -_tree.gram(divided, one)[:, 0]
        response = _tree.gram(divided, thirds) / 2
        squares = jax.tree.map(jnp.square, gradient)
        drift = drift - self._stiffening(products, optimizer.collected(squares), self.state.moment)
        added = [self._squares(jax.tree.map(lambda x, a=a: x[a], products)) for a in range(len(drift))]
        columns = [self._stiffening(products, extra, _tree.zeros_like(self.state.moment)) for extra in added]
        response = response + jnp.stack(columns, axis=1)
        # Any number > 0 where a direction is far: X is 0 there, and the problem stays regular.
        response = response + jnp.diag(jnp.where(self._far(), jnp.trace(response) / len(response), 0))
        basis = jnp.asarray(symmetric_basis(flow.directions), dtype)
        constant = _THRESHOLD * jnp.eye(flow.directions) - jnp.diag(self.pairs.values)
        constant = (constant - jnp.tensordot(drift, basis, 1)).astype(dtype)
        found: Complementary = complementary(constant, ((response + response.T) / 2).astype(dtype))
        x = jnp.tensordot(basis, found.matrix, 2)
        force = _tree.combine(x / 2, thirds)
        return _Oscillation(force, self._squares(_tree.combine(x, products)), found.matrix, found.error)

    def _stiffening(self, products: Params, squares: Any, moment: Any) -> jax.Array:
        r"""How P moving lowers the curvature in a step: $2 u_i^\top \dot P u_j$ at the threshold, for each $B_a$."""
        optimizer = self.flow.preconditioner
        rate = optimizer.rate(moment, squares)
        moved = optimizer.diagonal_rate(self.flow.learning_rate, self.diagonal, rate)
        return _THRESHOLD * _tree.gram(products, jax.tree.map(lambda x: x[None], moved))[:, 0]

    def _squares(self, covariance: Params) -> Any:
        r"""What an oscillation with this diagonal of $\Sigma$ adds to the squared gradient: $4 P^2 \operatorname{diag} \Sigma$."""
        squares = jax.tree.map(lambda c, p: _THRESHOLD**2 * p**2 * c, covariance, self.diagonal)
        return self.flow.preconditioner.collected(squares)

    def _places(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows, columns = np.triu_indices(self.flow.directions)
        return rows, columns, np.where(rows == columns, 1.0, np.sqrt(2.0))

    def _products(self) -> Params:
        rows, columns, size = self._places()

        def of(u: jax.Array) -> jax.Array:
            scale = jnp.asarray(size, u.dtype).reshape(-1, *[1] * (u.ndim - 1))
            return scale * u[rows] * u[columns]

        return jax.tree.map(of, self.pairs.vectors)

    def _thirds(self) -> Params:
        """Third derivatives for pairs of directions near the threshold, one at a time; 0 for others."""
        rows, columns, size = self._places()

        def one(place: tuple) -> Params:
            i, j, scale, far = place

            def derivative() -> Params:
                u, v = (jax.tree.map(lambda x, n=n: x[n], self.pairs.vectors) for n in (i, j))
                third = third_derivative(self.flow.loss, self.state.params, self.args, u, v)
                return _tree.scale(scale, third)

            return jax.lax.cond(far, lambda: _tree.zeros_like(self.state.params), derivative)

        return jax.lax.map(one, (*map(jnp.asarray, (rows, columns, size)), self._far()))

    def _far(self) -> jax.Array:
        """Of which elements of X a direction is far from the threshold."""
        rows, columns, _ = self._places()
        far = self.pairs.values < _NEAR * _THRESHOLD
        return far[rows] | far[columns]
