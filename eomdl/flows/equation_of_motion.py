"""The equation of motion of gradient descent."""

from typing import TYPE_CHECKING, ClassVar

import equinox as eqx
import jax
from jax.typing import ArrayLike

from eomdl import _check
from eomdl._autodiff import descent_field
from eomdl._end import Diagnostic
from eomdl._types import Args, Loss, Params
from eomdl.flows.descent import AbstractDescentFlow
from eomdl.flows.gradient import gradient_descent_step
from eomdl.observe.curvature import sharpness
from eomdl.series.euler import MAX_ORDER, modified_field


# Of one evaluation at order 0, 1, ...: flops on a tanh MLP over those of a gradient.
GRADIENTS = (1.0, 2.7, 5.0, 9.0, 26.0, 53.0, 144.0)
# Of a look at the sharpness: with 0.05 it was up to 37 % too low on digits along training, with 0.02 at most 0.1 %.
RTOL = 0.02


class EquationOfMotion(AbstractDescentFlow):
    r"""The equation of motion $\dot\theta = -\nabla L - \eta \sum_{a<n} \eta^a \xi_a(\theta)$.

    ```python
    flow = eomdl.EquationOfMotion(loss, learning_rate=0.1, order=1)
    path = eomdl.solve(flow, params, 100, args=data)
    ```

    Gradient flow plus the first n counter terms $\xi_0, \dots, \xi_{n-1}$ (see
    `eomdl.counterterms`); n = 0 is gradient flow. The error against gradient descent is
    $O(\eta^{n+2})$ in one step and $O(\eta^{n+1})$ at a fixed time, as long as
    $\eta \lambda_{max} < 1$. Beyond that the series in $\eta$ has no limit, and more terms
    make the error larger.

    **Arguments:**

    - `loss`: function `(params, args) -> scalar`, differentiable `order + 1` times.
    - `learning_rate`: $\eta$, a finite number > 0. It is a leaf of the pytree: another value
        does not recompile, and `jax.vmap` and `jax.grad` go through it.
    - `order`: the number n of counter terms kept, an integer >= 0.

    **Cost** of one evaluation in gradients, for n = 0 ... 6, as XLA counts flops on a tanh
    MLP: 1 / 2.7 / 5 / 9 / 26 / 53 / 144. It is up to a quarter more for a loss in which XLA
    finds less to share (`benchmarks/` measures it).

    **Raises:** `ValueError` for a wrong argument.

    Source: Miyagawa 2022 (arXiv 2210.15898).
    """

    references: ClassVar[tuple[str, ...]] = ("miyagawa2022",)

    loss: Loss = eqx.field(converter=lambda f: _check.function("loss", f))
    learning_rate: jax.Array = eqx.field(converter=lambda x: _check.positive_scalar("learning_rate", x))
    order: int = eqx.field(
        default=1, static=True, converter=lambda n: _check.integer("order", n, 0, MAX_ORDER)
    )

    if TYPE_CHECKING:  # a checker knows no converters, and takes an AbstractVar for an argument

        def __init__(self, loss: Loss, learning_rate: ArrayLike, order: int = 1) -> None: ...

    @property
    def gradients(self) -> float:
        """By the order, as measured on a tanh MLP."""
        return GRADIENTS[self.order]

    def __call__(self, t: ArrayLike, state: Params, args: Args) -> Params:
        r"""$-\nabla L$ and the counter terms kept."""
        del t
        return modified_field(descent_field(self.loss, args), state, self.learning_rate, self.order)

    def step(self, t: ArrayLike, state: Params, args: Args) -> Params:
        """One step of gradient descent."""
        del t
        return gradient_descent_step(self.loss, self.learning_rate, state, args)

    def diagnostics(self, t: ArrayLike, state: Params, args: Args) -> dict[str, Diagnostic]:
        """`eta*lambda_max`: the series in the learning rate needs it below 1."""
        del t
        if self.order == 0:
            return {}
        return {
            "eta*lambda_max": Diagnostic(
                self.learning_rate * sharpness(self.loss, rtol=RTOL)(state, args),
                limit=1.0,
                meaning="From 1 on the series in the learning rate has no limit, and more counter terms make it "
                "worse: lower the learning rate, or take InterpolatingFlow(..., stride=2).",
            )
        }
