"""The loss along a step: how far it falls, and where it would begin to rise."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from eomdl import _tree
from eomdl._types import Args, Loss, Params


MOST = 8  # values of the loss along the step
ENOUGH = 0.25  # the search ends where the loss has changed by less than this part of what the slope foretells


class Along(eqx.Module):
    r"""The loss along a step u, $f(c) = L(\theta + c u) - L(\theta)$.

    - `loss`: $L(\theta)$.
    - `multiple`: the critical multiple, the c > 0 with f(c) = 0: beyond it the loss is higher than before the step. 0 where u
        leads upwards, infinite where no c was found.
    - `slope`, `curvature`: $f'(0) = g \cdot u$ and $f''(0) = u^\top H u$.
    - `length`: |u|.
    - `drop`: -f(1), by how much the loss falls in the step.
    - `evaluations`: the number of forward passes for `multiple` and `drop`.
    """

    loss: Float[jax.Array, ""]
    multiple: Float[jax.Array, ""]
    slope: Float[jax.Array, ""]
    curvature: Float[jax.Array, ""]
    length: Float[jax.Array, ""]
    drop: Float[jax.Array, ""]
    evaluations: Int[jax.Array, ""]


class _Search(NamedTuple):
    """`low` and `high`: the largest c at which the loss is lower than before the step, the smallest at which it is not."""

    c: jax.Array  # the next to be tried
    low: jax.Array
    high: jax.Array
    tried: jax.Array  # the last one tried,
    ratio: jax.Array  # and f(c)/c there
    first: jax.Array  # f(1)
    passes: jax.Array


def along(loss: Loss, params: Params, step: Params, args: Args, guess: jax.Array | None = None) -> Along:
    """The loss along a step; `guess` is where the critical multiple may be.

    **Cost:** a second directional derivative, about one gradient, and at most 8 forward passes, mostly 2 to 4.

    Source: the critical multiple is the critical learning rate of arXiv 2601.16979 over that of the step. There it is
    bracketed and bisected; here the slope and the curvature are known, so that a few passes suffice.
    """

    def moved(c: jax.Array) -> jax.Array:
        return loss(jax.tree.map(lambda p, u: (p + c * u).astype(p.dtype), params, step), args)

    def slope_at(c: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, slope = jax.jvp(moved, (c,), (jnp.ones_like(c),))
        return slope, value

    # Parameters in float32 with data in float64 have a loss in float64.
    start = jnp.zeros((), jnp.result_type(jax.eval_shape(loss, params, args), *jax.tree.leaves(params)))
    slope, curvature, value = jax.jvp(slope_at, (start,), (jnp.ones_like(start),), has_aux=True)
    rounding = 4 * jnp.finfo(_tree.dtype(params)).eps * jnp.abs(value)

    def goes_on(at: _Search) -> jax.Array:
        small = jnp.abs(at.ratio) <= jnp.maximum(ENOUGH * jnp.abs(slope), rounding)
        return (at.passes < MOST) & ~small

    def tried(at: _Search) -> _Search:
        change = (moved(at.c) - value) / at.c
        ratio = jnp.where(jnp.isfinite(change), change, jnp.inf)
        low = jnp.where(ratio < 0, jnp.maximum(at.low, at.c), at.low)
        high = jnp.where(ratio < 0, at.high, jnp.minimum(at.high, at.c))
        first = jnp.where(at.passes == 0, change, at.first)
        c = _next(slope, _parabola(slope, curvature, at, ratio), at.c, low, high)
        if guess is not None:
            c = jnp.where((at.passes == 0) & (guess > low) & (guess < high), guess.astype(c.dtype), c)
        return _Search(c, low, high, at.c, ratio, first, at.passes + 1)

    one, far = jnp.ones_like(start), jnp.full_like(start, jnp.inf)
    begin = _Search(one, start, far, start, -far, far, jnp.asarray(0))
    end = jax.lax.while_loop(goes_on, tried, begin)
    is_open = (end.passes == MOST) & jnp.isinf(end.high)
    multiple = jnp.where(slope < 0, jnp.where(is_open, far, end.c), jnp.where(slope >= 0, start, slope))
    return Along(value, multiple, slope, curvature, _tree.norm(step), -end.first, end.passes)


def _parabola(
    slope: jax.Array, curvature: jax.Array, at: _Search, ratio: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """B and q of f(c)/c = slope + b c + q c^2 through the last two points; the first with the curvature known."""
    c, before = at.c, at.tried
    here = (ratio - slope) / c
    there = jnp.where(at.passes == 0, curvature / 2, (at.ratio - slope) / before)
    q = (here - there) / (c - before)
    b = here - q * c
    known = jnp.isfinite(q)
    return jnp.where(known, b, curvature / 2), jnp.where(known, q, (here - curvature / 2) / c)


def _next(
    slope: jax.Array, parabola: tuple[jax.Array, jax.Array], c: jax.Array, low: jax.Array, high: jax.Array
) -> jax.Array:
    """Where the parabola is zero; if that is nowhere between what is known, half way between, or four times as far."""
    b, q = parabola
    below = b + jnp.sqrt(b**2 - 4 * q * slope)
    root = jnp.where(below > 0, -2 * slope / below, jnp.inf)
    inside = (root > 0.999 * low) & (root < 1.001 * high) & (root < 8 * c)  # at its ends by rounding
    otherwise = jnp.where(jnp.isinf(high), 4 * jnp.maximum(low, c), (low + high) / 2)
    return jnp.where(inside, jnp.clip(root, low, high), otherwise)
