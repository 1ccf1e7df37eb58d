r"""What is this optimizer: its rates, its memory and its stability threshold; and whether it is gradient descent with momentum.

Two questions, two functions:

- `linear_response`: what the optimizer does *in one step*, at the state, gradient and parameters that are there. It holds for that
    step only.
- `recognize_momentum`: whether it follows one rule of gradient descent with momentum *in every step* from rest, so that closed
    forms for whole runs hold (flows, laws of charges). It needs to know nothing of the state, and all steps.

Where both answer they agree. Which integers of a state count its steps is told by `counters`, where it keeps its memories by `memory`.

**One step.** Near where it is, each parameter's update is linear in its gradient, its memory m and itself:

$$\delta\theta' = \delta\theta - r\,\delta g - q\,\delta m - k\,\delta\theta, \qquad
\delta m' = a\,\delta g + c\,\delta m + b\,\delta\theta,$$

with numbers of its own for each parameter: r its rate, k a decay of the weights beside the gradient (AdamW), b one before the memory
(L2). They are derivatives of the optimizer's own update at its own state and gradient, in which the second moments after the step are
held. With $\delta g = H\delta\theta$ the multiplier of a perturbation leaves the unit circle at -1, and there $\delta m = -(a H + b)
\delta\theta / (1 + c)$, so that

$$(E H + d)\,\delta\theta = 2\,\delta\theta, \qquad E = r - \frac{q a}{1 + c}, \quad d = k - \frac{q b}{1 + c}.$$

This is one symmetric eigenvalue problem for all parameters, also where groups of them have rates and memories of their own. It is the
first to be left if $-\frac{1-c}{3+c} \le c - qa/r < 1$: then all other points of the unit circle have an imaginary part of one sign.

**In the long run** the memory follows, $\dot\theta = -v$ with $v = D g + K\theta$, $D = r + \frac{qa}{1-c}$, $K = k + \frac{qb}{1-c}$,
and the first counter term is $-(\frac12 D + \frac{qa}{(1-c)^2}) H v - (\frac12 K + \frac{qb}{(1-c)^2}) v$.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from eomdl import _tree
from eomdl._types import Params, State
from eomdl.maps.memory import find_memories, whole_step
from eomdl.maps.sensitivity import Sensitivity, Unknown, measure_sensitivity


_FITTED = 3  # steps from which the numbers of a rule are computed; the others check them


class Response(eqx.Module):
    r"""The linear response of an optimizer, from `linear_response`.

    - `rates`: R, a pytree like the parameters: the learning rate of each. For gradient descent, with momentum or Nesterov's
        too, it is lr; for RMSProp and Adam lr over the root of the second moment. 0 for a frozen parameter, and for one whose second
        moment is 0: the optimizer has no rate for it yet.
    - `threshold`: the largest stable eigenvalue of R (H + `decay`): 2; heavy ball $2 + 2\beta$; Nesterov $(2 + 2\beta)/(1 + 2\beta)$;
        Adam $2 (1 + \beta_1) / (1 - \beta_1)$. Where groups of parameters have several it is the smallest one, and the rates of the others
        are smaller in proportion: the ratio of the eigenvalue to the threshold is that of all groups together.
    - `decay`: what the decay of the weights adds to the diagonal of H, a pytree like the parameters.
    - `velocity_rates`: D and K. `counter_rates`: the two factors of the first counter term; all of them like the parameters.
    - `unknown`: an `Unknown`. Where it is not 0, nothing of the rest holds.
    """

    rates: Params
    threshold: Float[jax.Array, ""]
    decay: Params
    velocity_rates: tuple[Params, Params]
    counter_rates: tuple[Params, Params]
    unknown: Int[jax.Array, ""]

    @property
    def is_known(self) -> jax.Array:
        """Whether the optimizer is what is assumed."""
        return self.unknown == Unknown.KNOWN

    def velocity(self, gradient: Params, params: Params) -> Params:
        r"""Return the step along the flow of the long run, $D g + K \theta$."""
        return _sum_of_products(self.velocity_rates, (gradient, params))

    def counterterm(self, product: Params, velocity: Params) -> Params:
        """Return minus the first counter term for $H v$ and the `velocity` v: what a step is off from the flow."""
        return _sum_of_products(self.counter_rates, (product, velocity))


def _sum_of_products(factors: tuple[Params, Params], vectors: tuple[Params, Params]) -> Params:
    return jax.tree.map(lambda a, b, x, y: (a * x + b * y).astype(x.dtype), *factors, *vectors)


@dataclasses.dataclass(frozen=True)
class MomentumRule:
    r"""Gradient descent with momentum in every step, as `optax.sgd` has it; $\beta = 0$ is gradient descent without.

    - `learning_rate` $\eta$, `momentum` $\beta$, `nesterov`.
    """

    learning_rate: float
    momentum: float = 0.0
    nesterov: bool = False

    @property
    def name(self) -> str:
        """The optimizer's name in words."""
        if self.momentum == 0:
            return "plain gradient descent"
        return f"gradient descent with {'Nesterov ' * self.nesterov}momentum {self.momentum:.3g}"

    @property
    def threshold(self) -> float:
        r"""The largest stable $\eta \lambda$ on a quadratic.

        2; heavy ball $2 + 2\beta$; Nesterov $(2 + 2\beta) / (1 + 2\beta)$ (Cohen et al. 2021, arXiv 2103.00065, appendix B).
        """
        return (2 + 2 * self.momentum) / (1 + 2 * self.momentum * self.nesterov)

    @property
    def step_size(self) -> float:
        r"""$\eta / (1 - \beta)$: the time for which one step follows gradient flow."""
        return self.learning_rate / (1 - self.momentum)

    @property
    def memory_factor(self) -> float:
        r"""The factor of the counter term, $1 + 2 a$ with the `mean_age` a: $(1 + \beta) / (1 - \beta)$ for heavy ball."""
        return 1 + 2 * mean_age(self.momentum, self.nesterov)

    def updates(self, gradients: np.ndarray) -> np.ndarray:
        """Return the updates by gradients of shape (n,) in n steps from rest."""
        rows, memory = [], 0.0
        for gradient in gradients:
            memory = self.momentum * memory + gradient
            used = gradient + self.momentum * memory if self.nesterov else memory
            rows.append(-self.learning_rate * used)
        return np.asarray(rows)


