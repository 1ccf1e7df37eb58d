"""The stochastic flow of any step map."""

from typing import TYPE_CHECKING, Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from typing_extensions import override

from eomdl import _check, _tree
from eomdl._autodiff import jvp
from eomdl._types import Args, Params, State
from eomdl.flows.base import AbstractFlow
from eomdl.flows.stochastic_modified import check_weak_order
from eomdl.maps.step_map import StepFunction, StepMap, as_step_map, check_step
from eomdl.noise.base import NoiseOperator


class StochasticInterpolatingFlow(AbstractFlow):
    r"""The law of any optimizer on its whole state, from its own steps on M equally likely batches.

    With $D_b = (\Psi_b(x) - x)/\eta$ for the step $\Psi_b$ on batch b, and their mean D,

    $$dX = \Big( D - \frac{\eta}{2} \dot D \Big) dt + \sqrt{\frac{\eta}{M}} \sum_b (D_b - D)\,dW_b, \qquad
    \dot D = D'(x) D + \partial_t D,$$

    in the sense of Ito, on parameters and averages x. Expectations at a fixed time differ from those of the optimizer by $O(\eta^2)$
    where its state changes by $O(\eta)$ in a step: for momenta and averages, where $1 - \beta$ falls as $\eta$ does. With M
    Brownian motions the noise of the averages is correlated with that of the parameters as in the optimizer itself, and no form of it
    needs to be known.

    ```python
    step_map = eomdl.optimizer_step(loss, optax.adam(0.01, b1=0.95, b2=0.98))
    flow = eomdl.flows.StochasticInterpolatingFlow(step_map, step_size=0.01)
    drift = flow.ito_drift(t, flow.init(params, batches), batches)
    ```

    **Arguments:**

    - `step_map`: an `eomdl.StepMap`, such as `eomdl.optimizer_step(loss, optimizer)`, or a function `(state, args, k) -> state`.
    - `step_size`: $\eta$, the time of a step, a leaf of the pytree.
    - `points`: 1 leaves out $\dot D$, which is of order 1; 2 keeps it.
    - `noise_order`: 2 adds the counter term of the noise, $D_b \to D_b - \frac{\eta}{2} (D_b' D + D' D_b + \partial_t D_b)$ on the
        deviations, which the covariance needs to be of order 2.

    `args` are the M batches, stacked: arrays with leading axis M. The law is that where one of them is drawn
    afresh in each step.

    **State:** that of the step map. Schedules and bias corrections see the time in steps, $t/\eta$.

    `eomdl.solve` does not take it yet: it has the drift and the noise (guide Noise).

    **Cost** of the drift: M steps of the map, with their derivative along the mean step for 2 points; one batch after the other, in the
    memory of one.

    **Raises:** `ValueError` for a wrong argument, and in `validate` for a map that changes the structure of its state.

    Source: derived here; for SGD it is the equation of Li, Tai & E 2019 (arXiv 1811.01558).
    """

    references: ClassVar[tuple[str, ...]] = ("li2019",)

    step_map: StepMap = eqx.field(converter=as_step_map)
    step_size: jax.Array = eqx.field(converter=lambda x: _check.positive_scalar("step_size", x))
    points: int = eqx.field(default=2, static=True, converter=lambda n: check_weak_order("points", n))
    noise_order: int = eqx.field(
        default=1, static=True, converter=lambda n: check_weak_order("noise_order", n)
    )

    if TYPE_CHECKING:  # a checker knows no converters, and takes an AbstractVar for an argument

        def __init__(
            self,
            step_map: StepMap | StepFunction,
            step_size: ArrayLike,
            points: int = 2,
            noise_order: int = 1,
        ) -> None: ...

    @override
    def init(self, params: Params, args: Args) -> State:
        del args
        return self.step_map.init(params)

    @override
    def begin(self, t: ArrayLike, params: Params, state: State, args: Args) -> State:
        del t, args
        return self.step_map.restore(state, params)

    @override
    def params(self, state: State) -> Params:
        return self.step_map.params(state)

    @override
    def __call__(self, t: ArrayLike, state: State, args: Args) -> State:
        return self._velocity(self._uniform(state, args), t, state, args, self.points)

    @override
    def noise(self, t: ArrayLike, state: State, args: Args) -> NoiseOperator:
        """Return the noise: the derivative of the drift by the weights of the batches."""
        uniform = self._uniform(state, args)

        def noise_of(normals: jax.Array) -> State:
            count = len(normals)
            weights = _tree.scale(jnp.sqrt(self.step_size / count), normals - jnp.mean(normals))
            if self.noise_order == 1:  # linear in the weights
                return self._velocity(weights, t, state, args, 1)
            return jax.jvp(lambda u: self._velocity(u, t, state, args, 2), (uniform,), (weights,))[1]

        return NoiseOperator(noise_of, uniform)

    @override
    def validate(self, params: Params, args: Args) -> None:
        self._count(args)
        check_step(self.step_map, params, jax.tree.map(lambda leaf: leaf[0], args))

    def _count(self, args: Args) -> int:
        count = _check.num_examples("args", args)
        if count == 1:
            raise ValueError("args: expected at least 2 batches, stacked, got 1, which has no noise")
        return count

    def _uniform(self, state: State, args: Args) -> jax.Array:
        count = self._count(args)
        return jnp.full(count, 1 / count, _tree.dtype(state))

    def _velocity(self, weights: jax.Array, t: ArrayLike, state: State, args: Args, points: int) -> State:
        r"""Return $D_u = \sum_b u_b D_b$ for weights u, and with 2 points $D_u - \frac{\eta}{2} \dot D_u$."""

        def total(at: tuple[jax.Array, State]) -> State:
            time, x = at

            def add_batch(so_far: State, one: tuple[jax.Array, Args]) -> tuple[State, None]:
                weight, batch = one
                step = self.step_map.increment(x, batch, time / self.step_size)
                return _tree.add(so_far, _tree.scale(weight / self.step_size, step)), None

            return jax.lax.scan(add_batch, _tree.zeros_like(x), (weights, args))[0]

        here: Any = (jnp.asarray(t, jnp.result_type(float)), state)
        velocity = total(here)
        if points == 1:
            return velocity
        along = jvp(total, here, (jnp.ones_like(here[0]), velocity))[1]
        return _tree.sub(velocity, _tree.scale(self.step_size / 2, along))
