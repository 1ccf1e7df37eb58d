"""Noise that does not depend on the place: that of a temperature, and one scale for each parameter."""

from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from typing_extensions import override

from eomdl import _check, _tree
from eomdl._types import Args, Params
from eomdl.noise.base import AbstractNoise


class IsotropicNoise(AbstractNoise):
    r"""The noise $\sqrt{2T}\,dW$ of a heat bath: covariance $2T$ times the identity.

    **Arguments:** `temperature`: T > 0, a leaf of the pytree. **Raises:** `ValueError` for another.
    """

    temperature: jax.Array = eqx.field(converter=lambda x: _check.positive_scalar("temperature", x))

    if TYPE_CHECKING:  # a checker knows no converters

        def __init__(self, temperature: ArrayLike) -> None: ...

    @override
    def apply(self, params: Params, weights: Any, args: Args) -> Params:
        del params, args
        return _tree.scale(jnp.sqrt(2 * self.temperature), weights)


class DiagonalNoise(AbstractNoise):
    r"""Independent noise of every parameter: covariance $\mathrm{diag}(s^2)$.

    **Arguments:** `scale`: the standard deviations s >= 0, one number, or a pytree like the parameters.

    **Raises:** `ValueError` for a wrong argument; when called, for a pytree unlike the parameters.
    """

    scale: Any = eqx.field(converter=lambda s: _check_scale(s))

    if TYPE_CHECKING:  # a checker knows no converters

        def __init__(self, scale: Any) -> None: ...

    @override
    def apply(self, params: Params, weights: Any, args: Args) -> Params:
        del args
        if isinstance(self.scale, jax.Array) and self.scale.ndim == 0:
            return _tree.scale(self.scale, weights)
        _check.same_structure("scale", self.scale, "params", params)
        return jax.tree.map(lambda s, w: s.astype(w.dtype) * w, self.scale, weights)


def _check_scale(scale: Any) -> Any:
    leaves = jax.tree_util.tree_leaves_with_path(scale)
    if not leaves:
        raise ValueError(
            f"scale: expected a number >= 0 or a pytree of them like the parameters, got {_check.show(scale)}"
        )
    checked = [
        jnp.asarray(_check.nonnegative_numbers(f"scale{jax.tree_util.keystr(path)}", leaf))
        for path, leaf in leaves
    ]
    return jax.tree.structure(scale).unflatten(checked)
