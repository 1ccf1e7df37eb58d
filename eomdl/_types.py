"""The names of the things that pass between modules."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax


Params: TypeAlias = Any  # a pytree whose leaves are all real floating-point arrays
Args: TypeAlias = Any  # data for the loss: any pytree, never captured by closure
State: TypeAlias = Any  # what a flow or an optimizer carries; holds the parameters

Loss: TypeAlias = Callable[[Params, Args], jax.Array]  # -> real scalar
Observable: TypeAlias = Callable[[Params, Args], jax.Array]  # -> array of fixed shape
VectorField: TypeAlias = Callable[[Params], Params]
StateObservable: TypeAlias = Callable[[Any, State, Args], jax.Array]  # (t, state, args) -> array
