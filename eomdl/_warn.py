"""Warnings at the line of the user's code that they are about."""

import inspect
import warnings


# Frames of these packages stand between a warning and the user's code.
_BETWEEN = {"eomdl", "equinox", "jax", "jaxtyping", "beartype", "contextlib", "numpy"}


def warn(message: str) -> None:
    """Warn at the line from which the library was called, which `stacklevel` alone cannot find: decorators add frames."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
