"""The processes of one run: which is the first, barriers between them, and checks that all are given the same."""

import contextlib
import itertools
import os
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from eomdl import _upstream


TIMEOUT = 300.0  # seconds that a process waits for the others, at most
_numbers = itertools.count()


_forks: list[int] = []  # processes forked after JAX had started, of which this is one


def _note_fork() -> None:
    if _upstream.backends_are_initialized():
        _forks.append(os.getpid())


os.register_at_fork(after_in_child=_note_fork)


def require_own_threads() -> None:
    """Raise in a process that was forked after JAX was used: the threads of JAX stayed behind, and it would wait for them for ever.

    **Raises:** `RuntimeError`.
    """
    if _forks:
        raise RuntimeError(
            "this process was forked after JAX was used, and would wait for JAX's threads for ever: start it with "
            'multiprocessing.get_context("spawn"), or fork before JAX is used'
        )


def is_distributed() -> bool:
    """Whether this is one of several processes (`jax.distributed.initialize`)."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes files and shows progress. A process that is alone is the first."""
    return jax.process_index() == 0


class ProcessError(ValueError):
    """The processes of a run differ, or one of them failed or did not come to a barrier."""


def assert_equal_across_processes(what: str, *values: Any) -> None:
    """Raise on every process where the values differ in their text, or a process does not come.

    **Raises:** `ProcessError` with the first difference, or after `TIMEOUT` seconds.
    """
    if not is_distributed():
        return
    every = [text.split("\n") for text in _exchange(what, "\n".join([what, *map(str, values)]))]
    mine = every[jax.process_index()]
    for number, other in enumerate(every):
        for here, there in itertools.zip_longest(mine, other, fillvalue="nothing"):
            if here != there:
                hint = "; make one array of the parts with jax.make_array_from_process_local_data" * (
                    "#" in here
                )
                raise ProcessError(
                    f"{what}: expected the same on all processes, got {here!r} on this one, {jax.process_index()}, and "
                    f"{there!r} on process {number}{hint}"
                )


@contextlib.contextmanager
def barrier(what: str) -> Iterator[None]:
    """Wait at the end of the block until all processes come there. An exception in one of them is raised in all.

    **Raises:** `ProcessError` where another process failed, or did not come within `TIMEOUT` seconds.
    """
    try:
        yield
    except Exception as error:
        if is_distributed():
            with contextlib.suppress(ProcessError):  # its own error is the one to show
                _exchange(what, f"{type(error).__name__}: {error}")
        raise
    if is_distributed():
        for number, failure in enumerate(_exchange(what, "")):
            if failure:
                raise ProcessError(f"{what}: process {number} failed with {failure:.1000}")


def _exchange(what: str, text: str) -> list[str]:
    """Return the text of every process, in their order. A barrier."""
    client, number = _upstream.coordination_client(), next(_numbers)
    assert client is not None, "several processes, but none of jax.distributed.initialize"
    place = f"eomdl/{number}"
    try:
        if number > 1:  # all have read it: they were at the barrier after it
            client.key_value_delete(f"eomdl/{number - 2}/{jax.process_index()}")
        client.key_value_set(f"{place}/{jax.process_index()}", text)
        client.wait_at_barrier(f"{place}/all", int(1000 * TIMEOUT))
        numbers = range(jax.process_count())
        return [client.blocking_key_value_get(f"{place}/{n}", int(1000 * TIMEOUT)) for n in numbers]
    except jax.errors.JaxRuntimeError as error:
        raise ProcessError(
            f"{what}: expected all {jax.process_count()} processes within {TIMEOUT:g} s, got {error}"
        ) from error


def describe(name: str, tree: Any) -> list[str]:
    """Return a line for each leaf that must be the same on all processes.

    It has the dtype and the shape, the sharding of an array of all processes, and a checksum of one that each has itself.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree) if is_distributed() else []
    return [f"{name}{jax.tree_util.keystr(path)}: {_describe_leaf(leaf)}" for path, leaf in leaves]


def _describe_leaf(leaf: Any) -> str:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return f"{leaf.dtype}{list(leaf.shape)} {getattr(leaf.sharding, 'spec', leaf.sharding)}"
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array | np.ndarray | np.generic):
        content = zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8).data)
        return f"{leaf.dtype}{list(leaf.shape)} #{content:08x}"
    return f"{leaf!r:.80}"


def explain(error: BaseException) -> None:
    """Add a note to an error in a run of several processes: what it most often means."""
    if is_distributed() and not isinstance(error, ProcessError):
        with contextlib.suppress(AttributeError, TypeError):
            error.add_note(
                "a run of several processes continues only with all of them: one may have ended or lost its connection. Start "
                "all of them again, with `resume=store.latest` of an eomdl.Checkpoints"
            )
