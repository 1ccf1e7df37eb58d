"""The loss on a plane in weight space."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from eomdl import _check, _tree
from eomdl._types import Args, Loss, Params


@dataclasses.dataclass(frozen=True)
class LossPlane:
    """$L(c + x u + y v)$ on a grid: `x` (m,), `y` (n,) and `loss` (n, m), row i at `y[i]`."""

    x: Float[np.ndarray, " m"]
    y: Float[np.ndarray, " n"]
    loss: Float[np.ndarray, "n m"]


def loss_plane(
    loss: Loss,
    centre: Params,
    u: Params,
    v: Params,
    x: Any,
    y: Any,
    args: Args = None,
    *,
    progress: bool = False,
) -> LossPlane:
    """The loss on a plane through weight space, $L(c + x u + y v)$.

    **Arguments:** `centre` c and the two directions u, v: pytrees like the parameters, such as the `mean` and the two
    directions of `principal_components`; with orthonormal ones x and y are parameter distances. `x`, `y`:
    coordinates of the grid, shapes (m,) and (n,).

    **Cost:** m n losses, one at a time: memory is that of one.

    **Raises:** `ValueError` for a wrong argument.
    """
    progress = _check.flag("progress", progress)
    centre, u, v = (_check.params(name, p) for name, p in (("centre", centre), ("u", u), ("v", v)))
    for name, direction in (("u", u), ("v", v)):
        _check.same_structure(name, direction, "centre", centre)
    _check.loss_is_scalar(loss, centre, args)
    grid = []
    for name, values in (("x", x), ("y", y)):
        grid.append(np.asarray(_check.numbers(name, values, "finite coordinates, shape (m,)", ndim=1)))
    across = jnp.asarray(grid[0])
    lines = [
        np.asarray(_line(loss, _along(centre, v, at), u, across, args))
        for at in tqdm(grid[1], desc="loss plane", disable=not progress)
    ]
    return LossPlane(grid[0], grid[1], np.stack(lines))


def _along(start: Params, direction: Params, distance: Any) -> Params:
    return _tree.add(start, _tree.scale(distance, direction))


@eqx.filter_jit
def _line(loss: Loss, start: Params, u: Params, x: jax.Array, args: Args) -> jax.Array:
    return jax.lax.map(lambda at: loss(_along(start, u, at), args), x)
