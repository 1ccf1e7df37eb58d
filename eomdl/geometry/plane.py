"""The loss on a plane in weight space."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from tqdm import tqdm
from typing_extensions import override

from eomdl import _check, _tree
from eomdl._result import AbstractResult, Note, Table, series_table
from eomdl._types import Args, Loss, Params


@dataclasses.dataclass(frozen=True)
class LossPlane(AbstractResult):
    """The loss $L(c + x u + y v)$ on a grid: `x` (m,), `y` (n,) and `loss` (n, m), row i at `y[i]`.

    Its picture shows contours at even distances of the loss's logarithm. Its option `paths`, `{name: coordinates (n, 2)}`, the real run
    first, takes the scores of `principal_components` and what its `project` makes of the flows. The contours are those on the
    plane itself; a path beside the plane has another loss than they say.
    """

    x: Float[np.ndarray, " m"]
    y: Float[np.ndarray, " n"]
    loss: Float[np.ndarray, "n m"]
    notes: tuple[Note, ...] = ()

    @override
    def _tables(self) -> tuple[Table, ...]:
        x, y = np.meshgrid(self.x, self.y)
        columns = {"x": x.ravel(), "y": y.ravel(), "loss": self.loss.ravel()}
        return (series_table("Loss on the plane", columns),)


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
    """Return the loss on a plane through weight space, $L(c + x u + y v)$.

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
        np.asarray(_losses_on_line(loss, _move(centre, v, distance), u, across, args))
        for distance in tqdm(grid[1], desc="loss plane", disable=not progress)
    ]
    return LossPlane(grid[0], grid[1], np.stack(lines))


def _move(start: Params, direction: Params, distance: Any) -> Params:
    return _tree.add(start, _tree.scale(distance, direction))


@eqx.filter_jit
def _losses_on_line(loss: Loss, start: Params, u: Params, x: jax.Array, args: Args) -> jax.Array:
    return jax.lax.map(lambda distance: loss(_move(start, u, distance), args), x)
