"""The types that pass between modules, and how a record is made."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, dataclass_transform

import jax
import numpy as np
from numpy.typing import ArrayLike
from typing_extensions import override as override  # for all modules: Python 3.11 has none


Array: TypeAlias = jax.Array | np.ndarray  # NumPy's go into compiled programs too
Numbers: TypeAlias = ArrayLike  # NumPy's, which has lists in it; JAX's has not
Params: TypeAlias = Any  # a pytree whose leaves are all real floating-point arrays
Args: TypeAlias = Any  # data for the loss: any pytree, never captured by closure
State: TypeAlias = Any  # what a flow or an optimizer carries; holds the parameters

Loss: TypeAlias = Callable[[Params, Args], jax.Array]  # -> real scalar
Observable: TypeAlias = Callable[[Params, Args], Any]  # -> a pytree of arrays of fixed shapes
VectorField: TypeAlias = Callable[[Params], Params]
StateObservable: TypeAlias = Callable[[Any, State, Args], Any]  # (t, state, args) -> a pytree of arrays

_T = TypeVar("_T")


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(dataclasses.field,))
def record_type(cls: type[_T]) -> type[_T]:
    """Make a frozen dataclass that is a pytree: for data that are created often, where an `equinox.Module` is slow."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, eq=False)(cls))


STATIC = {"static": True}  # metadata of a field that is part of the structure
