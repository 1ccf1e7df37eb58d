"""Counter terms of the equation of motion: exact, of any order, matrix-free."""

from collections.abc import Sequence
from typing import Any

from jax.typing import ArrayLike

from eomdl import _check, _tree
from eomdl._autodiff import descent_field
from eomdl._types import Args, Loss, Params, VectorField
from eomdl.series.elementary import ElementaryDifferentials
from eomdl.series.trees import EULER, ButcherTableau, Tree, modified_equation


MAX_ORDER = 10  # it has 1,842 trees, and each further order three times as many


def modified_field(
    f: VectorField, x: Params, step_size: ArrayLike, order: int, method: ButcherTableau = EULER
) -> Params:
    r"""Return the field whose flow over time `step_size` is one step of the method, up to the terms left out.

    $$\sum_{j=1}^{n+1} h^{j-1} F_j(x), \qquad F_1 = f, \quad F_j = \sum_{|t|=j} c(t) F(t)(x).$$

    With n = `order`, and the step $x + h f(x)$ by default: the modified equation of a Runge-Kutta method as a B-series
    (Hairer, Lubich & Wanner 2006, ch. IX). It costs as much as `eomdl.EquationOfMotion`, and less than the $F_j$ one by one,
    since trees of different size share derivatives.
    """
    order = _check.integer("order", order, 0, MAX_ORDER)
    coefficients: dict[Tree, Any] = {}
    for n in range(1, order + 2):
        for tree, c in modified_equation(n, method).items():
            coefficients[tree] = float(c) * step_size ** (n - 1) if n > 1 else 1.0
    return ElementaryDifferentials(f, x).combination(coefficients)


def counterterms(loss: Loss, params: Params, order: int, args: Args = None) -> Sequence[Params]:
    r"""Return the counter terms $(\xi_0, \dots, \xi_{n-1})$ of gradient descent at `params`.

    ```python
    xi = eomdl.counterterms(loss, params, order=2, args=data)
    ```

    They cancel the discretization error of gradient descent in powers of the learning
    rate $\eta$: the flow of

    $$\dot\theta = -\nabla L(\theta) - \eta \sum_{a=0}^{n-1} \eta^a \xi_a(\theta)$$

    over time $\eta$ is one step $\theta - \eta \nabla L(\theta)$ up to $O(\eta^{n+2})$.
    With $g = \nabla L$, $H = \nabla^2 L$: $\xi_0 = \frac12 H g$ and
    $\xi_1 = \frac13 H H g + \frac1{12} \nabla^3 L[g, g]$.

    **Arguments:**

    - `loss`: function `(params, args) -> scalar`, differentiable `order + 1` times by
        JAX. Where it is only piecewise smooth (relu, max-pool), these are the derivatives
        of the piece that `params` lies in.
    - `params`: pytree of floating-point arrays.
    - `order`: the number n of counter terms, at most 10; 0 gives the empty tuple.
    - `args`: passed to `loss`.

    **Returns:** a tuple of `order` pytrees like `params`.

    **Cost:** about 2.7 / 6 / 11 / 30 / 60 / 150 gradients for n = 1 ... 6; the page "Cost" has measurements.

    **Raises:** `ValueError` for a wrong argument.

    Source: Miyagawa 2022 (arXiv 2210.15898), equation of motion and its counter terms, here
    computed from rooted trees (Hairer, Lubich & Wanner 2006, ch. IX).
    """
    order = _check.integer("order", order, 0, MAX_ORDER)
    params = _check.params("params", params)
    _check.loss_is_scalar(loss, params, args)
    if order == 0:
        return ()
    differentials = ElementaryDifferentials(descent_field(loss, args), params)
    return tuple(
        _tree.scale(-1.0, differentials.combination({t: float(c) for t, c in modified_equation(n).items()}))
        for n in range(2, order + 2)
    )
