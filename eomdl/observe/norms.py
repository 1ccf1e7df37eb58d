"""Norms and components of blocks of the parameters, and how fast they change.

A block is named by the keys on its path, "hidden.w", or given by a function
`where(params) -> subtree`, as in `equinox.tree_at`.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from eomdl import _blocks, _check, _tree
from eomdl._blocks import Where
from eomdl._types import Args, Observable, Params


def whole(params: Params) -> Params:
    """The block of all parameters."""
    return params


class _BlockNorm(eqx.Module):
    where: Where

    def __call__(self, params: Params, args: Args) -> jax.Array:
        return _tree.norm(_blocks.select(params, self.where))


def block_norm(where: Where = whole) -> Observable:
    """Observable $|\\theta_A|$, the Euclidean norm of a block. Cost: none to speak of."""
    return _BlockNorm(where)


class _ShiftComponent(eqx.Module):
    where: Where
    axis: int = eqx.field(static=True)

    def __call__(self, params: Params, args: Args) -> jax.Array:
        block = _blocks.select(params, self.where)
        return jnp.sum(block, axis=self.axis) / np.sqrt(block.shape[self.axis])


def shift_component(where: Where, axis: int = -1) -> Observable:
    """Observable $p = \\langle 1, \\theta_A \\rangle / \\sqrt{m}$ along one axis of length m.

    The component of an array block along the all-ones direction of `axis`. For the
    weights into a softmax, shape (inputs, classes), with the axis of the classes: the
    component that the loss does not see, shape (inputs,).
    """
    return _ShiftComponent(where, axis)


class _LieDerivative(eqx.Module):
    observable: Observable
    flow: Callable[[Any, Params, Args], Params]

    def __call__(self, params: Params, args: Args) -> jax.Array:
        velocity = self.flow(0.0, params, args)
        return jax.jvp(lambda p: self.observable(p, args), (params,), (velocity,))[1]


def lie_derivative(observable: Observable, flow: Callable[[Any, Params, Args], Params]) -> Observable:
    """Observable $\\frac{d}{dt} O(\\theta(t)) = DO(\\theta)[F(\\theta)]$ along a flow, now.

    What the flow predicts for the observable's velocity, per unit of time, at the given
    point and without integrating. Cost: one evaluation of the flow. For flows whose state
    is the parameters only and that do not depend on time.
    """
    return _LieDerivative(observable, flow)


def decay_rate(values: ArrayLike, learning_rate: ArrayLike) -> np.ndarray:
    """Decay rate per unit of time, step by step: $-\\log(|v_{k+1}| / |v_k|) / \\eta$.

    **Arguments:** `values` recorded at every step, shape (n, ...); for an array observable
    $|v_k|$ is the Euclidean norm of row k. **Returns:** shape (n - 1,).
    """
    values = np.asarray(values)
    size = np.linalg.norm(values.reshape(len(values), -1), axis=1)
    return -np.diff(np.log(size)) / np.asarray(_check.positive_scalar("learning_rate", learning_rate))


def angle_per_step(block: Any) -> np.ndarray:
    """Angle between successive rows of a saved block, in radians, shape (n - 1,).

    $2 \\arcsin(|\\hat\\theta_{k+1} - \\hat\\theta_k| / 2)$ with unit vectors, which keeps its
    digits at small angles where arccos does not. `block`: pytree with leading axis n, such
    as `where(trajectory.params)`.
    """
    rows = np.concatenate([np.reshape(x, (len(x), -1)) for x in jax.tree.leaves(block)], axis=1)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return 2 * np.arcsin(np.clip(np.linalg.norm(np.diff(unit, axis=0), axis=1) / 2, 0, 1))
