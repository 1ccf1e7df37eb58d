"""The stochastic modified equations of SGD."""

from typing import TYPE_CHECKING, Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from typing_extensions import override

from eomdl import _check, _costs, _tree
from eomdl._autodiff import descent_field
from eomdl._end import Diagnostic
from eomdl._types import Args, Params
from eomdl.flows.base import AbstractFlow
from eomdl.flows.equation_of_motion import series_diagnostics
from eomdl.flows.penalized import penalized_descent
from eomdl.losses.examples import PER_EXAMPLE, Losses, WeightedLoss, mean_loss
from eomdl.noise.base import NoiseOperator
from eomdl.noise.minibatch import MinibatchNoise


class StochasticModifiedFlow(AbstractFlow):
    r"""The stochastic modified equation of SGD: the law of its iterates over random batches.

    $$dX = -\big(g + \tfrac{\eta}{2} H g\big)\,dt - \sqrt{\eta}\,\big(\xi_w + \tfrac{\eta}{2} (H \xi_w + H_w g)\big),
    \qquad \xi_w = \nabla \sum_i w_i \ell_i,\quad H_w = \nabla^2 \sum_i w_i \ell_i,$$

    in the sense of Ito, with the weights $w = \sqrt{f/N}\,(dW - \overline{dW})$ of N Brownian motions, so that $\xi_w$ has the
    covariance $f\Sigma\,dt$ of a minibatch gradient (`eomdl.noise.MinibatchNoise`).

    - `order` 1 leaves out the drift's counter term $\frac{\eta}{2} H g$: expectations of smooth functions at a fixed time are off by
        $O(\eta)$; with `order` 2 by $O(\eta^2)$.
    - `noise_order` 1 leaves out the counter term of the noise. The order is that of the drift all the same, but the *covariance* of the
        iterates is then off by $O(\eta)$, and of order 2 it is further off than of order 1: take (1, 1) or (2, 2).

    With weights $1/N + \sqrt\eta\,w$ in place of $1/N$, drift and noise are the equation of motion of one loss, up to what is linear
    in w: so the covariance is positive by construction, and no matrix is made.

    ```python
    flow = eomdl.flows.StochasticModifiedFlow(losses, learning_rate=0.1, batch_size=8)
    drift = flow.ito_drift(0.0, params, data)
    spread = flow.diffusion(0.0, params, data, v)  # covariance of the noise per unit of time, times v
    ```

    **Arguments:** `losses`: function `(params, args) -> (N,)`; `learning_rate` $\eta$, a leaf of the pytree; `batch_size` and
    `replacement`: see `eomdl.noise.MinibatchNoise`; `order` and `noise_order`: 1 or 2.

    **Valid** for $\eta \lambda_{max} < 1$, and for batches drawn afresh in each step. For the batches of *reshuffled* epochs either
    order is of order 1 only; `ReshufflingFlow` is a model of their mean. No equation with Brownian noise has order 3.

    `eomdl.solve` does not take it yet: it has the drift and the noise, of which equations for moments are made (guide Noise).

    **Cost** in gradients of the mean loss: drift 1 (order 1), 2.7 (order 2); drift and noise together (`noisy_velocity`) 1 for
    orders (1, 1).

    **Raises:** `ValueError` for a wrong argument.

    Source: Li, Tai & E 2019 (arXiv 1811.01558), the drift; Gess, Kassing & Konarovskyi 2023 (arXiv 2302.07125), the noise by
    examples; its counter term is derived here.
    """

    references: ClassVar[tuple[str, ...]] = ("li2017", "li2019", "gess2024")

    losses: Losses = eqx.field(converter=lambda f: _check.function("losses", f, PER_EXAMPLE))
    learning_rate: jax.Array = eqx.field(converter=lambda x: _check.positive_scalar("learning_rate", x))
    batch_size: int = eqx.field(static=True, converter=lambda n: _check.integer("batch_size", n, 1))
    order: int = eqx.field(default=2, static=True, converter=lambda n: check_weak_order("order", n))
    noise_order: int = eqx.field(
        default=2, static=True, converter=lambda n: check_weak_order("noise_order", n)
    )
    replacement: bool = eqx.field(
        default=False, static=True, converter=lambda x: _check.flag("replacement", x)
    )

    if TYPE_CHECKING:  # a checker knows no converters, and takes an AbstractVar for an argument

        def __init__(
            self,
            losses: Losses,
            learning_rate: ArrayLike,
            batch_size: int,
            order: int = 2,
            noise_order: int = 2,
            replacement: bool = False,
        ) -> None: ...

    # Equinox lets a property fill an AbstractVar; mypy does not know.
    @property  # type: ignore[misc]
    @override
    def step_size(self) -> jax.Array:
        return self.learning_rate

    @property
    @override
    def gradient_cost(self) -> float:
        return 1.0 if self.order == 1 else _costs.GRADIENT_AND_PRODUCT

    @override
    def __call__(self, t: ArrayLike, state: Params, args: Args) -> Params:
        del t
        return self._velocity(self._uniform(state, args), state, args, self.order)

    @override
    def noise(self, t: ArrayLike, state: Params, args: Args) -> NoiseOperator:
        """Return the noise: the derivative of the drift by the weights of the examples."""
        del t
        batches = self._batches

        def noise_of(normals: jax.Array) -> Params:
            weights = self._weights(normals, args)
            if self.noise_order == 1:  # linear in the weights
                return _tree.scale(-1.0, batches.apply(state, weights, args))
            return self._along(state, args, weights)[1]

        return NoiseOperator(noise_of, batches.normals_like(state, args))

    @override
    def noisy_velocity(self, t: ArrayLike, state: Params, args: Args, normals: jax.Array) -> Params:
        r"""Return drift and noise in one pass, where both are of one order.

        **Cost:** one gradient for orders (1, 1), as the noise only changes the weights of the examples.
        """
        if self.order != self.noise_order:
            return _tree.add(self(t, state, args), self.noise(t, state, args)(normals))
        weights = self._weights(normals, args)
        if self.order == 1:
            return self._velocity(self._uniform(state, args) + weights, state, args, 1)
        return _tree.add(*self._along(state, args, weights))

    @override
    def validate(self, params: Params, args: Args) -> None:
        self._batches.validate(params, args)
        _check.loss_is_scalar(mean_loss(self.losses), params, args)

    @override
    def diagnostics(self, t: ArrayLike, state: Params, args: Args) -> dict[str, Diagnostic]:
        del t
        return series_diagnostics(mean_loss(self.losses), self.learning_rate, state, args)

    @property
    def _batches(self) -> MinibatchNoise:
        return MinibatchNoise(self.losses, self.batch_size, self.replacement)

    def _weights(self, normals: jax.Array, args: Args) -> jax.Array:
        return _tree.scale(jnp.sqrt(self.learning_rate), self._batches.weights_from(normals, args))

    def _uniform(self, params: Params, args: Args) -> jax.Array:
        like: Any = self._batches.normals_like(params, args)
        return jnp.full(like.shape, 1 / like.shape[0], like.dtype)

    def _velocity(self, weights: jax.Array, params: Params, args: Args, order: int) -> Params:
        loss = WeightedLoss(self.losses, weights)
        if order == 1:
            return descent_field(loss, args)(params)
        return penalized_descent(loss, self.learning_rate / 2, params, args)

    def _along(self, params: Params, args: Args, weights: jax.Array) -> tuple[Params, Params]:
        """Return the drift of order 2, and its derivative by the weights of the examples."""
        return jax.jvp(
            lambda w: self._velocity(w, params, args, 2), (self._uniform(params, args),), (weights,)
        )


def check_weak_order(name: str, value: Any) -> int:
    """Return 1 or 2."""
    order = _check.integer(name, value, 1)
    if order > 2:
        raise ValueError(
            f"{name}: expected 1 or 2, got {order!r}: no stochastic differential equation has weak order 3. The next term of SGD's "
            "generator is the third cumulant of the batch gradients, -(eta^2/6) kappa_3 : grad^3, and Brownian noise has none"
        )
    return order