# ------------------------------------------------- in one step


def linear_response(
    optimizer: optax.GradientTransformation, state: State, gradient: Params, params: Params
) -> Response:
    """Return the response of an optimizer in the step that it takes from `state` with `gradient` at `params`.

    An optimizer that accumulates gradients takes its step after the last of them: the response is that of the whole step, with the
    present gradient in the place of those still to come. What goes wrong in the optimizer's own code is a reason, and raises nothing.

    **Cost:** no gradients; four updates of the optimizer and six derivatives of it.
    """
    try:
        step = whole_step(optimizer, state, gradient, params)
        memories = find_memories(params, step.state)
        if memories is None:
            return _no_response(params, Unknown.SEVERAL)
        found = measure_sensitivity(step, memories, params)
        found.fails[Unknown.ENDLESS] = ~step.is_found
        return _solve_edge(found)
    except Exception:  # of any type: it is the optimizer's own code
        return _no_response(params, Unknown.RAISED)


def _no_response(params: Params, unknown: Unknown) -> Response:
    ones, zeros = jax.tree.map(jnp.ones_like, params), _tree.zeros_like(params)
    nan = jnp.asarray(jnp.nan, _tree.dtype(params))
    return Response(ones, nan, zeros, (ones, zeros), (ones, zeros), jnp.asarray(int(unknown)))


class _Edge(NamedTuple):
    """What follows from the numbers of the parameters of one leaf, with the letters of the equations above."""

    e: jax.Array
    decay: jax.Array
    velocity: tuple[jax.Array, jax.Array]
    counter: tuple[jax.Array, jax.Array]
    threshold: jax.Array  # the smallest one
    climbs: jax.Array
    moves: jax.Array
    is_ordered: jax.Array


def _edge_of_leaf(
    tolerance: float,
    is_seen: jax.Array,
    r: jax.Array,
    q: jax.Array,
    k: jax.Array,
    a: jax.Array,
    c: jax.Array,
    b: jax.Array,
) -> _Edge:
    """Return what follows from the numbers of a leaf; a parameter that is not seen does not move."""
    r, q, k, b = (jnp.where(is_seen, x, 0) for x in (r, q, k, b))
    sooner, later = q / (1 + c), q / (1 - c)
    e, d = r - sooner * a, k - sooner * b
    velocity = r + later * a, k + later * b
    counter = velocity[0] / 2 + later * a / (1 - c), velocity[1] / 2 + later * b / (1 - c)
    moves = (r != 0) | (q * a != 0)
    # A memory that is a mean of gradients leaves the rate as it is, one that is a sum multiplies it.
    is_mean = jnp.all(jnp.abs(a - (1 - c)) <= max(1e-3, tolerance) * (1 - c))
    rate = jnp.where(is_mean, 1, 1 - c) * velocity[0]
    safe = jnp.where(moves & (e > 0), e, 1)
    threshold = jnp.min(jnp.where(moves, 2 * rate / safe, jnp.inf), initial=jnp.inf)
    ahead = c * r - q * a
    is_ordered = (ahead >= -(1 - c) / (3 + c) * r) & (ahead < r) & (jnp.abs(c) < 1) & (e > 0) & (d < 2)
    return _Edge(
        jnp.where(moves, e, 0),
        jnp.where(moves, d / safe, 0),
        velocity,
        counter,
        threshold,
        jnp.any(r < 0),
        jnp.any(moves),
        jnp.all(is_ordered | ~moves),
    )


