"""The central flow: gradient descent, RMSProp and scalar RMSProp at the edge of stability."""

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike
from jaxtyping import Float
from typing_extensions import override

from eomdl import _check, _tree
from eomdl._end import Diagnostic
from eomdl._target import SMOOTHED, Target
from eomdl._types import Args, Loss, Params
from eomdl.curvature.tracker import RTOL, THOROUGH, EigenpairTracker, TrackedPairs
from eomdl.flows.base import AbstractStateStep
from eomdl.flows.descent import AbstractDescentFlow
from eomdl.flows.oscillation import NEAR, THRESHOLD, Balance
from eomdl.flows.preconditioners import DESCENT, AbstractPreconditioner


_MAX_DIRECTIONS = 4  # where the user names no number


class CentralState(NamedTuple):
    r"""Where a central flow is, and what it holds from one step to the next.

    - `params`; `moment`: $\nu$ of RMSProp, None for gradient descent.
    - `tracked`: the k critical directions, eigenpairs of $P^{-1} H$, critical at 2. As in all that follows, places that are not
        active are 0.
    - `force`: $\frac12 \nabla \langle H, \Sigma \rangle$, like the parameters.
    - `squares`: what oscillations add to the squared gradient that the moment averages.
    - `variance`: X, shape (k, k), with $\Sigma = \sum_{ij} X_{ij} u_i u_j^\top$.
    - `worst`: of all steps so far, (2,): the largest residual of a pair near the threshold, as a part of the largest
        eigenvalue, and the largest error of the complementarity problem.
    """

    params: Params
    moment: Any
    tracked: TrackedPairs
    force: Params
    squares: Any
    variance: jax.Array
    worst: jax.Array

    @property
    def curvature(self) -> jax.Array:
        """The eigenvalues in the tracked directions, shape (k,), largest first."""
        return self.tracked.values


