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
from jaxtyping import Float
from typing_extensions import override

from eomdl import _blocks, _check, _tree
from eomdl._blocks import Where
from eomdl._types import Args, Numbers, Observable, Params
from eomdl.observe.base import AbstractObservable


def whole(params: Params) -> Params:
    """Return all parameters as one block."""
    return params


class _BlockNorm(AbstractObservable):
    where: Where

    @override
    def __call__(self, params: Params, args: Args) -> Float[jax.Array, ""]:
        return _tree.norm(_blocks.select(params, self.where))


def block_norm(where: Where = whole) -> Observable:
    r"""Return the observable $|\theta_A|$, the Euclidean norm of a block. **Cost:** no gradients."""
    return _BlockNorm(_check.where("where", where))


class _ShiftComponent(AbstractObservable):
    where: Where
    axis: int = eqx.field(static=True)

    @override
    def __call__(self, params: Params, args: Args) -> jax.Array:
        block = _blocks.select(params, self.where)
        return jnp.sum(block, axis=self.axis) / np.sqrt(block.shape[self.axis])


def shift_component(where: Where, axis: int = -1) -> Observable:
    r"""Return the observable $p = \langle 1, \theta_A \rangle / \sqrt{m}$ along one axis of length m.

    The component of an array block along the all-ones direction of `axis`. The loss does not depend on it
    for the weights into a softmax, shape (inputs, classes), along the axis of the classes; the
    component then has shape (inputs,).

    **Raises:** `ValueError` for a wrong argument.
    """
    return _ShiftComponent(_check.where("where", where), _check.integer("axis", axis, -32, 31))


class _LieDerivative(AbstractObservable):
    observable: Observable
    flow: Callable[[Any, Params, Args], Params]

    @override
    def __call__(self, params: Params, args: Args) -> jax.Array:
        velocity = self.flow(0.0, params, args)
        return jax.jvp(lambda p: self.observable(p, args), (params,), (velocity,))[1]


def lie_derivative(observable: Observable, flow: Callable[[Any, Params, Args], Params]) -> Observable:
    r"""Return the observable $\frac{d}{dt} O(\theta(t)) = DO(\theta)[F(\theta)]$, the Lie derivative of an observable along a flow.

    The flow's prediction of the observable's change per unit of time, at the given point and without
    integrating. For flows whose state is only the parameters and that do not depend on time.

    **Cost:** one evaluation of the flow, and one derivative of the observable.
    """
    _check.function("flow", flow, "a flow, or a function (t, params, args) -> velocity", takes=3)
    if getattr(flow, "noise", None) is not None:
        raise ValueError(
            f"flow: expected one without noise, got {type(flow).__name__}: an observable has no derivative along a stochastic "
            "equation; the velocity of its mean is made of `flow.ito_drift` and `flow.diffusion` (guide Noise)"
        )
    return _LieDerivative(_check.observable("observable", observable), flow)


def decay_rate(values: Numbers, learning_rate: ArrayLike) -> Float[np.ndarray, " steps"]:
    r"""Return the decay rate per unit of time, step by step: $-\log(|v_{k+1}| / |v_k|) / \eta$.

    **Arguments:** `values` recorded at every step, shape (n, ...); for an array observable
    $|v_k|$ is the Euclidean norm of row k. **Returns:** shape (n - 1,).
    """
    values = np.asarray(_check.numbers("values", values, "finite numbers, shape (n, ...)"))
    if values.ndim == 0:
        raise ValueError(f"values: expected numbers at every step, shape (n, ...), got {values}")
    size = _tree.row_norms(values)
    return -np.diff(np.log(size)) / np.asarray(_check.positive_scalar("learning_rate", learning_rate))


def angle_per_step(block: Any) -> Float[np.ndarray, " steps"]:
    r"""Return the angle between successive saved steps of a block, in radians, shape (n - 1,).

    $2 \arcsin(|\hat\theta_{k+1} - \hat\theta_k| / 2)$ with unit vectors, which keeps its
    digits at small angles, where arccos does not. `block`: a pytree with leading axis n, such
    as `trajectory.params["w"]`.
    """
    leaves = jax.tree.leaves(block)
    if not leaves or len({np.shape(x)[:1] for x in leaves}) != 1 or np.ndim(leaves[0]) < 1:
        raise ValueError(f"block: expected arrays with one leading axis in common, got {_check.show(block)}")
    for leaf in leaves:
        _check.numbers("block", leaf, "a pytree of arrays of finite numbers")
    rows = _tree.rows(leaves)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return 2 * np.arcsin(np.clip(np.linalg.norm(np.diff(unit, axis=0), axis=1) / 2, 0, 1))
