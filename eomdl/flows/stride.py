"""The data that a flow of stride m sees: that of m steps."""

from typing import Any

import equinox as eqx
import jax
from jax.typing import ArrayLike

from eomdl._types import Args


class StrideData(eqx.Module):
    """The batches of the m steps that a flow of stride m spans: arrays with leading axis m."""

    batches: Any

    def at(self, n: ArrayLike) -> Args:
        """The batch of step n, counted from the first; after the last batch the first follows again."""
        count = jax.tree.leaves(self.batches)[0].shape[0]
        return jax.tree.map(lambda leaf: leaf[n % count], self.batches)


def step_data(args: Args, n: ArrayLike) -> Args:
    """The data of the n-th step of a stride: its own batch, or all of `args` in a run without batches.

    For a strided flow of your own: `self.step_map(state, step_data(args, n), k + n)`.
    """
    return args.at(n) if isinstance(args, StrideData) else args
