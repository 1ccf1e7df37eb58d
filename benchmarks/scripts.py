"""What people write today: fixed steps in a `lax.scan`, the counter term by nested gradients."""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp

from benchmarks.aliases import Args, Loss, Params


Field: TypeAlias = Callable[[Params, Args], Params]


def gradient_flow(loss: Loss) -> Field:
    r"""$-\nabla L$."""
    return lambda params, args: jax.tree.map(jnp.negative, jax.grad(loss)(params, args))


def modified_flow(loss: Loss, eta: float) -> Field:
    r"""$-\nabla (L + \frac{\eta}{4} |\nabla L|^2)$: two nested gradients."""

    def modified(params: Params, args: Args) -> jax.Array:
        g = jax.grad(loss)(params, args)
        return loss(params, args) + eta / 4 * sum(jnp.vdot(x, x) for x in jax.tree.leaves(g))

    return gradient_flow(modified)


def _axpy(h: float, v: Params, x: Params) -> Params:
    return jax.tree.map(lambda a, b: a + h * b, x, v)


def euler_step(field: Field, x: Params, args: Args, h: float) -> Params:
    """One step of Euler's method of length h."""
    return _axpy(h, field(x, args), x)


def rk4_step(field: Field, x: Params, args: Args, h: float) -> Params:
    """One step of the classical Runge-Kutta method of order 4 of length h."""
    k1 = field(x, args)
    k2 = field(_axpy(h / 2, k1, x), args)
    k3 = field(_axpy(h / 2, k2, x), args)
    k4 = field(_axpy(h, k3, x), args)
    mean = jax.tree.map(lambda a, b, c, d: (a + 2 * b + 2 * c + d) / 6, k1, k2, k3, k4)
    return _axpy(h, mean, x)


@partial(jax.jit, static_argnames=("step", "field", "num_steps", "substeps"))
def integrate(
    step: Callable, field: Field, params: Params, args: Args, eta: float, num_steps: int, substeps: int
) -> Params:
    """The parameters before every step of gradient descent and at the end, leading axis num_steps + 1."""

    def one(x: Params, _: None) -> tuple[Params, Params]:
        def sub(x: Params, _: None) -> tuple[Params, None]:
            return step(field, x, args, eta / substeps), None

        return jax.lax.scan(sub, x, None, length=substeps)[0], x

    last, path = jax.lax.scan(one, params, None, length=num_steps)
    return jax.tree.map(lambda p, x: jnp.concatenate([p, x[None]]), path, last)
