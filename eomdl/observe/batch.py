"""Observables of the step's own minibatch."""

import jax

from eomdl import _check
from eomdl._types import Args, Observable, Params
from eomdl.observe.base import AbstractObservable


class OnBatch(AbstractObservable):
    """The observable that `eomdl.on_batch` returns: a run gives it the batch of the step."""

    function: Observable

    @property
    def per_member(self) -> bool:
        """Whether the function's value has a leading axis of the members of an `eomdl.Ensemble`."""
        return getattr(self.function, "per_member", False)

    def __call__(self, params: Params, batch: Args) -> jax.Array:
        """The function's value for the batch of the step."""
        return self.function(params, batch)


def on_batch(function: Observable) -> OnBatch:
    r"""An observable of the step's own minibatch: at step k it sees the batch that step k is taken with.

    ```python
    observe = {"loss of the batch": eomdl.on_batch(loss), "loss": loss}
    run = eomdl.descend(loss, params, optimizer, 100, args=data, batches=batches, observe=observe)
    ```

    It records $f(\theta_k, B_k)$, where other observables see `args`. In a run without `batches` it sees `args`.
    In the last row, where no step follows, it sees the last batch.

    **Raises:** `ValueError` if `function` is not callable.
    """
    return OnBatch(_check.observable("function", function))
