"""The flow of any step map: the interpolating vector field."""

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float
from typing_extensions import override

from eomdl import _check, _tree, _warn
from eomdl._end import Diagnostic
from eomdl._types import Args, Numbers, Params, State
from eomdl.flows.base import AbstractFlow
from eomdl.flows.stride import step_data
from eomdl.maps.step_map import StepFunction, StepMap, as_step_map, check_step
from eomdl.series.weights import (
    MAX_POINTS,
    centred_weights,
    difference_weights,
    step_back_weights,
    taylor_weights,
)


RELAXATION = 0.7  # contracts for multipliers up to 2.85: gradient descent of stride 2 up to eta*lambda = 2.69


class InterpolatingFlow(AbstractFlow):
    r"""The logarithm of a step map, from its own iterates.

    $$F_K(t, x) = \frac{1}{m h} \sum_{j=1}^{K} \frac{(-1)^{j+1}}{j} \Delta^j x
    = \frac{1}{m h} \sum_{i<K} b_i d_i,$$

    with $\Delta^j$ the forward differences of the iterates $x, \Psi(x), \Psi^2(x), \dots$ of the map
    $\Psi$ of m optimizer steps, and $d_i$ their increments.

    ```python
    step_map = eomdl.optimizer_step(loss, optax.sgd(0.1, momentum=0.9))
    flow = eomdl.InterpolatingFlow(step_map, step_size=0.1, points=4)
    path = eomdl.solve(flow, params, 100, args=data)
    ```

    No derivatives are taken, so it is the equation of motion of any optimizer. Flow and map differ by
    $O(h^{K+1})$ in one step where the map is near the identity. The series needs multipliers
    (eigenvalues of $D\Psi$) within 1 of 1: for gradient descent $\eta \lambda_{max} < 1$ with m = 1, and
    $\eta \lambda_{max} < 1 + \sqrt 2$ with m = 2, past the edge of stability at 2.

    With `backward` = n the iterate before, $y = \Psi^{-1}(x)$, is used too, so that the series is that of a window
    around x. It is found by n relaxations,

    $$y \leftarrow y + 0.7\,(x - \Psi(y)), \qquad y_0 = \sum_{j \le K} (-1)^j \Delta^j x,
    \qquad F = \frac{1}{m h} \Big(\sum_{1 \le j \le K+1} a_j \Delta^j y\Big), \quad
    a_1 = 1,\ a_j = \frac{(-1)^j}{j (j-1)},$$

    the series of $(1 + \Delta) \log(1 + \Delta)$. With n = 0 it would be $F_K$; each relaxation multiplies the first term
    that $F_K$ leaves out by 0.3, so the formal order stays K. The points stay near x, which matters where the map
    changes within a few steps: through the edge of stability 3 points and 3 relaxations of stride 2 end 3 to 20 times
    nearer than 4 points. Relaxations converge for multipliers between 0 and 2.85: $\eta \lambda_{max} < 2.69$ with m = 2.

    **Arguments:**

    - `step_map`: an `eomdl.StepMap`, such as `eomdl.optimizer_step(loss, optimizer)`, or a function
        `(state, args, k) -> state` whose state is the parameters.
    - `step_size`: h, time per optimizer step; a leaf of the pytree. It only sets the clock.
    - `points`: K, the number of iterates, which is the formal order. More is not always better:
        `eomdl.choice.choose_points` finds the best number for a path.
    - `stride`: m. The flow passes through every m-th iterate; `solve` gets those between by steps
        of the map from there.
    - `weights`: $b_0, \dots, b_{K-1}$, e.g. `eomdl.flows.minimax_weights(...)`; by default
        Taylor's, of the equation above. With `backward` they are K + 1, those of
        $d_{-1} = x - y$ first.
    - `backward`: n, the number of relaxations by which the iterate before is found; 0 leaves it out.

    **State:** that of the step map: parameters and optimizer state. Schedules and bias corrections
    see the time in steps, t / h.

    **Cost** of one evaluation: (K + n) m steps of the map, so as many gradients. **Memory:** three copies of the
    state for every K and m, one more with `backward`.

    **Raises:** `ValueError` for a wrong argument, and in `solve` for a map that changes the
    structure, shapes or dtypes of its state. **Warns** in `solve` where the map is not near
    the identity at the start: $|\Delta^2 x| \ge |\Delta x|$.

    Source: Gelfreich & Vieiro 2018 (Nonlinearity 31).
    """

    references: ClassVar[tuple[str, ...]] = ("gelfreich2018",)

    step_map: StepMap = eqx.field(converter=as_step_map)
    step_size: jax.Array = eqx.field(converter=lambda x: _check.positive_scalar("step_size", x))
    points: int = eqx.field(static=True, converter=lambda n: _check.integer("points", n, 1, MAX_POINTS))
    stride: int = eqx.field(default=1, static=True, converter=lambda n: _check.integer("stride", n, 1))
    weights: Float[jax.Array, " count"] | None = eqx.field(
        default=None,
        converter=lambda b: (
            None if b is None else jnp.asarray(_check.numbers("weights", b, "finite numbers", ndim=1))
        ),
    )
    backward: int = eqx.field(default=0, static=True, converter=lambda n: _check.integer("backward", n, 0))

    if TYPE_CHECKING:  # a checker knows no converters, and takes an AbstractVar for an argument

        def __init__(
            self,
            step_map: StepMap | StepFunction,
            step_size: ArrayLike,
            points: int,
            stride: int = 1,
            weights: Numbers | None = None,
            backward: int = 0,
        ) -> None: ...

    def __check_init__(self) -> None:
        count = self.points + (self.backward > 0)
        if self.weights is not None and np.shape(self.weights) != (count,):
            raise ValueError(
                f"weights: expected shape ({count},), one for each point, got {np.shape(self.weights)}"
            )

    @property
    @override
    def map(self) -> StepMap:
        return self.step_map

    @property
    @override
    def warmup(self) -> int:
        # After n steps averages change like 1/(n + 1): there the series of K points falls like (K m / (n + 1))^j.
        return 2 * self.points * self.stride

    @property
    @override
    def gradient_cost(self) -> float:
        return float((self.points + self.backward) * self.stride)

    @property
    @override
    def next_order(self) -> "InterpolatingFlow | None":
        if self.weights is not None or self.points == MAX_POINTS:
            return None
        return dataclasses.replace(self, points=self.points + 1)

    @override
    def __call__(self, t: ArrayLike, state: State, args: Args) -> State:
        unit = 1 / (self.stride * self.step_size)
        if self.backward == 0:
            weights = taylor_weights(self.points) if self.weights is None else self.weights
            (total,) = self._combine(t, state, args, weights)
            return _tree.scale(unit, total)
        weights = jnp.asarray(centred_weights(self.points) if self.weights is None else self.weights)
        total, guess = self._combine(t, state, args, weights[1:], step_back_weights(self.points))
        before = self._step_before(t, state, args, guess)
        return _tree.scale(unit, _tree.add(total, _tree.scale(weights[0], before)))

    @override
    def validate(self, params: Params, args: Args) -> None:
        check_step(self.step_map, params, step_data(args, 0))
        if _tree.is_traced(self, params, args):
            return
        ratio = float(_start_ratio(self, params, args))
        if ratio >= 1:
            is_cold = bool(self.step_map.starts_cold(params, step_data(args, 0)))
            _warn.warn(
                f"step_map: expected a map near the identity, got second differences {ratio:.2f} times the "
                f"first at the start (stride {self.stride}), where the series of the logarithm does not "
                f"converge. {self._remedies(is_cold)}; an update by signs has no flow."
            )

    @override
    def diagnostics(self, t: ArrayLike, state: State, args: Args) -> dict[str, Diagnostic]:
        return {
            "the last difference over the first": Diagnostic(
                self.last_difference(t, state, args),
                limit=1.0,
                meaning="From 1 on the series of the logarithm has stopped converging, and more points make it worse: see "
                f"eomdl.choice.choose_points. {self._remedies()}.",
            )
        }

    def _remedies(self, is_cold: bool = False) -> str:
        """Return what may help where the series does not converge; real steps first, where an empty memory scales the steps."""
        ways = ["lower the learning rate"]
        ways += ["try stride=2, which follows what alternates"] * (self.stride == 1)
        ways += ["start after a few real steps (warmup=10)"] * is_cold
        return ", or ".join(ways).replace("lower", "Lower", 1)

    def last_difference(self, t: ArrayLike, state: State, args: Args) -> jax.Array:
        r"""Return $|\Delta^K \theta| / |\Delta \theta|$ (K at least 2), the last difference over the first.

        About $(m \eta \lambda)^{K-1}$ for the fastest mode that is still moving. Near 1 and above the series
        no longer converges. Record it by `solve(..., observe_state={"last difference": flow.last_difference})`.

        **Cost:** that of the field.
        """
        return self._difference_ratio(t, state, args, max(self.points, 2))

    def _difference_ratio(self, t: ArrayLike, state: State, args: Args, order: int) -> jax.Array:
        first = np.eye(1, order)[0]
        low, high = self._combine(t, state, args, first, difference_weights(order))
        low, high = (_tree.norm(self.step_map.params(d)) for d in (low, high))
        return jnp.where(low > 0, high / jnp.where(low > 0, low, 1), 0)

    def _step_before(self, t: ArrayLike, state: State, args: Args, guess: State) -> State:
        r"""Return $d_{-1} = x - y$ with $\Psi(y) = x$, by relaxations that begin at the guess.

        The step from y begins m steps ago; with batches it sees those of this stride, like every step of the field.
        """
        start = t - self.stride * self.step_size

        def relax(d: State, _: None) -> tuple[State, None]:
            (taken,) = self._combine(start, _tree.sub(state, d), args, np.ones(1))
            return _tree.add(d, _tree.scale(RELAXATION, _tree.sub(taken, d))), None

        return jax.lax.scan(relax, guess, length=self.backward)[0]

    def _combine(self, t: ArrayLike, state: State, args: Args, *weights: Any) -> list[State]:
        r"""Return $\sum_i b_i d_i$ for every set of weights, with $d_i$ the increments of the strided map.

        One loop, so that the program and its memory do not grow with the points.
        """
        start = jnp.asarray(t / self.step_size)

        def one(carry: tuple, at: tuple) -> tuple:
            x, totals = carry
            n, b = at
            d = self.step_map.increment(x, step_data(args, n), start + n)
            totals = [_tree.add(total, _tree.scale(w, d)) for total, w in zip(totals, b, strict=True)]
            return (_tree.add(x, d), totals), None

        b = jnp.repeat(jnp.stack([jnp.asarray(w) for w in weights], axis=1), self.stride, axis=0)
        zeros = [_tree.zeros_like(state)] * len(weights)
        (_, totals), _ = jax.lax.scan(one, (state, zeros), (jnp.arange(len(b)), b))
        return totals


@eqx.filter_jit
def _start_ratio(flow: InterpolatingFlow, params: Params, args: Args) -> jax.Array:
    state = flow.init(params, args)
    return flow._difference_ratio(jnp.zeros(()), state, args, 2)
