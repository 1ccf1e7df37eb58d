"""The edge flow of gradient descent: a centre, the direction in which it oscillates, and how far."""

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from typing_extensions import override

from eomdl import _check, _tree
from eomdl._autodiff import descent_field
from eomdl._end import Diagnostic
from eomdl._target import SMOOTHED, Target
from eomdl._types import Args, Loss, Params, State
from eomdl.curvature import eigenpairs
from eomdl.flows.base import AbstractStateStep, SolverOptions
from eomdl.flows.descent import AbstractDescentFlow
from eomdl.flows.symmetric_difference import MAX_MODES, MIN_COSINE, is_alternating, symmetric_difference
from eomdl.maps.gradient_descent import GradientDescentStep


_AT_START: dict[str, Any] = {"num_matvecs": 32, "rtol": 1e-6}
_FOR_DIAGNOSTICS: dict[str, Any] = {"num_matvecs": 16, "rtol": 1e-2}


class EdgeState(NamedTuple):
    """The state of an edge flow.

    - `centre`: c, like the parameters; `direction`: u of length 1, or 0 where nothing oscillates.
    - `log_magnitude`: log r, since r grows from rounding to the size of the oscillation.
    """

    centre: Params
    direction: Params
    log_magnitude: jax.Array


class EdgeFlow(AbstractDescentFlow):
    r"""The edge flow: gradient descent jumps between $c + r u$ and $c - r u$.

    $$\dot c = -\tfrac12 (g_+ + g_-), \qquad \dot u = (I - u u^\top) A u, \qquad \dot r = r \big( u^\top A u - 2/\eta \big)$$

    with $g_\pm = \nabla L(c \pm r u)$ and $A u = (g_+ - g_-) / 2r$, the mean of the Hessian between the two ends times u. The
    oscillation grows while $\eta\, u^\top A u > 2$, pushes the centre to where the curvature is lower, and dies there.

    ```python
    flow = eomdl.flows.EdgeFlow(loss, learning_rate=0.1)
    path = eomdl.solve(flow, params, 1000, args=data, resume=run)
    ```

    **What it predicts:** the smoothed path $(\theta_{k-1} + 2 \theta_k + \theta_{k+1}) / 4$, which is c (`eomdl.compare` compares
    it with that); r u is the oscillation about it.

    **Where to begin:** at a step of a real run where $\eta\lambda_{max}$ is above 1 and best above 1.8 (`resume=` that run). r u is
    the part of the iterate that alternates, in the top eigenvector of the Hessian and (at most 3) others with nearly as large an
    eigenvalue, from two more steps of gradient descent. Below $\eta\lambda_{max} = 1$ nothing alternates: then u = 0 for the whole
    run, and the flow is gradient flow. Begun between 1 and 2, the oscillation is right at the start, but the flow lets it fall at the
    rate $2 - \eta\lambda$ per step, which gradient descent does at $-\log(\eta\lambda - 1)$.

    **One direction is enough:** d = r u obeys $\dot d = (A - 2/\eta)\, d$, which is linear in every mode: each that d has a part of grows
    at its own rate $\lambda_i - 2/\eta$, and u turns between them. So no mode needs a direction of its own.

    **Which solver:** by default Euler with constant steps of 1/2: the equation of c has the rate $\eta\lambda \approx 2$ per step,
    which such a step damps at once. With steps of 1 it does not: c itself then oscillates, as gradient descent does, and r falls to
    nothing. A Runge-Kutta method of order 3 (`diffrax.Bosh3()`) is stable with steps of 1. The guide "Past the edge of stability"
    has the numbers.

    **Arguments:** `loss`; `learning_rate` $\eta$, a leaf of the pytree; `direction`: u at the start, a pytree like the parameters, in
    place of the eigenvector; `magnitude`: r at the start, $\ge 0$; the parameters are then c.

    **State:** `EdgeState`. **Cost** of one evaluation: 2 gradients, no Hessian-vector products, no third derivatives. At the start up
    to 128 Hessian-vector products.

    **Limits:** a mode of which d has no part at the start is not followed later; the diagnostics say so where it passes $2/\eta$.

    **Raises:** `ValueError` for a wrong argument.

    Source: Marion 2026 (arXiv 2606.18080), with $H(c)\, u$ in place of $A u$, to which it is equal up to $O(r^2)$. A costs no product with
    a vector, and holds the orbits of period two of a quartic loss exactly.
    """

    references: ClassVar[tuple[str, ...]] = ("marion2026",)

    loss: Loss = eqx.field(converter=lambda f: _check.function("loss", f))
    learning_rate: jax.Array = eqx.field(converter=lambda x: _check.positive_scalar("learning_rate", x))
    direction: Params | None = eqx.field(default=None, converter=lambda u: None if u is None else _finite(u))
    magnitude: jax.Array | None = eqx.field(
        default=None, converter=lambda r: None if r is None else _check.nonnegative_scalar("magnitude", r)
    )

    if TYPE_CHECKING:  # a checker knows no converters, and takes an AbstractVar for an argument

        def __init__(
            self,
            loss: Loss,
            learning_rate: ArrayLike,
            direction: Params | None = None,
            magnitude: ArrayLike | None = None,
        ) -> None: ...

    @property
    @override
    def map(self) -> "_EdgeStep":
        return _EdgeStep(self)

    @property
    @override
    def gradient_cost(self) -> float:
        return 2.0

    @property
    @override
    def recommended_solver(self) -> SolverOptions:
        return SolverOptions(diffrax.Euler(), diffrax.ConstantStepSize(), 1 / 2)

    @property
    @override
    def target(self) -> Target:
        return SMOOTHED

    @override
    def begin(self, t: ArrayLike, params: Params, state: State, args: Args) -> EdgeState:
        del t, state
        return self.init(params, args)

    @override
    def init(self, params: Params, args: Args) -> EdgeState:
        if self.direction is None:
            pairs = eigenpairs(self.loss, params, args, min(MAX_MODES, _tree.size(params)), **_AT_START)
            modes, curvatures = pairs.vectors, pairs.values
        else:
            u = _tree.unit(self.direction)
            still = jnp.full((), -jnp.inf, _tree.dtype(params))
            curvatures = symmetric_difference(descent_field(self.loss, args), params, u, still)[2][None]
            modes = jax.tree.map(lambda x: x[None], u)
        modes = jax.tree.map(lambda a, b: jax.lax.stop_gradient(a).astype(b.dtype), modes, params)
        if self.magnitude is not None:
            u = jax.tree.map(lambda x: x[0], modes)
            return _start(params, u, self.magnitude.astype(_tree.dtype(params)))
        descent = GradientDescentStep(self.loss, self.learning_rate)
        first = descent(params, args, 0)
        second = descent(first, args, 0)
        bend = _tree.sub(_tree.sub(second, first), _tree.sub(first, params))
        # Of a mode that is multiplied by 1 - z in each step, the second difference is z^2 times what is left of it.
        parts, z = jax.vmap(_tree.vdot, (0, None))(modes, bend), self.learning_rate * curvatures
        moving = is_alternating(z)
        d = _tree.combine(jnp.where(moving, parts / jnp.where(moving, z, 1) ** 2, 0), modes)
        return _start(_tree.sub(params, d), _tree.unit(d), _tree.norm(d).astype(_tree.dtype(params)))

    @override
    def __call__(self, t: ArrayLike, state: EdgeState, args: Args) -> EdgeState:
        del t
        field = descent_field(self.loss, args)
        descent, product, curvature = symmetric_difference(field, *state)
        length = _tree.norm(state.direction)
        turn = _tree.sub(product, _tree.scale(curvature, _tree.unit(state.direction)))
        growth = jnp.where(length > 0, curvature - 2 / self.learning_rate, 0)
        return EdgeState(descent, _tree.scale(length, turn), growth.astype(state.log_magnitude.dtype))

    @override
    def validate(self, params: Params, args: Args) -> None:
        _check.loss_is_scalar(self.loss, params, args)
        if self.direction is not None:
            _check.same_structure("direction", self.direction, "params", params)

    @override
    def diagnostics(self, t: ArrayLike, state: EdgeState, args: Args) -> dict[str, Diagnostic]:
        count = min(2, _tree.size(state.centre))
        pairs = eigenpairs(self.loss, state.centre, args, count, **_FOR_DIAGNOSTICS)
        cosines = jnp.abs(jax.vmap(_tree.vdot, (0, None))(pairs.vectors, _tree.unit(state.direction)))
        left = jnp.where(cosines > MIN_COSINE, 0, pairs.values)
        return {
            "eta*lambda beside the oscillation": Diagnostic(
                self.learning_rate * jnp.max(left),
                limit=2.0,
                meaning="A mode of which the oscillation has no part is past the edge of stability: begin at a step of the real "
                "run where it alternates already (`resume=`).",
            )
        }


