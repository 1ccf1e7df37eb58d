"""The stochastic differential equation of SGD with momentum."""

from typing import TYPE_CHECKING, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from typing_extensions import override

from eomdl import _check, _costs, _tree
from eomdl._autodiff import DescentField, jvp
from eomdl._types import Args, Params
from eomdl.flows.base import AbstractFlow
from eomdl.flows.stochastic_modified import check_weak_order
from eomdl.losses.examples import PER_EXAMPLE, Losses, mean_loss
from eomdl.noise.base import NoiseOperator
from eomdl.noise.minibatch import MinibatchNoise


class StochasticMomentumFlow(AbstractFlow):
    r"""SGD with heavy-ball momentum as a stochastic differential equation of parameters X and velocity V.

    With the time $h = \sqrt\eta$ of a step and the friction $\gamma = (1 - \beta)/h$, of order 1

    $$dX = V\,dt, \qquad dV = -(\gamma V + g)\,dt - \sqrt h\,\xi\,dW,$$

    where $\xi\,dW$ is the noise of a minibatch gradient (`eomdl.noise.MinibatchNoise`), and of order 2 the drifts are

    $$V - \tfrac h2 (\gamma V + g), \qquad -(\gamma V + g) - \tfrac h2 (\gamma^2 V + \gamma g - H V),$$

    with the same noise, in the sense of Ito. Expectations at a fixed time are off by $O(h)$ and $O(h^2)$ where $\gamma$ is of
    order 1: where $1 - \beta$ is of the size of $\sqrt\eta$. The *covariance* is off by $O(h)$ at either order, and at order 2
    further off than at order 1; the counter term of the noise is in `StochasticInterpolatingFlow(..., noise_order=2)`.

    **Arguments:** `losses`: function `(params, args) -> (N,)`; `learning_rate` $\eta$ and `momentum` $0 \le \beta < 1$ as in
    `optax.sgd`, leaves of the pytree; `batch_size` and `replacement`: see `eomdl.noise.MinibatchNoise`; `order`: 1 or 2.

    **State:** `(params, V)`; V is $-\sqrt\eta$ times the trace of `optax.sgd`, and 0 at the start.

    `eomdl.solve` does not take it yet: it has the drift and the noise (guide Noise).

    **Cost** of the drift: 1 gradient (order 1), 2.7 (order 2). **Raises:** `ValueError` for a wrong argument.

    Source: Li, Tai & E 2019 (arXiv 1811.01558); order 2 is derived here.
    """

    references: ClassVar[tuple[str, ...]] = ("li2019",)

    losses: Losses = eqx.field(converter=lambda f: _check.function("losses", f, PER_EXAMPLE))
    learning_rate: jax.Array = eqx.field(converter=lambda x: _check.positive_scalar("learning_rate", x))
    momentum: jax.Array = eqx.field(converter=lambda x: _check.fraction("momentum", x))
    batch_size: int = eqx.field(static=True, converter=lambda n: _check.integer("batch_size", n, 1))
    order: int = eqx.field(default=2, static=True, converter=lambda n: check_weak_order("order", n))
    replacement: bool = eqx.field(
        default=False, static=True, converter=lambda x: _check.flag("replacement", x)
    )

    if TYPE_CHECKING:  # a checker knows no converters, and takes an AbstractVar for an argument

        def __init__(
            self,
            losses: Losses,
            learning_rate: ArrayLike,
            momentum: ArrayLike,
            batch_size: int,
            order: int = 2,
            replacement: bool = False,
        ) -> None: ...

    # Equinox lets a property fill an AbstractVar; mypy does not know.
    @property  # type: ignore[misc]
    @override
    def step_size(self) -> jax.Array:
        r"""$h = \sqrt\eta$."""
        return jnp.sqrt(self.learning_rate)

    @property
    @override
    def gradient_cost(self) -> float:
        return 1.0 if self.order == 1 else _costs.GRADIENT_AND_PRODUCT

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
        (x, v), h = state, self.step_size
        friction = (1 - self.momentum) / h
        descent = DescentField(mean_loss(self.losses))
        if self.order == 1:
            return v, _tree.sub(descent(x, args), _tree.scale(friction, v))
        force, along = jvp(lambda y: descent(y, args), x, v)  # along = -H V
        pushed = _tree.sub(force, _tree.scale(friction, v))
        # gamma^2 V + gamma g - H V = -gamma * pushed + along
        change = _tree.sub(along, _tree.scale(friction, pushed))
        half = lambda a, b: _tree.add(a, _tree.scale(h / 2, b))
        return half(v, pushed), half(pushed, _tree.scale(-1.0, change))

    @override
    def noise(self, t: ArrayLike, state: tuple[Params, Params], args: Args) -> NoiseOperator:
        del t
        x, _ = state
        batches, scale = self._batches, -jnp.sqrt(self.step_size)

        def noise_of(normals: jax.Array) -> tuple[Params, Params]:
            kick = batches.apply(x, batches.weights_from(normals, args), args)
            return _tree.zeros_like(x), _tree.scale(scale, kick)

        return NoiseOperator(noise_of, batches.normals_like(x, args))

    @override
    def validate(self, params: Params, args: Args) -> None:
        self._batches.validate(params, args)
        _check.loss_is_scalar(mean_loss(self.losses), params, args)

    @property
    def _batches(self) -> MinibatchNoise:
        return MinibatchNoise(self.losses, self.batch_size, self.replacement)
