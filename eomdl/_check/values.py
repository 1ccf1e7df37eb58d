"""Checks of numbers, text and choices."""

import operator
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eomdl import _tree
from eomdl._types import Array


def wrong(name: str, expected: str, got: Any) -> ValueError:
    """Return the error that every check raises."""
    return ValueError(f"{name}: expected {expected}, got {got}")


def show(value: Any, most: int = 80) -> str:
    """Return the beginning of a value's text: a message names a value, it does not print it."""
    try:
        return f"{value!r:.{most}}"
    except ValueError:  # Python prints no integer of more than 4300 digits
        return f"a {type(value).__name__} that is too long to print"


def makes_array(value: Any) -> bool:
    """Return whether NumPy makes an array of a value: not of rows of several lengths, nor of random keys."""
    try:
        np.asarray(value)
    except (TypeError, ValueError):
        return False
    return True


def finite_scalar(name: str, value: Any) -> jax.Array:
    """Return a finite scalar as a floating-point array."""
    return _scalar(name, value, "a finite number", lambda x: True)


def positive_scalar(name: str, value: Any) -> jax.Array:
    """Return a finite scalar > 0 as a floating-point array."""
    return _scalar(name, value, "a finite number > 0", lambda x: x > 0)


def nonnegative_scalar(name: str, value: Any) -> jax.Array:
    """Return a finite scalar >= 0 as a floating-point array."""
    return _scalar(name, value, "a finite number >= 0", lambda x: x >= 0)


def fraction(name: str, value: Any) -> jax.Array:
    """Return a scalar in [0, 1) as a floating-point array."""
    return _scalar(name, value, "a number in [0, 1)", lambda x: 0 <= x < 1)


_FOR_OPTIMIZERS = (
    "; the flow of an optimizer, with its schedule, is eomdl.InterpolatingFlow(eomdl.optimizer_step(loss, optimizer), step_size, "
    "points=2), where step_size is a number that sets the clock"
)


def _scalar(name: str, value: Any, expected: str, holds: Callable[[float], bool]) -> jax.Array:
    if is_optimizer(value) or callable(value):
        raise wrong(name, expected, f"{show(value)}{_FOR_OPTIMIZERS}")
    array = _array(name, value, expected)
    if array.shape != () or not is_real(array):
        raise wrong(name, expected, f"{show(value)} (shape {array.shape}, dtype {array.dtype})")
    # One dtype for 0.1, numpy.float32(0.1) and numpy.float64(0.1): else each would compile again.
    array = jax.lax.convert_element_type(array, jnp.result_type(float))
    if not _tree.is_traced(array) and not (np.isfinite(array) and holds(float(array))):
        ascent = name in ("learning_rate", "step_size") and float(array) < 0
        raise wrong(name, expected, f"{show(value)}{'; for ascent negate the loss' * ascent}")
    return array


def is_real(array: Array) -> bool:
    """Return whether an array is of real numbers: no truth values, complex numbers, objects or random keys."""
    return jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, np.integer)


def _array(name: str, value: Any, expected: str) -> jax.Array:
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError):
        raise wrong(name, expected, show(value)) from None


def numbers(
    name: str,
    value: Any,
    expected: str,
    holds: Callable[[np.ndarray], Any] = np.isfinite,
    ndim: int | None = None,
) -> Array:
    """Return a real floating-point array that is not empty; `holds` must be true of every number.

    What is no JAX array becomes a NumPy array: without x64 JAX would cut it to float32.
    """
    if not isinstance(value, jax.Array) and not makes_array(value):
        raise wrong(name, expected, show(value))
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    if array.size == 0 or not is_real(array) or ndim not in (None, array.ndim):
        raise wrong(name, expected, f"{show(value)} (shape {array.shape}, dtype {array.dtype})")
    if jnp.issubdtype(array.dtype, np.integer):
        array = array.astype(float if isinstance(array, np.ndarray) else jnp.result_type(float))
    if not _tree.is_traced(array) and not np.all(holds(np.asarray(array))):
        raise wrong(name, expected, show(value))
    return array


def positive_numbers(name: str, value: Any) -> Array:
    """Return an array of finite numbers > 0."""
    return numbers(name, value, "finite numbers > 0", lambda x: np.isfinite(x) & (x > 0))


def nonnegative_numbers(name: str, value: Any) -> Array:
    """Return an array of finite numbers >= 0."""
    return numbers(name, value, "finite numbers >= 0", lambda x: np.isfinite(x) & (x >= 0))


def fractions(name: str, value: Any) -> Array:
    """Return an array of numbers in [0, 1)."""
    return numbers(name, value, "numbers in [0, 1)", lambda x: (x >= 0) & (x < 1))


def flag(name: str, value: Any) -> bool:
    """Return True or False."""
    if not isinstance(value, bool | np.bool_):
        raise wrong(name, "True or False", show(value))
    return bool(value)


def kind(name: str, value: Any, cls: Any, expected: str) -> Any:
    """Return the value, an instance of a class."""
    if not isinstance(value, cls):
        raise wrong(name, expected, f"{type(value).__name__}: {show(value)}")
    return value


def mapping(name: str, value: Any, cls: Any, expected: str) -> Mapping[str, Any]:
    """Return the value, a dict of instances of a class that is not empty."""
    if not isinstance(value, Mapping) or not value or not all(isinstance(v, cls) for v in value.values()):
        raise wrong(name, f"a dict {{name: {expected}}}", show(value))
    return value


def step_numbers(name: str, value: Any) -> list[int]:
    """Return step numbers, at least one."""
    steps = np.asarray(value if makes_array(value) else ())
    if steps.ndim != 1 or steps.size == 0 or steps.dtype.kind not in "iu" or steps.min() < 0:
        raise wrong(name, "a sequence of step numbers", show(value))
    return steps.tolist()


def seed(name: str, value: Any) -> int:
    """Return the seed of a random number generator."""
    return integer(name, value, 0, 2**63 - 1)


def path(name: str, value: Any) -> Path:
    """Return a path in the file system."""
    return Path(kind(name, value, str | os.PathLike, "a path, a string or a pathlib.Path"))


def where(name: str, value: Any) -> Any:
    """Return the name of a block of the parameters, or a function that selects it."""
    if not isinstance(value, str) and not callable(value):
        raise wrong(name, "the name of a block, or a function params -> block", show(value))
    return value


def integer(name: str, value: Any, minimum: int, maximum: int = 2**31 - 1) -> int:
    """Return a Python integer from `minimum` to `maximum`."""
    expected = f"an integer >= {minimum}" + (f" and <= {maximum}" if maximum < 2**31 - 1 else "")
    if isinstance(value, bool | np.bool_):
        raise wrong(name, expected, show(value))
    try:
        number = operator.index(value)
    except TypeError:
        raise wrong(name, expected, show(value)) from None
    if not minimum <= number <= maximum:
        raise wrong(name, expected, show(number))
    return number


def is_optimizer(value: Any) -> bool:
    """Return whether a value has the methods of an optax optimizer."""
    return callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))
