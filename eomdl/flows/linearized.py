"""The linear part of a step map, matrix-free."""

from typing import Any

import jax
from matfree import decomp

from eomdl import _tree
from eomdl._types import Args, State
from eomdl.maps.step_map import StepMap


def arnoldi(
    step_map: StepMap, state: State, k: Any, args: Args, stride: int, depth: int, start: State | None = None
) -> Any:
    """The map's Jacobian less the identity on a Krylov space of dimension `depth`: `Q_tall` (vectors), `J_small`.

    From one fixed random vector, or from `start`. NaN where the space ends before.
    """

    def increment(x: State) -> State:
        total = _tree.zeros_like(x)
        for n in range(stride):
            total = _tree.add(total, step_map.increment(_tree.add(x, total), args, k + n))
        return total

    start = _tree.random_normal(jax.random.key(0), state) if start is None else start
    decompose = decomp.hessenberg(depth, reortho="full", reortho_vjp="full", custom_vjp=False)
    return decompose(lambda v: jax.jvp(increment, (state,), (v,))[1], start)