def _solve_edge(found: Sensitivity) -> Response:
    """Return the response by the numbers of each parameter."""
    structure = jax.tree.structure(found.is_seen)
    edges = [
        _edge_of_leaf(found.tolerance, *leaves)
        for leaves in zip(jax.tree.leaves(found.is_seen), *map(jax.tree.leaves, found.numbers), strict=True)
    ]
    threshold = functools.reduce(jnp.minimum, [edge.threshold for edge in edges])
    fails = found.fails | {
        Unknown.CLIMBS: functools.reduce(jnp.logical_or, [edge.climbs for edge in edges]),
        Unknown.STILL: ~functools.reduce(jnp.logical_or, [edge.moves for edge in edges]),
        Unknown.UNORDERED: ~functools.reduce(jnp.logical_and, [edge.is_ordered for edge in edges]),
    }
    unknown = jnp.asarray(int(Unknown.KNOWN))
    for reason in sorted(fails, reverse=True):
        unknown = jnp.where(fails[reason], int(reason), unknown)
    pairs = (
        zip(*(edge.velocity for edge in edges), strict=True),
        zip(*(edge.counter for edge in edges), strict=True),
    )
    velocity, counter = (tuple(structure.unflatten(column) for column in pair) for pair in pairs)
    rates = structure.unflatten([edge.e * (threshold / 2).astype(edge.e.dtype) for edge in edges])
    decay = structure.unflatten([edge.decay for edge in edges])
    threshold = jnp.where(unknown == Unknown.KNOWN, threshold, jnp.nan)
    return Response(rates, threshold, decay, velocity, counter, unknown)


# ------------------------------------------------- in every step


def mean_age(momentum: ArrayLike, nesterov: bool) -> Any:
    r"""Return the mean age in steps of the gradients in an update: $\beta/(1-\beta)$; Nesterov $\beta^2/(1-\beta)$.

    An update with a memory is, in the long run, a step along the gradient of that many steps ago.
    """
    return momentum ** (2 if nesterov else 1) / (1 - momentum)


def recognize_momentum(
    optimizer: optax.GradientTransformation, params: Params, num_steps: int
) -> MomentumRule | None:
    """Return the rule that the optimizer follows in all steps from rest, or None if it follows no such rule.

    It is given gradients along one random direction, of sizes that change from step to step. A schedule, a decay of the
    weights, a clipping, an update by signs or by squares each leave the direction, or the sizes that the rule makes of them.

    **Cost:** no gradients; `num_steps` updates of the optimizer.
    """
    sizes = np.cos(1.3 * np.arange(max(num_steps, _FITTED))) + 0.4
    try:
        along, aside = (
            np.asarray(x, float)
            for x in _updates_along(optimizer, params, _direction(params), jnp.asarray(sizes))
        )
    except Exception:  # one that needs more than the gradient, say: it is another rule, whatever it is
        return None
    tolerance = float(jnp.finfo(_tree.dtype(params)).eps) ** 0.5
    largest = np.max(np.abs(along))
    if not np.isfinite(largest) or largest == 0 or np.max(aside) > tolerance * largest:
        return None
    for rule in _candidates(sizes, along):
        if rule.learning_rate > 0 and 0 <= rule.momentum < 1:
            apart = np.max(np.abs(rule.updates(sizes) - along))
            if apart <= tolerance * largest:
                return rule
    return None


def _candidates(sizes: np.ndarray, updates: np.ndarray) -> list[MomentumRule]:
    """Return the rules that fit the first steps: update k is minus a sum of c_j times gradient k - j."""
    c: list[float] = []
    for k in range(_FITTED):
        known = sum(c[j] * sizes[k - j] for j in range(k))
        c.append(float((-updates[k] - known) / sizes[0]))
    if abs(c[1]) <= 1e-3 * abs(c[0]):
        return [MomentumRule(c[0])]
    beta = round(c[2] / c[1], 5)  # float32 gives no more
    return [MomentumRule(c[0], beta), *([MomentumRule(c[1] / beta**2, beta, nesterov=True)] if beta else [])]


def _direction(params: Params) -> Params:
    """Draw a random direction on the host: JAX's generator takes longer to compile than all the rest."""
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(generator.normal(size=x.shape), x.dtype), params)


@eqx.filter_jit
def _updates_along(
    optimizer: optax.GradientTransformation, params: Params, direction: Params, sizes: jax.Array
) -> Any:
    """Return the updates along the direction, in units of it, (n,), and how far they leave it, (n,)."""
    norm = _tree.norm(direction)

    def step(state: Any, size: jax.Array) -> tuple[Any, Any]:
        updates, state = optimizer.update(_tree.scale(size, direction), state, params)
        along = _tree.vdot(updates, direction) / norm**2
        return state, (along, _tree.norm(_tree.sub(updates, _tree.scale(along, direction))) / norm)

    return jax.lax.scan(step, optimizer.init(params), sizes)[1]
