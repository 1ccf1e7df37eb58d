"""A field at both ends of an oscillation about a centre."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from eomdl import _tree
from eomdl._types import State


MAX_MODES = 4  # of which the oscillation is made at the start
MIN_COSINE = 0.01  # between the oscillation and a mode, for the oscillation to have a part of it
_MAX_DECAY = 0.2  # per step beyond that of the first mode: faster ones die within a few steps


def is_alternating(b: jax.Array) -> jax.Array:
    """Whether each of the modes with the multipliers 1 - b is a part of the oscillation at the start."""
    return (b.real > 1) & (b.real > jnp.max(b.real) - _MAX_DECAY)


def symmetric_difference(
    field: Callable[[State], State], centre: State, direction: State, log_length: jax.Array
) -> tuple[State, State, jax.Array]:
    r"""Return the mean of a field over both ends of an oscillation, its difference quotient, and that along the direction.

    $\tfrac12 (f_+ + f_-)$, $F u = (f_- - f_+) / 2 l$ and $u^\top F u$, with $f_\pm = f(c \pm l u)$ and u of length 1 (or 0).
    """
    u, length = _tree.unit(direction), jnp.exp(log_length)
    # A shorter difference would be rounding. The mean stays at c: it is taken by the lever rule.
    reach = jnp.maximum(length, jnp.sqrt(jnp.finfo(length.dtype).eps))
    distance = reach + length
    plus = field(_tree.add(centre, _tree.scale(reach, u)))
    minus = field(_tree.sub(centre, _tree.scale(length, u)))
    mean = _tree.add(_tree.scale(length / distance, plus), _tree.scale(reach / distance, minus))
    quotient = _tree.scale(1 / distance, _tree.sub(minus, plus))
    return mean, quotient, _tree.vdot(u, quotient)
