"""What people write today: fixed steps in a `lax.scan`, the counter term by nested gradients."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


Field = Callable[[Any, Any], Any]


def gradient_flow(loss: Any) -> Field:
    r"""$-\nabla L$."""
    return lambda params, args: jax.tree.map(jnp.negative, jax.grad(loss)(params, args))


def modified_flow(loss: Any, eta: float) -> Field:
    r"""$-\nabla (L + \frac{\eta}{4} |\nabla L|^2)$: two nested gradients."""

    def modified(params, args):
        g = jax.grad(loss)(params, args)
        return loss(params, args) + eta / 4 * sum(jnp.vdot(x, x) for x in jax.tree.leaves(g))

    return gradient_flow(modified)


def _axpy(h: float, v: Any, x: Any) -> Any:
    return jax.tree.map(lambda a, b: a + h * b, x, v)


def euler_step(field: Field, x: Any, args: Any, h: float) -> Any:
    """One step of Euler's method of length h."""
    return _axpy(h, field(x, args), x)


def rk4_step(field: Field, x: Any, args: Any, h: float) -> Any:
    """One step of the classical Runge-Kutta method of order 4 of length h."""
    k1 = field(x, args)
    k2 = field(_axpy(h / 2, k1, x), args)
    k3 = field(_axpy(h / 2, k2, x), args)
    k4 = field(_axpy(h, k3, x), args)
    mean = jax.tree.map(lambda a, b, c, d: (a + 2 * b + 2 * c + d) / 6, k1, k2, k3, k4)
    return _axpy(h, mean, x)


@partial(jax.jit, static_argnames=("step", "field", "num_steps", "substeps"))
def integrate(
    step: Callable, field: Field, params: Any, args: Any, eta: float, num_steps: int, substeps: int
) -> Any:
    """The parameters before every step of gradient descent and at the end, leading axis num_steps + 1."""

    def one(x, _):
        def sub(x, _):
            return step(field, x, args, eta / substeps), None

        return jax.lax.scan(sub, x, None, length=substeps)[0], x

    last, path = jax.lax.scan(one, params, None, length=num_steps)
    return jax.tree.map(lambda p, x: jnp.concatenate([p, x[None]]), path, last)
