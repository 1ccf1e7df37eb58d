"""What the tests check of every call: it returns what its annotation says, and so do the fields of a result."""

from collections.abc import Callable
from typing import Any, get_args

import beartype
import jaxtyping


def _has_shape(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(_has_shape(part) for part in get_args(hint))


def _is_checked(function: Callable, name: str, hint: Any) -> bool:
    # Other arguments the library refuses by itself, with its own error. A trajectory is a pytree: JAX makes one of
    # whatever a map gives.
    is_field = function.__name__ == "__init__" and function.__qualname__ != "Trajectory.__init__"
    # beartype does not know a type that has itself in it (rooted trees).
    return "ForwardRef" not in repr(hint) and (name == "return" or (is_field and _has_shape(hint)))


def results(function: Callable) -> Callable:
    """The function with its result checked, and with its fields checked if it makes a result."""
    hints = function.__annotations__
    function.__annotations__ = {
        name: hint for name, hint in hints.items() if _is_checked(function, name, hint)
    }
    return beartype.beartype(function)
