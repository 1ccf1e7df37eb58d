"""The first-order modified flow of gradient descent with momentum."""

from typing import TYPE_CHECKING, ClassVar

import equinox as eqx
import jax
from jax.typing import ArrayLike
from typing_extensions import override

from eomdl import _check, _costs, _tree
from eomdl._autodiff import DescentField
from eomdl._types import Args, Loss, Params
from eomdl.flows.averages import average_along_flow
from eomdl.flows.base import AbstractFlow, Differentiated
from eomdl.flows.penalized import penalized_descent
from eomdl.maps.response import mean_age
from eomdl.maps.step_map import StepMap


class MomentumFlow(AbstractFlow):
    r"""Gradient descent with momentum, on the loss that its memory modifies.

    $$\dot\theta = -\nabla \big( L + \tfrac{h}{4} (1 + 2 a) |\nabla L|^2 \big), \qquad
    h = \frac{\eta}{1 - \beta},$$

    where a is the mean age in steps of the gradients in an update: $\beta/(1-\beta)$ for heavy ball, which
    gives the factor $(1+\beta)/(1-\beta)$ of Ghosh et al. 2023 (arXiv 2302.00849), and
    $\beta^2/(1-\beta)$ for Nesterov as `optax.sgd(..., nesterov=True)` has it. $\beta = 0$ is implicit gradient
    regularization (Barrett & Dherin 2021). It holds after the transient of about
    $1/(1-\beta)$ steps in which the memory fills: the local error is $O(h^3)$ from there on, $O(h)$ in the transient.

    **Arguments:** `loss`; `learning_rate` $\eta$ and `momentum` $0 \le \beta < 1$ as in `optax.sgd`, leaves of
    the pytree; `nesterov`.

    **Time:** a step of the optimizer takes $h = \eta/(1-\beta)$ (`step_size`).

    **Cost** of one evaluation: about 2.7 gradients. **Raises:** `ValueError` for a wrong argument.
    """

    references: ClassVar[tuple[str, ...]] = ("ghosh2023", "barrett2021")

    loss: Loss = eqx.field(converter=lambda f: _check.function("loss", f))
    learning_rate: jax.Array = eqx.field(converter=lambda x: _check.positive_scalar("learning_rate", x))
    momentum: jax.Array = eqx.field(default=0.9, converter=lambda x: _check.fraction("momentum", x))
    nesterov: bool = eqx.field(default=False, static=True, converter=lambda x: _check.flag("nesterov", x))

    if TYPE_CHECKING:  # a checker knows no converters, and takes an AbstractVar for an argument

        def __init__(
            self, loss: Loss, learning_rate: ArrayLike, momentum: ArrayLike = 0.9, nesterov: bool = False
        ) -> None: ...

    # Equinox lets a property fill an AbstractVar; mypy does not know.
    @property  # type: ignore[misc]
    @override
    def step_size(self) -> jax.Array:
        r"""$h = \eta / (1 - \beta)$: the step that a constant gradient makes, over that gradient."""
        return self.learning_rate / (1 - self.momentum)

    @property
    @override
    def map(self) -> "_MomentumStep":
        return _MomentumStep(self)

    @property
    @override
    def gradient_cost(self) -> float:
        return _costs.GRADIENT_AND_PRODUCT

    @override
    def differentiated(self, state: Params) -> Differentiated:
        return Differentiated(DescentField(self.loss), state)

    @override
    def __call__(self, t: ArrayLike, state: Params, args: Args) -> Params:
        r"""$-\nabla$ of the loss with its penalty on the gradient."""
        del t
        age = mean_age(self.momentum, self.nesterov)
        return penalized_descent(self.loss, self.step_size * (1 + 2 * age) / 2, state, args)

    @override
    def validate(self, params: Params, args: Args) -> None:
        """Raise `ValueError` if the loss does not give one real number at `params`."""
        _check.loss_is_scalar(self.loss, params, args)


class _MomentumStep(StepMap):
    """A step of the optimizer whose memory has filled along the flow's own path."""

    is_model: ClassVar[bool] = True

    flow: MomentumFlow

    @override
    def __call__(self, state: Params, args: Args, k: ArrayLike) -> Params:
        flow, gradient = self.flow, jax.grad(self.flow.loss)
        mean = average_along_flow(
            lambda x: gradient(x, args),
            lambda x: flow(k * flow.step_size, x, args),
            state,
            flow.momentum,
            flow.step_size,
        )
        if not flow.nesterov:
            return _tree.sub(state, _tree.scale(flow.step_size, mean))
        now = _tree.sub(state, _tree.scale(flow.learning_rate, gradient(state, args)))
        return _tree.sub(now, _tree.scale(flow.momentum * flow.step_size, mean))
