"""The local error of a flow, in one step, at points of the real path."""

from collections.abc import Iterator, Sequence
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from eomdl import _check, _tree, _warn
from eomdl._end import End
from eomdl._types import Args, State
from eomdl.flows.base import AbstractFlow, as_ode, map_of
from eomdl.runs.continuous import solve
from eomdl.runs.data import ChunkData, stacked_batches
from eomdl.runs.trajectory import Trajectory


def local_error(
    flow: AbstractFlow,
    reference: Trajectory,
    *,
    args: Args = None,
    batches: Any = None,
    steps: Sequence[int] | None = None,
) -> tuple[Int[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    r"""Return the local error of a flow, in one step, at points of the real path.

    $d_k = |\varphi_{mh}(\theta_k) - \theta_{k+m}|$: the flow starts at a point of the reference and runs
    for the time of one step (of m steps, for a flow of stride m). It is $O(\eta^{n+2})$
    for the equation of motion with n counter terms, $O(h^{K+1})$ for K points. A flow that carries
    an optimizer's state starts with the state that its map has there.

    **Arguments:** `reference`: a real run with saved `params`; `args`, `batches` (stacked, or a list of one for each step):
    those of that run; `steps`: the steps k, by default up to 16 spread over the path.

    **Returns:** `(steps, errors)`, each of shape (m,).

    **Cost:** one ODE solve of one step for each of the `steps`; where the flow carries an optimizer's state, also
    the map up to the last of them.

    **Raises:** `ValueError` if steps k and k + m are not saved.
    """
    as_ode(flow)
    _check.kind("reference", reference, Trajectory, "an eomdl.Trajectory")
    stride = flow.stride
    if reference.params is None:
        raise ValueError("reference: expected saved params, got a run with save_params=False")
    chosen = _chosen(reference, stride, steps)
    batches = None if batches is None else _check.stacked("batches", batches)
    lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batches)}
    if batches is not None and (len(lengths) != 1 or () in lengths):
        raise ValueError(
            f"batches: expected arrays with one leading axis, the steps, got {_check.show(batches)}"
        )
    data = stacked_batches(args, batches)
    errors = []
    for k, state in zip(chosen, _states(flow, reference, chosen, data), strict=True):
        here, end = reference.at(k), int(k + stride)
        path = _warn.quietly(solve)(
            flow,
            here,
            end,
            args=data.stride(k, stride),
            resume=End(int(k), state, here),
            save_steps=[end],
            solver=diffrax.Tsit5(),  # not what the flow recommends: this is the error of the flow itself
            estimate_error=False,
            diagnose=False,
        )
        difference = jax.tree.map(lambda a, b: np.asarray(a[-1:] - b), path.params, reference.at(end))
        errors.append(float(_tree.row_norms(difference)[0]))
    return chosen, np.array(errors)


def _chosen(reference: Trajectory, stride: int, steps: Sequence[int] | None) -> np.ndarray:
    saved = np.asarray(reference.steps)
    possible = saved[np.isin(saved + stride, saved) & (saved % stride == 0)]
    spread = np.linspace(0, len(possible) - 1, min(16, len(possible))).round().astype(int)
    chosen = possible[spread] if steps is None else np.asarray(_check.step_numbers("steps", steps))
    if len(chosen) == 0 or not np.all(np.isin(chosen, possible)):
        raise ValueError(
            f"steps: expected multiples of the stride {stride} saved together with the step {stride} later, got "
            f"{steps} of {saved}"
        )
    return chosen


def _states(
    flow: AbstractFlow, reference: Trajectory, chosen: np.ndarray, data: ChunkData
) -> Iterator[State | None]:
    """Iterate over the state of the flow's map at points of the real path; None where it is the parameters only."""
    state, at = flow.init(reference.at(int(reference.steps[0])), data.at(0)), 0
    for k in chosen:
        if jax.tree.structure(state) == jax.tree.structure(flow.params(state)):
            yield None
            continue
        if at == 0 and reference.steps[0] != 0:
            raise ValueError(
                f"reference: expected step 0 to be saved, from where {type(flow).__name__} runs its map to get the "
                f"optimizer's state, got {reference.steps}"
            )
        for n in range(at, int(k)):
            state = _step(flow, np.asarray(n), state, data)
        at = int(k)
        yield state


@eqx.filter_jit
def _step(flow: AbstractFlow, k: Any, state: State, data: ChunkData) -> State:
    return map_of(flow)(state, data.at(k), jnp.asarray(k, jnp.result_type(float)))
