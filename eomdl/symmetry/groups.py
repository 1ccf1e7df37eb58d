"""Families of transformations that may leave the loss as it is, and their charges."""

import abc
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from typing_extensions import override

from eomdl import _blocks, _check, _tree
from eomdl._blocks import Where
from eomdl._types import Args, Array, Params
from eomdl.storage.values import make_storable


Member = Where | tuple[Where, int | None]


class AbstractSymmetry(eqx.Module):
    """A group acting on the parameters, with one charge for each of its one-parameter subgroups (units)."""

    @property
    @abc.abstractmethod
    def label(self) -> str:
        """The symmetry in words."""

    @abc.abstractmethod
    def charge(self, params: Params, args: Args = None) -> Float[Array, "*units"]:
        """Return the charge of every unit; this method is an observable.

        Gradient flow conserves it (without decay) if the loss has the symmetry.
        """

    @abc.abstractmethod
    def transform(self, params: Params, amount: jax.Array) -> Params:
        """Return the parameters after a finite transformation; an amount of 0 is the identity.

        `amount` has the shape of the charge, or is one number for all of it.

        **Raises:** `ValueError` for another amount.
        """

    @abc.abstractmethod
    def violation(self, params: Params, gradient: Params) -> Float[jax.Array, ""]:
        r"""Return the cosine of the gradient and the group's directions, 0 where the loss has the symmetry.

        $|\langle \partial_\alpha, \nabla f \rangle| / (|\partial_\alpha| |\nabla_A f|)$; 0 where the gradient vanishes.
        """


class Translation(AbstractSymmetry):
    r"""$f(\theta + c\, 1_A) = f(\theta)$: the same number added to a block along one axis.

    The weights into a softmax have it along the axis of the classes. The charge is the component
    $\langle 1, \theta_A \rangle / \sqrt m$ along that axis of length m, in the shape of the others. With `axis=None`, for
    a block that the loss does not use at all, it is every entry by itself.

    **Arguments:** `block`, an array of the parameters: its name, such as "head.w", or a function of the
    parameters; `axis`.
    """

    block: Where = eqx.field(static=True, converter=lambda b: _check.where("block", b))
    axis: int | None = eqx.field(
        default=-1,
        static=True,
        converter=lambda axis: None if axis is None else _check.integer("axis", axis, -32, 31),
    )

    @property
    @override
    def label(self) -> str:
        along = "in every entry" if self.axis is None else f"along axis {self.axis}"
        return f"translation of {_blocks.label(self.block)} {along}"

    def _array(self, params: Params) -> Array:
        block = _blocks.select(params, self.block)
        if not hasattr(block, "shape"):
            raise ValueError(f"block: expected one array of params, got {_check.show(block)}")
        if self.axis is not None and not -block.ndim <= self.axis < block.ndim:
            raise ValueError(
                f"axis: expected an axis of {_blocks.label(self.block)}, shape {block.shape}, got {self.axis}"
            )
        return block

    def _sum(self, block: Array) -> Array:
        if self.axis is None:
            return block
        return jnp.sum(block, axis=self.axis) / np.sqrt(block.shape[self.axis])

    @override
    def charge(self, params: Params, args: Args = None) -> Float[Array, "*units"]:
        del args
        return self._sum(self._array(params))

    @override
    def transform(self, params: Params, amount: jax.Array) -> Params:
        block, amount = self._array(params), _amount(self, params, amount)
        shift = amount if self.axis is None else jnp.expand_dims(amount, self.axis)
        return _replace(params, self.block, block + jnp.broadcast_to(shift, block.shape))

    @override
    def violation(self, params: Params, gradient: Params) -> Float[jax.Array, ""]:
        block = self._array(gradient)
        # The gradient of a block that is not used at all is small against the whole gradient.
        size = jnp.linalg.norm(block) if self.axis is not None else _tree.norm(gradient)
        return _ratio(jnp.linalg.norm(self._sum(block)), size)


