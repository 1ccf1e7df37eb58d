"""The loss along a step: how far it falls, and where it would begin to rise."""

import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from eomdl import _tree
from eomdl._types import Args, Loss, Params


MAX_EVALUATIONS = 8  # of the loss along the step
MIN_MOVE = 0.1  # in the logarithm: the search ends where its next move would be shorter
MAX_MOVE = math.log(4)  # the longest move of the search, in the logarithm


class Along(eqx.Module):
    r"""The loss along a step u, $f(c) = L(\theta + c u) - L(\theta)$.

    - `loss`: $L(\theta)$.
    - `multiple`: the critical multiple, the c > 0 with f(c) = 0: beyond it the loss is higher than before the step. 0 where u
        leads upwards, infinite where there is none in reach, nan for a step of length 0.
    - `slope`, `curvature`: $f'(0) = g \cdot u$ and $f''(0) = u^\top H u$.
    - `length`: |u|.
    - `drop`: -f(1), by how much the loss falls in the step.
    - `power`: s in $f(c) \approx f'(0)\, c\, (1 - (c/c^*)^s)$ near the critical multiple $c^*$; 1 for a quadratic.
    - `evaluations`: the number of forward passes for `multiple` and `drop`.
    """

    loss: Float[jax.Array, ""]
    multiple: Float[jax.Array, ""]
    slope: Float[jax.Array, ""]
    curvature: Float[jax.Array, ""]
    length: Float[jax.Array, ""]
    drop: Float[jax.Array, ""]
    power: Float[jax.Array, ""]
    evaluations: Int[jax.Array, ""]


class Guess(NamedTuple):
    """The critical multiple and the power of the step before, as in `Along`; a multiple of 0 stands for none."""

    multiple: jax.Array
    power: jax.Array


class _Search(NamedTuple):
    r"""The search for $c^*$ on the line $\log(1 + f(c)/(c\,|f'(0)|)) = s \log(c/c^*)$."""

    c: jax.Array  # where the loss is evaluated next
    low: jax.Array  # the largest c at which the loss is lower than before the step,
    high: jax.Array  # the smallest at which it is not
    last: jax.Array  # the c of the last evaluation,
    height: jax.Array  # and the line there
    power: jax.Array
    is_near: jax.Array
    evaluations: jax.Array


def along(loss: Loss, params: Params, step: Params, args: Args, guess: Guess | None = None) -> Along:
    """Return the loss along a step, with its critical multiple; `guess` is that of the step before.

    **Cost:** a second directional derivative, about one gradient, and at most 8 forward passes, mostly 2 to 4.

    Source: the critical multiple is the critical learning rate of arXiv 2601.16979 over that of the step. There it is
    bracketed and bisected; here it is searched by secants, from that of the step before.
    """

    def loss_at(c: jax.Array) -> jax.Array:
        return loss(jax.tree.map(lambda p, u: (p + c * u).astype(p.dtype), params, step), args)

    def slope_at(c: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, slope = jax.jvp(loss_at, (c,), (jnp.ones_like(c),))
        return slope, value

    # Parameters in float32 with data in float64 have a loss in float64.
    start = jnp.zeros((), jnp.result_type(jax.eval_shape(loss, params, args), *jax.tree.leaves(params)))
    one, far = jnp.ones_like(start), jnp.full_like(start, jnp.inf)
    slope, curvature, value = jax.jvp(slope_at, (start,), (one,), has_aux=True)
    first = loss_at(one) - value

    def advance(at: _Search, change: jax.Array) -> _Search:
        return _advance(at, change, (change - at.c * slope) / (at.c * jnp.abs(slope)))

    quadratic = jnp.where(curvature > 0, -2 * slope / jnp.where(curvature > 0, curvature, 1), far)
    multiple, power = Guess(start, one) if guess is None else guess
    multiple = jnp.where(multiple > 0, multiple, quadratic).astype(start.dtype)
    # Where f is lost in the rounding of the loss, the quadratic model is all there is.
    rounding = 64 * jnp.finfo(_tree.dtype(params)).eps * jnp.abs(value)
    is_lost = jnp.abs(slope) * quadratic <= rounding
    begin = _Search(one, start, far, start, -far, power.astype(start.dtype), is_lost, jnp.asarray(0))
    second = advance(begin, first)
    is_between = (second.low < multiple) & (multiple < second.high) & ~second.is_near
    second = second._replace(c=jnp.where(is_lost, quadratic, jnp.where(is_between, multiple, second.c)))
    end = jax.lax.while_loop(
        lambda at: (at.evaluations < MAX_EVALUATIONS) & ~at.is_near & (slope < 0),
        lambda at: advance(at, loss_at(at.c) - value),
        second,
    )
    is_open = ~end.is_near & jnp.isinf(end.high)
    multiple = jnp.where(slope < 0, jnp.where(is_open, far, end.c), jnp.where(slope >= 0, start, slope))
    length = _tree.norm(step)
    multiple = jnp.where(length == 0, jnp.nan, multiple)
    return Along(value, multiple, slope, curvature, length, -first, end.power, end.evaluations)


def _advance(at: _Search, change: jax.Array, bend: jax.Array) -> _Search:
    """Return the search after an evaluation of f at `at.c`: the next c is where the secant is zero.

    `change` is f, and `bend` its part above the tangent in units of the tangent.
    """
    is_lower = change < 0
    low = jnp.where(is_lower, jnp.maximum(at.low, at.c), at.low)
    high = jnp.where(is_lower, at.high, jnp.minimum(at.high, at.c))
    height = jnp.log(jnp.where(jnp.isfinite(change), jnp.where(bend > 0, bend, 0), jnp.inf))
    distance = jnp.log(at.c / at.last)  # infinite for the first one
    secant = (height - at.height) / distance
    # Over a longer distance it says nothing of the power at the critical multiple.
    is_good = (jnp.abs(distance) <= MAX_MOVE) & jnp.isfinite(secant) & (secant > 0)
    power = jnp.where(is_good, secant, at.power)
    move = -height / power
    c = at.c * jnp.exp(jnp.clip(move, -MAX_MOVE, MAX_MOVE))
    is_between = (low <= c) & (c <= high)
    c = jnp.where(is_between, c, jnp.sqrt(low * high))
    is_near = at.is_near | (is_between & (jnp.abs(move) <= MIN_MOVE))
    return _Search(c, low, high, at.c, height, power, is_near, at.evaluations + 1)
