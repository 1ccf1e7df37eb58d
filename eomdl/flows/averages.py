"""The averages that an optimizer keeps, along a smooth path."""

from collections.abc import Callable
from typing import Any

from jax.typing import ArrayLike

from eomdl import _tree
from eomdl._autodiff import jvp
from eomdl._types import Params, VectorField


def average_along_flow(
    function: Callable[[Params], Any], field: VectorField, x: Params, decay: ArrayLike, step: ArrayLike
) -> Any:
    r"""Return the exponential average of a function over the past of x on the flow of `field`.

    $\sum_{j \ge 0} (1 - b) b^j f(x(t - jh)) = f - h a \dot f + \frac{h^2}{2} q \ddot f + O(h^3)$

    with the mean $a = b / (1 - b)$ and the mean square $q = b (1 + b) / (1 - b)^2$ of the age j, h = `step`,
    b = `decay`. f must change little within the memory: $h a$ is small against its time scale.
    """

    def derivative(f: Callable[[Params], Any]) -> Callable[[Params], Any]:
        return lambda y: jvp(f, y, field(y))[1]

    first = derivative(function)
    age = decay / (1 - decay)
    square = decay * (1 + decay) / (1 - decay) ** 2
    now = _tree.sub(function(x), _tree.scale(step * age, first(x)))
    return _tree.add(now, _tree.scale(step**2 * square / 2, derivative(first)(x)))
