"""Observables of the step's own minibatch."""

import equinox as eqx
import jax

from eomdl import _check
from eomdl._types import Args, Observable, Params


class OnBatch(eqx.Module):
    """What `on_batch` makes."""

    function: Observable

    def __call__(self, params: Params, batch: Args) -> jax.Array:
        return self.function(params, batch)


def on_batch(function: Observable) -> OnBatch:
    """An observable of the step's own minibatch: at step k it sees the batch that step k is taken with.

    `observe={"gamma": on_batch(f)}` records $f(\\theta_k, B_k)$, where other observables see `args`. In a run
    without `batches` it sees `args`. In the last row, where no step follows, it sees the last batch.

    **Raises:** `ValueError` if `function` is not callable.
    """
    return OnBatch(_check.observable("function", function))
