"""The modified equation of a one-step method for any vector field."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import equinox as eqx
import jax
from jax.typing import ArrayLike
from typing_extensions import override

from eomdl import _check, _tree
from eomdl._types import Args, Params
from eomdl.flows.base import AbstractFlow, Differentiated
from eomdl.maps.step_map import StepMap
from eomdl.series.euler import MAX_ORDER, modified_field
from eomdl.series.trees import EULER, ButcherTableau


Field: TypeAlias = Callable[[Params, Args], Params]  # (x, args) -> velocity


def _tableau(method: Any) -> ButcherTableau:
    return _check.kind("method", method, ButcherTableau, "an eomdl.series.ButcherTableau")


class ModifiedFlow(AbstractFlow):
    r"""The modified equation of the iteration $x_{k+1} = x_k + h f(x_k)$, or of a Runge-Kutta method, for any field $f$.

    ```python
    flow = eomdl.flows.ModifiedFlow(lambda x, args: jnp.array([-x[1], x[0]]), step_size=0.1, order=1)
    path = eomdl.solve(flow, jnp.array([1.0, 0.0]), 100)
    ```

    $$\dot x = \sum_{j=1}^{n+1} h^{j-1} F_j(x), \qquad F_1 = f, \quad F_2 = -\tfrac12 f' f, \quad \dots$$

    (the terms of explicit Euler). The field need not be a gradient: two players who descend at the same time,
    temporal-difference learning. For $f = -\nabla L$ it is `eomdl.EquationOfMotion`. The error is $O(h^{n+2})$ in one step,
    and for a method of order p the first term after $f$ is that of $h^p$.

    **Arguments:**

    - `field`: f, a function `(x, args) -> velocity`, a pytree like `x`, differentiable `order` times.
    - `step_size`: h, a finite number > 0, a leaf of the pytree.
    - `order`: n, the highest power of h that is kept.
    - `method`: an `eomdl.series.ButcherTableau`, such as `eomdl.series.RK4`; by default explicit Euler.

    **Cost** of one evaluation as of `eomdl.EquationOfMotion` with the same order, in evaluations of f and its derivatives.

    **Raises:** `ValueError` for a wrong argument, and for a field whose velocity is not like `x`.

    Source: Hairer, Lubich & Wanner 2006, ch. IX.
    """

    references: ClassVar[tuple[str, ...]] = ("hairer2006",)

    field: Field = eqx.field(
        converter=lambda f: _check.function("field", f, "a function (x, args) -> velocity like x")
    )
    step_size: jax.Array = eqx.field(converter=lambda x: _check.positive_scalar("step_size", x))
    order: int = eqx.field(
        default=1, static=True, converter=lambda n: _check.integer("order", n, 0, MAX_ORDER)
    )
    method: ButcherTableau = eqx.field(default=EULER, static=True, converter=_tableau)

    if TYPE_CHECKING:  # a checker knows no converters, and takes an AbstractVar for an argument

        def __init__(
            self, field: Field, step_size: ArrayLike, order: int = 1, method: ButcherTableau = EULER
        ) -> None: ...

    @property
    @override
    def map(self) -> "_MethodStep":
        return _MethodStep(self.field, self.step_size, self.method)

    @override
    def __call__(self, t: ArrayLike, state: Params, args: Args) -> Params:
        del t
        return modified_field(lambda x: self.field(x, args), state, self.step_size, self.order, self.method)

    @override
    def differentiated(self, state: Params) -> Differentiated | None:
        return Differentiated(self.field, state) if self.order else None

    @override
    def validate(self, params: Params, args: Args) -> None:
        velocity = _check.shape_of(
            "field", "a function (x, args) -> velocity like x", self.field, params, args
        )
        _check.same_structure("field's velocity", velocity, "params", params)


class _MethodStep(StepMap):
    """A step of an explicit Runge-Kutta method."""

    field: Field
    step_size: jax.Array
    method: ButcherTableau = eqx.field(static=True)

    @override
    def __call__(self, state: Params, args: Args, k: ArrayLike) -> Params:
        del k
        slopes: list[Params] = []
        for row in self.method.a:
            slopes.append(self.field(self._advance(state, row, slopes), args))
        return self._advance(state, self.method.b, slopes)

    def _advance(self, state: Params, weights: tuple, slopes: list[Params]) -> Params:
        for weight, slope in zip(weights, slopes, strict=True):
            if weight:
                state = _tree.add(state, _tree.scale(float(weight) * self.step_size, slope))
        return state
