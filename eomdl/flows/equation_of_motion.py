"""The equation of motion of gradient descent."""

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import equinox as eqx
import jax
from jax.typing import ArrayLike
from typing_extensions import override

from eomdl import _check, _costs, _tree
from eomdl._autodiff import DescentField, descent_field, linearize
from eomdl._end import Diagnostic
from eomdl._types import Args, Loss, Params
from eomdl.flows.base import Differentiated
from eomdl.flows.descent import AbstractDescentFlow
from eomdl.observe.curvature import sharpness
from eomdl.series.euler import MAX_ORDER, counterterms, modified_field


# Of the sharpness in the diagnostics: with 0.05 it was up to 37 % too low on digits along training, with 0.02 at most 0.1 %.
SHARPNESS_RTOL = 0.02


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
    @override
    def gradient_cost(self) -> float:
        return _costs.equation_of_motion(self.order)

    @property
    @override
    def next_order(self) -> "EquationOfMotion | None":
        return None if self.order == MAX_ORDER else dataclasses.replace(self, order=self.order + 1)

    @override
    def __call__(self, t: ArrayLike, state: Params, args: Args) -> Params:
        del t
        return modified_field(descent_field(self.loss, args), state, self.learning_rate, self.order)

    @override
    def leading_error(self, t: ArrayLike, params: Params, error: Params, args: Args) -> tuple[Params, Params]:
        del t
        return with_leading_error(self.loss, self.learning_rate, self.order, params, error, args)

    @override
    def differentiated(self, state: Params) -> Differentiated | None:
        return Differentiated(DescentField(self.loss), state) if self.order else None

    @override
    def diagnostics(self, t: ArrayLike, state: Params, args: Args) -> dict[str, Diagnostic]:
        del t
        if self.order == 0:
            return {}
        return series_diagnostics(self.loss, self.learning_rate, state, args)


def series_diagnostics(
    loss: Loss, learning_rate: jax.Array, params: Params, args: Args
) -> dict[str, Diagnostic]:
    """Return the diagnostic of a flow that is a series in the learning rate."""
    return {
        "eta*lambda_max": Diagnostic(
            learning_rate * sharpness(loss, rtol=SHARPNESS_RTOL)(params, args),
            limit=1.0,
            meaning="From 1 on the series in the learning rate has no limit, and more counter terms make it "
            "worse: lower the learning rate, or take InterpolatingFlow(..., stride=2).",
        )
    }


def with_leading_error(
    loss: Loss, learning_rate: jax.Array, order: int, params: Params, error: Params, args: Args
) -> tuple[Params, Params]:
    r"""Return the velocity with n = `order` counter terms, and that of its leading error, $-H e + \eta^{n+1} \xi_n$.

    $e(k\eta) = \theta(k\eta) - \theta_k + O(\eta^{n+2})$ with $e(0) = 0$.

    **Raises:** `ValueError` for n = 10: $\xi_{10}$ is not known.

    Source: Miyagawa 2022 (arXiv 2210.15898), discretization error; Hairer, Lubich & Wanner 2006, ch. IX.
    """
    if order == MAX_ORDER:
        raise ValueError(
            f"flow: expected at most {MAX_ORDER - 1} counter terms, got {MAX_ORDER}: the next is not known"
        )
    eta = learning_rate
    velocity, along = linearize(descent_field(loss, args), params)  # along(v) = -H v
    if order == 0:  # xi_0 = H g / 2, in the same product with H
        return velocity, along(_tree.add(error, _tree.scale(eta / 2, velocity)))
    *kept, left_out = counterterms(loss, params, order + 1, args)
    for a, term in enumerate(kept):
        velocity = _tree.sub(velocity, _tree.scale(eta ** (a + 1), term))
    return velocity, _tree.add(along(error), _tree.scale(eta ** (order + 1), left_out))
