"""The names of the things that pass between the benchmarks."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax


Params: TypeAlias = Any  # a pytree whose leaves are all real floating-point arrays
Args: TypeAlias = Any  # data for the loss: any pytree
Loss: TypeAlias = Callable[[Params, Args], jax.Array]  # -> real scalar
VectorField: TypeAlias = Callable[[Params], Params]
