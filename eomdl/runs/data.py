"""The data of every step: none, stacked in arrays, or streamed. The only thing that knows about batches."""

import abc
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eomdl._types import Args, Array, Observable, record_type
from eomdl.flows.stride import StrideData
from eomdl.losses.host import OnHost
from eomdl.observe.batch import OnBatch


_ZERO = np.asarray(0)


@record_type
class Window:
    """The data of the steps of one stretch, as a compiled program sees it.

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
        index = jnp.clip(k - self.first, 0, self._length() - 1)
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
        return self.at(k) if isinstance(observable, OnBatch) else self.args

    def _length(self) -> int:
        return jax.tree.leaves(self.batches)[0].shape[0]


def stacked_window(args: Args, batches: Any) -> Window:
    """The data of every step, with batches stacked in arrays or None."""
    return Window(args, jax.tree.map(jnp.asarray, batches), _ZERO)


class AbstractData(abc.ABC):
    """Data for a run on the host, handed out in windows."""

    args: Args
    example: Args  # what the loss sees first
    source: ClassVar[str] = "the first of `batches`, for one step"
    pending: BaseException | None = None  # what a source of batches has raised

    @abc.abstractmethod
    def window(self, start: int, count: int, length: int) -> tuple[Window, int]:
        """Data of the next steps, and how many there are.

        The steps begin at `start`; `count` are asked for, and there may be fewer. A window has room for `length`.
        """

    @property
    def fingerprint(self) -> str:
        """A checksum of data on the host, which may be of files that change between two runs; empty for arrays."""
        return self.args.fingerprint if isinstance(self.args, OnHost) else ""

    def raise_pending(self) -> None:
        """Raise what a source of batches has raised, now that the batches before it are used."""
        if self.pending is not None:
            raise self.pending

    @property
    @abc.abstractmethod
    def in_arrays(self) -> bool:
        """Whether a window is the same arrays for every stretch."""

    def seen_by(self, observable: Observable) -> Args:
        """What an observable sees first."""
        return self.example if isinstance(observable, OnBatch) else self.args


class Constant(AbstractData):
    """The same `args` for every step."""

    source = "args"
    in_arrays = True

    def __init__(self, args: Args):
        self.args = self.example = args

    def window(self, start: int, count: int, length: int) -> tuple[Window, int]:
        """The same `args`, for as many steps as asked."""
        return Window(self.args, None, _ZERO), count


class Stacked(AbstractData):
    """One batch for each step, in arrays with a leading axis of steps."""

    in_arrays = True

    def __init__(self, batches: Any, num_steps: int, args: Args):
        lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batches)}
        if lengths != {(num_steps,)}:
            raise ValueError(
                f"batches: expected arrays with leading axis num_steps = {num_steps}, got leading axes "
                f"{sorted(lengths)}; a list or an iterator is taken as one batch a step"
            )
        self.args, self._batches = args, jax.tree.map(jnp.asarray, batches)
        self.example = jax.tree.map(lambda leaf: leaf[0], self._batches)

    def window(self, start: int, count: int, length: int) -> tuple[Window, int]:
        """All batches, for as many steps as asked."""
        return Window(self.args, self._batches, _ZERO), count


class Streamed(AbstractData):
    """One batch for each step, from a list or an iterator; only a stretch of them is in memory."""

    in_arrays = False

    def __init__(self, batches: Iterable[Any], num_steps: int, args: Args, start: int):
        if isinstance(batches, Sized):
            if len(batches) != num_steps:
                raise ValueError(
                    f"batches: expected one batch for each of num_steps = {num_steps} steps, got {len(batches)}"
                )
            # Of a finished run the last one, to look at.
            batches = itertools.islice(batches, min(start, num_steps - 1), None)
        self.args = args
        self._iterator: Iterator[Any] = iter(batches)
        head = list(itertools.islice(self._iterator, 1))
        if not head:
            raise ValueError("batches: expected at least one batch, got an empty iterable")
        self.example = self._last = head[0]
        self._iterator = itertools.chain(head, self._iterator)

    def window(self, start: int, count: int, length: int) -> tuple[Window, int]:
        """The next batches, stacked, and how many came: fewer where the source has ended or failed."""
        taken = []
        try:
            for batch in itertools.islice(self._iterator, count):
                taken.append(batch)
        except BaseException as error:
            self.pending = error
            if not taken:
                raise
        # Padding is never stepped on; at the very end of the batches it is all there is.
        self._last = taken[-1] if taken else self._last
        padded = taken + [self._last] * (max(length, 1) - len(taken))
        try:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *padded)
        except ValueError as error:
            raise ValueError(
                f"batches: expected batches of one structure and shape, got steps {start} to "
                f"{start + len(taken) - 1} that differ ({error})"
            ) from error
        return Window(self.args, stacked, np.asarray(start)), len(taken)


def open_data(args: Args, batches: Any, num_steps: int, start: int, stride: int) -> AbstractData:
    """The data of a run from step `start` to `num_steps`, for a flow of the given stride."""
    if batches is None:
        return Constant(args)
    stacked = _is_stacked(batches)
    if stride > 1:
        # A strided flow spans several steps, and a stretch may end between them.
        if not (isinstance(batches, list) or stacked):
            raise ValueError(
                f"batches: expected stacked arrays or a list for a flow of stride {stride}, got an iterator"
            )
        if num_steps % stride:
            raise ValueError(
                f"num_steps: expected a multiple of the flow's stride {stride} with batches, got {num_steps}"
            )
        if isinstance(batches, list) and len(batches) == num_steps:
            return Stacked(jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches), num_steps, args)
    if isinstance(batches, Iterable) and (isinstance(batches, list) or not stacked):
        return Streamed(batches, num_steps, args, start)
    return Stacked(batches, num_steps, args)


def _is_stacked(batches: Any) -> bool:
    def is_leaf(x: Any) -> bool:  # a generator is no pytree, and JAX warns of it unless told
        return isinstance(x, Iterable) and not isinstance(x, list | tuple | Mapping)

    return all(eqx.is_array(leaf) for leaf in jax.tree.leaves(batches, is_leaf=is_leaf))
