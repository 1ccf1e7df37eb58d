"""The step map of gradient descent."""

from typing import TYPE_CHECKING

import equinox as eqx
import jax
from jax.typing import ArrayLike
from typing_extensions import override

from eomdl import _check, _tree
from eomdl._autodiff import descent_field
from eomdl._types import Args, Loss, Params
from eomdl.maps.step_map import StepMap


class GradientDescentStep(StepMap):
    r"""The step of gradient descent, $\Psi(\theta) = \theta - \eta \nabla L(\theta)$; its state is the parameters.

    ```python
    run = eomdl.iterate(eomdl.maps.GradientDescentStep(loss, 0.1), params, 100, args=data)
    ```

    A flow of your own that models gradient descent returns it from its property `map`.

    **Arguments:** `loss`: function `(params, args) -> scalar`; `learning_rate`: $\eta$, a leaf of the pytree.

    **Cost** of a step: one gradient. **Raises:** `ValueError` for a wrong argument.
    """

    loss: Loss = eqx.field(converter=lambda f: _check.function("loss", f))
    learning_rate: jax.Array = eqx.field(converter=lambda x: _check.positive_scalar("learning_rate", x))

    if TYPE_CHECKING:  # a checker knows no converters

        def __init__(self, loss: Loss, learning_rate: ArrayLike) -> None: ...

    @override
    def __call__(self, state: Params, args: Args, k: ArrayLike) -> Params:
        return _tree.add(state, self.increment(state, args, k))

    @override
    def increment(self, state: Params, args: Args, k: ArrayLike) -> Params:
        del k
        return _tree.scale(self.learning_rate, descent_field(self.loss, args)(state))
