"""Linear regions of ReLU networks: counted along a line, and seen on a plane through data.

A network of ReLUs is affine in its input wherever no hidden pre-activation changes sign. A region is a set of inputs
with one activation pattern (which pre-activations are positive); it is convex.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from eomdl import _check
from eomdl._types import Params


Preactivations = Callable[[Params, Any], Any]  # (params, one input) -> all hidden pre-activations, any pytree


@dataclasses.dataclass(frozen=True)
class RegionsOnLine:
    """Linear regions along the segment from a to b.

    - `breakpoints`: where the pattern changes, rising in (0, 1), shape (count - 1,): the inputs $a + t (b - a)$.
    - `count`: number of regions.
    - `reached`: 1 if the whole segment was walked, else the t at which `max_regions` were found.
    - `resolution`: breakpoints closer than this in t are counted as one.
    """

    breakpoints: Float[np.ndarray, " k"]
    reached: float
    resolution: float

    @property
    def count(self) -> int:
        """Number of regions found: one more than breakpoints."""
        return len(self.breakpoints) + 1

    @property
    def message(self) -> str:
        """What to do if the count is not that of the whole segment. Empty if it is."""
        if self.reached == 1.0:
            return ""
        return (
            f"Stopped at t = {self.reached:.6g} with {self.count} regions found so far. Raise `max_regions`."
        )


def count_regions_on_line(
    preactivations: Preactivations, params: Params, a: Any, b: Any, *, max_regions: int = 4096
) -> RegionsOnLine:
    r"""Linear regions of a ReLU network along the segment from input a to input b, of any depth.

    From inside a region at t: there every pre-activation is affine, $z_i(t + s) = z_i + s \dot z_i$, with
    $\dot z$ from one Jacobian-vector product, so that the region ends at the smallest $t - z_i / \dot z_i$ beyond t. The walk
    goes on from just behind that. No sampling: a region is missed only if it is narrower than
    `resolution` = $2 \epsilon^{2/3}$ of the segment (7e-11; float32 5e-5). Units that cross together are one
    breakpoint, units that are 0 throughout none.

    **Arguments:**

    - `preactivations`: function `(params, x) -> array or pytree of arrays`, every hidden pre-activation of one
        input; compiled once for each function.
    - `a`, `b`: two inputs, of one shape. `max_regions`: the count at which to stop, as `message` then says.

    **Cost:** three forward passes a region (one of them to see that the function is affine there), one after the other.

    **Raises:** `ValueError` for a wrong argument, a == b, values not finite, or pre-activations that are not piecewise
    affine (another activation than ReLU, leaky ReLU or their like).

    Source: Hanin & Rolnick 2019 (Complexity of linear regions in deep networks), who count along lines.
    """
    params, (a, b) = _check.params("params", params), _inputs(preactivations, params, {"a": a, "b": b})
    if bool(jnp.all(a == b)):
        raise ValueError("b: expected another input than a, got the same")
    max_regions = _check.integer("max_regions", max_regions, 1)
    found, t, number, finite, bend = _walk(preactivations, max_regions, params, a, b)
    if not finite:
        raise ValueError(
            f"preactivations: expected finite values, got infinity or NaN near t = {float(t):.6g}"
        )
    if bend > _LARGEST_BEND * float(jnp.finfo(a.dtype).eps):
        raise ValueError(
            f"preactivations: expected a piecewise affine function of the input, got one that bends by {float(bend):.1e} "
            "of its size inside a region"
        )
    stopped = number > max_regions - 1
    return RegionsOnLine(
        np.asarray(found[: min(int(number), max_regions - 1)], float),
        float(found[max_regions - 1]) if stopped else 1.0,
        2 * _resolution(a.dtype),
    )


_LARGEST_BEND = 1e5  # of the rounding unit, with room for deep sums


def _resolution(dtype: Any) -> float:
    """How far behind a breakpoint the walk goes on: far enough that rounding does not change the sign."""
    return float(jnp.finfo(dtype).eps) ** (2 / 3)


@eqx.filter_jit
def _walk(
    preactivations: Preactivations, max_regions: int, params: Params, a: jax.Array, b: jax.Array
) -> tuple[jax.Array, ...]:
    """Breakpoints in a buffer of `max_regions`, the t reached, how many, whether all was finite, largest bend."""

    def z(t: jax.Array) -> jax.Array:
        return _flat(preactivations(params, a + t * (b - a)))

    delta = jnp.asarray(_resolution(a.dtype), a.dtype)

    def go_on(carry: tuple) -> jax.Array:
        _, t, number, finite, _, _ = carry
        return (t < 1) & (number < max_regions) & finite

    def next_region(carry: tuple) -> tuple:
        found, t, number, _, bend, last = carry
        here, slope = jax.jvp(z, (t,), (jnp.ones_like(t),))
        crossing = t - here / jnp.where(slope == 0, 1, slope)
        end = jnp.min(jnp.where((slope != 0) & (crossing > t), crossing, jnp.inf), initial=jnp.inf)
        middle = (t + jnp.minimum(end, 1)) / 2
        there, affine = z(middle), here + (middle - t) * slope
        # A region too narrow for a point in it says nothing about bends.
        wide = middle - t > delta
        size = jnp.max(jnp.abs(here), initial=0) + jnp.max(jnp.abs(slope), initial=0)
        off = jnp.max(jnp.abs(there - affine), initial=0) / jnp.where(size > 0, size, 1)
        bend = jnp.maximum(bend, jnp.where(wide, off, 0))
        finite = jnp.all(jnp.isfinite(here)) & jnp.all(jnp.isfinite(slope)) & jnp.isfinite(off)
        new = (end < 1) & (end - last > 2 * delta)
        found = jnp.where(new, found.at[number].set(end), found)
        return found, end + delta, number + new, finite, bend, jnp.where(new, end, last)

    start = (
        jnp.full(max_regions, jnp.nan, a.dtype),
        delta,
        jnp.zeros((), int),
        jnp.array(True),
        jnp.zeros((), a.dtype),
        jnp.full((), -jnp.inf, a.dtype),
    )
    found, t, number, finite, bend, _ = jax.lax.while_loop(go_on, next_region, start)
    return found, t, number, finite, bend


@dataclasses.dataclass(frozen=True)
class RegionMap:
    """Linear regions on a plane through three inputs, as a grid of m x m points sees them.

    - `labels`: 0 ... count - 1, one a region, shape (m, m); row i is at `y[i]`, column j at `x[j]`.
    - `x`, `y`: coordinates of the grid, input distance, shape (m,).
    - `corners`: the three inputs in these coordinates, shape (3, 2); the first is (0, 0), the second on the x axis.
    """

    labels: Int[np.ndarray, "m m"]
    x: Float[np.ndarray, " m"]
    y: Float[np.ndarray, " m"]
    corners: Float[np.ndarray, "3 2"]

    @property
    def count(self) -> int:
        """Number of regions seen: a lower bound, for those between grid points are missed."""
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
    """Linear regions of a ReLU network on the plane through three inputs.

    Every grid point's activation pattern $[z_i > 0]_i$ is compared bit by bit, so two points have one label
    exactly if they share a region. What the grid does not hit is not seen.

    **Arguments:** `preactivations` as in `count_regions_on_line`; `corners`: three inputs, shape (3, ...);
    `resolution`: grid points a side; `margin`: share of the triangle's width and height added on each side;
    `batch_size`: inputs taken at once.

    **Cost:** `resolution`$^2$ forward passes. **Memory:** one bit a unit and grid point.

    **Raises:** `ValueError` for a wrong argument, or three inputs on one line.
    """
    params = _check.params("params", params)
    resolution = _check.integer("resolution", resolution, 2)
    batch_size = _check.integer("batch_size", batch_size, 1)
    corners = jnp.asarray(_check.numbers("corners", corners, "three inputs, shape (3, ...)"))
    if corners.shape[:1] != (3,):
        raise ValueError(f"corners: expected three inputs, shape (3, ...), got shape {corners.shape}")
    points = _inputs(preactivations, params, {f"corners[{i}]": corners[i] for i in range(3)})
    p = np.stack([np.ravel(np.asarray(point, float)) for point in points])
    edges = p[1:] - p[0]
    if np.linalg.matrix_rank(edges) < 2:
        raise ValueError("corners: expected three inputs that are not on one line, got such")
    axes, r = np.linalg.qr(edges.T)
    signs = np.sign(np.diagonal(r))
    axes, places = axes * signs, np.concatenate([np.zeros((1, 2)), (r * signs[:, None]).T]) + 0.0  # no -0
    low, high = places.min(axis=0), places.max(axis=0)
    add = float(_check.nonnegative_scalar("margin", margin)) * (high - low)
    x, y = np.linspace(low - add, high + add, resolution).T
    patterns = [
        np.asarray(_pattern_rows(preactivations, min(batch_size, resolution), params, points[0], axes, x, at))
        for at in y
    ]
    _, labels = np.unique(np.concatenate(patterns), axis=0, return_inverse=True)
    return RegionMap(labels.reshape(resolution, resolution), x, y, places)


@eqx.filter_jit
def _pattern_rows(
    preactivations: Preactivations,
    batch_size: int,
    params: Params,
    origin: jax.Array,
    axes: Any,
    x: Any,
    y: Any,
) -> jax.Array:
    """Patterns along one row of the grid, packed into bytes."""
    axes = jnp.asarray(axes, origin.dtype)

    def pattern(u: jax.Array) -> jax.Array:
        at = origin + (axes @ jnp.stack([u, jnp.asarray(y, origin.dtype)])).reshape(origin.shape)
        return jnp.packbits(_flat(preactivations(params, at)) > 0)

    return jax.lax.map(pattern, jnp.asarray(x, origin.dtype), batch_size=batch_size)


def _flat(tree: Any) -> jax.Array:
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def _inputs(preactivations: Preactivations, params: Params, inputs: dict[str, Any]) -> list[jax.Array]:
    """Inputs as floating-point arrays of one shape that the function takes."""
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
