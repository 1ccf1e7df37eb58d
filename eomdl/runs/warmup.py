"""The real steps that come before a flow whose optimizer starts with an empty memory."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from eomdl import _check, _tree
from eomdl._types import Args, Params
from eomdl.flows.base import AbstractFlow, map_of
from eomdl.flows.stride import step_data
from eomdl.maps.step_map import StepMap, check_step
from eomdl.runs.discrete import StepDynamics
from eomdl.runs.ensemble import AbstractMembers
from eomdl.runs.run import Run
from eomdl.runs.trajectory import Trajectory


def _choose(flow: AbstractFlow, members: AbstractMembers, run: Run, warmup: Any) -> int:
    """Return how many real steps come first: as given, else as many as the flow asks for from an empty memory.

    At most half of the run, so that some of it is the flow's. A run that continues has its memory already.
    """
    if warmup is not None:
        warmup = _check.integer("warmup", warmup, 0, run.num_steps)
        if warmup and run.begin is not None:
            raise ValueError(
                f"warmup: expected 0 or None for a run that continues another (`resume`), got {warmup}"
            )
        if warmup and (flow.map is None or flow.map.is_model):
            raise ValueError(
                f"warmup: expected 0 or None, since {type(flow).__name__} does not know the optimizer's own step, got {warmup}; "
                "begin after real steps by `resume=eomdl.descend(...)`"
            )
        return warmup
    if run.begin is not None or flow.warmup == 0 or flow.map is None:
        return 0
    params, example = members.first(run.params), members.first_args(run.data.example)
    if _tree.is_traced(flow, run.params, run.data.args, example):
        return 0
    count = min(flow.warmup, run.num_steps // 2)
    return count if count and bool(_starts_cold(flow.map, params, step_data(example, 0))) else 0


@eqx.filter_jit
def _starts_cold(step_map: StepMap, params: Params, args: Args) -> jax.Array:
    return jnp.asarray(step_map.starts_cold(params, args))


def warm_up(
    flow: AbstractFlow, members: AbstractMembers, run: Run, warmup: Any, keep_saved: bool
) -> tuple[Run, Trajectory | None]:
    """Return what is left of a run after its first steps, which are taken for real, and those; None where there are none.

    `keep_saved`: whether their saved steps are part of the run.
    """
    count = _choose(flow, members, run, warmup)
    if count == 0:
        flow.validate(members.first(run.params), members.first_args(run.data.example))
        return run, None
    step_map = map_of(flow)
    check_step(step_map, members.first(run.params), step_data(members.first_args(run.data.example), 0))
    state = members.start(step_map.init, 0)(run.params)
    dynamics = StepDynamics(step_map, flow.step_size, gradients=1)
    real = run.until(count).run(members.vectorize(dynamics), state)
    stats = dataclasses.replace(real.stats, warmup=count)
    real = dataclasses.replace(real, end=dataclasses.replace(real.end, stats=stats))
    return run.after(real, keep_saved), real
