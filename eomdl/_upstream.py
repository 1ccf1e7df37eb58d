"""Private names of other packages, where these have no public way. No other module may use any (`tests/test_house.py`).

Each function says which change of the other package would remove it. `tests/test_upstream.py` tests it with the versions
that are installed.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, cast

import equinox as eqx


def coordination_client() -> Any:
    """Return the client of the coordinator of `jax.distributed`, or None before `jax.distributed.initialize`.

    It keeps strings by key and has barriers that fail after a time. The public `multihost_utils` has collectives
    only: they run on the devices, and where one process does not come the others wait without an end.

    **Until** JAX has a public key-value store and barrier with a time limit.
    """
    from jax._src import distributed

    return distributed.global_state.client


def backends_are_initialized() -> bool:
    """Return whether JAX has looked for its devices, and so has threads of its own.

    **Until** JAX says so publicly without looking for them, or runs in forked processes.
    """
    from jax._src import xla_bridge

    return xla_bridge.backends_are_initialized()


@contextlib.contextmanager
def no_callbacks() -> Iterator[None]:
    """Trace the run-time checks of equinox (`eqx.error_if`, and so diffrax's) without a callback to the host.

    A program with a callback is not kept by the compilation cache and runs it on device 0. What diffrax would check is
    made by `eomdl` (steps in order, a first step forward). A check in a user's loss makes the state NaN, which the run
    reports. Where the user has set the environment variable `EQX_ON_ERROR`, that holds. A function that the user has
    jitted and that is traced in here first keeps this mode.

    **Until** equinox can be told by a context, or diffrax by an argument, what a failed check does. Equinox reads the
    environment variable when it is imported, and keeps the traces of its checks without regard to what was read.
    """
    if "EQX_ON_ERROR" in os.environ:
        yield
        return
    errors = cast(Any, eqx)._errors
    mode, check = errors.EQX_ON_ERROR, errors.branched_error_if_impl_jit

    def check_to_nan(*args: Any, on_error: str) -> Any:
        return check(*args, on_error="nan" if on_error == "default" else on_error)

    errors.EQX_ON_ERROR, errors.branched_error_if_impl_jit = "nan", check_to_nan
    try:
        yield
    finally:
        errors.EQX_ON_ERROR, errors.branched_error_if_impl_jit = mode, check