class CentralFlow(AbstractDescentFlow):
    r"""The smoothed path of gradient descent, of RMSProp or of scalar RMSProp through the edge of stability.

    ```python
    flow = eomdl.flows.CentralFlow(loss, learning_rate=0.1)
    path = eomdl.solve(flow, params, 1000, args=data, observe_state={"loss": flow.mean_loss})
    ```

    $$\dot\theta = -\frac{1}{\eta} P^{-1} \Big[ \nabla L + \tfrac12 \nabla \langle H, \Sigma \rangle \Big], \qquad
    \dot\nu = \frac{1}{\eta} \frac{1-\beta_2}{\beta_2} \big[ g^2 + 4 \operatorname{diag}(P \Sigma P) - \nu \big],$$

    with $P = 1/\eta$ and no $\nu$ for gradient descent, $P = \sqrt{\nu + \epsilon}/\eta$ for RMSProp. $\Sigma \succeq 0$ is the
    covariance of the oscillation in the critical directions, the eigenvectors of $P^{-1} H$ whose curvature A is at its bound 2:
    $\Sigma = U X U^\top$ solves a semidefinite complementarity problem,

    $$X \succeq 0, \qquad 2 I - A - \dot A[X] \succeq 0, \qquad \text{their product } 0,$$

    where $\dot A$ is the rate of A per step. So the bound is applied one step ahead: the curvature comes to it within
    a step and drifts no further than a step's nonlinearity. For one direction of gradient descent at the edge
    $\Sigma = \max(0, 2 \langle -g, T \rangle / |T|^2)$ along u, $T = \nabla (u^\top H u)$. Where nothing is critical this is gradient flow.

    It predicts the smoothed path (its `target`), and of the oscillation around it `mean_loss`, `mean_squared_gradient`
    and `variances` along `axes`, to be recorded by `observe_state`: each is that of the step before its row. `compare` holds the
    first two against the real run under the name that they are recorded by, `eomdl.errors.variances_along` the variances.

    **Arguments:**

    - `loss`; `learning_rate` $\eta$, a leaf of the pytree, and the time of a step.
    - `directions`: k, the most that are tracked; by default 4, or all of a smaller space. The first is tracked from the start, another
        one from where the next eigenvalue is within 10 % of the bound, which is searched for every 16 steps;
        `Trajectory.notes` says from which step. Directions beyond k are not held at the bound: the diagnostic
        `curvature of the next direction` then says to raise it.
    - `preconditioner`: by default gradient descent's; `eomdl.flows.SecondMoment` is RMSProp's.

    **Cost** of a step: for the $m \le k$ directions tracked about 1.2 m Hessian-vector products and, of those within 10 % of the bound,
    $m(m+1)/2$ third derivatives (3 gradients each on the benchmarks), at the start of the step; $\Sigma$ is held over it. Then one
    gradient for each evaluation of the field, and while m < k at most 8 Hessian-vector products every 16 steps.
    Memory of a step, measured with a million parameters: 13, 22 and 33 copies of them for k = 1, 2 and 4.

    **Limits:** the model assumes that oscillations are small and in balance. Where they set in, the real run first
    overshoots the bound for some tens of steps; where it is at the bound for a few steps only, it may not oscillate where the flow
    does. A loss that is quadratic there has no balance: the diagnostic `complementarity error` says so.

    **Raises:** `ValueError` for a wrong argument, and for more directions than parameters.

    Source: Cohen, Damian, Talwalkar, Kolter & Lee 2025 (arXiv 2410.24206).
    """

    references: ClassVar[tuple[str, ...]] = ("cohen2025",)

    loss: Loss = eqx.field(converter=lambda f: _check.function("loss", f))
    learning_rate: jax.Array = eqx.field(converter=lambda x: _check.positive_scalar("learning_rate", x))
    directions: int | None = eqx.field(
        default=None,
        static=True,
        converter=lambda n: None if n is None else _check.integer("directions", n, 1),
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
            directions: int | None = None,
            preconditioner: AbstractPreconditioner = DESCENT,
        ) -> None: ...

    @property
    @override
    def target(self) -> Target:
        """What it predicts: the smoothed path of a real run."""
        return SMOOTHED

    @property
    @override
    def map(self) -> "_CentralStep":
        return _CentralStep(self)

    @property
    @override
    def gradient_cost(self) -> float:
        return 1.0  # what a step costs besides is in the docstring of the class

    @override
    def validate(self, params: Params, args: Args) -> None:
        """Raise `ValueError` if the loss is no real number, or there are fewer parameters than directions."""
        _check.loss_is_scalar(self.loss, params, args)
        _check.integer("directions", self._num_directions(params), 1, _tree.size(params))

    @override
    def init(self, params: Params, args: Args) -> CentralState:
        """Return a state in which nothing oscillates yet; the moment is the squared gradient."""
        return self._start(params, self.preconditioner.init(jax.grad(self.loss)(params, args)), args)

    @override
    def begin(self, t: ArrayLike, params: Params, state: Any, args: Args) -> CentralState:
        """Return the state where a real run ended, with its moment."""
        del t
        return self._start(params, self.preconditioner.read(state, params), args)

    @override
    def __call__(self, t: ArrayLike, state: CentralState, args: Args) -> CentralState:
        """Return the velocity, with the oscillation of the last `refresh`."""
        del t
        gradient = jax.grad(self.loss)(state.params, args)
        diagonal = self._diagonal(state)
        whole = _tree.add(gradient, state.force)
        still = jax.tree.map(jnp.zeros_like, state)
        squares = self.preconditioner.collect(jax.tree.map(jnp.square, gradient))
        rate = self.preconditioner.rate(state.moment, _tree.add(squares, state.squares))
        return still._replace(
            params=jax.tree.map(lambda g, p: -g / (p * self.learning_rate.astype(g.dtype)), whole, diagonal),
            moment=_tree.scale(1 / self.learning_rate, rate),
        )

    @override
    def refresh(self, t: ArrayLike, state: CentralState, args: Args) -> CentralState:
        """Return the state with the directions here, and the oscillation that holds their curvature over the step."""
        tracker = self._tracker(state.params, state.moment, args)
        tracked, residual = tracker.refresh(state.tracked, jnp.round(t / self.learning_rate))
        balance = Balance(
            self.loss,
            self.preconditioner,
            self.learning_rate,
            state.params,
            state.moment,
            tracker.preconditioner,
            tracked,
            args,
        )
        oscillation = balance.solve()
        worst = jnp.stack([residual, oscillation.error]).astype(state.worst.dtype)
        return state._replace(
            tracked=tracked,
            force=oscillation.force,
            squares=oscillation.squares,
            variance=oscillation.variance,
            worst=jnp.maximum(state.worst, worst),
        )

    def mean_loss(self, t: ArrayLike, state: CentralState, args: Args) -> Float[jax.Array, ""]:
        r"""Return the loss averaged over the oscillation, $L + \frac12 \langle H, \Sigma \rangle$.

        For gradient descent $L + \operatorname{tr} \Sigma / \eta$.
        """
        del t
        return self.loss(state.params, args) + THRESHOLD / 2 * jnp.trace(state.variance)

    def mean_squared_gradient(self, t: ArrayLike, state: CentralState, args: Args) -> Float[jax.Array, ""]:
        r"""Return the squared norm of the gradient averaged over the oscillation, $|g|^2 + 4 \operatorname{tr}(P \Sigma P)$.

        For gradient descent $|g|^2 + 4 \operatorname{tr} \Sigma / \eta^2$.
        """
        del t
        gradient = jax.grad(self.loss)(state.params, args)
        weighted = jax.vmap(lambda u: jax.tree.map(jnp.multiply, u, self._diagonal(state)))(
            state.tracked.vectors
        )
        return _tree.vdot(gradient, gradient) + THRESHOLD**2 * jnp.sum(
            state.variance * _tree.gram(weighted, weighted)
        )

    def variances(self, t: ArrayLike, state: CentralState, args: Args) -> Float[jax.Array, " k"]:
        r"""Return the variances of the iterates around the path along the critical directions: eigenvalues of $\Sigma$, largest first."""
        del t, args
        return jnp.maximum(self._principal_axes(state)[0], 0)

    def axes(self, t: ArrayLike, state: CentralState, args: Args) -> Float[jax.Array, "k size"]:
        r"""Return the directions of `variances`: orthonormal eigenvectors of $\Sigma$, 0 in places that are not active.

        In the order of `jax.flatten_util.ravel_pytree`, for `eomdl.errors.variances_along`. Rows of k times the number of
        parameters: record them at a few steps.
        """
        del t, args
        mixed = _tree.combine(self._principal_axes(state)[1], state.tracked.vectors)
        return jax.vmap(lambda u: ravel_pytree(u)[0])(mixed)

    @override
    def diagnostics(self, t: ArrayLike, state: CentralState, args: Args) -> dict[str, Diagnostic]:
        """Return whether all critical directions are tracked and since when, how well, and whether the bound could be held."""
        del t
        num_directions = self._num_directions(state.params)
        diagnostics = {
            "residual of the tracked directions": Diagnostic(
                state.worst[0],
                10 * RTOL,
                "The eigenvectors change faster than they are tracked: the curvature is not known to better than about 1 %.",
            ),
            "complementarity error": Diagnostic(
                state.worst[1],
                1e-3,
                "No oscillation in the tracked directions holds the curvature at its bound: the loss is too near a quadratic "
                "there, or the steps are too large for the model. Lower the learning rate.",
            ),
        }
        for i in range(1, num_directions):
            diagnostics[f"step from which {i + 1} directions are tracked"] = Diagnostic(
                state.tracked.since[i],
                0.0,
                "The curvature of that many came within 10 % of the bound.",
                is_fault=False,
            )
        if num_directions < _tree.size(state.params):
            tracker = self._tracker(state.params, state.moment, args)
            beyond = tracker.find_next(state.tracked, THOROUGH).values[0]
            # While there is room for it, the next search takes it.
            beyond = jnp.where(state.tracked.num_active < num_directions, jnp.minimum(beyond, NEAR), beyond)
            diagnostics["curvature of the next direction"] = Diagnostic(
                beyond,
                THRESHOLD * (1 - RTOL / 10),
                f"More directions are critical than the {num_directions} tracked. Raise `directions`.",
            )
        return diagnostics

    def _start(self, params: Params, moment: Any, args: Args) -> CentralState:
        k, dtype = self._num_directions(params), _tree.dtype(params)
        return CentralState(
            params=params,
            moment=moment,
            tracked=self._tracker(params, moment, args).init(k),
            force=_tree.zeros_like(params),
            squares=_tree.zeros_like(moment),
            variance=jnp.zeros((k, k), dtype),
            worst=jnp.zeros(2, dtype),
        )

    def _num_directions(self, params: Params) -> int:
        """Return how many directions there is room for."""
        return min(_MAX_DIRECTIONS, _tree.size(params)) if self.directions is None else self.directions

    def _tracker(self, params: Params, moment: Any, args: Args) -> EigenpairTracker:
        diagonal = self.preconditioner.diagonal(self.learning_rate, moment, params)
        return EigenpairTracker(self.loss, params, args, diagonal, NEAR)

    def _principal_axes(self, state: CentralState) -> tuple[jax.Array, jax.Array]:
        r"""Return the eigenvalues of $\Sigma$, largest first, -1 in inactive places, and its eigenvectors in terms of the tracked ones."""
        tracked = state.tracked
        inactive = jnp.diag((tracked.since < 0).astype(tracked.since.dtype))
        root = jnp.linalg.cholesky(_tree.gram(tracked.vectors, tracked.vectors) + inactive)
        values, vectors = jnp.linalg.eigh(root.T @ state.variance @ root - inactive)
        mixed = jax.scipy.linalg.solve_triangular(root.T, vectors, lower=False).T
        return values[::-1], mixed[::-1]

    def _diagonal(self, state: CentralState) -> Params:
        return self.preconditioner.diagonal(self.learning_rate, state.moment, state.params)


class _CentralStep(AbstractStateStep):
    """One step of the optimizer."""

    flow: CentralFlow

    @override
    def __call__(self, state: CentralState, args: Args, k: ArrayLike) -> CentralState:
        del k
        flow = self.flow
        gradient = jax.grad(flow.loss)(state.params, args)
        squares = flow.preconditioner.collect(jax.tree.map(jnp.square, gradient))
        state = state._replace(moment=flow.preconditioner.next(state.moment, squares))
        params = jax.tree.map(lambda w, g, p: w - g / p, state.params, gradient, flow._diagonal(state))
        return state._replace(params=params)

    @override
    def params(self, state: CentralState) -> Params:
        return state.params