def _finite(direction: Params) -> Params:
    direction = _check.params("direction", direction)
    for leaf in jax.tree.leaves(direction):
        _check.numbers("direction", leaf, "finite numbers")
    return direction


class _EdgeStep(AbstractStateStep):
    """One step of gradient descent from both ends: Euler's step of the centre and of the magnitude."""

    flow: EdgeFlow

    @override
    def __call__(self, state: EdgeState, args: Args, k: ArrayLike) -> EdgeState:
        h = self.flow.learning_rate
        velocity = self.flow(k * h, state, args)
        factor = jnp.abs(1 + h * velocity.log_magnitude)
        new = _tree.add(state, _tree.scale(h, velocity))
        tiny = jnp.finfo(factor.dtype).tiny
        log_magnitude = state.log_magnitude + jnp.log(jnp.maximum(factor, tiny))
        return new._replace(log_magnitude=log_magnitude.astype(state.log_magnitude.dtype))

    @override
    def params(self, state: EdgeState) -> Params:
        return state.centre


def _start(centre: Params, direction: Params, magnitude: jax.Array) -> EdgeState:
    """Return the state of a magnitude >= 0; without an oscillation the direction is 0."""
    moving = magnitude > 0
    direction = _tree.scale(jnp.where(moving, 1.0, 0.0), direction)
    return EdgeState(centre, direction, jnp.log(jnp.where(moving, magnitude, 1)))
