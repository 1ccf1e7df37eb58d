"""Whether the loss has a symmetry: a given one, or any that the shapes allow."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import override

from eomdl import _blocks, _check, _tree
from eomdl._result import AbstractResult, Note, Table
from eomdl._types import Args, Loss, Params
from eomdl.losses.penalties import WeightDecay
from eomdl.symmetry.groups import AbstractSymmetry, Scaling, Translation


_MOVES = (0.5, 0.05, 0.005)  # of the size of each array: the first with a finite gradient
_NOTES = (
    Note(
        "The loss is finite at no point near these parameters that has no zeros: what holds here may hold because of zeros only.",
        is_fault=True,
    ),
)


@dataclasses.dataclass(frozen=True)
class SymmetryCheck(AbstractResult):
    """Whether the loss has a symmetry: measured violations, 0 where it holds.

    - `holds`: whether both violations are below the tolerance.
    - `gradient`: cosine of the gradient and the symmetry's directions.
    - `value`: relative change of the loss under a finite transformation.
    - `tolerance`, `symmetry`: what was asked. `verdict`: the answer in words.
    """

    holds: bool
    gradient: float
    value: float
    tolerance: float
    symmetry: AbstractSymmetry
    notes: tuple[Note, ...] = ()

    @property
    @override
    def verdict(self) -> str:
        return (
            f"{self.symmetry.label}: the symmetry {'holds' if self.holds else 'does not hold'}: the loss changes by "
            f"{self.value:.1e} of itself under a finite transformation, and its gradient has a cosine of {self.gradient:.1e} with "
            f"the symmetry's direction (tolerance {self.tolerance:.1e})"
        )

    @override
    def _tables(self) -> tuple[Table, ...]:
        columns = ("symmetry", "holds", "violation by the gradient", "violation by the value", "tolerance")
        row = (self.symmetry.label, self.holds, self.gradient, self.value, self.tolerance)
        return (Table(columns, (row,), title="Symmetry of the loss"),)


def without_decay(loss: Loss) -> Loss:
    """Return the loss under `eomdl.WeightDecay`, which breaks every symmetry."""
    while isinstance(loss, WeightDecay):
        loss = loss.loss
    return loss


def check(
    loss: Loss,
    params: Params,
    symmetry: AbstractSymmetry,
    args: Args = None,
    tolerance: float | None = None,
) -> SymmetryCheck:
    """Check whether the loss is the same along the group, by its gradient and by a finite transformation.

    `eomdl.WeightDecay`, which breaks it, is taken off the loss first. Scale symmetry before a normalization with
    an epsilon holds up to that epsilon: the violation says how far. Zeros (biases at the start, a last layer of zeros) hide whether it
    holds, so that it is also checked at a moved point: the parameters plus normal numbers of half the root mean square of each array, or of
    all parameters for an array of zeros.

    **Arguments:** `symmetry`, an `eomdl.symmetry.Translation` or `eomdl.symmetry.Scaling`; `tolerance`, by default the square root of the
    machine epsilon.

    **Returns:** a result with `gradient`, the cosine of the gradient and the symmetry's directions; `value`, the relative change of
    the loss under a finite transformation, the larger ones of the two points; `holds`, whether both are at most the tolerance; `verdict`,
    the same in words; `notes`, if the loss is finite at no moved point.

    **Cost:** two gradients and five losses.

    **Raises:** `ValueError` for a wrong argument; for a block that does not exist, with the nearest names.
    """
    params = _check.params("params", params)
    expected = "an eomdl.symmetry.Translation or eomdl.symmetry.Scaling"
    _check.kind("symmetry", symmetry, AbstractSymmetry, expected)
    loss = without_decay(_check.function("loss", loss))
    _check.loss_is_scalar(loss, params, args)
    return _check_at_places(loss, symmetry, args, _places(loss, params, args), _tolerance(params, tolerance))


def _tolerance(params: Params, tolerance: float | None) -> float:
    if tolerance is None:
        return float(jnp.finfo(_tree.dtype(params)).eps) ** 0.5
    return float(_check.positive_scalar("tolerance", tolerance))


class _Place(NamedTuple):
    """Where a symmetry is tested, with the gradient of the loss there."""

    params: Params
    gradient: Params


def _places(loss: Loss, params: Params, args: Args) -> list[_Place]:
    """Return the parameters, and, if the loss is finite there, a point near them without their zeros."""
    places = [_Place(params, _gradient(loss, params, args))]
    for size in _MOVES:
        moved = _move(params, size)
        gradient = _gradient(loss, moved, args)
        if np.isfinite(_tree.norm(gradient) + _value(loss, moved, args)):
            return [*places, _Place(moved, gradient)]
    return places


@eqx.filter_jit
def _move(params: Params, size: float) -> Params:
    """Return the parameters plus normal numbers of a part of the size of each array, or of all for an array of zeros."""
    whole = _tree.norm(params) / np.sqrt(_tree.size(params))
    whole = jnp.where(whole > 0, whole, 1)

    def move(x: jax.Array, direction: jax.Array) -> jax.Array:
        own = jnp.sqrt(jnp.mean(x**2))
        return (x + size * jnp.where(own > 0, own, whole) * direction).astype(x.dtype)

    return jax.tree.map(move, params, _tree.random_normal(jax.random.key(1), params))


def _check_at_places(
    loss: Loss, symmetry: AbstractSymmetry, args: Args, places: list[_Place], tolerance: float
) -> SymmetryCheck:
    """Return the larger violations of all places."""
    value = violation = 0.0
    for params, gradient in places:
        charge = symmetry.charge(params)
        amount = jax.random.normal(jax.random.key(0), charge.shape, charge.dtype)
        before, after = (_value(loss, p, args) for p in (params, symmetry.transform(params, amount)))
        change = jnp.abs(after - before) / jnp.maximum(jnp.abs(before), jnp.finfo(before.dtype).tiny)
        value = float(np.fmax(value, change) if np.isfinite(change) else np.inf)
        violation = max(violation, float(symmetry.violation(params, gradient)))
    holds = value <= tolerance and violation <= tolerance
    return SymmetryCheck(holds, violation, value, tolerance, symmetry, _NOTES * (len(places) == 1))


@eqx.filter_jit
def _value(loss: Loss, params: Params, args: Args) -> jax.Array:
    return loss(params, args)


@eqx.filter_jit
def _gradient(loss: Loss, params: Params, args: Args) -> Params:
    return jax.grad(loss)(params, args)


def propose(
    loss: Loss, params: Params, args: Args = None, tolerance: float | None = None
) -> list[SymmetryCheck]:
    """Find the symmetries of single blocks and of pairs of layers that the loss has, by trying.

    Candidates are all that the shapes allow: translations of each array along each axis; scalings of each array, as a
    whole and by units, by itself and with the bias of its layer; and rescalings of an array (with such a bias) against
    another with as many units. Those whose gradient passes are confirmed by a finite transformation. Of
    a symmetry by units and the same as a whole only the first is returned, as it implies the second. Both are done at the parameters
    and at a moved point, as in `check`: what holds only because of zeros is not returned.

    It does not see symmetries of more than two layers, or of units that are no axis of an array. Name those yourself and
    `check`.

    **Returns:** a list of what `check` returns, all of which hold.

    **Cost:** two gradients, and four losses for each candidate that these do not rule out.

    **Raises:** `ValueError` for a wrong argument.
    """
    params = _check.params("params", params)
    loss = without_decay(_check.function("loss", loss))
    _check.loss_is_scalar(loss, params, args)
    places = _places(loss, params, args)
    tolerance = _tolerance(params, tolerance)
    found: list[SymmetryCheck] = []

    def holds(symmetry: AbstractSymmetry) -> bool:
        if any(float(symmetry.violation(*place)) > tolerance for place in places):
            return False
        result = _check_at_places(loss, symmetry, args, places, tolerance)
        found.extend([result] * result.holds)
        return result.holds

    leaves = dict(zip(_blocks.names(params), jax.tree.leaves(params), strict=True))
    used = {name: leaf for name, leaf in leaves.items() if not holds(Translation(name, None))}
    for name, leaf in used.items():
        for axis in range(leaf.ndim):
            if leaf.shape[axis] > 1:
                holds(Translation(name, axis))
    # A block that scales by itself is no half of a pair: it would pass with any other that does.
    left = {name: leaf for name, leaf in used.items() if not any(map(holds, _scalings(name, leaf, used)))}
    paired: set[frozenset] = set()
    for one, other in itertools.permutations(left, 2):
        for pair in _rescalings(one, other, left):
            blocks = frozenset(block for block, _ in pair.incoming + pair.outgoing)
            if blocks not in paired and holds(pair):
                paired.add(blocks)
    return found


def _axes(leaf: jax.Array) -> range:
    """Return the axes that may count units, the last first."""
    return range(leaf.ndim)[::-1]


def _biases(name: str, num_units: int, leaves: dict[str, jax.Array]) -> list[str]:
    """Return the vectors with as many entries under the same parent."""
    parent = name.rpartition(".")[0]
    return [
        other
        for other, leaf in leaves.items()
        if other != name and other.rpartition(".")[0] == parent and np.shape(leaf) == (num_units,)
    ]


def _scalings(name: str, leaf: jax.Array, leaves: dict[str, jax.Array]) -> Iterator[Scaling]:
    """Yield the scalings of one array by itself, by units and as a whole, and with a bias."""
    # Of a vector each entry would be a unit: that is a block that the loss does not use.
    axes = _axes(leaf) if leaf.ndim > 1 else []
    for axis in axes:
        yield Scaling([(name, axis)])
    yield Scaling([name])
    for axis in axes:
        for bias in _biases(name, leaf.shape[axis], leaves):
            yield Scaling([(name, axis), (bias, 0)])


def _rescalings(one: str, other: str, leaves: dict[str, jax.Array]) -> Iterator[Scaling]:
    """Yield the rescalings of one array, with and without a bias, against the other."""
    a, b = leaves[one], leaves[other]
    as_a_whole = [[one]]
    for axis in _axes(a):
        with_bias = [[one, bias] for bias in _biases(one, a.shape[axis], leaves) if bias != other]
        as_a_whole += with_bias
        for incoming in ([one], *with_bias):
            for unit in _axes(b):
                if b.shape[unit] == a.shape[axis] > 1:
                    yield Scaling([(x, axis if x == one else 0) for x in incoming], [(other, unit)])
    for incoming in as_a_whole:
        yield Scaling(incoming, [other])
