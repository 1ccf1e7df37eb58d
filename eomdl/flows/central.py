"""The central flow: gradient descent, RMSProp and scalar RMSProp at the edge of stability."""

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike
from jaxtyping import Float

from eomdl import _check, _tree
from eomdl._end import Diagnostic
from eomdl._target import SMOOTHED, Target
from eomdl._types import Args, Loss, Params
from eomdl.curvature import Eigenpairs
from eomdl.curvature.pairs import preconditioned_pairs
from eomdl.flows.descent import AbstractDescentFlow
from eomdl.flows.oscillation import NEAR, THRESHOLD, Balance
from eomdl.flows.preconditioners import DESCENT, AbstractPreconditioner


_MOST = 4  # directions, where the user names no number
_WARM = 4  # Hessian-vector products at most, for each tracked direction at a step
# Of the largest eigenvalue: the residual of a tracked pair, and of a look in passing. The value is wrong by about its square.
_RTOL, _ROUGH = 1e-2, 5e-2
_EVERY = 16  # steps from one look at the next direction to another


class _Look(NamedTuple):
    """A search for the next direction: `rounds`, each from the vector of the one before; products in each; residual."""

    rounds: int
    num_matvecs: int
    rtol: float


_COLD = _Look(1, 16, _RTOL)
_GLANCE = _Look(2, 4, _ROUGH)  # a round of 8 would take 8 copies of the parameters more


