"""First-order modified flows of Adam and RMSProp."""

from typing import TYPE_CHECKING, Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from typing_extensions import override

from eomdl import _check, _costs, _tree
from eomdl._autodiff import DescentField, descent_field, jvp
from eomdl._end import Diagnostic
from eomdl._types import Args, Loss, Params
from eomdl.flows.averages import average_along_flow
from eomdl.flows.base import Differentiated
from eomdl.flows.descent import AbstractDescentFlow
from eomdl.maps.step_map import StepMap


class AdamFlow(AbstractDescentFlow):
    r"""Adam after the transient of its averages.

    With $g = \nabla L$, $r = \sqrt{g^2 + \epsilon_r}$ and $d = r + \epsilon$, componentwise,

    $$\dot\theta = -\frac{g}{d} - \frac{h}{2d}
    \Big( \frac{1+\beta_1}{1-\beta_1} - \frac{1+\beta_2}{1-\beta_2} \frac{g^2}{r d} \Big)
    H \frac{g}{d},$$

    and only the first term at `order` 0. With $\epsilon = 0$ this is the equation of Cattaneo et al. 2024
    (arXiv 2309.00079), whose $\epsilon$ is $\epsilon_r$ here; with both it models the step of optax. The local error
    after the transient (about $1/(1-\beta_2)$ steps) is $O(h^2)$ at order 0 and $O(h^3)$ at order 1, as long as
    gradients change little over that memory and $h$ is small against $d$. With the default
    $\epsilon = 10^{-8}$ a component whose gradient changes sign breaks that.

    **Arguments:** `loss`; `learning_rate` h, `b1`, `b2`, `eps` $\epsilon$ and `eps_root` $\epsilon_r$ as in
    `optax.adam`, leaves of the pytree; `order` 0 or 1, the number of correction terms.

    **Time:** a step takes h. **Cost** of one evaluation: 1 gradient at order 0, about 2.7 at order 1.

    **Raises:** `ValueError` for a wrong argument.
    """

    references: ClassVar[tuple[str, ...]] = ("cattaneo2024",)

    loss: Loss = eqx.field(converter=lambda f: _check.function("loss", f))
    learning_rate: jax.Array = eqx.field(converter=lambda x: _check.positive_scalar("learning_rate", x))
    b1: jax.Array = eqx.field(default=0.9, converter=lambda x: _check.fraction("b1", x))
    b2: jax.Array = eqx.field(default=0.999, converter=lambda x: _check.fraction("b2", x))
    eps: jax.Array = eqx.field(default=1e-8, converter=lambda x: _check.nonnegative_scalar("eps", x))
    eps_root: jax.Array = eqx.field(default=0.0, converter=lambda x: _check.nonnegative_scalar("eps_root", x))
    order: int = eqx.field(default=1, static=True, converter=lambda n: _check.integer("order", n, 0))

    if TYPE_CHECKING:  # a checker knows no converters, and takes an AbstractVar for an argument

        def __init__(
            self,
            loss: Loss,
            learning_rate: ArrayLike,
            b1: ArrayLike = 0.9,
            b2: ArrayLike = 0.999,
            eps: ArrayLike = 1e-8,
            eps_root: ArrayLike = 0.0,
            order: int = 1,
        ) -> None: ...

    def __check_init__(self) -> None:
        if self.order > 1:
            raise ValueError(
                f"order: expected 0 or 1 (one correction is known in closed form), got {self.order}; "
                "eomdl.InterpolatingFlow goes further"
            )

    @property
    @override
    def map(self) -> "_AdamStep":
        return _AdamStep(self)

    @property
    @override
    def gradient_cost(self) -> float:
        return _costs.GRADIENT_AND_PRODUCT if self.order else 1.0

    @override
    def differentiated(self, state: Params) -> Differentiated | None:
        return Differentiated(DescentField(self.loss), state) if self.order else None

    @override
    def __call__(self, t: ArrayLike, state: Params, args: Args) -> Params:
        del t
        leading, correction = self._terms(state, args, self.order)
        return leading if correction is None else _tree.add(leading, correction)

    @override
    def diagnostics(self, t: ArrayLike, state: Params, args: Args) -> dict[str, Diagnostic]:
        leading, correction = self._terms(state, args, 1)
        size = _tree.norm(leading)
        ratio = _tree.norm(correction) / jnp.where(size > 0, size, 1)
        return {
            "the first correction / the leading term": Diagnostic(
                ratio,
                limit=1.0,
                meaning="From 1 on the series in the learning rate says nothing. Where a gradient changes its sign the correction "
                "grows like 1/eps: take a larger eps (1e-4), a smaller learning rate, or "
                "eomdl.InterpolatingFlow(eomdl.optimizer_step(loss, optimizer), learning_rate, points=2).",
            )
        }

    def _terms(self, state: Params, args: Args, order: int) -> tuple[Params, Params | None]:
        """Return the leading term, and the correction of first order where it is asked for."""
        field = descent_field(self.loss, args)
        f = field(state)

        def scales(f: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            root = jnp.asarray(self.eps_root, f.dtype)
            square = f * f + root
            # g^2/r is 0 where g = 0, whether or not r is 0 too.
            r = jnp.sqrt(jnp.where(square > 0, square, 1))
            r = jnp.where(square > 0, r, 0)
            d = r + jnp.asarray(self.eps, f.dtype)
            safe = jnp.where(d > 0, d, 1)
            fraction = jnp.where(r > 0, f * f / jnp.where(r > 0, r * safe, 1), 0)
            return f / safe, fraction, safe

        parts = jax.tree.map(scales, f)
        leading, fraction, d = jax.tree.transpose(jax.tree.structure(f), jax.tree.structure((0, 0, 0)), parts)
        if order == 0:
            return leading, None
        _, product = jvp(field, state, leading)  # H g/d: twice a sign
        first, second = ((1 + b) / (1 - b) for b in (self.b1, self.b2))

        def correct(s: jax.Array, d: jax.Array, p: jax.Array) -> Any:
            factor = (-0.5 * self.learning_rate * (first - second * s)).astype(p.dtype)
            return factor * p / d

        return leading, jax.tree.map(correct, fraction, d, product)


class _AdamStep(StepMap):
    """A step of the optimizer whose averages have filled along the flow's own path."""

    is_model: ClassVar[bool] = True

    flow: AdamFlow

    @override
    def __call__(self, state: Params, args: Args, k: ArrayLike) -> Params:
        flow = self.flow

        def average(function: Any, decay: jax.Array) -> Params:
            def field(x: Params) -> Params:
                return flow(k * flow.learning_rate, x, args)

            return average_along_flow(function, field, state, decay, flow.learning_rate)

        def gradient(x: Params) -> Params:
            return jax.grad(flow.loss)(x, args)

        def square(x: Params) -> Params:
            return jax.tree.map(jnp.square, gradient(x))

        def update(x: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            h, eps, root = (jnp.asarray(c, x.dtype) for c in (flow.learning_rate, flow.eps, flow.eps_root))
            d = jnp.sqrt(jnp.maximum(v, 0) + root) + eps
            return x - jnp.where(d > 0, h * m / jnp.where(d > 0, d, 1), 0)

        return jax.tree.map(update, state, average(gradient, flow.b1), average(square, flow.b2))


def rmsprop_flow(
    loss: Loss, learning_rate: ArrayLike, decay: ArrayLike = 0.9, eps: ArrayLike = 1e-8, order: int = 1
) -> AdamFlow:
    r"""RMSProp after the transient of its average: `AdamFlow` with $\beta_1 = 0$ and $\epsilon$ under the root.

    $\dot\theta = -\frac{g}{r} - \frac{h}{2r} (1 - \frac{1+\rho}{1-\rho} \frac{g^2}{r^2}) H \frac{g}{r}$,
    $r = \sqrt{g^2 + \epsilon}$, $\rho$ = `decay`: the arguments of `optax.rmsprop`, which puts $\epsilon$ there.

    **Raises:** `ValueError` for a wrong argument. Source: Cattaneo et al. 2024 (arXiv 2309.00079).
    """
    return AdamFlow(
        loss=loss,
        learning_rate=_check.positive_scalar("learning_rate", learning_rate),
        b1=_check.fraction("b1", 0.0),
        b2=_check.fraction("decay", decay),
        eps=_check.nonnegative_scalar("eps", 0.0),
        eps_root=_check.nonnegative_scalar("eps", eps),
        order=order,
    )