class Scaling(AbstractSymmetry):
    r"""$f(a\, \theta_A, \theta_B / a) = f(\theta)$: scale symmetry of a block A, or rescale symmetry of A against B.

    Weights before a normalization have scale symmetry (`outgoing` empty). The weights and the bias into a homogeneous unit
    (ReLU, linear) have rescale symmetry against those out of it. The charge is $|\theta_A|^2 - |\theta_B|^2$.

    **Arguments:** `incoming` (A) and `outgoing` (B): lists of members, each a block by name or function or, for a
    charge of every unit by itself, `(block, axis)` with the axis that counts the units:
    `Scaling([("0.w", 1), ("0.b", 0)], [("1.w", 0)])` for a ReLU network with weights (in, out).

    **Raises:** `ValueError` for members that are no such list; where used, for blocks that do not exist or do not
    have the same number of units.
    """

    incoming: tuple[tuple[Where, int | None], ...] = eqx.field(static=True)
    outgoing: tuple[tuple[Where, int | None], ...] = eqx.field(static=True)

    def __init__(self, incoming: Sequence[Member], outgoing: Sequence[Member] = ()):
        self.incoming = _members("incoming", incoming)
        self.outgoing = _members("outgoing", outgoing)
        if not self.incoming:
            raise ValueError("incoming: expected at least one block, got none")
        by_unit = {axis is not None for _, axis in self.incoming + self.outgoing}
        if len(by_unit) > 1:
            raise ValueError(
                "incoming, outgoing: expected an axis of units for all members or for none, got "
                f"{self.incoming}, {self.outgoing}"
            )

    @property
    @override
    def label(self) -> str:
        def describe(members: tuple) -> str:
            return " and ".join(_blocks.label(b) + ("" if a is None else f" (axis {a})") for b, a in members)

        if not self.outgoing:
            return f"scale of {describe(self.incoming)}"
        return f"rescale of {describe(self.incoming)} against {describe(self.outgoing)}"

    @override
    def charge(self, params: Params, args: Args = None) -> Float[Array, "*units"]:
        del args
        return self.pair(params, params)

    def pair(self, a: Params, b: Params) -> Float[Array, "*units"]:
        r"""Return the product $\langle a, b \rangle_A - \langle a, b \rangle_B$ of every unit; it may be negative.

        The charge is the product of $\theta$ with itself.
        """
        incoming, outgoing = self._products(a, b)
        return sum(incoming) - sum(outgoing) if outgoing else sum(incoming)

    def _products(self, a: Params, b: Params) -> tuple[list, list]:
        def products(members: tuple) -> list:
            return [
                _product(_blocks.select(a, block), _blocks.select(b, block), block, axis)
                for block, axis in members
            ]

        incoming, outgoing = products(self.incoming), products(self.outgoing)
        shapes = {p.shape for p in (*incoming, *outgoing)}
        if len(shapes) > 1:
            raise ValueError(
                f"incoming, outgoing: expected one number of units, got {sorted(shapes)} in {self.label}"
            )
        return incoming, outgoing

    @override
    def transform(self, params: Params, amount: jax.Array) -> Params:
        amount = _amount(self, params, amount)
        # A is multiplied by e^amount, B divided by it.
        for members, sign in ((self.incoming, 1.0), (self.outgoing, -1.0)):
            for block, axis in members:
                factor = jnp.exp(sign * amount)

                def scale(leaf: jax.Array, factor: Any = factor, axis: Any = axis) -> jax.Array:
                    if axis is None:
                        return factor * leaf
                    others = tuple(i for i in range(leaf.ndim) if i != axis % leaf.ndim)
                    return jnp.expand_dims(factor, others) * leaf

                params = _replace(params, block, jax.tree.map(scale, _blocks.select(params, block)))
        return params

    @override
    def violation(self, params: Params, gradient: Params) -> Float[jax.Array, ""]:
        square_params = sum(sum(side) for side in self._products(params, params))
        square_gradient = sum(sum(side) for side in self._products(gradient, gradient))
        return _ratio(
            jnp.linalg.norm(jnp.atleast_1d(self.pair(params, gradient))),
            jnp.sqrt(jnp.sum(square_params * square_gradient)),
        )


def _amount(symmetry: AbstractSymmetry, params: Params, amount: Any) -> jax.Array:
    """Return a finite amount in the shape of the charge."""
    shape = jax.eval_shape(symmetry.charge, _check.params("params", params)).shape
    amount = jnp.asarray(_check.numbers("amount", amount, "finite numbers"))
    if amount.shape not in ((), shape):
        raise ValueError(
            f"amount: expected the shape of the charge, {shape}, or one number, got {amount.shape}"
        )
    return jnp.broadcast_to(amount, shape)


def _members(name: str, members: Any) -> tuple:
    if isinstance(members, str) or not isinstance(members, Sequence):
        raise ValueError(f"{name}: expected a list of blocks or (block, axis), got {_check.show(members)}")
    pairs = []
    for member in members:
        pair = member if isinstance(member, tuple) else (member, None)
        is_block = len(pair) == 2 and (isinstance(pair[0], str) or callable(pair[0]))
        if not is_block or not (
            pair[1] is None or (isinstance(pair[1], int) and not isinstance(pair[1], bool))
        ):
            raise ValueError(
                f"{name}: expected a list of blocks or (block, axis), got {_check.show(member)} in it"
            )
        pairs.append(pair)
    return tuple(pairs)


def _product(a: Any, b: Any, block: Where, axis: int | None) -> jax.Array:
    if axis is None:
        return _tree.vdot(a, b)
    if not hasattr(a, "shape") or not -a.ndim <= axis < a.ndim:
        raise ValueError(
            f"axis: expected an axis of the array {_blocks.label(block)}, got {axis} for {_check.show(a)}"
        )
    others = tuple(i for i in range(a.ndim) if i != axis % a.ndim)
    return jnp.sum(a * b, axis=others)


def _replace(params: Params, where: Where, new: Any) -> Params:
    return eqx.tree_at(lambda p: _blocks.select(p, where), params, new)


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    return jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1), 0.0)


make_storable(Translation)
make_storable(Scaling)
