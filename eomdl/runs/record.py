"""What is kept of a run, and when."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eomdl._end import is_finite
from eomdl._types import Args, Observable, Params, State
from eomdl.observe.base import is_per_member
from eomdl.runs.chunk import Chunk


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
        return tuple(name for name, f in self.observe.items() if is_per_member(f))


@eqx.filter_jit
def evaluate_records(
    observe: dict[str, Observable], params: Params, chunk: Chunk, state: State
) -> tuple[dict[str, Any], jax.Array, jax.Array]:
    """Observables and finiteness of every record of a chunk, and finiteness of a state.

    Observables may be expensive: they are computed for the records that there are, and are 0 behind them.
    """

    def observe_at(params: Params, k: jax.Array) -> dict[str, Any]:
        values = {name: f(params, chunk.data.seen_by(f, k)) for name, f in observe.items()}
        return jax.tree.map(jnp.asarray, values)

    def evaluate(record: tuple) -> tuple[dict, jax.Array]:
        params, k, is_record = record
        shapes = jax.eval_shape(observe_at, params, k)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        values = jax.lax.cond(is_record, observe_at, lambda *_: nothing, params, k)
        return values, is_finite(params)

    values, finite = jax.lax.map(evaluate, (params, jnp.asarray(chunk.steps), chunk.is_record))
    return values, finite, is_finite(state)


def observable_shapes(
    observe: dict[str, Observable], params: Params, seen_by: Callable[[Observable], Args]
) -> dict[str, Any]:
    """Shapes and dtypes of the observables."""
    return {name: eqx.filter_eval_shape(f, params, seen_by(f)) for name, f in observe.items()}
