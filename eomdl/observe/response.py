r"""What an optimizer makes of a gradient in one step, its second moments frozen, and the curvature that it bears.

Along an eigenvector of the Hessian with eigenvalue $\lambda$ a step of gradient descent with a memory m is

$$\theta' = \theta - (\lambda \theta + p\, m), \qquad m' = \lambda \theta + c\, m,$$

with $\lambda$ and m in units of its rates, and it is stable as long as the eigenvalues of this 2 x 2 matrix are in the unit
circle. p, c and the rate of each parameter are found by giving the optimizer gradients and memories and looking at what
it makes of them.
"""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Bool, Float

from eomdl import _tree
from eomdl._types import Params, State


class Response(eqx.Module):
    r"""The linear response of an optimizer, from `linear_response`.

    - `rates`: R, a pytree like the parameters: the learning rate of each. For gradient descent, with momentum or Nesterov's
        too, it is lr; for RMSProp and Adam lr over the root of the second moment.
    - `threshold`: the largest stable eigenvalue of R H: 2; heavy ball $2 + 2\beta$; Nesterov $(2 + 2\beta)/(1 + 2\beta)$;
        Adam $2 (1 + \beta_1) / (1 - \beta_1)$.
    - `gain`: by which R is multiplied in the long run: $1/(1 - \beta)$ with momentum, 1 for Adam.
    - `memory_factor`: by which the counter term of the long run is multiplied: $(1 + \beta)/(1 - \beta)$ with momentum.
    - `is_linear`: whether the optimizer is what is assumed: each parameter's update is linear in its gradient and its
        memory. Where it is not, nothing of the rest holds.
    """

    rates: Params
    threshold: Float[jax.Array, ""]
    gain: Float[jax.Array, ""]
    memory_factor: Float[jax.Array, ""]
    is_linear: Bool[jax.Array, ""]


class _Tried(NamedTuple):
    """What a step makes of a gradient and a memory."""

    update: Params
    memory: Params | None
    rest: list[jax.Array]  # all other numbers in the state


class _Memory(NamedTuple):
    """Where a kind of state keeps the mean of gradients and that of their squares."""

    mean: str | None
    square: str | None


_KINDS: dict[type, _Memory] = {
    optax.TraceState: _Memory("trace", None),
    optax.ScaleByRmsState: _Memory(None, "nu"),
    optax.ScaleByAdamState: _Memory("mu", "nu"),
}


class _Frozen(eqx.Module):
    """An optimizer with its second moments held at what they are after the step with `gradient`."""

    optimizer: optax.GradientTransformation
    params: Params
    parts: list[Any]
    structure: Any = eqx.field(static=True)
    mean: tuple[int, str] | None = eqx.field(static=True)
    square: tuple[int, str] | None = eqx.field(static=True)
    second: Params | None = None
    decay: jax.Array | None = None

    def __call__(self, gradient: Params, memory: Params) -> _Tried:
        """One step."""
        before = None
        if self.decay is not None:  # what is second moment after the step, whatever the gradient
            b2 = self.decay
            before = jax.tree.map(
                lambda v, g: ((v - (1 - b2) * g**2) / b2).astype(v.dtype), self.second, gradient
            )
        update, parts = self.step(gradient, memory, before)
        known = {i for i, _ in filter(None, (self.mean, self.square))}
        rest = jax.tree.leaves([part for i, part in enumerate(parts) if i not in known])
        floats = [leaf for leaf in rest if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]
        return _Tried(update, None if self.mean is None else _field(parts, self.mean), floats)

    def step(self, gradient: Params, memory: Params | None, second: Params | None) -> tuple[Params, list]:
        """The update, and the parts of the new state."""
        parts = self.parts
        for place, value in ((self.mean, memory), (self.square, second)):
            if place is not None and value is not None:
                i, name = place
                same = jax.tree.map(lambda x, old: x.astype(old.dtype), value, _field(parts, place))
                parts = [*parts[:i], parts[i]._replace(**{name: same}), *parts[i + 1 :]]
        state = self.structure.unflatten(parts)
        update, state = self.optimizer.update(gradient, state, self.params)
        return update, jax.tree.leaves(state, is_leaf=_is_known)


def linear_response(
    optimizer: optax.GradientTransformation, state: State, gradient: Params, params: Params
) -> Response | None:
    """The response of an optimizer in the step that it takes from `state` with `gradient`; None where it has none.

    None if its update raises with these arguments, or its state keeps several memories.

    **Cost:** no gradients; six updates of the optimizer.
    """
    parts, structure = jax.tree.flatten(state, is_leaf=_is_known)
    kinds = [(i, _KINDS[type(part)]) for i, part in enumerate(parts) if _is_known(part)]
    means = [(i, kind.mean) for i, kind in kinds if kind.mean is not None]
    squares = [(i, kind.square) for i, kind in kinds if kind.square is not None]
    if len(means) > 1 or len(squares) > 1:
        return None
    mean, square = (next(iter(found), None) for found in (means, squares))
    frozen = _Frozen(optimizer, params, parts, structure, mean, square)
    try:
        return _response(_with_moments(frozen, gradient), gradient)
    except TypeError:  # it needs more than the gradient: a value, say
        return None


