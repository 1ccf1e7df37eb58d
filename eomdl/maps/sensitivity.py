r"""How an optimizer's step depends on its gradient, its memory and the parameters: derivatives at those that are there.

$$\delta u = -r\,\delta g - q\,\delta m - k\,\delta\theta, \qquad \delta m' = a\,\delta g + c\,\delta m + b\,\delta\theta,$$

for the update u and the memory m, with numbers of its own for each parameter. The second moments *after* the step are held as they are.
"""

import enum
import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from eomdl import _tree
from eomdl._types import Params
from eomdl.maps.memory import Memories, WholeStep


class Unknown(enum.IntEnum):
    """Why an optimizer has no linear response in a step; of several reasons the first one counts."""

    KNOWN = 0
    RAISED = 1
    SEVERAL = 2
    ENDLESS = 3
    NONFINITE = 4
    OTHER_MEMORY = 5
    COUPLED = 6
    NONLINEAR = 7
    CLIMBS = 8
    STILL = 9
    UNORDERED = 10

    @property
    def reason(self) -> str:
        """The reason in words; empty where the response is known."""
        return _REASONS[self]


_REASONS = {
    Unknown.KNOWN: "",
    Unknown.RAISED: "its update needs more than a gradient, a state and parameters, or has no derivative",
    Unknown.SEVERAL: "it keeps several memories of a parameter, or one in another form than the parameters",
    Unknown.ENDLESS: "it accumulates gradients without end",
    Unknown.NONFINITE: "its update, or the derivative of it, was not finite",
    Unknown.OTHER_MEMORY: "it keeps a memory of gradients of a kind that is not known",
    Unknown.COUPLED: "its update of a parameter depended on the gradients of others (clipped or normalized together, say)",
    Unknown.NONLINEAR: "its update was not linear in the gradient and one memory (clipped, normalized, or by sign)",
    Unknown.CLIMBS: "it follows the gradient of some parameters upwards (`optax.masked` passes on what it masks)",
    Unknown.STILL: "its rate was 0",
    Unknown.UNORDERED: "its memory does not follow the gradient slowly, as momentum does",
}


class Point(NamedTuple):
    """Where a step is taken: pytrees like the parameters. A parameter without a memory has a mean of 0 and a square of 1."""

    gradient: Params
    mean: Params
    params: Params
    square: Params


class Step(NamedTuple):
    """What the optimizer makes of it."""

    update: Params
    mean: Params
    square: Params
    rest: list[Any]  # all other real numbers in the state


class Numbers(NamedTuple):
    """The numbers r, q, k and a, c, b of all parameters."""

    r: Params
    q: Params
    k: Params
    a: Params
    c: Params
    b: Params


class Sensitivity(NamedTuple):
    """The numbers, which parameters have a second moment or need none, and whether each assumption fails."""

    numbers: Numbers
    tolerance: float  # what of them may be rounding
    is_seen: Params
    fails: dict[Unknown, jax.Array]


class _Optimizer(NamedTuple):
    """The optimizer's step as a function of real numbers."""

    step: WholeStep
    memories: Memories

    def __call__(self, at: Point) -> Step:
        leaves, structure = jax.tree.flatten(self.step.state)
        mean, square = jax.tree.leaves(at.mean), jax.tree.leaves(at.square)
        before = structure.unflatten(self.memories.replace(leaves, mean, square))
        update, after = self.step.update(at.gradient, before, at.params)
        zeros = [jnp.zeros_like(x) for x in mean]
        mean, square, rest = self.memories.split(jax.tree.leaves(after), zeros, square)
        join = jax.tree.structure(at.params).unflatten
        return Step(join(jax.tree.leaves(update)), join(mean), join(square), rest)

    def point(self, params: Params) -> Point:
        """Return the point that is there."""
        zeros, ones = ([f(x) for x in jax.tree.leaves(params)] for f in (jnp.zeros_like, jnp.ones_like))
        mean, square, _ = self.memories.split(jax.tree.leaves(self.step.state), zeros, ones)
        join = jax.tree.structure(params).unflatten
        return Point(self.step.gradient, join(mean), params, join(square))


class _Derivatives(NamedTuple):
    """The step at a point, and its derivatives there."""

    optimizer: _Optimizer
    at: Point
    here: Step

    @property
    def tolerance(self) -> float:
        """What of a number may be rounding, in the narrowest type of the state."""
        state = [x for x in jax.tree.leaves(self.optimizer.step.state) if eqx.is_inexact_array(x)]
        return float(jnp.finfo(_tree.dtype([*state, self.at])).eps) ** 0.5

    def along(self, **direction: Params) -> Step:
        """Return the derivative of the step in a direction."""
        zeros = _tree.zeros_like(self.at)._replace(**direction)
        given = jax.tree.map(lambda x, old: x.astype(old.dtype), zeros, self.at)
        return jax.jvp(self.optimizer.__call__, (self.at,), (given,))[1]


