"""The data of every step: none, stacked in arrays, or streamed. The only thing that knows about batches."""

import abc
import dataclasses
import itertools
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sized
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import override

from eomdl import _check
from eomdl._types import Args, Array, Observable, record_type
from eomdl.flows.stride import StrideData
from eomdl.losses.host import data_fingerprint
from eomdl.observe.base import sees_batch


_ZERO = np.asarray(0)


@record_type
class ChunkData:
    """The data of the steps of one chunk, as a compiled program sees them.

    - `args`: what observables see, and every step where there are no batches.
    - `batches`: leaves with a leading axis of steps, or None.
    - `first`: the step of the first batch.
    """

    args: Args
    batches: Any
    first: Array

    def at(self, k: Any) -> Args:
        """The data of step k; behind the last batch the last one."""
        if self.batches is None:
            return self.args
        length = jax.tree.leaves(self.batches)[0].shape[0]
        index = jnp.clip(k - self.first, 0, length - 1)
        return jax.tree.map(lambda leaf: leaf[index], self.batches)

    def stride(self, k: Any, m: int) -> Args:
        """The data of the steps k, ..., k + m - 1 for a flow of stride m."""
        if self.batches is None or m == 1:
            return self.at(k)
        return StrideData(
            jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, k - self.first, m), self.batches)
        )

    def seen_by(self, observable: Observable, k: Any) -> Args:
        """What an observable sees at step k."""
        return self.at(k) if sees_batch(observable) else self.args


def no_batches(args: Args) -> ChunkData:
    """The same `args` for every step."""
    return ChunkData(args, None, _ZERO)


def stacked_batches(args: Args, batches: Any) -> ChunkData:
    """One batch for each step, in arrays with a leading axis of steps; None for the same `args` in every step."""
    return ChunkData(args, jax.tree.map(jnp.asarray, batches), _ZERO)


class AbstractData(abc.ABC):
    """The data of a run on the host, handed out chunk by chunk."""

    args: Args
    example: Args  # what the loss sees first
    source: ClassVar[str] = "the first of `batches`, for one step"
    in_arrays: ClassVar[bool] = True  # the same arrays for every chunk
    pending: BaseException | None = None  # what a source of batches has raised

    @abc.abstractmethod
    def load(self, start: int, count: int, length: int) -> tuple[ChunkData, int]:
        """Return the data of the next steps, and of how many steps they are.

        The steps begin at `start`; `count` are asked for, and there may be fewer. The data have room for `length`.
        """

    @property
    def fingerprint(self) -> str:
        """A checksum of data on the host, which may be of files that change between two runs; empty for arrays."""
        return data_fingerprint(self.args)

    def raise_pending(self) -> None:
        """Raise what a source of batches has raised, now that the batches before it are used."""
        if self.pending is not None:
            raise self.pending

    def seen_by(self, observable: Observable) -> Args:
        """What an observable sees first."""
        return self.example if sees_batch(observable) else self.args


class NoBatches(AbstractData):
    """The same `args` for every step."""

    source = "args"

    def __init__(self, args: Args):
        self.args = self.example = args

    @override
    def load(self, start: int, count: int, length: int) -> tuple[ChunkData, int]:
        return no_batches(self.args), count


class StackedBatches(AbstractData):
    """One batch for each step, in arrays with a leading axis of steps."""

    def __init__(self, batches: Any, args: Args, num_steps: int):
        lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batches)}
        if lengths != {(num_steps,)}:
            raise ValueError(
                f"batches: expected arrays with leading axis num_steps = {num_steps}, got leading axes "
                f"{sorted(lengths)}; a list or an iterator is taken as one batch a step"
            )
        self.args, self._data = args, stacked_batches(args, batches)
        self.example = jax.tree.map(lambda leaf: leaf[0], self._data.batches)

    @override
    def load(self, start: int, count: int, length: int) -> tuple[ChunkData, int]:
        return self._data, count


class StreamedBatches(AbstractData):
    """One batch for each step, from a list or an iterator; only those of a chunk are in memory."""

    in_arrays = False

    def __init__(self, batches: Iterable[Any], args: Args, num_steps: int, start: int):
        if isinstance(batches, Sized):
            if len(batches) != num_steps:
                raise ValueError(
                    f"batches: expected one batch for each of num_steps = {num_steps} steps, got {len(batches)}"
                )
            # Of a finished run the last one, as the example.
            batches = itertools.islice(batches, min(start, num_steps - 1), None)
        self.args = args
        _refuse_used(batches, start)
        self._iterator: Iterator[Any] = iter(batches)
        head = list(itertools.islice(self._iterator, 1))
        if not head:
            used = f"an empty iterator, used up by another run perhaps; {_READ_TWICE}"
            got = used if isinstance(batches, Iterator) else "an empty iterable"
            raise ValueError(f"batches: expected at least one batch, got {got}")
        self.example = self._last = head[0]
        self._iterator = itertools.chain(head, self._iterator)

    @override
    def load(self, start: int, count: int, length: int) -> tuple[ChunkData, int]:
        taken = []
        try:
            for batch in itertools.islice(self._iterator, count):
                taken.append(batch)
        except BaseException as error:
            self.pending = error
            if not taken:
                raise
        # No step is taken on the padding; at the very end of the batches it is all there is.
        self._last = taken[-1] if taken else self._last
        padded = taken + [self._last] * (max(length, 1) - len(taken))
        try:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *padded)
        except ValueError as error:
            raise ValueError(
                f"batches: expected batches of one structure and shape, got steps {start} to "
                f"{start + len(taken) - 1} that differ ({error!s:.200}); {_check.RAGGED}"
            ) from error
        return ChunkData(self.args, stacked, np.asarray(start)), len(taken)


