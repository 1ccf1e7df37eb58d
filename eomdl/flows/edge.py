"""The edge flow of gradient descent: a centre, the direction in which it oscillates, and how far."""

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from eomdl import _check, _tree
from eomdl._autodiff import descent_field
from eomdl._end import Diagnostic
from eomdl._target import SMOOTHED, Target
from eomdl._types import Args, Loss, Params
from eomdl.curvature import eigenpairs
from eomdl.flows.descent import AbstractDescentFlow
from eomdl.flows.gradient import gradient_descent_step


_LOOK: dict[str, Any] = {"num_matvecs": 64, "rtol": 1e-6}  # at the start, for the direction
_GLANCE: dict[str, Any] = {"num_matvecs": 16, "rtol": 1e-2}  # for the diagnostics


class EdgeState(NamedTuple):
    """Where an edge flow is.

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
    euler = {
        "solver": diffrax.Euler(),
        "stepsize_controller": diffrax.ConstantStepSize(),
    }
    path = eomdl.solve(flow, params, 1000, args=data, resume=run, **euler)
    ```

    **What it predicts:** the smoothed path $(\theta_{k-1} + 2 \theta_k + \theta_{k+1}) / 4$, which is c (`eomdl.compare` measures
    it against that); r u is the oscillation about it.

    **Where to begin:** at a step of a real run where $\eta\lambda_{max}$ is above 1 and best above 1.8 (`resume=` that run). u is the
    top eigenvector of the Hessian there, and r the part of the iterate along u that alternates, from two more steps of
    gradient descent. Below $\eta\lambda_{max} = 1$ nothing alternates: then u = 0 for the whole run, and the flow is gradient flow. Begun
    between, the oscillation is right at the start, but the flow lets it fall at the rate $2 - \eta\lambda$ a step, which gradient descent
    does at $-\log(\eta\lambda - 1)$.

    **Which solver:** Euler with steps of 1 is cheapest. The centre is then the mean of two steps of gradient descent, one from each
    end. A Runge-Kutta method needs order 3 for steps of 1 (the equation of c has the rate $\eta\lambda \approx 2$ a step, where methods
    of order 2 are at the end of their stability). The guide "Past the edge of stability" has the numbers.

    **Arguments:** `loss`; `learning_rate` $\eta$, a leaf of the pytree; `direction`: u at the start, a pytree like the parameters, in
    place of the eigenvector; `magnitude`: r at the start, $\ge 0$; the parameters are then c.

    **State:** `EdgeState`. **Cost** of one evaluation: 3 gradients (at c and both ends), no Hessian-vector products, no third
    derivatives. At the start up to 64 Hessian-vector products.

    **Limits:** one direction. Where a second eigenvalue passes $2/\eta$ the diagnostics say so, and `eomdl.flows.RodFlow` follows several.

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
    def gradients(self) -> float:
        """At the centre and at both ends."""
        return 3.0

    @property
    def target(self) -> Target:
        """The smoothed path."""
        return SMOOTHED

    def params(self, state: EdgeState) -> Params:
        """The centre."""
        return state.centre

    def init(self, params: Params, args: Args) -> EdgeState:
        """The centre, direction and magnitude of gradient descent at `params`."""
        if self.direction is None:
            u = jax.tree.map(lambda x: x[0], eigenpairs(self.loss, params, args, 1, **_LOOK).vectors)
        else:
            u = _unit(self.direction)
        u = jax.tree.map(lambda a, b: jax.lax.stop_gradient(a).astype(b.dtype), u, params)
        dtype = _tree.dtype(params)
        if self.magnitude is not None:
            return _started(params, u, self.magnitude.astype(dtype))
        first = gradient_descent_step(self.loss, self.learning_rate, params, args)
        second = gradient_descent_step(self.loss, self.learning_rate, first, args)
        bend = _tree.vdot(u, _tree.sub(_tree.sub(second, first), _tree.sub(first, params)))
        stretched = self.learning_rate * self._curved(params, u, jnp.full((), -jnp.inf, dtype), args)[2]
        # Of a mode that is multiplied by 1 - z in each step, the second difference is z^2 times what is left of it.
        alternates = stretched > 1
        x = jnp.where(alternates, bend / jnp.where(alternates, stretched, 1) ** 2, 0).astype(dtype)
        centre = _tree.sub(params, _tree.scale(x, u))
        return _started(centre, _tree.scale(jnp.sign(x), u), jnp.abs(x))

    def __call__(self, t: ArrayLike, state: EdgeState, args: Args) -> EdgeState:
        """The velocities of centre, direction and the logarithm of the magnitude."""
        del t
        descent, product, curvature = self._curved(state.centre, state.direction, state.log_magnitude, args)
        length = _tree.norm(state.direction)
        turn = _tree.sub(product, _tree.scale(curvature, _unit(state.direction)))
        growth = jnp.where(length > 0, curvature - 2 / self.learning_rate, 0)
        return EdgeState(descent, _tree.scale(length, turn), growth.astype(state.log_magnitude.dtype))

    def step(self, t: ArrayLike, state: EdgeState, args: Args) -> EdgeState:
        """One step of gradient descent from both ends: Euler's step of the centre and of the magnitude."""
        h = self.learning_rate
        velocity = self(t, state, args)
        factor = jnp.abs(1 + h * velocity.log_magnitude)
        moved = _tree.add(state, _tree.scale(h, velocity))
        tiny = jnp.finfo(factor.dtype).tiny
        grown = state.log_magnitude + jnp.log(jnp.maximum(factor, tiny))
        return moved._replace(log_magnitude=grown.astype(state.log_magnitude.dtype))

    def validate(self, params: Params, args: Args) -> None:
        """Raise `ValueError` if the loss is no real number at `params`, or `direction` is not like them."""
        _check.loss_is_scalar(self.loss, params, args)
        if self.direction is not None:
            _check.same_structure("direction", self.direction, "params", params)

    def diagnostics(self, t: ArrayLike, state: EdgeState, args: Args) -> dict[str, Diagnostic]:
        """Whether a direction is critical that the flow does not follow."""
        size = _tree.size(state.centre)
        found = eigenpairs(self.loss, state.centre, args, min(2, size), **_GLANCE)
        inside = jnp.square(
            jax.vmap(_tree.vdot, (0, None))(found.vectors, state.direction)
        )  # how much of each pair is in u
        left = jnp.where(inside > 0.5, 0, found.values)
        return {
            "eta*lambda beside the direction followed": Diagnostic(
                self.learning_rate * jnp.max(left),
                limit=2.0,
                meaning="A direction that is not followed is past the edge of stability: take "
                "eomdl.flows.RodFlow with more rods, or begin where it shows.",
            )
        }

    def _curved(
        self, centre: Params, direction: Params, log_magnitude: jax.Array, args: Args
    ) -> tuple[Params, Params, jax.Array]:
        r"""$-\tfrac12 (g_+ + g_-)$, $A u$ and $u^\top A u$, with u of length 1 (or 0)."""
        field = descent_field(self.loss, args)
        u = _unit(direction)
        r = jnp.exp(log_magnitude)
        # A shorter difference would be rounding; what it adds to the mean is taken out again.
        reach = jnp.maximum(r, jnp.finfo(r.dtype).eps ** (1 / 3))
        middle = field(centre)
        plus, minus = (field(_tree.add(centre, _tree.scale(s * reach, u))) for s in (1, -1))
        share = 0.5 * (r / reach) ** 2
        bend = _tree.sub(_tree.add(plus, minus), _tree.scale(2.0, middle))
        product = _tree.scale(0.5 / reach, _tree.sub(minus, plus))
        return _tree.add(middle, _tree.scale(share, bend)), product, _tree.vdot(u, product)


def _finite(direction: Params) -> Params:
    direction = _check.params("direction", direction)
    for leaf in jax.tree.leaves(direction):
        _check.numbers("direction", leaf, "finite numbers")
    return direction


def _started(centre: Params, direction: Params, magnitude: jax.Array) -> EdgeState:
    """Without an oscillation the direction is 0."""
    moving = magnitude > 0
    direction = _tree.scale(jnp.where(moving, 1.0, 0.0), direction)
    return EdgeState(centre, direction, jnp.log(jnp.where(moving, magnitude, 1)))


def _unit(u: Params) -> Params:
    length = _tree.norm(u)
    return _tree.scale(jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0), u)