class CentralState(NamedTuple):
    r"""Where a central flow is, and what it holds from one step to the next.

    - `params`; `moment`: $\nu$ of RMSProp, None for gradient descent.
    - `vectors`: the tracked directions, with $u_i^\top P u_j = \delta_{ij}$, a leading axis k on every leaf. As in all that follows,
        places that are not in use are 0.
    - `force`: $\frac12 \nabla \langle H, \Sigma \rangle$, like the parameters.
    - `squares`: what oscillations add to the squared gradient that the moment averages.
    - `variance`: X, shape (k, k), with $\Sigma = \sum_{ij} X_{ij} u_i u_j^\top$.
    - `curvature`: eigenvalues of $P^{-1} H$ in the tracked directions, (k,), largest first; critical at 2.
    - `since`: (k,), the step from which 1, 2, ... k directions are tracked, 0 for those from the start; -1 for a place not in use.
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
    since: jax.Array
    worst: jax.Array

    @property
    def tracked(self) -> jax.Array:
        """How many directions are tracked."""
        return jnp.sum(self.since >= 0)


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

    where $\dot A$ is the rate of A per step. So the bound is looked at one step ahead: the curvature comes to it within
    a step and drifts no further than a step's nonlinearity. For one direction of gradient descent at the edge
    $\Sigma = \max(0, 2 \langle -g, T \rangle / |T|^2)$ along u, $T = \nabla (u^\top H u)$. Where nothing is critical this is gradient flow.

    It predicts the smoothed path (its `target`), and of the oscillation around it `mean_loss`, `mean_squared_gradient`
    and `variances` along `axes`, to be recorded by `observe_state`: each is that of the step before its row. `compare` holds the
    first two against the real run under the name that they are recorded by, `eomdl.errors.variances_along` the variances.

    **Arguments:**

    - `loss`; `learning_rate` $\eta$, a leaf of the pytree, and the time of a step.
    - `directions`: k, the most that are tracked; by default 4, or all of a smaller space. The first is tracked from the start, another
        one from where the next eigenvalue is within 10 % of the bound, which is looked at every 16 steps;
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
        _check.integer("directions", self._most(params), 1, _tree.size(params))

    def init(self, params: Params, args: Args) -> CentralState:
        """Nothing oscillates yet; the moment is the squared gradient."""
        return self._started(params, self.preconditioner.init(jax.grad(self.loss)(params, args)), args)

    def begin(self, t: ArrayLike, params: Params, state: Any, args: Args) -> CentralState:
        """From where a real run ended, with its moment."""
        del t
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
            params=jax.tree.map(lambda g, p: -g / (p * self.learning_rate.astype(g.dtype)), whole, diagonal),
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
        state = self._watched(jnp.round(t / self.learning_rate), state, args)
        diagonal = self._diagonal(state)
        pairs = self._pairs(state, args)
        found = Balance(
            self.loss,
            self.preconditioner,
            self.learning_rate,
            state.params,
            state.moment,
            diagonal,
            pairs,
            args,
        ).found()
        relative = pairs.residuals / jnp.max(jnp.abs(pairs.values))
        residual = jnp.max(jnp.where(pairs.values >= NEAR, relative, 0))
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
        return self.loss(state.params, args) + THRESHOLD / 2 * jnp.trace(state.variance)

    def mean_squared_gradient(self, t: ArrayLike, state: CentralState, args: Args) -> Float[jax.Array, ""]:
        r"""The squared norm of the gradient averaged over the oscillation, $|g|^2 + 4 \operatorname{tr}(P \Sigma P)$.

        For gradient descent $|g|^2 + 4 \operatorname{tr} \Sigma / \eta^2$.
        """
        del t
        gradient = jax.grad(self.loss)(state.params, args)
        weighted = jax.vmap(lambda u: jax.tree.map(jnp.multiply, u, self._diagonal(state)))(state.vectors)
        return _tree.vdot(gradient, gradient) + THRESHOLD**2 * jnp.sum(
            state.variance * _tree.gram(weighted, weighted)
        )

    def variances(self, t: ArrayLike, state: CentralState, args: Args) -> Float[jax.Array, " k"]:
        r"""The variances of the iterates around the path along the critical directions: eigenvalues of $\Sigma$, largest first."""
        del t, args
        return jnp.maximum(self._principal(state)[0], 0)

    def axes(self, t: ArrayLike, state: CentralState, args: Args) -> Float[jax.Array, "k size"]:
        r"""The directions of `variances`: orthonormal eigenvectors of $\Sigma$, 0 in places that are not in use.

        In the order of `jax.flatten_util.ravel_pytree`, for `eomdl.errors.variances_along`. Rows of k times the number of
        parameters: record them at a few steps.
        """
        del t, args
        mixed = _tree.combine(self._principal(state)[1], state.vectors)
        return jax.vmap(lambda u: ravel_pytree(u)[0])(mixed)

    def diagnostics(self, t: ArrayLike, state: CentralState, args: Args) -> dict[str, Diagnostic]:
        """Whether all critical directions are tracked and since when, whether they were found, and whether the bound could be held."""
        del t
        most = self._most(state.params)
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
        for i in range(1, most):
            found[f"step from which {i + 1} directions are tracked"] = Diagnostic(
                state.since[i],
                0.0,
                "The curvature of that many came within 10 % of the bound.",
                is_fault=False,
            )
        if most < _tree.size(state.params):
            beyond = self._next(state, args, _COLD).values[0]
            # While there is room for it, the next look takes it.
            beyond = jnp.where(state.tracked < most, jnp.minimum(beyond, NEAR), beyond)
            found["curvature of the next direction"] = Diagnostic(
                beyond,
                THRESHOLD * (1 - _RTOL / 10),
                f"More directions are critical than the {most} tracked. Raise `directions`.",
            )
        return found

    def _principal(self, state: CentralState) -> tuple[jax.Array, jax.Array]:
        r"""Eigenvalues of $\Sigma$, largest first, -1 in places not in use, and its eigenvectors in terms of the tracked ones."""
        unused = jnp.diag((state.since < 0).astype(state.since.dtype))
        root = jnp.linalg.cholesky(_tree.gram(state.vectors, state.vectors) + unused)
        values, vectors = jnp.linalg.eigh(root.T @ state.variance @ root - unused)
        mixed = jax.scipy.linalg.solve_triangular(root.T, vectors, lower=False).T
        return values[::-1], mixed[::-1]

    def _most(self, params: Params) -> int:
        """How many directions there is room for."""
        return min(_MOST, _tree.size(params)) if self.directions is None else self.directions

    def _started(self, params: Params, moment: Any, args: Args) -> CentralState:
        k, dtype = self._most(params), _tree.dtype(params)
        state = CentralState(
            params=params,
            moment=moment,
            vectors=jax.tree.map(lambda x: jnp.zeros((k, *x.shape), x.dtype), params),
            force=_tree.zeros_like(params),
            squares=_tree.zeros_like(moment),
            variance=jnp.zeros((k, k), dtype),
            curvature=jnp.zeros(k, dtype),
            since=jnp.full(k, -1, dtype),
            worst=jnp.zeros(2, dtype),
        )
        vectors, curvature, since = self._grown(0, state, args, _COLD)
        return state._replace(vectors=vectors, curvature=curvature, since=since)

    def _watched(self, step: jax.Array, state: CentralState, args: Args) -> CentralState:
        """With the directions that have come near the bound, every few steps, while there is room for more."""
        if len(state.since) == 1:  # else a loop is compiled that never runs
            return state
        due = (step % _EVERY == 0) & (state.tracked < len(state.since))
        # Of what changes only: all else of the state would be copied.
        vectors, curvature, since = jax.lax.cond(
            due,
            lambda: self._grown(step, state, args, _GLANCE),
            lambda: (state.vectors, state.curvature, state.since),
        )
        return state._replace(vectors=vectors, curvature=curvature, since=since)

    @eqx.filter_jit  # begun on the host: compiled once
    def _grown(
        self, step: ArrayLike, state: CentralState, args: Args, look: _Look
    ) -> tuple[Params, jax.Array, jax.Array]:
        """Vectors, curvature and `since` with the next directions that are near the bound; the first one wherever it is."""

        def held(carry: tuple) -> CentralState:
            return state._replace(vectors=carry[0], curvature=carry[1], since=carry[2])

        def goes_on(carry: tuple) -> jax.Array:
            return carry[3] & (held(carry).tracked < len(state.since))

        def advanced(carry: tuple) -> tuple:
            here, place = held(carry), held(carry).tracked
            found = self._next(here, args, look)
            taken = (found.values[0] >= NEAR) | (place == 0)
            new = (found.vectors, found.values, jnp.full(1, step, state.since.dtype))
            kept = jax.tree.map(
                lambda old, x: old.at[place].set(jnp.where(taken, x[0], old[place])), carry[:3], new
            )
            return *kept, taken

        start = (state.vectors, state.curvature, state.since, jnp.asarray(True))
        return jax.lax.while_loop(goes_on, advanced, start)[:3]

    def _next(self, state: CentralState, args: Args, look: _Look) -> Eigenpairs:
        """The largest pair of P^-1 H beside the tracked ones."""
        diagonal, tracked = self._diagonal(state), state.vectors

        def searched(start: Params) -> Eigenpairs:
            found = preconditioned_pairs(
                self.loss, state.params, args, 1, start, diagonal, look.num_matvecs, look.rtol, beside=tracked
            )
            return _as_in(state, found)

        # Zeros are none: a random vector takes their place.
        none = jax.tree.map(lambda x: jnp.zeros_like(x[None]), state.params)
        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(searched, none))
        return jax.lax.fori_loop(0, look.rounds, lambda _, found: searched(found.vectors), empty)

    def _pairs(self, state: CentralState, args: Args) -> Eigenpairs:
        """The tracked pairs of P^-1 H, from those of the step before."""
        diagonal, k = self._diagonal(state), len(state.since)
        found = preconditioned_pairs(
            self.loss, state.params, args, k, state.vectors, diagonal, _WARM, _RTOL, used=state.tracked
        )
        return _as_in(state, found)

    def _diagonal(self, state: CentralState) -> Params:
        return self.preconditioner.diagonal(self.learning_rate, state.moment, state.params)


def _as_in(state: CentralState, pairs: Eigenpairs) -> Eigenpairs:
    """In the dtypes of the state."""
    vectors = jax.tree.map(lambda x, like: x.astype(like.dtype), pairs.vectors, state.vectors)
    values, residuals = (x.astype(state.curvature.dtype) for x in (pairs.values, pairs.residuals))
    return Eigenpairs(values, vectors, residuals, pairs.converged, pairs.matvecs)