_READ_TWICE = "a list of batches can be read twice, or give each run an iterator of its own"
# Generators that a run has read from. Other iterators (zip, map) cannot be held weakly: only where they end is it noticed.
_USED: "weakref.WeakSet[Iterator[Any]]" = weakref.WeakSet()


def _refuse_used(batches: Iterable[Any], start: int) -> None:
    """Raise for a generator from which another run has read, in a run from step 0: it would give other batches."""
    if not isinstance(batches, Generator):
        return
    if start == 0 and batches in _USED:
        raise ValueError(
            "batches: expected an iterator that begins at step 0, got one that another run has read from; "
            f"{_READ_TWICE}"
        )
    _USED.add(batches)


@dataclasses.dataclass(frozen=True)
class Batches:
    """Batches that say what they are: what `eomdl.runs.stacked` and `eomdl.runs.stream` return."""

    open: Callable[[Args, int, int, int], AbstractData]  # of (args, num_steps, start, stride)


def stacked(batches: Any) -> Batches:
    """Batches in a pytree of arrays with leading axis `num_steps`: that of step k is `leaf[k]` of every leaf.

    ```python
    run = eomdl.descend(loss, params, optimizer, 100, batches=eomdl.runs.stacked((images, labels)))
    ```

    The arrays lie on the device whole. **Raises:** `ValueError`, by the run, for another leading axis.
    """
    return Batches(
        lambda args, num_steps, start, stride: _in_strides(
            stride, num_steps, StackedBatches(batches, args, num_steps)
        )
    )


def stream(batches: Iterable[Any]) -> Batches:
    """Batches from a sequence or an iterator that yields one for each step; only those of a chunk are in memory.

    ```python
    run = eomdl.descend(loss, params, optimizer, 100, batches=eomdl.runs.stream(loader))
    ```

    All batches have one structure and shape. An iterator must begin at the first step still to do; of a sequence the
    run skips the steps already done. A flow of stride > 1 takes a sequence, which is then stacked.

    **Raises:** `ValueError`, by the run, for a sequence of another length, for an empty one, and for batches that differ.
    """
    _check.kind("batches", batches, Iterable, "a sequence or an iterator of batches")

    def open_stream(args: Args, num_steps: int, start: int, stride: int) -> AbstractData:
        if stride == 1:
            return StreamedBatches(batches, args, num_steps, start)
        # A flow of stride m spans m steps, and a chunk may end between them.
        if not isinstance(batches, Sized):
            raise ValueError(
                f"batches: expected stacked arrays or a list for a flow of stride {stride}, got an iterator"
            )
        if len(batches) != num_steps:
            return _in_strides(stride, num_steps, StreamedBatches(batches, args, num_steps, start))
        whole = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
        return _in_strides(stride, num_steps, StackedBatches(whole, args, num_steps))

    return Batches(open_stream)


def open_data(args: Args, batches: Any, num_steps: int, start: int, stride: int) -> AbstractData:
    """The data of a run from step `start` to `num_steps`, for a flow of the given stride."""
    if batches is None:
        return NoBatches(args)
    if not isinstance(batches, Batches):
        batches = _read_batches(batches, num_steps)
    return batches.open(args, num_steps, start, stride)


def _read_batches(batches: Any, num_steps: int) -> Batches:
    """What batches without a constructor are: a list or an iterator is streamed, arrays are stacked."""
    if isinstance(batches, list):
        return stream(batches)
    if not _has_arrays_only(batches):
        return stream(batches) if isinstance(batches, Iterable) else stacked(batches)
    leading = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batches)}
    if isinstance(batches, tuple) and len(batches) == num_steps > 1 and leading == {(num_steps,)}:
        raise ValueError(
            f"batches: expected one reading, got a tuple of num_steps = {num_steps} whose arrays have the leading axis "
            f"{num_steps} too; say which: eomdl.runs.stacked(batches) for arrays with one entry for each step, "
            "eomdl.runs.stream(batches) for one batch after the other"
        )
    return stacked(batches)


def _in_strides(stride: int, num_steps: int, data: AbstractData) -> AbstractData:
    if num_steps % stride:
        raise ValueError(
            f"num_steps: expected a multiple of the flow's stride {stride} with batches, got {num_steps}"
        )
    return data


def _has_arrays_only(batches: Any) -> bool:
    def is_leaf(x: Any) -> bool:  # a generator is no pytree, and JAX warns of it unless told
        return isinstance(x, Iterable) and not isinstance(x, list | tuple | Mapping)

    return all(eqx.is_array(leaf) for leaf in jax.tree.leaves(batches, is_leaf=is_leaf))
