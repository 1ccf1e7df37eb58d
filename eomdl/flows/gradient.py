"""Gradient flow."""

from typing import TYPE_CHECKING, ClassVar

import equinox as eqx
import jax
from jax.typing import ArrayLike
from typing_extensions import override

from eomdl import _check
from eomdl._autodiff import descent_field
from eomdl._types import Args, Loss, Params
from eomdl.flows.descent import AbstractDescentFlow
from eomdl.flows.equation_of_motion import EquationOfMotion, with_leading_error


class GradientFlow(AbstractDescentFlow):
    r"""Gradient flow $\dot\theta = -\nabla L(\theta)$.

    ```python
    path = eomdl.solve(eomdl.GradientFlow(loss, learning_rate=0.1), params, 100, args=data)
    ```

    The learning rate $\eta$ only sets the clock: step k of gradient descent is at time $k \eta$. Its error
    against gradient descent is $O(\eta^2)$ in one step and $O(\eta)$ at a fixed time.

    **Arguments:** `loss`: function `(params, args) -> scalar`; `learning_rate`: $\eta$, a leaf of the pytree.

    **Cost** of one evaluation: one gradient.

    **Raises:** `ValueError` if the learning rate is not a finite number > 0.

    Source: Hairer, Lubich & Wanner 2006, ch. IX (gradient descent is explicit Euler on this equation).
    """

    references: ClassVar[tuple[str, ...]] = ("hairer2006",)

    loss: Loss = eqx.field(converter=lambda f: _check.function("loss", f))
    learning_rate: jax.Array = eqx.field(converter=lambda x: _check.positive_scalar("learning_rate", x))

    if TYPE_CHECKING:  # a checker knows no converters, and takes an AbstractVar for an argument

        def __init__(self, loss: Loss, learning_rate: ArrayLike) -> None: ...

    @property
    @override
    def gradient_cost(self) -> float:
        return 1.0

    @property
    @override
    def next_order(self) -> EquationOfMotion:
        return EquationOfMotion(self.loss, self.learning_rate, 1)

    @override
    def __call__(self, t: ArrayLike, state: Params, args: Args) -> Params:
        del t
        return descent_field(self.loss, args)(state)

    @override
    def differentiated(self, state: Params) -> None:
        del state

    @override
    def leading_error(self, t: ArrayLike, params: Params, error: Params, args: Args) -> tuple[Params, Params]:
        del t
        return with_leading_error(self.loss, self.learning_rate, 0, params, error, args)
