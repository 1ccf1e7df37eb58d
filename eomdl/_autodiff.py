"""Derivatives of a loss, matrix-free.

Nested `jax.jvp` rather than `jax.experimental.jet`: it works for every function that
JAX can differentiate that often (relu, scan, `jax.checkpoint`, max-pool, ...), and XLA
merges what the nestings share.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from eomdl import _tree
from eomdl._types import Args, Loss, Params, VectorField


def descent_field(loss: Loss, args: Args) -> VectorField:
    r"""Return $f(\theta) = -\nabla L(\theta)$, a function that costs one gradient."""
    return lambda params: _tree.scale(-1.0, jax.grad(loss)(params, args))


def hessian_vector_product(loss: Loss, params: Params, args: Args, vector: Params) -> Params:
    """Return $H v$, forward over reverse: about 2.7 gradients with the gradient itself."""
    return jax.jvp(lambda p: jax.grad(loss)(p, args), (params,), (vector,))[1]


def hessian_operator(loss: Loss, params: Params, args: Args) -> Callable[[Params], Params]:
    r"""Return $v \mapsto H v$ for several v at one place: what does not depend on v is computed once, about 0.6 gradients.

    Each product then takes about 1.5 gradients. Over `MeanOverChunks` the memory stays that of a chunk.
    """
    return jax.linearize(lambda p: jax.grad(loss)(p, args), params)[1]


def directional_derivative(f: Callable[[Any], Any], directions: Sequence[Any]) -> Callable[[Any], Any]:
    r"""Return $x \mapsto f^{(m)}(x)(v_1, \dots, v_m)$ for m = `len(directions)`."""
    for direction in directions:
        f = _derivative_along(f, direction)
    return f


def _derivative_along(f: Callable[[Any], Any], direction: Any) -> Callable[[Any], Any]:
    return lambda x: jax.jvp(f, (x,), (direction,))[1]
