"""Which flow made a run, in a word that survives the disk."""

import hashlib
import types
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eomdl import _devices


_DEPTH = 12  # of closures within closures


def identity(flow: eqx.Module) -> str:
    """Class, numbers and functions of a flow. Another loss, order or learning rate gives another.

    A function counts by its name, its code and what it closes over; long arrays by a checksum.
    """
    return _say(flow, _DEPTH)


def _say(x: Any, depth: int) -> str:
    if depth == 0:
        return "..."
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if eqx.is_array_like(x):
        array = np.asarray(_devices.on_host(x))
        return str(array.tolist()) if array.size <= 8 else f"{array.shape}#{_digest(array.tobytes())}"
    if isinstance(x, types.FunctionType):
        return _function(x, depth)
    if isinstance(x, eqx.Module):
        fields = ((name, getattr(x, name)) for name in x.__dataclass_fields__ if hasattr(x, name))
        return f"{type(x).__qualname__}({', '.join(f'{k}={_say(v, depth - 1)}' for k, v in fields)})"
    if isinstance(x, dict):
        return f"{{{', '.join(f'{k!r}: {_say(v, depth - 1)}' for k, v in x.items())}}}"
    if isinstance(x, tuple | list):
        return f"({', '.join(_say(v, depth - 1) for v in x)})"
    if isinstance(x, str | bytes | None):
        return repr(x)
    if isinstance(x, jax.tree_util.Partial):
        return f"{_say(x.func, depth - 1)}{_say(x.args, depth - 1)}"
    return getattr(x, "__qualname__", type(x).__qualname__)


def _function(f: types.FunctionType, depth: int) -> str:
    code = f.__code__
    cells = [_cell(cell) for cell in f.__closure__ or ()]
    constants = [c for c in code.co_consts if not isinstance(c, types.CodeType)]
    inner = [c.co_code for c in code.co_consts if isinstance(c, types.CodeType)]
    parts = [code.co_code, repr(constants).encode(), repr(code.co_names).encode(), *inner]
    said = _say([*cells, f.__defaults__], depth - 1)
    return f"{f.__module__}.{f.__qualname__}#{_digest(*parts, said.encode())}"


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def checksum(*parts: bytes) -> int:
    """A number > 0 of 31 bits."""
    return int(_digest(*parts)[:8], 16) % (2**31 - 1) + 1


def _digest(*parts: bytes) -> str:
    return hashlib.blake2b(b"\0".join(parts), digest_size=6).hexdigest()
