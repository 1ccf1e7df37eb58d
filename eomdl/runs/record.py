"""What is kept of a run, and when."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eomdl._end import is_finite
from eomdl._types import Array, Observable, Params, State
from eomdl.runs.data import Window


@dataclasses.dataclass(frozen=True)
class Record:
    """What to keep of a run.

    - `observe`: `{name: observable}` of the parameters.
    - `steps`: the saved step numbers.
    - `save_params`: whether the parameters are kept.
    """

    observe: dict[str, Observable]
    steps: np.ndarray
    save_params: bool

    @property
    def per_member(self) -> tuple[str, ...]:
        """Names of the observables with a value for each member of an ensemble."""
        return tuple(name for name, f in self.observe.items() if getattr(f, "per_member", False))


@eqx.filter_jit
def recorded(
    observe: dict[str, Observable],
    params: Params,
    steps: Array,
    wanted: Array,
    window: Window,
    state: State,
) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """Observables and finiteness of every row, and finiteness of a state.

    Observables may be dear: they are computed in the wanted rows, and 0 in the others.
    """

    def observed(params: Params, k: jax.Array) -> dict[str, jax.Array]:
        return {name: jnp.asarray(f(params, window.seen_by(f, k))) for name, f in observe.items()}

    def row(at: tuple) -> tuple[dict, jax.Array]:
        params, k, wanted = at
        shapes = jax.eval_shape(observed, params, k)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        values = jax.lax.cond(wanted, observed, lambda *_: nothing, params, k)
        return values, is_finite(params)

    values, finite = jax.lax.map(row, (params, steps, wanted))
    return values, finite, is_finite(state)


def column_shapes(observe: dict[str, Observable], params: Params, seen_by: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the observables."""
    return {name: eqx.filter_eval_shape(f, params, seen_by(f)).shape for name, f in observe.items()}
