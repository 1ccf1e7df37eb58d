"""Linear regions of ReLU networks: counted along a line, and seen on a plane through data.

A network of ReLUs is affine in its input wherever no hidden pre-activation changes sign. A region is a set of inputs
with one activation pattern (which pre-activations are positive); it is convex.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from typing_extensions import override

from eomdl import _check
from eomdl._result import AbstractResult, Note, Table, series_table
from eomdl._types import Params


Preactivations = Callable[[Params, Any], Any]  # (params, one input) -> all hidden pre-activations, any pytree


@dataclasses.dataclass(frozen=True)
class RegionsOnLine(AbstractResult):
    """Linear regions along the segment from a to b.

    The fields are those that `count_regions_on_line` describes.
    """

    breakpoints: Float[np.ndarray, " k"]
    reached: float
    resolution: float

    @property
    def count(self) -> int:
        """The number of regions: one more than breakpoints."""
        return len(self.breakpoints) + 1

    @property
    @override
    def notes(self) -> tuple[Note, ...]:
        if self.reached == 1.0:
            return ()
        said = (
            f"Stopped at t = {self.reached:.6g} with {self.count} regions found so far. Raise `max_regions`."
        )
        return (Note(said, is_fault=True),)

    @override
    def _tables(self) -> tuple[Table, ...]:
        ends = np.array([0.0, *self.breakpoints, self.reached])
        columns = {"region": np.arange(self.count), "begins at t": ends[:-1], "width in t": np.diff(ends)}
        return (series_table("Linear regions along the segment", columns),)


def count_regions_on_line(
    preactivations: Preactivations, params: Params, a: Any, b: Any, *, max_regions: int = 4096
) -> RegionsOnLine:
    r"""Count the linear regions of a ReLU network, of any depth, along the segment from input a to input b.

    Inside a region every pre-activation is affine, $z_i(t + s) = z_i + s \dot z_i$, with $\dot z$ from one Jacobian-vector
    product at t. So the region ends at the smallest $t - z_i / \dot z_i$ beyond t, and the walk continues from just
    behind that. There is no sampling: a region is missed only if it is narrower than
    `resolution` = $2 \epsilon^{2/3}$ of the segment (7e-11; float32 5e-5). Units that cross together are one
    breakpoint, units that are 0 throughout none.

    **Arguments:**

    - `preactivations`: function `(params, x) -> array or pytree of arrays`, every hidden pre-activation of one
        input; compiled once for each function.
    - `a`, `b`: two inputs, of one shape. `max_regions`: the count at which to stop, as `notes` then say.

    **Returns:** an object with `count`, the number of regions; `breakpoints`, where the pattern changes: rising t in (0, 1),
    shape (count - 1,), of the inputs $a + t (b - a)$; `reached`, 1 if the whole segment was walked, else the t at
    which `max_regions` were found; `resolution`, below which two breakpoints are counted as one; `notes`.

    **Cost:** three forward passes a region (one of them to see that the function is affine there), one after the other.

    **Raises:** `ValueError` for a wrong argument, a == b, values not finite, or pre-activations that are not piecewise
    affine (another activation than ReLU, leaky ReLU or their like).

    Source: Hanin & Rolnick 2019 (Complexity of linear regions in deep networks), who count along lines.
    """
    params, (a, b) = _check.params("params", params), _inputs(preactivations, params, {"a": a, "b": b})
    if bool(jnp.all(a == b)):
        raise ValueError("b: expected another input than a, got the same")
    max_regions = _check.integer("max_regions", max_regions, 1)
    walk = _walk(preactivations, max_regions, params, a, b)
    if not walk.is_finite:
        raise ValueError(
            f"preactivations: expected finite values, got infinity or NaN near t = {float(walk.t):.6g}"
        )
    if walk.bend > _MAX_BEND * float(jnp.finfo(a.dtype).eps):
        raise ValueError(
            "preactivations: expected a piecewise affine function of the input, got one that bends by "
            f"{float(walk.bend):.1e} of its size inside a region"
        )
    is_full = walk.num_found > max_regions - 1
    return RegionsOnLine(
        breakpoints=np.asarray(walk.breakpoints[: min(int(walk.num_found), max_regions - 1)], float),
        reached=float(walk.breakpoints[max_regions - 1]) if is_full else 1.0,
        resolution=2 * _resolution(a.dtype),
    )


_MAX_BEND = 1e5  # in units of the rounding unit, with room for deep sums


def _resolution(dtype: Any) -> float:
    """Return how far behind a breakpoint the walk continues: so far that rounding does not change the sign."""
    return float(jnp.finfo(dtype).eps) ** (2 / 3)


class _Walk(NamedTuple):
    """Where the walk along the segment is.

    - `breakpoints`: a buffer of `max_regions`; `num_found`: how many are filled.
    - `t`: from where the walk continues, just behind the end of a region; `last`: the latest breakpoint.
    - `is_finite`: whether all values were finite; `bend`: the largest relative deviation from an affine function.
    """

    breakpoints: jax.Array
    num_found: jax.Array
    t: jax.Array
    last: jax.Array
    is_finite: jax.Array
    bend: jax.Array


@eqx.filter_jit
def _walk(
    preactivations: Preactivations, max_regions: int, params: Params, a: jax.Array, b: jax.Array
) -> _Walk:
    """Walk from region to region, from t = 0 to 1 or to the last place in the buffer."""

    def evaluate(t: jax.Array) -> jax.Array:
        return _flatten(preactivations(params, a + t * (b - a)))

    delta = jnp.asarray(_resolution(a.dtype), a.dtype)

    def continues(walk: _Walk) -> jax.Array:
        return (walk.t < 1) & (walk.num_found < max_regions) & walk.is_finite

    def cross_region(walk: _Walk) -> _Walk:
        t = walk.t
        z, slope = jax.jvp(evaluate, (t,), (jnp.ones_like(t),))
        crossing = t - z / jnp.where(slope == 0, 1, slope)
        end = jnp.min(jnp.where((slope != 0) & (crossing > t), crossing, jnp.inf), initial=jnp.inf)
        middle = (t + jnp.minimum(end, 1)) / 2
        affine = z + (middle - t) * slope
        size = jnp.max(jnp.abs(z), initial=0) + jnp.max(jnp.abs(slope), initial=0)
        deviation = jnp.max(jnp.abs(evaluate(middle) - affine), initial=0) / jnp.where(size > 0, size, 1)
        # A region too narrow for a point in it says nothing about bends.
        is_wide = middle - t > delta
        is_new = (end < 1) & (end - walk.last > 2 * delta)
        return _Walk(
            breakpoints=jnp.where(is_new, walk.breakpoints.at[walk.num_found].set(end), walk.breakpoints),
            num_found=walk.num_found + is_new,
            t=end + delta,
            last=jnp.where(is_new, end, walk.last),
            is_finite=jnp.all(jnp.isfinite(z)) & jnp.all(jnp.isfinite(slope)) & jnp.isfinite(deviation),
            bend=jnp.maximum(walk.bend, jnp.where(is_wide, deviation, 0)),
        )

    start = _Walk(
        breakpoints=jnp.full(max_regions, jnp.nan, a.dtype),
        num_found=jnp.zeros((), int),
        t=delta,
        last=jnp.full((), -jnp.inf, a.dtype),
        is_finite=jnp.array(True),
        bend=jnp.zeros((), a.dtype),
    )
    return jax.lax.while_loop(continues, cross_region, start)


@dataclasses.dataclass(frozen=True)
class RegionMap(AbstractResult):
    """The linear regions on a plane through three inputs, as a grid of m x m points sees them.

    - `labels`: 0 ... count - 1, one for each region, shape (m, m); row i is at `y[i]`, column j at `x[j]`.
    - `x`, `y`: coordinates of the grid, input distance, shape (m,).
    - `corners`: the three inputs in these coordinates, shape (3, 2); the first is (0, 0), the second on the x axis.

    Its picture shows one colour for each region, and the three inputs; `eomdl.plotting.plot` takes several, one panel for each.
    """

    labels: Int[np.ndarray, "m m"]
    x: Float[np.ndarray, " m"]
    y: Float[np.ndarray, " m"]
    corners: Float[np.ndarray, "3 2"]
    notes: tuple[Note, ...] = ()

    @override
    def _tables(self) -> tuple[Table, ...]:
        labels, points = np.unique(self.labels, return_counts=True)
        columns = {"region": labels, "part of the plane": points / self.labels.size}
        return (series_table(f"{self.count} linear regions seen on the plane", columns),)

    @property
    def count(self) -> int:
        """The number of regions seen: a lower bound, since those between grid points are missed."""
        return int(self.labels.max()) + 1


def region_map(
    preactivations: Preactivations,
    params: Params,
    corners: Any,
    *,
    resolution: int = 200,
    margin: float = 0.2,
    batch_size: int = 4096,
) -> RegionMap:
    """Return the linear regions of a ReLU network on the plane through three inputs.

    Every grid point's activation pattern $[z_i > 0]_i$ is compared bit by bit, so two points have one label
    exactly if they share a region. What the grid does not hit is not seen.

    **Arguments:** `preactivations` as in `count_regions_on_line`; `corners`: three inputs, shape (3, ...);
    `resolution`: grid points per side; `margin`: fraction of the triangle's width and height added on each side;
    `batch_size`: inputs taken at once.

    **Cost:** `resolution`$^2$ forward passes. **Memory:** one bit for each unit and grid point.

    **Raises:** `ValueError` for a wrong argument, or three inputs on one line.
    """
    params = _check.params("params", params)
    resolution = _check.integer("resolution", resolution, 2)
    batch_size = _check.integer("batch_size", batch_size, 1)
    corners = jnp.asarray(_check.numbers("corners", corners, "three inputs, shape (3, ...)"))
    if corners.shape[:1] != (3,):
        raise ValueError(f"corners: expected three inputs, shape (3, ...), got shape {corners.shape}")
    points = _inputs(preactivations, params, {f"corners[{i}]": corners[i] for i in range(3)})
    triangle = np.stack([np.ravel(np.asarray(point, float)) for point in points])
    edges = triangle[1:] - triangle[0]
    if np.linalg.matrix_rank(edges) < 2:
        raise ValueError("corners: expected three inputs that are not on one line, got such")
    axes, r = np.linalg.qr(edges.T)
    signs = np.sign(np.diagonal(r))
    axes = axes * signs
    coordinates = np.concatenate([np.zeros((1, 2)), (r * signs[:, None]).T]) + 0.0  # no -0
    low, high = coordinates.min(axis=0), coordinates.max(axis=0)
    added = float(_check.nonnegative_scalar("margin", margin)) * (high - low)
    x, y = np.linspace(low - added, high + added, resolution).T
    batch_size = min(batch_size, resolution)
    patterns = [
        np.asarray(_patterns_on_row(preactivations, batch_size, params, points[0], axes, x, height))
        for height in y
    ]
    _, labels = np.unique(np.concatenate(patterns), axis=0, return_inverse=True)
    return RegionMap(labels.reshape(resolution, resolution), x, y, coordinates)


@eqx.filter_jit
def _patterns_on_row(
    preactivations: Preactivations,
    batch_size: int,
    params: Params,
    origin: jax.Array,
    axes: Any,
    x: Any,
    y: Any,
) -> jax.Array:
    """Return the activation patterns along one row of the grid, packed into bytes."""
    axes = jnp.asarray(axes, origin.dtype)

    def pattern(u: jax.Array) -> jax.Array:
        point = origin + (axes @ jnp.stack([u, jnp.asarray(y, origin.dtype)])).reshape(origin.shape)
        return jnp.packbits(_flatten(preactivations(params, point)) > 0)

    return jax.lax.map(pattern, jnp.asarray(x, origin.dtype), batch_size=batch_size)


def _flatten(tree: Any) -> jax.Array:
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def _inputs(preactivations: Preactivations, params: Params, inputs: dict[str, Any]) -> list[jax.Array]:
    """Return the inputs as floating-point arrays of one shape that the function takes."""
    arrays: list[jax.Array] = []
    for name, x in inputs.items():
        x = jnp.asarray(_check.numbers(name, x, "an input, an array of finite numbers"))
        if arrays and x.shape != arrays[0].shape:
            raise ValueError(f"{name}: expected shape {arrays[0].shape}, that of the first, got {x.shape}")
        arrays.append(x)
    expected = "a function (params, one input) -> the hidden pre-activations"
    out = _check.shape_of(
        "preactivations", expected, preactivations, params, arrays[0], names=("params", next(iter(inputs)))
    )
    if not jax.tree.leaves(out) or not all(hasattr(leaf, "shape") for leaf in jax.tree.leaves(out)):
        raise ValueError(f"preactivations: expected {expected}, got output {out}")
    return arrays
