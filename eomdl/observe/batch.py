"""Observables of the step's own minibatch."""

from typing import Any

from typing_extensions import override

from eomdl import _check
from eomdl._types import Args, Observable, Params
from eomdl.observe.base import AbstractObservable, is_per_member


class OnBatch(AbstractObservable):
    """The observable that `eomdl.on_batch` returns: a run gives it the batch of the step."""

    function: Observable

    @property
    @override
    def per_member(self) -> bool:
        return is_per_member(self.function)

    @property
    @override
    def sees_batch(self) -> bool:
        return True

    @override
    def __call__(self, params: Params, args: Args) -> Any:
        return self.function(params, args)


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
