r"""What is this optimizer: its rates, its memory and its stability threshold; and whether it is gradient descent with momentum.

Two questions, two functions:

- `linear_response`: what the optimizer does *in one step*, from a given state with a given gradient. Any state of optax that has
    at most one mean of gradients and one of their squares; valid for that step only.
- `recognize_momentum`: whether it follows one rule of gradient descent with momentum *in every step* from rest, so that closed
    forms for whole runs hold (flows, laws of charges). It needs to know nothing of the state, and all steps.

Where both answer they agree. Which integers of a state count its steps is told by `counters`.

**One step.** Along an eigenvector of the Hessian with eigenvalue $\lambda$ a step of gradient descent with a memory m is

$$\theta' = \theta - (\lambda \theta + p\, m), \qquad m' = \lambda \theta + c\, m,$$

with $\lambda$ and m in units of its rates, and it is stable as long as the eigenvalues of this 2 x 2 matrix are in the unit
circle. p, c and the rate of each parameter are measured: the optimizer is given gradients and memories, its second moments held.
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
from jaxtyping import Bool, Float

from eomdl import _tree
from eomdl._types import Params, State


_FITTED = 3  # steps from which the numbers of a rule are computed; the others check them


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


class _Step(NamedTuple):
    """What the optimizer makes of a gradient and a memory."""

    update: Params
    memory: Params | None
    rest: list[jax.Array]  # all other numbers in the state


class _Fields(NamedTuple):
    """The fields in which a kind of state keeps the mean of gradients and that of their squares."""

    mean: str | None
    square: str | None


_KINDS: dict[type, _Fields] = {
    optax.TraceState: _Fields("trace", None),
    optax.ScaleByRmsState: _Fields(None, "nu"),
    optax.ScaleByAdamState: _Fields("mu", "nu"),
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

    def __call__(self, gradient: Params, memory: Params) -> _Step:
        """Return one step from this memory."""
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
        return _Step(update, None if self.mean is None else _field(parts, self.mean), floats)

    def step(self, gradient: Params, memory: Params | None, second: Params | None) -> tuple[Params, list]:
        """Return the update and the parts of the new state."""
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
    """Return the response of an optimizer in the step that it takes from `state` with `gradient`.

    None if its update raises with these arguments, or its state keeps several memories.

    **Cost:** no gradients; six updates of the optimizer.
    """
    parts, structure = jax.tree.flatten(state, is_leaf=_is_known)
    kinds = [(i, _KINDS[type(part)]) for i, part in enumerate(parts) if _is_known(part)]
    means = [(i, kind.mean) for i, kind in kinds if kind.mean is not None]
    squares = [(i, kind.square) for i, kind in kinds if kind.square is not None]
    if len(means) > 1 or len(squares) > 1:
        return None
    mean, square = (next(iter(places), None) for places in (means, squares))
    frozen = _Frozen(optimizer, params, parts, structure, mean, square)
    try:
        return _measure(_hold_moments(frozen, gradient), gradient)
    except TypeError:  # it needs more than the gradient: a value, say
        return None


def second_moment(state: State) -> Params | None:
    """Return the mean of squared gradients, `nu`, in a state of optax; None where there is none."""
    return optax.tree.get(state, "nu")


def _hold_moments(frozen: _Frozen, gradient: Params) -> _Frozen:
    """Set the second moments to those after the step, and how fast they decay."""
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


def _measure(frozen: _Frozen, gradient: Params) -> Response:
    """Take a step with nothing, with a gradient only, with the memory that it leaves, and with another mixture of both."""
    size = _sizes(frozen.second, gradient)
    s, t = _signs(size, 1.7), _signs(size, 2.9)
    nothing, one = _tree.zeros_like(size), _product(s, size)
    rest, by_gradient = frozen(nothing, nothing), frozen(one, nothing)
    left = nothing if by_gradient.memory is None else by_gradient.memory
    by_memory = frozen(nothing, left)
    both = frozen(_tree.scale(0.5, _product(t, size)), _tree.scale(1 / 3, left))
    of_gradient, of_memory = (_tree.sub(step.update, rest.update) for step in (by_gradient, by_memory))
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
    return _solve_stability(own, p, c, is_mean, functools.reduce(jnp.logical_and, conditions))


def _solve_stability(
    own: Params, p: jax.Array, c: jax.Array, is_mean: jax.Array, is_linear: jax.Array
) -> Response:
    r"""Return the response by the matrix [[1 - \lambda, -p], [\lambda, c]] of an eigenvalue $\lambda$ of the own rates times H.

    Its eigenvalues leave the unit circle at -1, or with a determinant of -1 or 1.
    """

    def crossing(value: jax.Array, slope: jax.Array) -> jax.Array:
        return jnp.where(slope > 0, value / jnp.where(slope > 0, slope, 1), jnp.inf)

    ends = crossing(2 * (1 + c), 1 + c - p), crossing(1 + c, c - p), crossing(1 - c, p - c)
    in_the_long_run = 1 + p / (1 - c)
    # A memory that is a mean of gradients leaves the rate as it is, one that is a sum multiplies it.
    gain = jnp.where(is_mean, 1, 1 / (1 - c))
    unit = in_the_long_run / gain
    factor = 1 + 2 * (1 - 1 / in_the_long_run) / (1 - c)
    threshold = unit * functools.reduce(jnp.minimum, ends)
    return Response(_tree.scale(unit, own), threshold, gain, factor, is_linear)


def _sizes(second: Params | None, gradient: Params) -> Params:
    """Return sizes of gradients to try: as large as the second moments say, so that those can be held."""
    if second is not None:
        return jax.tree.map(lambda v, g: jnp.sqrt(v).astype(g.dtype), second, gradient)
    typical = _tree.norm(gradient) / jnp.sqrt(_tree.size(gradient))
    return jax.tree.map(lambda g: jnp.full_like(g, jnp.where(typical > 0, typical, 1)), gradient)


def _signs(like: Params, frequency: float) -> Params:
    """Return 1 and -1 in no order, without JAX's generator, which takes longer to compile than all the rest."""
    return jax.tree.map(
        lambda x: (
            jnp.where(jnp.cos(frequency * jnp.arange(1, x.size + 1) ** 1.5) > 0, 1, -1)
            .reshape(x.shape)
            .astype(x.dtype)
        ),
        like,
    )


def _ratio(a: Params, b: Params) -> jax.Array:
    """Return the best r in a = r b; 0 where b is 0."""
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
