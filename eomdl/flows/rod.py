"""The rod flow of any optimizer: two consecutive iterates as the ends of a rod."""

from typing import TYPE_CHECKING, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from eomdl import _check, _tree
from eomdl._target import MIDPOINTS, Target
from eomdl._types import Args, Params, State
from eomdl.flows.base import AbstractFlow
from eomdl.flows.linearized import arnoldi
from eomdl.maps.step_map import StepFunction, StepMap, as_step_map, check_step


_DEPTH = 48  # of the Krylov space in which the directions of the rods are looked for at the start
_REAL = 1e-3  # an eigenvalue whose imaginary part is a smaller share of it is real


class RodState(NamedTuple):
    """Where a rod flow is.

    - `centre`: c, a state of the step map.
    - `frame`: V, a stack of k directions, zero where nothing alternates.
    - `shape`: shape (k, k), of trace 1, or 0 where nothing oscillates; `log_length`: log l. The rods have the covariance
        V S V' with S = l^2 times `shape`, since l grows from rounding to the size of the oscillation.
    """

    centre: State
    frame: State
    shape: jax.Array
    log_length: jax.Array

    @property
    def extent(self) -> jax.Array:
        """S, shape (k, k)."""
        return jnp.exp(2 * self.log_length) * self.shape


class RodFlow(AbstractFlow):
    r"""The rod flow: the iterates $x_k, x_{k+1}$ are the ends $c \mp d$ of a rod, $\Sigma = d d^\top$ its extent.

    Of a step map $x_{k+1} = x_k + f(x_k)$ (gradient descent: $f = -\eta g$), on the clock of steps,

    $$\dot c = \bar f - \tfrac12 f'(c) \bar f, \qquad
    \dot\Sigma = \tfrac12 \langle \delta f\, \delta f^\top \rangle - 2 \Sigma, \qquad
    \bar f = \tfrac12 (f_+ + f_-), \quad \delta f = \tfrac12 (f_+ - f_-), \quad f_\pm = f(c \pm d).$$

    ```python
    step = eomdl.optimizer_step(loss, optax.sgd(0.05, momentum=0.9))
    flow = eomdl.flows.RodFlow(step, step_size=0.5)
    path = eomdl.solve(flow, params, 1000, args=data, resume=run)
    ```

    **The low-rank form** (derived here). Where $\Sigma$ is small, f is linear and so is the equation: $\Sigma$ is the sum of a part
    driven by the drift $\bar f$ and one that starts from the oscillation. The drift is far longer than the oscillation before its
    onset, so one vector for all of $\Sigma$, its top eigenvector, follows the drift and misses the onset. Here only the oscillation is
    followed, in the space V of the k eigenvectors of $-f'$ with the largest eigenvalues, and the drift's own share of $\Sigma$,
    $\frac14 \bar f \bar f^\top$, which is of third order, is left out. With $D = -f' V$, $V^+ = (V^\top V)^{-1} V^\top$ and $B = V^+ D$
    the space turns into the leading one, and $\Sigma = V S V^\top$ is closed:

    $$\dot V = D - V B, \qquad \dot S = \tfrac12 B S B^\top - 2 S .$$

    The rods are V times the square root of S. $f' V$ is the difference of f at the two ends of each, so that it is the mean over
    the rod, as in the source; $\bar f$ is f(c) and what each rod adds to it.

    **What it predicts:** the midpoints $(\theta_k + \theta_{k+1}) / 2$, which is c (`eomdl.compare` measures it against those).

    **Where to begin:** at a step of a real run whose fastest mode alternates, multiplier $1 - b < 0$, with b best above 1.8: `resume=`
    that run. The directions are eigenvectors of $-f'$ there, with $b > 1$; others are left out for the whole run. Without any the flow
    is $\dot c = f - \frac12 f' f$, the modified equation with one correction. With momentum $\beta$ the fastest mode is a complex pair
    up to $\eta\lambda = (1 + \sqrt\beta)^2$, shortly before its edge at $2 + 2\beta$: a pair takes two rods.

    **Which solver:** Euler with steps of 1/4: along a rod the equation of c has the rate $b + b^2/2$, 4 a step at the edge of
    stability, where steps of 1 are out of the stability of every explicit method here. The guide "Past the edge of stability" has the
    numbers.

    **Arguments:** `step_map`, `step_size`: as in `eomdl.InterpolatingFlow` (heavy ball and others have rods in the space of parameters and
    momenta); `rods`: k, at most the size of the state.

    **State:** `RodState`. **Cost** of one evaluation: 1 + 2k steps of the map and a Jacobian-vector product, about 2.7 + 2k gradients;
    no third derivatives. At the start 48 Jacobian-vector products. **Memory:** about 5 + 3k copies of the state.

    **Limits:** where no direction alternates at the start, none comes later. One rod turns to the direction that grows fastest.
    $\Sigma$ of several forgets that they belong to one vector d, so a second rod is not always better (the guide has an example).
    With momentum the model is confirmed by its threshold and growth on quadratics; on a network it was nearer to the real run than a flow
    without rods, and then left it. Adam is not confirmed.

    **Raises:** `ValueError` for a wrong argument.

    Source: Regis & Chewi 2026 (arXiv 2602.01480) for gradient descent, whose equation of c has the mean of f' over the rod in place of
    f'(c); Regis & Chewi 2026 (arXiv 2605.06821) for momentum in phase space.
    """

    references: ClassVar[tuple[str, ...]] = ("regis2026", "regis2026adam")

    step_map: StepMap = eqx.field(converter=as_step_map)
    step_size: jax.Array = eqx.field(converter=lambda x: _check.positive_scalar("step_size", x))
    rods: int = eqx.field(default=1, static=True, converter=lambda n: _check.integer("rods", n, 1))

    if TYPE_CHECKING:  # a checker knows no converters, and takes an AbstractVar for an argument

        def __init__(self, step_map: StepMap | StepFunction, step_size: ArrayLike, rods: int = 1) -> None: ...

    @property
    def gradients(self) -> float:
        """At the centre with a product, and at both ends of each rod."""
        return 2.7 + 2 * self.rods

    @property
    def target(self) -> Target:
        """Midpoints."""
        return MIDPOINTS

    def params(self, state: RodState) -> Params:
        """Those of the centre."""
        return self.step_map.params(state.centre)

    def init(self, params: Params, args: Args) -> RodState:
        """The rods of a new run at `params`."""
        return self._started(self.step_map.init(params), args)

    def begin(self, params: Params, state: State, args: Args) -> RodState:
        """The rods where a real run ended in `state`, with `params` in it."""
        return self._started(self.step_map.restore(state, params), args)

    def __call__(self, t: ArrayLike, state: RodState, args: Args) -> RodState:
        """The velocities of centre, frame and extent."""
        k = jnp.asarray(t / self.step_size) + 0.5
        mean, product, turn, inside = self._parts(k, state, args)
        centre = _tree.sub(mean, _tree.scale(0.5, product(mean)))
        change = 0.5 * inside @ state.shape @ inside.T - 2 * state.shape
        growth = 0.5 * jnp.trace(change)
        velocity = RodState(centre, turn, change - 2 * growth * state.shape, growth)
        return _tree.scale(1 / self.step_size, velocity)

    def step(self, t: ArrayLike, state: RodState, args: Args) -> RodState:
        """One step of the map from both ends of each rod, and of the drift."""
        k = jnp.asarray(t / self.step_size) + 0.5
        mean, _, turn, inside = self._parts(k, state, args)
        here = self.step_map.increment(state.centre, args, k)
        ends = [_tree.add(state.centre, _tree.scale(s, here)) for s in (0.5, -0.5)]
        drift = _tree.add(*(self.step_map.increment(x, args, k) for x in ends))
        mean = _tree.add(mean, _tree.sub(_tree.scale(0.5, drift), here))
        moved = _tree.add(state.centre, mean), _tree.add(state.frame, turn)
        grown = 0.5 * inside @ state.shape @ inside.T - state.shape
        return _of_extent(*moved, grown, state.log_length)

    def validate(self, params: Params, args: Args) -> None:
        """Raise `ValueError` if the map changes what its state is made of, or has a smaller state than there are rods."""
        check_step(self.step_map, params, args)
        size = _tree.size(self.step_map.init(params))
        if self.rods > size:
            raise ValueError(f"rods: expected at most the {size} numbers of the state, got {self.rods}")

    def _parts(self, k: jax.Array, state: RodState, args: Args) -> tuple:
        r"""$\bar f$, the product with f'(c), $D - V B$, and B."""

        def increment(x: State) -> State:
            return self.step_map.increment(x, args, k)

        here, product = jax.linearize(increment, state.centre)
        # The rods themselves: the extent along its own axes.
        squares, axes = jnp.linalg.eigh(state.extent)
        lengths = jnp.sqrt(jnp.maximum(squares, 0))
        # A shorter difference would be rounding; what it adds to the mean is taken out again.
        reach = jnp.maximum(lengths, jnp.finfo(lengths.dtype).eps ** (1 / 3))

        def of_rod(vector: State, reach: jax.Array, length: jax.Array) -> tuple[State, State]:
            ends = (increment(_tree.add(state.centre, _tree.scale(s * reach, vector))) for s in (1, -1))
            plus, minus = ends
            bend = _tree.sub(_tree.scale(0.5, _tree.add(plus, minus)), here)
            added = _tree.scale((length / reach) ** 2, bend)
            return added, _tree.scale(0.5 / reach, _tree.sub(minus, plus))

        along = _tree.combine(axes.T, state.frame)
        added, images = jax.lax.map(lambda one: of_rod(*one), (along, reach, lengths))
        mean = jax.tree.map(lambda x, y: x + jnp.sum(y, axis=0), here, added)
        # D, without the rounding of what a direction that is 0 has for an image.
        moving = jnp.where(jnp.diag(_tree.gram(state.frame, state.frame)) > 0, 1.0, 0.0)
        image = _tree.combine(moving[:, None] * axes, images)
        inside = _inverse(state.frame) @ _tree.gram(state.frame, image)
        turn = _tree.sub(image, _tree.combine(inside.T, state.frame))
        return mean, product, turn, inside

    @eqx.filter_jit
    def _started(self, state: State, args: Args) -> RodState:
        """The rods of the real run that goes on from a state."""
        dtype = _tree.dtype(state)
        zero = jnp.zeros((), jnp.result_type(float))
        frame = self._directions(state, zero, args)
        first = self.step_map.increment(state, args, zero)
        second = self.step_map.increment(_tree.add(state, first), args, zero + 1)
        centre = _tree.add(state, _tree.scale(0.5, first))
        # Of a mode multiplied by 1 - b the second difference is b^2 times what is left of it; the half step is b/2 times it.
        nothing = jnp.zeros((self.rods, self.rods), dtype)
        inside = self._parts(zero, RodState(state, frame, nothing, jnp.zeros((), dtype)), args)[-1]
        bend = _tree.gram(frame, jax.tree.map(lambda x: x[None], _tree.sub(second, first)))[:, 0]
        empty = jnp.diag(jnp.diag(inside) == 0)
        half = 0.5 * jnp.linalg.solve(inside + empty, _inverse(frame) @ bend)
        return _of_extent(centre, frame, jnp.outer(half, half).astype(dtype), jnp.zeros((), dtype))

    def _directions(self, state: State, k: jax.Array, args: Args) -> State:
        """The eigenvectors of -f' whose eigenvalues have the largest real parts, of length 1; 0 for parts up to 1."""
        depth = min(max(_DEPTH, 2 * self.rods), _tree.size(state))
        found = arnoldi(self.step_map, state, k, args, 1, depth)
        basis, matrix = (jax.tree.map(jnp.nan_to_num, x) for x in (found.Q_tall, found.J_small))
        values, vectors = jnp.linalg.eig(-matrix)
        top = jnp.argsort(-values.real)[: self.rods]
        values, vectors = values[top], vectors[:, top]
        # A complex pair, the one with the positive imaginary part first, is the plane of real and imaginary part.
        turning = jnp.abs(values.imag) > _REAL * jnp.abs(values)
        alone = turning[-1] & (values.imag[-1] > 0)
        vectors = jnp.where(turning & (values.imag < 0), vectors.imag, vectors.real)
        missing = (values.real <= 1) | (alone & (jnp.arange(self.rods) == self.rods - 1))
        frame = _tree.combine(vectors.T, basis)
        lengths = jnp.sqrt(jnp.diag(_tree.gram(frame, frame)))
        scale = jnp.where(missing, 0, 1 / jnp.where(lengths > 0, lengths, 1))
        return _tree.combine(jnp.diag(scale), frame)


def _of_extent(centre: State, frame: State, extent: jax.Array, log_length: jax.Array) -> RodState:
    """With the trace of the extent taken into the length."""
    trace = jnp.trace(extent)
    safe = jnp.where(trace > 0, trace, 1)
    shape = jnp.where(trace > 0, extent / safe, 0)
    return RodState(centre, frame, shape, log_length + 0.5 * jnp.log(safe))


def _inverse(frame: State) -> jax.Array:
    """$(V^T V)^{-1}$, for directions that are 0 as if they had length 1."""
    gram = _tree.gram(frame, frame)
    return jnp.linalg.inv(gram + jnp.diag(jnp.where(jnp.diag(gram) > 0, 0, 1).astype(gram.dtype)))
