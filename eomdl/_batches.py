"""Data for every step: no batches, batches stacked in arrays, or batches one by one."""

import itertools
from collections.abc import Iterable, Mapping, Sized
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from eomdl._types import Args, Observable, Params
from eomdl.trajectory import Trajectory


class Cycle(eqx.Module):
    """The batches of the m steps that a flow of stride m spans: arrays with leading axis m."""

    batches: Any

    def at(self, n: ArrayLike) -> Args:
        """The batch of step n, counted from the first of them and repeated for ever."""
        count = jax.tree.leaves(self.batches)[0].shape[0]
        return jax.tree.map(lambda leaf: leaf[n % count], self.batches)


def batch_of(args: Args, n: ArrayLike) -> Args:
    """What the map's n-th step of a stride sees."""
    return args.at(n) if isinstance(args, Cycle) else args


def batch_at(batches: Any, index: Any, args: Args, stride: int = 1) -> Args:
    """The batch of a step (a `Cycle` of those of a stride), or `args` where there are no batches."""
    if batches is None:
        return args
    if stride == 1:
        return jax.tree.map(lambda leaf: leaf[index], batches)
    return Cycle(jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, index, stride), batches))


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
    if not callable(function):
        raise ValueError(f"function: expected a function (params, args) -> array, got {function!r}")
    return OnBatch(function)


class Batches:
    """One interface to no batches, batches stacked in arrays, and batches one by one."""

    def __init__(self, batches: Any, num_steps: int, args: Args, resume: Trajectory | None, stride: int = 1):
        self._stacked = self._iterator = None
        self.example = self._args = args  # what the loss sees first, and what observables see
        if batches is None:
            return
        start = 0 if resume is None else int(resume.final_step)
        if stride > 1:
            # A strided flow spans several steps, and a chunk may end between them.
            if not (isinstance(batches, list) or _is_stacked(batches)):
                raise ValueError(
                    f"batches: expected stacked arrays or a list for a flow of stride {stride}, got an iterator"
                )
            if num_steps % stride:
                raise ValueError(
                    f"num_steps: expected a multiple of the flow's stride {stride} with batches, got {num_steps}"
                )
            if isinstance(batches, list) and len(batches) == num_steps:
                batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
        if isinstance(batches, list) or (isinstance(batches, Iterable) and not _is_stacked(batches)):
            if isinstance(batches, Sized):
                if len(batches) != num_steps:
                    raise ValueError(
                        f"batches: expected one batch for each of num_steps = {num_steps} steps, "
                        f"got {len(batches)}"
                    )
                # Of a finished run the last one, to look at.
                batches = itertools.islice(batches, min(start, num_steps - 1), None)
            self._iterator = iter(batches)
            head = list(itertools.islice(self._iterator, 1))
            if not head:
                raise ValueError("batches: expected at least one batch, got an empty iterable")
            self.example = head[0]
            self._iterator = itertools.chain(head, self._iterator)
            self._last = head[0]
            return
        lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batches)}
        if lengths != {(num_steps,)}:
            raise ValueError(
                f"batches: expected arrays with leading axis num_steps = {num_steps}, got leading axes "
                f"{sorted(lengths)}; a list or an iterator is taken as one batch a step"
            )
        self._stacked = jax.tree.map(jnp.asarray, batches)
        self.example = jax.tree.map(lambda leaf: leaf[0], self._stacked)

    def seen_by(self, observable: Observable) -> Args:
        """What an observable sees: `args`, or a batch."""
        return self.example if isinstance(observable, OnBatch) else self._args

    def length(self, available: int) -> int:
        """How many batches are in what `take` gave, of which `available` were new."""
        return available if self._stacked is None else jax.tree.leaves(self._stacked)[0].shape[0]

    def take(self, start: int, count: int, length: int) -> tuple[Any, int, int]:
        """Batches for steps `start .. start + count`, padded to `length`; the number of the
        first one; and how many there were."""
        if self._iterator is None:
            return self._stacked, 0, count
        taken = list(itertools.islice(self._iterator, count))
        # Padding is never stepped on; at the very end of the batches it is all there is.
        self._last = taken[-1] if taken else self._last
        padded = taken + [self._last] * (max(length, 1) - len(taken))
        try:
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *padded), start, len(taken)
        except ValueError as error:
            raise ValueError(
                f"batches: expected batches of one structure and shape, got steps {start} to "
                f"{start + len(taken) - 1} that differ ({error})"
            ) from error


def _is_stacked(batches: Any) -> bool:
    def is_leaf(x: Any) -> bool:  # a generator is no pytree, and JAX warns of it unless told
        return isinstance(x, Iterable) and not isinstance(x, list | tuple | Mapping)

    return all(eqx.is_array(leaf) for leaf in jax.tree.leaves(batches, is_leaf=is_leaf))
