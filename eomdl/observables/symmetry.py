"""What symmetry of the loss says about the weights, and whether it holds.

$L = f + \\frac{\\lambda}{2}|\\theta|^2$, learning rate $\\eta$. Laws from Kunin et al. 2021
(arXiv 2012.04728) and Miyagawa 2022 (arXiv 2210.15898); with GD's exact ones beside them.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from eomdl import _check, _tree
from eomdl._types import Args, Loss, Params
from eomdl.losses import WeightDecay
from eomdl.observables.norms import Where


def translation_decay_rate(learning_rate: ArrayLike, weight_decay: ArrayLike, order: int | None) -> jax.Array:
    """Decay rate of the component along a direction that the loss does not see.

    The Hessian of L is $\\lambda$ along it, so the equation of motion with n counter terms
    predicts $\\sum_{j=1}^{n+1} \\eta^{j-1} \\lambda^j / j$: gradient flow (n = 0) says
    $\\lambda$, one counter term $\\lambda + \\eta\\lambda^2/2$. Gradient descent itself, and
    the limit of the series, is $-\\log(1 - \\eta\\lambda)/\\eta$: `order=None`.

    **Returns:** rate per unit of time. **Raises:** `ValueError` for a wrong argument.
    """
    eta = _check.positive_scalar("learning_rate", learning_rate)
    decay = _check.nonnegative_scalar("weight_decay", weight_decay)
    if order is None:
        return -jnp.log1p(-eta * decay) / eta
    order = _check.integer("order", order, 0)
    return jnp.sum(jnp.stack([eta ** (j - 1) * decay**j / j for j in range(1, order + 2)]))


def scale_norm_after_step(
    norm: ArrayLike, gradient_norm: ArrayLike, learning_rate: ArrayLike, weight_decay: ArrayLike
) -> ArrayLike:
    """Norm of a scale-invariant block after one step of gradient descent, exactly.

    $|\\theta|^2_{k+1} = (1 - \\eta\\lambda)^2 |\\theta|^2_k + \\eta^2 |\\nabla f|^2$, since
    $\\langle \\theta_A, \\nabla_A f \\rangle = 0$. `gradient_norm` is that of f, without decay.
    """
    return jnp.hypot((1 - learning_rate * weight_decay) * norm, learning_rate * gradient_norm)


def scale_norm_rate(
    norm: ArrayLike, gradient_norm: ArrayLike, learning_rate: ArrayLike, weight_decay: ArrayLike, order: int
) -> ArrayLike:
    """$\\frac{d}{dt} \\log |\\theta_A|^2$ of a scale-invariant block, in closed form.

    Gradient flow (order 0): $-2\\lambda$. One counter term (order 1):
    $-(2\\lambda + \\eta\\lambda^2) + \\eta |\\nabla_A f|^2 / |\\theta_A|^2$, whatever other
    parameters f has. For higher orders use `eomdl.rate`.

    **Raises:** `ValueError` for an order other than 0 and 1.
    """
    if order == 0:
        return jnp.broadcast_to(-2.0 * jnp.asarray(weight_decay), jnp.shape(norm))
    if order == 1:
        decay = 2 * weight_decay + learning_rate * weight_decay**2
        return -decay + learning_rate * (gradient_norm / norm) ** 2
    raise ValueError(f"order: expected 0 or 1 (eomdl.rate does the others), got {order!r}")


def equilibrium_norm(
    norm: ArrayLike, gradient_norm: ArrayLike, learning_rate: ArrayLike, weight_decay: ArrayLike
) -> jax.Array:
    """Norm at which decay and the growth from discreteness balance in a scale-invariant block.

    $r^4 = \\eta c^2 / (\\lambda (2 - \\eta\\lambda))$ with $c = |\\theta_A| |\\nabla f|$, which
    scaling the block leaves as it is. Gradient flow has no such balance: its norm decays
    to 0. At it the angle per step is `equilibrium_angle`.
    """
    c = jnp.asarray(norm) * gradient_norm
    return jnp.asarray(learning_rate * c**2 / (weight_decay * (2 - learning_rate * weight_decay))) ** 0.25


def equilibrium_angle(learning_rate: ArrayLike, weight_decay: ArrayLike) -> jax.Array:
    """Angle per step at the equilibrium norm: $\\cos\\alpha = 1 - \\eta\\lambda$.

    About $\\sqrt{2\\eta\\lambda}$ (Wan et al. 2021, arXiv 2006.08419).
    """
    return jnp.arccos(1 - jnp.asarray(learning_rate) * weight_decay)


class SymmetryCheck(NamedTuple):
    """Whether a block has a symmetry: measured violations, 0 where it holds.

    - `holds`: whether both violations are below the tolerance.
    - `gradient`: cosine of $\\nabla_A f$ and the symmetry's direction (its largest entry
        where there are several directions); nan where the gradient vanishes.
    - `value`: relative change of the loss under a finite transformation.
    - `message`: the same in words.
    """

    holds: bool
    gradient: float
    value: float
    message: str


def check_translation(
    loss: Loss,
    params: Params,
    where: Where,
    axis: int = -1,
    args: Args = None,
    tolerance: float | None = None,
) -> SymmetryCheck:
    """Does $f(\\theta + c 1_A) = f(\\theta)$ hold for the block, along `axis`?

    True of the weights into a softmax along the axis of the classes, c being any vector
    over the other axes. `eomdl.WeightDecay`, which breaks it, is taken off the loss first.
    `tolerance` defaults to the square root of the machine epsilon. Cost: one gradient and
    two losses.
    """
    block = where(params)
    if not hasattr(block, "shape") or not -block.ndim <= axis < block.ndim:
        raise ValueError(f"axis: expected an axis of the array where(params), got {axis} for {block!r:.80}")
    shape = [1 if i == axis % block.ndim else n for i, n in enumerate(block.shape)]
    shift = jax.random.normal(jax.random.key(0), shape, block.dtype)

    def violation(gradient: jax.Array) -> jax.Array:
        return jnp.linalg.norm(jnp.sum(gradient, axis=axis)) / (
            np.sqrt(gradient.shape[axis]) * jnp.linalg.norm(gradient)
        )

    return _checked("translation", loss, params, where, args, block + shift, violation, tolerance)


def check_scale(
    loss: Loss, params: Params, where: Where, args: Args = None, tolerance: float | None = None
) -> SymmetryCheck:
    """Does $f(c\\,\\theta_A) = f(\\theta_A)$ hold for the block?

    True of weights before a normalization, up to its epsilon. Else as `check_translation`.
    """
    block = where(params)

    def violation(gradient: Any) -> jax.Array:
        return jnp.abs(_tree.vdot(gradient, block)) / (_tree.norm(gradient) * _tree.norm(block))

    return _checked("scale", loss, params, where, args, _tree.scale(2.0, block), violation, tolerance)


def _checked(kind, loss, params, where, args, moved, violation, tolerance) -> SymmetryCheck:
    params = _check.params("params", params)
    while isinstance(loss, WeightDecay):
        loss = loss.loss
    _check.loss_is_scalar(loss, params, args)
    if tolerance is None:
        tolerance = float(jnp.finfo(_tree.dtype(params)).eps) ** 0.5
    before = loss(params, args)
    after = loss(eqx.tree_at(where, params, moved), args)
    value = float(jnp.abs(after - before) / jnp.maximum(jnp.abs(before), jnp.finfo(before.dtype).tiny))
    gradient = float(violation(where(jax.grad(loss)(params, args))))
    holds = value <= tolerance and not gradient > tolerance
    message = (
        f"{kind} symmetry {'holds' if holds else 'does not hold'}: the loss changes by {value:.1e} of itself "
        f"under a finite change, and its gradient has a cosine of {gradient:.1e} with the symmetry's "
        f"direction (tolerance {tolerance:.1e})"
    )
    return SymmetryCheck(holds, gradient, value, message)
