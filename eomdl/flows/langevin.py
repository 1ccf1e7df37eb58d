"""Langevin dynamics: descent in a heat bath."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from typing_extensions import override

from eomdl import _check, _tree
from eomdl._autodiff import descent_field
from eomdl._types import Args, Loss, Params
from eomdl.flows.base import AbstractFlow
from eomdl.noise.base import NoiseOperator


Temperature: TypeAlias = jax.Array | Callable[[ArrayLike], ArrayLike]


def check_temperature(value: Any) -> Temperature:
    """Return a number > 0, or a schedule, a function of time."""
    if callable(value):
        return _check.function("temperature", value, "a number > 0, or a function of time", takes=1)
    return _check.positive_scalar("temperature", value)


def temperature_at(temperature: Temperature, t: ArrayLike) -> jax.Array:
    """Return the temperature at a time."""
    return jnp.asarray(temperature(t)) if callable(temperature) else temperature


class LangevinFlow(AbstractFlow):
    r"""Overdamped Langevin dynamics $dX = -\nabla U\,dt + \sqrt{2T}\,dW$, with the loss as the energy U.

    At a constant temperature its stationary density is that of Gibbs, $e^{-U/T}$, where that can be normalized.

    ```python
    flow = eomdl.flows.LangevinFlow(loss, temperature=0.1)
    ```

    **Arguments:** `loss`: function `(params, args) -> scalar`; `temperature`: T > 0, a leaf of the pytree, or a schedule, a function
    of time; `step_size`: the time of a step, which only sets the clock.

    `eomdl.solve` does not take it yet: it has the drift and the noise (guide Noise).

    **Cost** of the drift: one gradient. **Raises:** `ValueError` for a wrong argument.

    Source: Leimkuhler & Matthews 2013, for both dynamics of Langevin.
    """

    references: ClassVar[tuple[str, ...]] = ("leimkuhler2013",)

    # mypy takes the abstract `step_size` of the base for the first field, which has a default here.
    loss: Loss = eqx.field(converter=lambda f: _check.function("loss", f))  # type: ignore[misc]
    temperature: Temperature = eqx.field(converter=check_temperature)  # type: ignore[misc]
    step_size: jax.Array = eqx.field(default=1.0, converter=lambda x: _check.positive_scalar("step_size", x))

    if TYPE_CHECKING:  # a checker knows no converters, and takes an AbstractVar for an argument

        def __init__(
            self, loss: Loss, temperature: ArrayLike | Temperature, step_size: ArrayLike = 1.0
        ) -> None: ...

    @property
    @override
    def gradient_cost(self) -> float:
        return 1.0

    @override
    def __call__(self, t: ArrayLike, state: Params, args: Args) -> Params:
        del t
        return descent_field(self.loss, args)(state)

    @override
    def noise(self, t: ArrayLike, state: Params, args: Args) -> NoiseOperator:
        del args
        return NoiseOperator(_scaled(jnp.sqrt(2 * temperature_at(self.temperature, t))), state)

    @override
    def validate(self, params: Params, args: Args) -> None:
        _check.loss_is_scalar(self.loss, params, args)


class UnderdampedLangevinFlow(AbstractFlow):
    r"""Underdamped Langevin dynamics, of unit mass.

    $$dx = v\,dt, \qquad dv = -(\gamma v + \nabla U)\,dt + \sqrt{2 \gamma T}\,dW.$$

    At a constant temperature its stationary density is $e^{-(U + |v|^2/2)/T}$.

    **Arguments:** as of `LangevinFlow`; `friction`: $\gamma > 0$, a leaf of the pytree.

    **State:** `(params, velocity)`; a new run begins at rest.

    `eomdl.solve` does not take it yet: it has the drift and the noise (guide Noise).

    **Cost** of the drift: one gradient. **Raises:** `ValueError` for a wrong argument.

    Source: Leimkuhler & Matthews 2013.
    """

    references: ClassVar[tuple[str, ...]] = ("leimkuhler2013",)

    # mypy takes the abstract `step_size` of the base for the first field, which has a default here.
    loss: Loss = eqx.field(converter=lambda f: _check.function("loss", f))  # type: ignore[misc]
    temperature: Temperature = eqx.field(converter=check_temperature)  # type: ignore[misc]
    friction: jax.Array = eqx.field(  # type: ignore[misc]
        converter=lambda x: _check.positive_scalar("friction", x)
    )
    step_size: jax.Array = eqx.field(default=1.0, converter=lambda x: _check.positive_scalar("step_size", x))

    if TYPE_CHECKING:  # a checker knows no converters, and takes an AbstractVar for an argument

        def __init__(
            self,
            loss: Loss,
            temperature: ArrayLike | Temperature,
            friction: ArrayLike,
            step_size: ArrayLike = 1.0,
        ) -> None: ...

    @property
    @override
    def gradient_cost(self) -> float:
        return 1.0

    @override
    def init(self, params: Params, args: Args) -> tuple[Params, Params]:
        del args
        return params, _tree.zeros_like(params)

    @override
    def params(self, state: tuple[Params, Params]) -> Params:
        return state[0]

    @override
    def __call__(self, t: ArrayLike, state: tuple[Params, Params], args: Args) -> tuple[Params, Params]:
        del t
        x, v = state
        return v, _tree.sub(descent_field(self.loss, args)(x), _tree.scale(self.friction, v))

    @override
    def noise(self, t: ArrayLike, state: tuple[Params, Params], args: Args) -> NoiseOperator:
        del args
        kick = _scaled(jnp.sqrt(2 * self.friction * temperature_at(self.temperature, t)))
        return NoiseOperator(lambda z: (_tree.zeros_like(z), kick(z)), state[1])

    @override
    def validate(self, params: Params, args: Args) -> None:
        _check.loss_is_scalar(self.loss, params, args)


def _scaled(factor: jax.Array) -> Callable[[Params], Params]:
    return lambda normals: _tree.scale(factor, normals)
