"""What the noise of a gradient is: a field that is linear in random weights."""

import abc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp

from eomdl import _check, _tree
from eomdl._types import Args, Params


class AbstractNoise(eqx.Module):
    r"""The noise of a gradient: a vector like the parameters, linear in random weights w.

    To write your own, subclass and define `apply`. The weights are then independent standard normal numbers in the shapes of
    the parameters, as here for noise that grows with the parameters:

    ```python
    class Multiplicative(eomdl.noise.AbstractNoise):
        scale: float

        def apply(self, params, weights, args):
            return jax.tree.map(lambda x, w: self.scale * x * w, params, weights)
    ```

    The covariance follows from it, matrix-free: it is `apply` after its transpose. A noise with weights of another kind says which
    by `normals_like` and `weights_from`.
    """

    @abc.abstractmethod
    def apply(self, params: Params, weights: Any, args: Args) -> Params:
        """Return the noise for these weights; it is linear in them."""

    def normals_like(self, params: Params, args: Args) -> Any:
        """Return the shapes and dtypes of the independent standard normal numbers that the weights are made of."""
        del args
        return shapes_of(params)

    def weights_from(self, normals: Any, args: Args) -> Any:
        """Return the weights, a linear function of standard normal numbers; by default the numbers themselves."""
        del args
        return normals

    def sample(self, key: jax.Array, params: Params, args: Args) -> Params:
        """Return a normal vector with the covariance of the noise. **Cost:** one `apply`."""
        normals = _tree.random_normal(key, self.normals_like(params, args))
        return self.apply(params, self.weights_from(normals, args), args)

    def covariance_product(self, params: Params, v: Params, args: Args) -> Params:
        r"""Return $C v$ with the covariance C of the noise, without a matrix."""
        operator = NoiseOperator(
            lambda normals: self.apply(params, self.weights_from(normals, args), args),
            self.normals_like(params, args),
        )
        return operator.covariance_product(v)


def shapes_of(tree: Any) -> Any:
    """Return the shapes and dtypes of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)


def _check_normals(value: Any) -> Any:
    leaves = jax.tree.leaves(value)
    if not leaves or not all(hasattr(x, "shape") and jnp.issubdtype(x.dtype, jnp.floating) for x in leaves):
        raise ValueError(
            "normals_like: expected a pytree of real floating-point arrays, or of jax.ShapeDtypeStruct, got "
            f"{_check.show(value)}"
        )
    return shapes_of(value)


class NoiseOperator(eqx.Module):
    r"""A linear function $\sigma$ of independent standard normal numbers: the noise $\sigma\,dW$ of a flow at one place.

    ```python
    class Diffusing(eomdl.GradientFlow):  # in `noise`, of a flow of your own
        def noise(self, t, state, args):
            return eomdl.noise.NoiseOperator(lambda z: 0.1 * z, state)
    ```

    **Arguments:** `function`: from the numbers to a vector like the state; linear. `normals_like`: what the numbers look like, a
    pytree of arrays or of `jax.ShapeDtypeStruct`.

    **Raises:** `ValueError` for a wrong argument.
    """

    function: Callable[[Any], Any] = eqx.field(
        converter=lambda f: _check.function("function", f, "a linear function normals -> vector", takes=1)
    )
    normals_like: Any = eqx.field(converter=lambda x: _check_normals(x))

    if TYPE_CHECKING:  # a checker knows no converters

        def __init__(self, function: Callable[[Any], Any], normals_like: Any) -> None: ...

    def __call__(self, normals: Any) -> Any:
        r"""Return $\sigma z$."""
        return self.function(normals)

    def transpose(self, v: Any) -> Any:
        r"""Return $\sigma^\top v$. **Cost:** about that of $\sigma z$, backwards."""
        # Not `jax.linear_transpose`: that of JAX 0.9 fails at a loop (of the batches) whose body has other work too.
        at = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.normals_like)
        (normals,) = jax.vjp(self.function, at)[1](v)
        return normals

    def covariance_product(self, v: Any) -> Any:
        r"""Return $\sigma \sigma^\top v$."""
        return self.function(self.transpose(v))
