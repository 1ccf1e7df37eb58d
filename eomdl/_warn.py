"""Warnings at the line of the user's code that they are about."""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

from eomdl import _tree


_P = ParamSpec("_P")
_R = TypeVar("_R")

# Frames of these packages stand between a warning and the user's code.
_BETWEEN = {"eomdl", "equinox", "jax", "jaxtyping", "beartype", "contextlib", "numpy"}


class ModelWarning(UserWarning):
    """A run left what its model is valid for."""


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line from which the library was called, which `stacklevel` alone cannot find: decorators add frames."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def of_faults(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make a function warn of the faults in the notes of the run that it returns, but of why it stopped: that is its message."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        result = function(*args, **kwargs)
        if not _tree.is_traced(result):
            run = cast(Any, result)
            for note in run.notes:
                if note.is_fault and note != run.message:
                    warn(note, ModelWarning)
        return result

    return call


def quietly(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return a function without the warnings of `of_faults`: for a caller within the library, whose result has the notes."""
    return inspect.unwrap(function)