def _with_moments(frozen: _Frozen, gradient: Params) -> _Frozen:
    """With the second moments after the step, and how fast they decay."""
    if frozen.square is None:
        return frozen
    second = _field(frozen.step(gradient, None, None)[1], frozen.square)
    ones = jax.tree.map(jnp.ones_like, second)
    decayed = _field(frozen.step(_tree.zeros_like(gradient), None, ones)[1], frozen.square)
    decay = _tree.vdot(ones, decayed) / _tree.size(ones)
    places = (lambda f: f.second, lambda f: f.decay)
    return eqx.tree_at(
        lambda f: tuple(place(f) for place in places), frozen, (second, decay), is_leaf=_is_none
    )


def _response(frozen: _Frozen, gradient: Params) -> Response:
    """From a step with nothing, with a gradient only, with the memory that it leaves, and with another mixture of both."""
    size = _sizes(frozen.second, gradient)
    s, t = _signs(size, 1.7), _signs(size, 2.9)
    nothing, one = _tree.zeros_like(size), _product(s, size)
    rest, by_gradient = frozen(nothing, nothing), frozen(one, nothing)
    left = nothing if by_gradient.memory is None else by_gradient.memory
    by_memory = frozen(nothing, left)
    both = frozen(_tree.scale(0.5, _product(t, size)), _tree.scale(1 / 3, left))
    of_gradient, of_memory = (_tree.sub(tried.update, rest.update) for tried in (by_gradient, by_memory))
    mixed = _tree.scale(0.5, _product(_product(s, t), of_gradient))
    expected = _tree.add(mixed, _tree.scale(1 / 3, of_memory))
    p = _ratio(of_memory, of_gradient)
    c = jnp.zeros_like(p) if by_memory.memory is None else _ratio(by_memory.memory, left)
    own = jax.tree.map(lambda u, g: jnp.where(g == 0, 0, -u / jnp.where(g == 0, 1, g)), of_gradient, one)
    tolerance = jnp.sqrt(jnp.finfo(_tree.dtype(gradient)).eps) * _tree.norm(of_gradient)
    conditions = [
        (tolerance > 0) & jnp.isfinite(tolerance),
        _distance(_tree.sub(both.update, rest.update), expected) <= tolerance,
        _distance(of_memory, _tree.scale(p, of_gradient)) <= tolerance,
        *(jnp.array_equal(x, y) for x, y in zip(by_gradient.rest, rest.rest, strict=True)),
        *(jnp.all(leaf >= 0) for leaf in jax.tree.leaves(own)),
    ]
    is_mean = _distance(left, _tree.scale(1 - c, one)) <= 1e-3 * _tree.norm(one)
    return _stable(own, p, c, is_mean, functools.reduce(jnp.logical_and, conditions))


def _stable(own: Params, p: jax.Array, c: jax.Array, is_mean: jax.Array, is_linear: jax.Array) -> Response:
    r"""By the matrix [[1 - \lambda, -p], [\lambda, c]] of an eigenvalue $\lambda$ of the own rates times H.

    Its eigenvalues leave the unit circle at -1, or with a determinant of -1 or 1.
    """

    def reached(value: jax.Array, slope: jax.Array) -> jax.Array:
        return jnp.where(slope > 0, value / jnp.where(slope > 0, slope, 1), jnp.inf)

    ends = reached(2 * (1 + c), 1 + c - p), reached(1 + c, c - p), reached(1 - c, p - c)
    in_the_long_run = 1 + p / (1 - c)
    # A memory that is a mean of gradients leaves the rate as it is, one that is a sum multiplies it.
    gain = jnp.where(is_mean, 1, 1 / (1 - c))
    unit = in_the_long_run / gain
    factor = 1 + 2 * (1 - 1 / in_the_long_run) / (1 - c)
    threshold = unit * functools.reduce(jnp.minimum, ends)
    return Response(_tree.scale(unit, own), threshold, gain, factor, is_linear)


def _sizes(second: Params | None, gradient: Params) -> Params:
    """How large the gradients that are tried are: as large as the second moments say, so that those can be held."""
    if second is not None:
        return jax.tree.map(lambda v, g: jnp.sqrt(v).astype(g.dtype), second, gradient)
    typical = _tree.norm(gradient) / jnp.sqrt(_tree.size(gradient))
    return jax.tree.map(lambda g: jnp.full_like(g, jnp.where(typical > 0, typical, 1)), gradient)


def _signs(like: Params, frequency: float) -> Params:
    """1 and -1 in no order, without JAX's generator, which takes longer to compile than all the rest."""
    return jax.tree.map(
        lambda x: (
            jnp.where(jnp.cos(frequency * jnp.arange(1, x.size + 1) ** 1.5) > 0, 1, -1)
            .reshape(x.shape)
            .astype(x.dtype)
        ),
        like,
    )


def _ratio(a: Params, b: Params) -> jax.Array:
    """R in a = r b, at best; 0 where b is 0."""
    square = _tree.vdot(b, b)
    return jnp.where(square > 0, _tree.vdot(a, b) / jnp.where(square > 0, square, 1), 0)


def _distance(a: Params, b: Params) -> jax.Array:
    return _tree.norm(_tree.sub(a, b))


def _product(a: Params, b: Params) -> Params:
    return jax.tree.map(jnp.multiply, a, b)


def _field(parts: list[Any], place: tuple[int, str]) -> Any:
    i, name = place
    return getattr(parts[i], name)


def _is_known(part: Any) -> bool:
    return type(part) in _KINDS


def _is_none(x: Any) -> bool:
    return x is None
