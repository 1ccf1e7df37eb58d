"""Does the loss have a symmetry? Asked of a named one, or of all that the shapes allow."""

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eomdl import _blocks, _check, _tree
from eomdl._types import Args, Loss, Params
from eomdl.losses import WeightDecay
from eomdl.symmetry.groups import AbstractSymmetry, Scaling, Translation


class SymmetryCheck(NamedTuple):
    """Whether the loss has a symmetry: measured violations, 0 where it holds.

    - `holds`: whether both violations are below the tolerance.
    - `gradient`: cosine of the gradient and the symmetry's directions.
    - `value`: relative change of the loss under a finite transformation.
    - `message`: the same in words.
    - `symmetry`: what was checked.
    """

    holds: bool
    gradient: float
    value: float
    message: str
    symmetry: AbstractSymmetry


def without_decay(loss: Loss) -> Loss:
    """The loss under `eomdl.WeightDecay`, which breaks every symmetry."""
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
    """Is the loss the same along the group, by its gradient and by a finite transformation?

    `eomdl.WeightDecay`, which breaks it, is taken off the loss first. Scale symmetry before a normalization with
    an epsilon holds up to that epsilon: the violation says how far.

    **Arguments:** `symmetry`, an `eomdl.symmetry.Translation` or `eomdl.symmetry.Scaling`; `tolerance`, by default the square root of the
    machine epsilon.

    **Cost:** one gradient and two losses.

    **Raises:** `ValueError` for a wrong argument; for a block that does not exist, with the nearest names.
    """
    params = _check.params("params", params)
    expected = "an eomdl.symmetry.Translation or eomdl.symmetry.Scaling"
    _check.kind("symmetry", symmetry, AbstractSymmetry, expected)
    loss = without_decay(_check.function("loss", loss))
    _check.loss_is_scalar(loss, params, args)
    return _checked(loss, params, symmetry, args, jax.grad(loss)(params, args), _tolerance(params, tolerance))


def _tolerance(params: Params, tolerance: float | None) -> float:
    if tolerance is None:
        return float(jnp.finfo(_tree.dtype(params)).eps) ** 0.5
    return float(_check.positive_scalar("tolerance", tolerance))


def _checked(
    loss: Loss, params: Params, symmetry: AbstractSymmetry, args: Args, gradient: Params, tolerance: float
) -> SymmetryCheck:
    charge = symmetry.charge(params)
    moved = symmetry.transform(params, jax.random.normal(jax.random.key(0), charge.shape, charge.dtype))
    before, after = loss(params, args), loss(moved, args)
    value = float(jnp.abs(after - before) / jnp.maximum(jnp.abs(before), jnp.finfo(before.dtype).tiny))
    violation = float(symmetry.violation(params, gradient))
    holds = value <= tolerance and violation <= tolerance
    message = (
        f"{symmetry.label}: the symmetry {'holds' if holds else 'does not hold'}: the loss changes by {value:.1e} of "
        f"itself under a finite transformation, and its gradient has a cosine of {violation:.1e} with the "
        f"symmetry's direction (tolerance {tolerance:.1e})"
    )
    return SymmetryCheck(holds, violation, value, message, symmetry)


@eqx.filter_jit
def _value(loss: Loss, params: Params, args: Args) -> jax.Array:
    return loss(params, args)


@eqx.filter_jit
def _gradient(loss: Loss, params: Params, args: Args) -> Params:
    return jax.grad(loss)(params, args)


def propose(
    loss: Loss, params: Params, args: Args = None, tolerance: float | None = None
) -> list[SymmetryCheck]:
    """The symmetries of single blocks and of pairs of layers that the loss has, found by trying.

    Candidates are all that the shapes allow: translations of each array along each axis, scalings of each array, as a
    whole and by units, by itself and with a bias beside it, and rescalings of an array (with such a bias) against
    another with as many units. Those whose gradient passes are confirmed by a finite transformation. Of
    one with units and the same as a whole only the first is returned, as it implies the second.

    What it cannot see: symmetries of more than two layers, or of units that lie across an axis in a way that is not an
    axis of the array. Name those yourself and `check`.

    **Returns:** a list of `SymmetryCheck`, all of which hold.

    **Cost:** one gradient, and one loss for each candidate that its gradient does not rule out.

    **Raises:** `ValueError` for a wrong argument.
    """
    params = _check.params("params", params)
    loss = without_decay(_check.function("loss", loss))
    _check.loss_is_scalar(loss, params, args)
    gradient = _gradient(loss, params, args)
    tolerance = _tolerance(params, tolerance)
    compiled = functools.partial(_value, loss)
    found: list[SymmetryCheck] = []

    def holds(symmetry: AbstractSymmetry) -> bool:
        if float(symmetry.violation(params, gradient)) > tolerance:
            return False
        check = _checked(compiled, params, symmetry, args, gradient, tolerance)
        found.extend([check] * check.holds)
        return check.holds

    leaves = dict(zip(_blocks.names(params), jax.tree.leaves(params), strict=True))
    seen = {name: leaf for name, leaf in leaves.items() if not holds(Translation(name, None))}
    for name, leaf in seen.items():
        for axis in range(leaf.ndim):
            if leaf.shape[axis] > 1:
                holds(Translation(name, axis))
    # What scales by itself is no half of a pair: it would pass with any other that does.
    free = {name: leaf for name, leaf in seen.items() if not any(map(holds, _alone(name, leaf, seen)))}
    paired: set[frozenset] = set()
    for one, other in itertools.permutations(free, 2):
        for pair in _pairs(one, other, free):
            blocks = frozenset(block for block, _ in pair.incoming + pair.outgoing)
            if blocks not in paired and holds(pair):
                paired.add(blocks)
    return found


def _units(leaf: jax.Array) -> list[int]:
    """Axes that may count units, the last first."""
    return list(range(leaf.ndim))[::-1]


def _biases(name: str, units: int, leaves: dict[str, jax.Array]) -> list[str]:
    """Vectors with as many entries under the same parent."""
    parent = name.rpartition(".")[0]
    return [
        other
        for other, leaf in leaves.items()
        if other != name and other.rpartition(".")[0] == parent and np.shape(leaf) == (units,)
    ]


def _alone(name: str, leaf: jax.Array, leaves: dict[str, jax.Array]) -> Iterator[Scaling]:
    # Of a vector each entry would be a unit: that is a block which is not seen.
    for axis in _units(leaf) if leaf.ndim > 1 else []:
        yield Scaling([(name, axis)])
    yield Scaling([name])
    for axis in _units(leaf) if leaf.ndim > 1 else []:
        for bias in _biases(name, leaf.shape[axis], leaves):
            yield Scaling([(name, axis), (bias, 0)])


def _pairs(one: str, other: str, leaves: dict[str, jax.Array]) -> Iterator[Scaling]:
    a, b = leaves[one], leaves[other]
    whole = [[one]]
    for axis in _units(a):
        sides = [[one], *([one, bias] for bias in _biases(one, a.shape[axis], leaves) if bias != other)]
        whole += sides[1:]
        for incoming in sides:
            for unit in _units(b):
                if b.shape[unit] == a.shape[axis] > 1:
                    yield Scaling([(x, axis if x == one else 0) for x in incoming], [(other, unit)])
    for incoming in whole:
        yield Scaling(incoming, [other])
