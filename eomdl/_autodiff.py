"""Derivatives of a loss, matrix-free.

Nested `jax.jvp` rather than `jax.experimental.jet`: it works for every function that
JAX can differentiate that often (relu, scan, `jax.checkpoint`, max-pool, ...), and XLA
merges what the nestings share. The first derivative of a gradient without a forward derivative
(a `custom_vjp` whose rule calls the function itself, as `odeint` does) is taken backwards.
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from eomdl import _tree
from eomdl._types import Args, Loss, Params, VectorField


class DescentField(eqx.Module):
    r"""$f(\theta) = -\nabla L(\theta)$, a function `(params, args) -> velocity` that costs one gradient."""

    loss: Loss

    def __call__(self, params: Params, args: Args) -> Params:
        """Return the velocity."""
        return _tree.scale(-1.0, jax.grad(self.loss)(params, args))


def descent_field(loss: Loss, args: Args) -> VectorField:
    r"""Return $f(\theta) = -\nabla L(\theta)$, a function that costs one gradient."""
    return lambda params: DescentField(loss)(params, args)


def jvp(f: Callable[[Any], Any], x: Any, v: Any) -> tuple[Any, Any]:
    r"""Return $f(x)$ and $f'(x) v$, forwards; where f has no forward derivative, backwards twice.

    The second way is the transpose of $u \mapsto f'(x)^\top u$, which is linear in u: about twice the cost.

    **Raises:** `ValueError` where neither way is there.
    """
    value, along = _both_ways(lambda: jax.jvp(f, (x,), (v,)), lambda: _backwards(f, x))
    return value, along(v) if callable(along) else along


def linearize(f: Callable[[Any], Any], x: Any) -> tuple[Any, Callable[[Any], Any]]:
    r"""Return $f(x)$ and $v \mapsto f'(x) v$, where what does not depend on v is computed once; the rest as `jvp`."""
    return _both_ways(lambda: _forwards(f, x), lambda: _backwards(f, x))


def _forwards(f: Callable[[Any], Any], x: Any) -> tuple[Any, Callable[[Any], Any]]:
    y, along = jax.linearize(f, x)
    if _holds(jax.make_jaxpr(along)(x).jaxpr, "custom_lin"):  # JAX says so only where it is compiled
        raise TypeError("a custom_vjp function has no forward derivative")
    return y, along


def _holds(jaxpr: Any, primitive: str) -> bool:
    """Whether an operation stands in a program or in those inside of it."""
    inner = [
        getattr(part, "jaxpr", part)
        for equation in jaxpr.eqns
        for part in jax.tree.leaves(tuple(equation.params.values()), is_leaf=_is_program)
        if _is_program(part)
    ]
    return any(e.primitive.name == primitive for e in jaxpr.eqns) or any(_holds(j, primitive) for j in inner)


def _is_program(part: Any) -> bool:
    return isinstance(part, ClosedJaxpr | Jaxpr)


def _backwards(f: Callable[[Any], Any], x: Any) -> tuple[Any, Callable[[Any], Any]]:
    y, pull = jax.vjp(f, x)
    transpose = jax.vjp(pull, y)[1]  # the point does not matter, as `pull` is linear
    return y, lambda v: transpose((v,))[0]


def _both_ways(forwards: Callable[[], Any], backwards: Callable[[], Any]) -> Any:
    try:
        return forwards()
    except TypeError as error:
        if not _is_backwards_only(error):
            raise
    try:
        return backwards()
    except (TypeError, ValueError, NotImplementedError) as error:
        if _is_backwards_only(error):  # inside of a forward derivative, which is taken backwards next
            raise
        raise ValueError(
            "loss: expected one whose gradient JAX can differentiate, got one with a `custom_vjp` that has no derivative "
            "of this order, neither forwards nor backwards. Of `diffrax.diffeqsolve` take `adjoint=diffrax.DirectAdjoint()`; "
            "of a function of your own `jax.custom_jvp`. Or take a flow that needs the gradient only: GradientFlow, or "
            f"InterpolatingFlow(optimizer_step(loss, optimizer), learning_rate, points=2). ({error!s:.200})"
        ) from error


def _is_backwards_only(error: Exception) -> bool:
    return isinstance(error, TypeError) and "custom_vjp" in str(error)


def hessian_vector_product(loss: Loss, params: Params, args: Args, vector: Params) -> Params:
    """Return $H v$, forward over reverse: about 2.7 gradients with the gradient itself."""
    return jvp(lambda p: jax.grad(loss)(p, args), params, vector)[1]


def hessian_operator(loss: Loss, params: Params, args: Args) -> Callable[[Params], Params]:
    r"""Return $v \mapsto H v$ for several v at one place: what does not depend on v is computed once, about 0.6 gradients.

    Each product then takes about 1.5 gradients. Over `MeanOverChunks` the memory stays that of a chunk.
    """
    return linearize(lambda p: jax.grad(loss)(p, args), params)[1]


def directional_derivative(f: Callable[[Any], Any], directions: Sequence[Any]) -> Callable[[Any], Any]:
    r"""Return $x \mapsto f^{(m)}(x)(v_1, \dots, v_m)$ for m = `len(directions)`."""
    for direction in directions:
        f = _derivative_along(f, direction)
    return f


def _derivative_along(f: Callable[[Any], Any], direction: Any) -> Callable[[Any], Any]:
    return lambda x: jvp(f, x, direction)[1]