def measure_sensitivity(step: WholeStep, memories: Memories, params: Params) -> Sensitivity:
    """Return how a step depends on what it is taken from.

    **Cost:** four updates of the optimizer and six derivatives of it, no gradients.
    """
    optimizer = _Optimizer(step, memories)
    at = optimizer.point(params)
    # A second moment of 0 is taken for one so small that nothing notices: its root then has a derivative.
    is_seen = jax.tree.map(lambda v: v > 0, optimizer(at).square)
    small = jax.tree.map(lambda v: jnp.full_like(v, float(jnp.finfo(v.dtype).tiny) ** 0.9), at.square)
    at = at._replace(square=jax.tree.map(jnp.where, is_seen, at.square, small))
    d = _Derivatives(optimizer, at, optimizer(at))
    by_square = d.along(square=d.here.square)
    kept = jax.tree.map(jnp.divide, by_square.square, d.here.square)
    is_kept = jax.tree.map(lambda part: jnp.all(part > 0), kept)
    kept = jax.tree.map(lambda part: jnp.where(part > 0, part, 1), kept)
    ones = jax.tree.map(jnp.ones_like, params)
    raw = [d.along(**{name: ones}) for name in Point._fields[:3]]
    # The part of itself by which the second moment changes before the step, for none to change after it.
    holds = [jax.tree.map(lambda x, part, v: -x / (part * v), s.square, kept, d.here.square) for s in raw]

    def held(name: str) -> list[Params]:
        of_square = getattr(by_square, name)
        pairs = zip(raw, holds, strict=True)
        return [jax.tree.map(_add_product, getattr(s, name), hold, of_square) for s, hold in pairs]

    numbers = Numbers(*(_tree.scale(-1.0, x) for x in held("update")), *held("mean"))
    # One sum for all: what is not finite in one of them is not in it.
    total = jax.tree.map(lambda *x: jnp.isfinite(jnp.sum(sum(map(jnp.abs, x)))), *numbers, d.here.update)
    is_other = [jnp.any(x != 0) for x in raw[0].rest]
    fails = {
        Unknown.NONFINITE: ~_all(jax.tree.leaves(total)),
        Unknown.OTHER_MEMORY: ~_all([~x for x in is_other]),
        Unknown.COUPLED: ~_is_diagonal(d, numbers, holds),
        Unknown.NONLINEAR: ~(_all(jax.tree.leaves(is_kept)) & _is_linear(d, numbers, kept, small)),
    }
    return Sensitivity(numbers, d.tolerance, is_seen, fails)


def _is_diagonal(d: _Derivatives, numbers: Numbers, holds: list[Params]) -> jax.Array:
    """Whether the numbers, found by a change that is the same for all parameters, hold for other ones too.

    One is random. The other is along the gradient and the memory themselves: in a large model this is the only direction in which a
    clipped norm is seen.
    """
    random = [_tree.hashed(i, d.at.params) for i in range(3)]
    itself = [d.at.gradient, d.at.mean, _tree.zeros_like(d.at.params)]
    holds_up = []
    for moved in (random, itself):
        square = jax.tree.map(jnp.multiply, _sum_of_products(holds, moved), d.here.square)
        found = d.along(**dict(zip(Point._fields, (*moved, square), strict=True)))
        update = _tree.scale(-1.0, found.update)
        holds_up.append(_are_near(update, numbers[:3], moved, d.tolerance))
        holds_up.append(_are_near(found.mean, numbers[3:], moved, d.tolerance))
    return _all(holds_up)


def _is_linear(d: _Derivatives, numbers: Numbers, kept: Params, small: Params) -> jax.Array:
    """Whether the numbers lead from the update to that without gradient and memory.

    The second moments are held. Where they cannot be (a decay of the weights alone gives more) nothing is tried.
    """
    gradient, mean = d.at.gradient, d.at.mean
    nothing = d.at._replace(gradient=_tree.zeros_like(gradient), mean=_tree.zeros_like(mean))
    least = d.optimizer(nothing._replace(square=small)).square
    square = jax.tree.map(lambda v, low, part: (v - low) / part, d.here.square, least, kept)
    is_tried = jax.tree.map(lambda v: v > 0, square)
    square = jax.tree.map(jnp.where, is_tried, square, small)
    update = d.optimizer(nothing._replace(square=square)).update
    change = _tree.sub(update, d.here.update)
    tried = [jax.tree.map(jnp.where, is_tried, x, _tree.zeros_like(x)) for x in (change, gradient, mean)]
    return _are_near(tried[0], numbers[:2], tried[1:], d.tolerance, d.here.update)


def _are_near(
    x: Params, factors: Any, vectors: Any, tolerance: float, size: Params | None = None
) -> jax.Array:
    """Whether x is the sum of the products, in each leaf by itself, to a part of the largest product (or `size`) there."""
    size = _tree.zeros_like(x) if size is None else size
    total = _sum_of_products(factors, vectors)
    sizes = _sum_of_products(*([jax.tree.map(jnp.abs, y) for y in ys] for ys in (factors, vectors)))

    def is_near(x: jax.Array, expected: jax.Array, *sizes: jax.Array) -> jax.Array:
        allowed = tolerance * jnp.max(sum(jnp.abs(size) for size in sizes), initial=0)
        return jnp.max(jnp.abs(x - expected), initial=0) <= allowed

    return _all(jax.tree.leaves(jax.tree.map(is_near, x, total, sizes, size)))


def _sum_of_products(factors: Any, vectors: Any) -> Params:
    total = _tree.zeros_like(vectors[0])
    for factor, vector in zip(factors, vectors, strict=True):
        total = jax.tree.map(_add_product, total, factor, vector)
    return total


def _add_product(total: jax.Array, factor: jax.Array, vector: jax.Array) -> jax.Array:
    return (total + factor * vector).astype(total.dtype)


def _all(conditions: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.logical_and, conditions, jnp.asarray(True))
