"""Several processes of one run: which is the first, and that all do the same at the same time."""

import contextlib
import itertools
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np


PATIENCE = 300.0  # seconds that a process waits for the others, at most
_numbers = itertools.count()


def several() -> bool:
    """Whether this is one of several processes (`jax.distributed.initialize`)."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes files and shows progress; the only one is."""
    return jax.process_index() == 0


class NotTogether(ValueError):
    """The processes of a run differ, or one of them failed or did not come."""


def agree(what: str, *said: Any) -> None:
    """Raise on every process where not all say the same, or one does not come: nobody is left waiting.

    **Raises:** `NotTogether` with the first thing that differs, or after `PATIENCE` seconds.
    """
    if not several():
        return
    every = [text.split("\n") for text in _exchanged(what, "\n".join([what, *map(str, said)]))]
    mine = every[jax.process_index()]
    for number, other in enumerate(every):
        for here, there in itertools.zip_longest(mine, other, fillvalue="nothing"):
            if here != there:
                hint = "; make one array of the parts with jax.make_array_from_process_local_data" * (
                    "#" in here
                )
                raise NotTogether(
                    f"{what}: expected the same on all processes, got {here!r} on this one, {jax.process_index()}, and "
                    f"{there!r} on process {number}{hint}"
                )


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """What is raised on one process stops them all.

    **Raises:** `NotTogether` where another process failed, or did not come within `PATIENCE` seconds.
    """
    try:
        yield
    except Exception as error:
        if several():
            with contextlib.suppress(NotTogether):  # its own error is the one to show
                _exchanged(what, f"{type(error).__name__}: {error}")
        raise
    if several():
        for number, failure in enumerate(_exchanged(what, "")):
            if failure:
                raise NotTogether(f"{what}: process {number} failed with {failure:.1000}")


def _exchanged(what: str, text: str) -> list[str]:
    """What every process says. Through the coordinator of `jax.distributed`: a collective would wait without an end."""
    # JAX has no public name for its client.
    from jax._src import distributed

    client, number = distributed.global_state.client, next(_numbers)
    assert client is not None, "several processes, but none of jax.distributed.initialize"
    place = f"eomdl/{number}"
    try:
        if number > 1:  # all have read it: they were at the barrier after it
            client.key_value_delete(f"eomdl/{number - 2}/{jax.process_index()}")
        client.key_value_set(f"{place}/{jax.process_index()}", text)
        client.wait_at_barrier(f"{place}/all", int(1000 * PATIENCE))
        numbers = range(jax.process_count())
        return [client.blocking_key_value_get(f"{place}/{n}", int(1000 * PATIENCE)) for n in numbers]
    except jax.errors.JaxRuntimeError as error:
        raise NotTogether(
            f"{what}: expected all {jax.process_count()} processes within {PATIENCE:g} s, got {error}"
        ) from error


def describe(name: str, tree: Any) -> list[str]:
    """What the processes must have in common of a tree: shapes, dtypes, places; of what each has itself, the numbers."""
    leaves = jax.tree_util.tree_leaves_with_path(tree) if several() else []
    return [f"{name}{jax.tree_util.keystr(path)}: {_said(leaf)}" for path, leaf in leaves]


def _said(leaf: Any) -> str:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return f"{leaf.dtype}{list(leaf.shape)} {getattr(leaf.sharding, 'spec', leaf.sharding)}"
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array | np.ndarray | np.generic):
        content = zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8).data)
        return f"{leaf.dtype}{list(leaf.shape)} #{content:08x}"
    return f"{leaf!r:.80}"


def explain(error: BaseException) -> None:
    """Say of an error in a run of several processes what it most often means."""
    if several() and not isinstance(error, NotTogether):
        with contextlib.suppress(AttributeError, TypeError):
            error.add_note(
                "a run of several processes goes on only together: one may have ended or lost its connection. Start all of "
                "them again, with `resume=store.latest` of an eomdl.Checkpoints"
            )
