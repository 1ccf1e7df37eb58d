"""Third derivatives of a loss contracted with vectors: how the curvature changes."""

import jax

from eomdl import _check
from eomdl._autodiff import directional_derivative
from eomdl._types import Args, Loss, Params


def third_derivative(loss: Loss, params: Params, args: Args, u: Params, v: Params) -> Params:
    r"""Return $T[u, v] = \nabla_\theta \big(u^\top H(\theta)\, v\big)$, the third derivative contracted with two vectors.

    ```python
    change = eomdl.curvature.third_derivative(loss, params, data, u, v)
    ```

    H is the Hessian, and u and v are held fixed. T is linear and symmetric in u and v, and its inner product with a third
    vector is symmetric in all three.

    **Arguments:** `u`, `v`: pytrees like `params`. **Returns:** a pytree like `params`.

    **Cost:** about 6 gradients (two `jax.jvp` over one `jax.grad`), and the memory of about 4.

    **Raises:** `ValueError` for a wrong argument.
    """
    params = _check.params("params", params)
    _check.loss_is_scalar(loss, params, args)
    for name, vector in {"u": u, "v": v}.items():
        _check.same_structure(name, _check.params(name, vector), "params", params)
    return directional_derivative(lambda p: jax.grad(loss)(p, args), (u, v))(params)


def eigenvalue_gradient(loss: Loss, params: Params, args: Args, vector: Params) -> Params:
    r"""Return $\nabla_\theta \lambda = T[u, u]$, the gradient of a simple eigenvalue of the Hessian with unit eigenvector u.

    ```python
    top = eomdl.curvature.eigenpairs(loss, params, data, 1)
    vector = jax.tree.map(lambda leaf: leaf[0], top.vectors)
    ascent = eomdl.curvature.eigenvalue_gradient(loss, params, data, vector)
    ```

    Where two eigenvalues meet neither has a gradient; the mean of their two is that of their mean. For
    a pair of $P^{-1} H$, with P held fixed and $u^\top P u = 1$, the same formula holds.

    **Arguments:** `vector`: u, a pytree like `params`. **Returns:** a pytree like `params`.

    **Cost:** that of `third_derivative`. **Raises:** `ValueError` for a wrong argument.
    """
    params = _check.params("params", params)
    _check.same_structure("vector", _check.params("vector", vector), "params", params)
    return third_derivative(loss, params, args, vector, vector)
