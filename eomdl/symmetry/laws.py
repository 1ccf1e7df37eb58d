r"""What symmetry of the loss says about weight norms, in closed form.

$L = f + \frac{\lambda}{2}|\theta|^2$, learning rate $\eta$. Laws from Kunin et al. 2021
(arXiv 2012.04728) and Miyagawa 2022 (arXiv 2210.15898), and the exact ones of gradient descent.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float

from eomdl import _check
from eomdl._types import Array, Numbers


def translation_decay_rate(
    learning_rate: ArrayLike, weight_decay: ArrayLike, order: int | None
) -> Float[jax.Array, ""]:
    r"""Return the decay rate of the component along a direction that the loss does not depend on.

    The Hessian of L is $\lambda$ along it, so the equation of motion with n counter terms
    predicts $\sum_{j=1}^{n+1} \eta^{j-1} \lambda^j / j$: gradient flow (n = 0) says
    $\lambda$, one counter term $\lambda + \eta\lambda^2/2$. Gradient descent itself, and
    the limit of the series, is $-\log(1 - \eta\lambda)/\eta$: `order=None`.

    **Returns:** rate per unit of time. **Raises:** `ValueError` for a wrong argument.
    """
    eta = _check.positive_scalar("learning_rate", learning_rate)
    decay = _check.nonnegative_scalar("weight_decay", weight_decay)
    if order is None:
        return -jnp.log1p(-eta * decay) / eta
    order = _check.integer("order", order, 0, 64)
    return jnp.sum(jnp.stack([eta ** (j - 1) * decay**j / j for j in range(1, order + 2)]))


def scale_norm_after_step(
    norm: Numbers, gradient_norm: Numbers, learning_rate: Numbers, weight_decay: Numbers
) -> Float[jax.Array, "..."]:
    r"""Return the norm of a scale-invariant block after one step of gradient descent, exactly.

    $|\theta|^2_{k+1} = (1 - \eta\lambda)^2 |\theta|^2_k + \eta^2 |\nabla f|^2$, since
    $\langle \theta_A, \nabla_A f \rangle = 0$. `gradient_norm` is that of f, without decay.
    """
    norm, gradient_norm = _norms(norm, gradient_norm)
    learning_rate, weight_decay = _rates(learning_rate, weight_decay)
    return jnp.hypot((1 - learning_rate * weight_decay) * norm, learning_rate * gradient_norm)


def scale_norm_rate(
    norm: Numbers, gradient_norm: Numbers, learning_rate: Numbers, weight_decay: Numbers, order: int
) -> ArrayLike:
    r"""Return $\frac{d}{dt} \log |\theta_A|^2$ of a scale-invariant block, in closed form.

    Gradient flow (order 0): $-2\lambda$. One counter term (order 1):
    $-(2\lambda + \eta\lambda^2) + \eta |\nabla_A f|^2 / |\theta_A|^2$, whatever other
    parameters f has. For higher orders use `eomdl.observe.lie_derivative`.

    **Raises:** `ValueError` for an order other than 0 and 1.
    """
    norm, gradient_norm = _norms(norm, gradient_norm)
    learning_rate, weight_decay = _rates(learning_rate, weight_decay)
    if _check.integer("order", order, 0) > 1:
        raise ValueError(
            f"order: expected 0 or 1 (eomdl.observe.lie_derivative does the others), got {order}"
        )
    if order == 0:
        return jnp.broadcast_to(-2.0 * jnp.asarray(weight_decay), jnp.shape(norm))
    decay = 2 * weight_decay + learning_rate * weight_decay**2
    return -decay + learning_rate * (gradient_norm / norm) ** 2


def equilibrium_norm(
    norm: Numbers,
    gradient_norm: Numbers,
    learning_rate: Numbers,
    weight_decay: Numbers,
    momentum: Numbers = 0.0,
) -> Float[jax.Array, "..."]:
    r"""Return the norm at which decay and the growth from discreteness balance in a scale-invariant block.

    $$r^4 = \frac{\eta c^2}{\lambda (1 - \beta) (2 - \eta\lambda / (1 + \beta))}, \qquad c = |\theta_A| |\nabla f|,$$

    where scaling the block leaves c as it is. With momentum $\beta$ it takes the gradient to be uncorrelated with
    the last update (Wan et al. 2021, arXiv 2006.08419); without, it is exact. Gradient flow has no such
    balance: its norm decays to 0. The angle per step at this norm is `equilibrium_angle`.
    """
    norm, gradient_norm = _norms(norm, gradient_norm)
    learning_rate = _check.positive_numbers("learning_rate", learning_rate)
    weight_decay = _check.positive_numbers("weight_decay", weight_decay)
    momentum = _check.fractions("momentum", momentum)
    c = norm * gradient_norm
    balance = 2 - learning_rate * weight_decay / (1 + momentum)
    return jnp.asarray((learning_rate * c**2 / (weight_decay * (1 - momentum) * balance)) ** 0.25)


def equilibrium_angle(
    learning_rate: Numbers, weight_decay: Numbers, momentum: Numbers = 0.0
) -> Float[jax.Array, "..."]:
    r"""Return the angle per step at the equilibrium norm: $\cos\alpha = 1 - \eta\lambda / (1 + \beta)$.

    About $\sqrt{2\eta\lambda / (1 + \beta)}$ (Wan et al. 2021, arXiv 2006.08419). It needs no assumption on the gradient: at
    a constant norm it follows from the exact law of `eomdl.symmetry.conservation`.
    """
    learning_rate, weight_decay = _rates(learning_rate, weight_decay)
    return jnp.arccos(1 - learning_rate * weight_decay / (1 + _check.fractions("momentum", momentum)))


def effective_learning_rate(
    norm: Numbers, learning_rate: Numbers, momentum: Numbers = 0.0
) -> Float[jax.Array, "..."]:
    r"""Return $\eta_e = \eta / ((1 - \beta) |\theta_A|^2)$, the learning rate of the direction of a scale-invariant block.

    $f(\theta_A) = f(\theta_A / |\theta_A|)$, whose gradient is $1/|\theta_A|$ of that on the unit sphere, where a step of the
    direction is another $1/|\theta_A|$ (Hoffer et al. 2018, arXiv 1803.01814).
    """
    learning_rate = _check.positive_numbers("learning_rate", learning_rate)
    norm = _check.positive_numbers("norm", norm)
    return jnp.asarray(learning_rate / ((1 - _check.fractions("momentum", momentum)) * norm**2))


def _norms(norm: Numbers, gradient_norm: Numbers) -> tuple[Array, Array]:
    return _check.positive_numbers("norm", norm), _check.nonnegative_numbers("gradient_norm", gradient_norm)


def _rates(learning_rate: Numbers, weight_decay: Numbers) -> tuple[Array, Array]:
    rates = _check.positive_numbers("learning_rate", learning_rate)
    return rates, _check.nonnegative_numbers("weight_decay", weight_decay)
