"""The data that a flow of stride m sees: that of m steps."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from eomdl import _check
from eomdl._types import Args


class StrideData(eqx.Module):
    """The batches of the m steps in a stride: arrays with leading axis m."""

    batches: Any

    def at(self, n: ArrayLike) -> Args:
        """Return the batch of step n, counted from the first; after the last batch the first follows again."""
        count = jax.tree.leaves(self.batches)[0].shape[0]
        return jax.tree.map(lambda leaf: leaf[n % count], self.batches)


def _is_count(n: Any) -> bool:
    if isinstance(n, int) and not isinstance(n, bool):
        return True
    is_scalar = isinstance(n, jax.Array | np.ndarray | np.generic) and n.shape == ()
    return is_scalar and jnp.issubdtype(n.dtype, jnp.integer)


def step_data(args: Args, n: ArrayLike) -> Args:
    """Return the data of the n-th step of a stride: its own batch, or all of `args` in a run without batches.

    For a strided flow of your own: `self.step_map(state, step_data(args, n), k + n)`.
    """
    if not _is_count(n):
        raise ValueError(f"n: expected the number of a step in its stride, an integer, got {_check.show(n)}")
    return args.at(n) if isinstance(args, StrideData) else args
