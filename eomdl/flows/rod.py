"""The rod flow of any optimizer: two consecutive iterates as the ends of a rod."""

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from typing_extensions import override

from eomdl import _check, _costs, _tree
from eomdl._autodiff import jvp
from eomdl._end import Diagnostic
from eomdl._target import MIDPOINTS, Target
from eomdl._types import Args, Params, State
from eomdl.flows.base import AbstractFlow, AbstractStateStep, Differentiated, Increments, SolverOptions
from eomdl.flows.linearized import krylov_of_step
from eomdl.flows.symmetric_difference import MIN_COSINE, is_alternating, symmetric_difference
from eomdl.maps.step_map import StepFunction, StepMap, as_step_map, check_step


# Dimensions of the Krylov space in which the modes are computed.
_DEPTH_AT_START = 48
_DEPTH_FOR_DIAGNOSTICS = 16


class RodState(NamedTuple):
    """The state of a rod flow.

    - `centre`: c, a state of the step map; `direction`: u of length 1, or 0 where nothing oscillates.
    - `log_length`: log l of the rod d = l u, since l grows from rounding to the size of the oscillation.
    """

    centre: State
    direction: State
    log_length: jax.Array


class RodFlow(AbstractFlow):
    r"""The rod flow: two iterates $x_k, x_{k+1}$ are the ends $c \pm d$ of a rod.

    Of a step map $x_{k+1} = x_k + f(x_k)$ (gradient descent: $f = -\eta g$), on the clock of steps, with the rod $d = l u$,

    $$\dot c = \bar f - \tfrac12 f'(c) \bar f, \qquad \dot u = F u - b u, \qquad \dot l = \big( \tfrac14 b^2 - 1 \big) l, \qquad
    \bar f = \tfrac12 (f_+ + f_-), \quad F u = \frac{f_- - f_+}{2 l}, \quad b = u^\top F u, \quad f_\pm = f(c \pm d).$$

    ```python
    step = eomdl.optimizer_step(loss, optax.sgd(0.05, momentum=0.9))
    flow = eomdl.flows.RodFlow(step, step_size=0.5)
    path = eomdl.solve(flow, params, 1000, args=data, resume=run)
    ```

    **One vector** (derived here). The source has a covariance $\Sigma$ in place of $d d^\top$, with
    $\dot\Sigma = \frac12 \langle \delta f\, \delta f^\top \rangle - 2 \Sigma$, $\delta f = \frac12 (f_+ - f_-)$. Before the onset the drift
    $\bar f$ is far longer than the oscillation, so $\Sigma$'s top eigenvector follows the drift, and misses the onset. Here only the
    oscillation is followed, and the part of the drift itself, $\frac14 \bar f \bar f^\top$, of third order, is left out. All modes that
    alternate are parts of one vector d, and u turns between them as d does: a mode with $b_i$ gains on one with $b_j$ at the rate
    $b_i - b_j$, and the plane of a complex pair turns by the imaginary part. So several modes take no more rods.

    **What it predicts:** the midpoints $(\theta_k + \theta_{k+1}) / 2$, which is c (`eomdl.compare` compares it with those).

    **Where to begin:** at a step of a real run whose fastest mode alternates, multiplier $1 - b < 0$, with b best above 1.8: `resume=`
    that run. The rod is half of the step in the mode of $-f'$ with the largest b, and in those with nearly as large a b. Where none is
    above 1 the rod is 0 for the whole run, and the flow is $\dot c = f - \frac12 f' f$, the modified equation with one correction. With
    momentum $\beta$ the fastest mode is a complex pair up to $\eta\lambda = (1 + \sqrt\beta)^2$, shortly before its edge at $2 + 2\beta$.

    **Which solver:** by default Euler with constant steps of 1/3: along the rod the equation of c has the rate $b + b^2/2$, 4 per
    step at the edge of stability, where steps of 1 are out of the stability of every explicit method here. The guide "Past the edge
    of stability" has the numbers.

    **Arguments:** `step_map`, `step_size`: as in `eomdl.InterpolatingFlow` (heavy ball, Adam and others have a rod in the space of
    parameters and momenta).

    **State:** `RodState`. **Cost** of one evaluation: 2 steps of the map and a Jacobian-vector product, about 4.7 gradients; no third
    derivatives. At the start 48 Jacobian-vector products. **Memory:** about 8 copies of the state.

    **Limits:** a mode of which the rod has no part at the start is not followed later; the diagnostics say so where it grows. With
    Adam the second moment must stay positive at both ends of the rod.

    **Raises:** `ValueError` for a wrong argument.

    Source: Regis & Chewi 2026 (arXiv 2602.01480) for gradient descent, whose equation of c has the mean of f' over the rod in place of
    f'(c); Regis & Chewi 2026 (arXiv 2605.06821) for momentum in phase space.
    """

    references: ClassVar[tuple[str, ...]] = ("regis2026", "regis2026adam")

    step_map: StepMap = eqx.field(converter=as_step_map)
    step_size: jax.Array = eqx.field(converter=lambda x: _check.positive_scalar("step_size", x))

    if TYPE_CHECKING:  # a checker knows no converters, and takes an AbstractVar for an argument

        def __init__(self, step_map: StepMap | StepFunction, step_size: ArrayLike) -> None: ...

    @property
    @override
    def map(self) -> "_RodStep":
        return _RodStep(self)

    @property
    @override
    def gradient_cost(self) -> float:
        return 2 + _costs.STEP_DERIVATIVE

    @property
    @override
    def recommended_solver(self) -> SolverOptions:
        return SolverOptions(diffrax.Euler(), diffrax.ConstantStepSize(), 1 / 3)

    @property
    @override
    def target(self) -> Target:
        return MIDPOINTS

    @override
    def init(self, params: Params, args: Args) -> RodState:
        return self._start(jnp.zeros(()), self.step_map.init(params), args)

    @override
    def begin(self, t: ArrayLike, params: Params, state: State, args: Args) -> RodState:
        return self._start(jnp.asarray(t / self.step_size), self.step_map.restore(state, params), args)

    @override
    def __call__(self, t: ArrayLike, state: RodState, args: Args) -> RodState:
        # In a step c moves by the mean of f at k and k + 1: its velocity at k is f at k, less half of f' times f.
        k = jnp.asarray(t / self.step_size)
        mean, turn, b = self._parts(k, state, args)
        bent = jvp(self._increment(k, args), state.centre, mean)[1]
        growth = jnp.where(b == 0, 0, 0.25 * b**2 - 1).astype(state.log_length.dtype)
        velocity = RodState(_tree.sub(mean, _tree.scale(0.5, bent)), turn, growth)
        return _tree.scale(1 / self.step_size, velocity)

    @override
    def validate(self, params: Params, args: Args) -> None:
        check_step(self.step_map, params, args)

    @override
    def differentiated(self, state: RodState) -> Differentiated:
        return Differentiated(Increments(self.step_map), state.centre)

    @override
    def diagnostics(self, t: ArrayLike, state: RodState, args: Args) -> dict[str, Diagnostic]:
        k = jnp.asarray(t / self.step_size)
        values, vectors, basis = self._modes(k, state.centre, args, _DEPTH_FOR_DIAGNOSTICS)
        along = jax.vmap(_tree.vdot, (0, None))(basis, _tree.unit(state.direction))
        left = jnp.where(jnp.abs(vectors.conj().T @ along) > MIN_COSINE, 0, values.real)
        return {
            "b of a mode beside the rod": Diagnostic(
                jnp.max(left, initial=0),
                limit=2.0,
                meaning="A mode of which the rod has no part alternates and grows (its multiplier is 1 - b): begin at a step "
                "of the real run where it alternates already (`resume=`).",
            )
        }

    def _increment(self, k: jax.Array, args: Args) -> Callable[[State], State]:
        return lambda x: self.step_map.increment(x, args, k)

    def _parts(self, k: jax.Array, state: RodState, args: Args) -> tuple[State, State, jax.Array]:
        r"""Return $\bar f$, $F u - b u$, and b."""
        increment = self._increment(k, args)
        mean, quotient, b = symmetric_difference(increment, state.centre, state.direction, state.log_length)
        turn = _tree.sub(quotient, _tree.scale(b, _tree.unit(state.direction)))
        return mean, _tree.scale(_tree.norm(state.direction), turn), b

    @eqx.filter_jit
    def _start(self, k: jax.Array, state: State, args: Args) -> RodState:
        """Return the rod of the real run that continues from a state at step k."""
        first = self.step_map.increment(state, args, k)
        second = self.step_map.increment(_tree.add(state, first), args, k + 1)
        # Of a mode multiplied by 1 - b the second difference is b^2 times what is left of it; the half step is b/2 times it.
        bend = _tree.sub(second, first)
        values, vectors, basis = self._modes(k, state, args, _DEPTH_AT_START, bend)
        parts = jnp.linalg.pinv(vectors)[:, 0] * _tree.norm(bend)  # the basis begins with the bend
        moving = is_alternating(values)
        rod = vectors @ jnp.where(moving, 0.5 * parts / jnp.where(moving, values, 1), 0)
        d = _tree.combine(rod.real, basis)
        length = _tree.norm(d).astype(_tree.dtype(state))
        centre = _tree.add(state, _tree.scale(0.5, first))
        return RodState(centre, _tree.unit(d), jnp.log(jnp.where(length > 0, length, 1)))

    def _modes(
        self, k: jax.Array, state: State, args: Args, depth: int, start: State | None = None
    ) -> tuple[jax.Array, jax.Array, State]:
        """Return the eigenvalues of -f', its eigenvectors (columns) in a basis, and the basis, a stack of vectors."""
        krylov = krylov_of_step(self.step_map, state, k, args, 1, min(depth, _tree.size(state)), start)
        # In a part of the space that is not the start's, no mode is in the start. Where the map has no derivative (Adam's
        # at a second moment of 0) none is found.
        matrix = krylov.matrix if start is None else krylov.matrix_of_start
        values, vectors = jnp.linalg.eig(-jnp.nan_to_num(matrix))
        return values, vectors, krylov.basis


class _RodStep(AbstractStateStep):
    """One step of the map from both ends of the rod, and of the drift."""

    flow: RodFlow

    @override
    def __call__(self, state: RodState, args: Args, k: ArrayLike) -> RodState:
        middle = jnp.asarray(k) + 0.5
        increment = self.flow._increment(middle, args)
        mean, turn, b = self.flow._parts(middle, state, args)
        here = increment(state.centre)
        ends = [_tree.add(state.centre, _tree.scale(s, here)) for s in (0.5, -0.5)]
        drift = _tree.scale(0.5, _tree.add(*map(increment, ends)))
        centre = _tree.add(state.centre, _tree.add(mean, _tree.sub(drift, here)))
        factor = jnp.where(b == 0, 1, jnp.maximum(0.5 * b**2 - 1, jnp.finfo(b.dtype).tiny))
        log_length = state.log_length + 0.5 * jnp.log(factor)
        return RodState(centre, _tree.add(state.direction, turn), log_length.astype(state.log_length.dtype))

    @override
    def params(self, state: RodState) -> Params:
        return self.flow.step_map.params(state.centre)
