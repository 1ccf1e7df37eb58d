"""The linear part of a step map, matrix-free."""

from typing import Any

import jax

from eomdl import _tree
from eomdl._autodiff import jvp
from eomdl._types import Args, State
from eomdl.linalg.arnoldi import Krylov, arnoldi
from eomdl.maps.step_map import StepMap


def krylov_of_step(
    step_map: StepMap, state: State, k: Any, args: Args, stride: int, depth: int, start: State | None = None
) -> Krylov:
    """Return the map's Jacobian less the identity on a Krylov space of dimension `depth`.

    The space begins with one fixed random vector, or with `start`. **Cost:** `depth` Jacobian-vector products of `stride` steps.
    """

    def increment(x: State) -> State:
        total = _tree.zeros_like(x)
        for n in range(stride):
            total = _tree.add(total, step_map.increment(_tree.add(x, total), args, k + n))
        return total

    start = _tree.random_normal(jax.random.key(0), state) if start is None else start
    return arnoldi(lambda v: jvp(increment, state, v)[1], start, depth)
