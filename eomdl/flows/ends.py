"""A field at both ends of an oscillation about a centre."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from eomdl import _tree
from eomdl._types import State


MODES = 4  # of which the oscillation is made at the start, at most
SHARE = 0.01  # the cosine between the oscillation and a mode that it follows
_NEAR = 0.2  # modes farther below the first one die within a few steps


def alternating(b: jax.Array) -> jax.Array:
    """Which of the modes with the multipliers 1 - b make the oscillation at the start."""
    return (b.real > 1) & (b.real > jnp.max(b.real) - _NEAR)


def between_ends(
    field: Callable[[State], State], centre: State, direction: State, log_length: jax.Array
) -> tuple[State, State, jax.Array]:
    r"""$\tfrac12 (f_+ + f_-)$, $F u = (f_- - f_+) / 2 l$ and $u^\top F u$, with $f_\pm = f(c \pm l u)$ and u of length 1 (or 0)."""
    u, length = _tree.unit(direction), jnp.exp(log_length)
    # A shorter difference would be rounding. The mean stays at c: it is taken by the lever rule.
    reach = jnp.maximum(length, jnp.sqrt(jnp.finfo(length.dtype).eps))
    span = reach + length
    plus = field(_tree.add(centre, _tree.scale(reach, u)))
    minus = field(_tree.sub(centre, _tree.scale(length, u)))
    mean = _tree.add(_tree.scale(length / span, plus), _tree.scale(reach / span, minus))
    image = _tree.scale(1 / span, _tree.sub(minus, plus))
    return mean, image, _tree.vdot(u, image)
