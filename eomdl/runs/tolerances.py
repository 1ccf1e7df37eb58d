"""What is measured before a flow's first step: the scales of a state, its tolerances, and whether its derivatives are right."""

import dataclasses
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eomdl import _tree, _warn
from eomdl._autodiff import DescentField, jvp
from eomdl._end import Diagnostic, End, real_part
from eomdl._types import Args, Loss, Params, State
from eomdl.flows.base import AbstractFlow, Differentiated, map_of
from eomdl.flows.stride import step_data
from eomdl.runs.chunk import Chunk
from eomdl.runs.data import ChunkData, no_batches
from eomdl.runs.integrator import OdeProblem, integrator_for, tolerance_control


MAX_ERROR_FRACTION = 5e-4  # of the flow's local error: the ODE error allowed in one ODE step
FIRST_TOLERANCE = 1e-5  # of a discrete step: the tolerance tried first
JUMP_TOLERANCE = 1e-3  # of a discrete step, where the gradient can only change by jumps
KINK_DISTANCE = 1e-2  # of a discrete step, within which the gradient is compared on both sides of a path
MAX_JUMP = 0.1  # of the gradient there, relative, from which on it is told
STOP_TEST = "jump of the gradient within the next two steps, relative"
KINK_TEST = "jump of the gradient within a hundredth of a step, relative"
SCALE_STEPS = 32  # discrete steps over which the scales of an optimizer's state are measured
DERIVATIVE_TEST = "part of the gradient's change that its derivative misses"
MAX_MISMATCH = (
    0.01  # of a derivative and a difference of the field, relative, where it is more than the noise
)
WHY_MISMATCHED = (
    "The loss has a `stop_gradient` (JAX stops the second derivative too), a rule of its own for its derivative, or kinks here (relu, "
    "abs, max)."
)


def default_tolerances(dtype: Any) -> tuple[float, float]:
    """`rtol` and `atol` where nothing can be measured: under `jit`, or without a discrete map."""
    tol = 1e-7 if dtype == jnp.float64 else 1e-5
    return tol, tol


def measure_scales(flow: AbstractFlow, state: State, chunk: Chunk) -> State | None:
    """One number for each real leaf, by which the solver's errors in it are weighed; None for 1 everywhere.

    An optimizer's momenta and averages live on scales of their own. A relative error in
    them makes the same relative error in the step of the parameters, so their scale is
    (size of a step of the parameters) / (their own size), over the first few discrete steps.
    """
    params = flow.params(state)
    shape = jax.tree.structure(params)
    if shape == jax.tree.structure(state):
        return None
    measured = _sizes(flow, chunk.start, state, chunk.data)
    if measured is None:
        return None
    moved, sizes = measured
    # Powers of two, so that going back and forth does not round.
    scales = [2.0 ** round(float(np.log2(moved / s))) if s > 0 and moved > 0 else 1.0 for s in sizes]
    groups, outer = jax.tree.flatten(real_part(state), is_leaf=lambda x: jax.tree.structure(x) == shape)
    scales = [1.0 if _is(group, params) else scale for group, scale in zip(groups, scales, strict=True)]
    trees = [
        jax.tree.map(lambda leaf, scale=scale: jnp.asarray(scale, leaf.dtype), group)
        for group, scale in zip(groups, scales, strict=True)
    ]
    return jax.tree.unflatten(outer, trees)


def _is(a: Any, b: Any) -> bool:
    """Whether two trees hold the same arrays."""
    same = jax.tree.structure(a) == jax.tree.structure(b)
    return same and all(x is y for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@eqx.filter_jit
def _sizes(
    flow: AbstractFlow, k: Any, state: State, data: ChunkData
) -> tuple[jax.Array, list[jax.Array]] | None:
    """Largest root mean squares: of a step of the parameters, and of every group of the state."""
    shape = jax.tree.structure(flow.params(state))
    args = data.stride(k - k % flow.stride, flow.stride)
    start, step_map = jnp.asarray(k - k % flow.stride, jnp.result_type(float)), flow.map
    if step_map is None:
        return None

    def rms(tree: Any) -> jax.Array:
        return _tree.norm(tree) / np.sqrt(_tree.size(tree))

    def one(x: State, n: jax.Array) -> tuple[State, Any]:
        new = step_map(x, step_data(args, n), start + n)
        groups = jax.tree.leaves(real_part(new), is_leaf=lambda y: jax.tree.structure(y) == shape)
        return new, (rms(_tree.sub(flow.params(new), flow.params(x))), [rms(g) for g in groups])

    _, sizes = jax.lax.scan(one, state, jnp.arange(SCALE_STEPS))
    return jax.tree.map(jnp.max, sizes)


class Measured(NamedTuple):
    """What is measured at the start of a flow's run.

    - `rtol`, `atol`: the tolerances of one ODE step.
    - `is_constant`: whether the second step is as the first: then the gradient can only change by jumps.
    - `step_length`: the length of the first step (stride, epoch) of the discrete map; None where the flow has no map.
    - `departure`: the distance of the flow from the map after that, over that length.
    """

    rtol: float
    atol: float
    is_constant: bool = False
    step_length: float | None = None
    departure: float = 0.0


def measure_tolerances(problem: OdeProblem, state: State, chunk: Chunk) -> Measured:
    """Tolerances from the flow's local error: its distance after one step (stride, epoch) to the discrete map.

    The tolerance is lowered until the local error stands clear of the error of the ODE solver. It begins where one
    ODE step of order 5 ends in most runs, so that this is mostly the one: 7 evaluations of the flow.

    Where the second step is as the first one (a piecewise linear loss: L1, hinge) the flow has no error until it comes to
    a kink, and there one of the order of a step: the tolerance is a part of that, which steps across a jump can meet.
    """
    flow = problem.flow
    mapped = _map_params(flow, chunk.start, state, chunk.data)
    dtype = _tree.dtype(real_part(state))
    if mapped is None:
        return Measured(*default_tolerances(dtype))
    target, length, size, after = mapped
    step_length = float(distance(target, flow.params(state)))
    first_stride = _first_steps(chunk, flow.stride, int(length))
    integrate = integrator_for(problem, chunk)
    root = np.sqrt(_tree.size(flow.params(state)))
    # The noise of the discrete step itself, which rounds x.
    noise = float(jnp.finfo(dtype).eps) * float(size)
    floor = max(noise / root, float(jnp.finfo(dtype).tiny))
    rtol = 4 * float(jnp.finfo(dtype).eps)
    tol = max(FIRST_TOLERANCE * step_length / root, floor)
    while True:
        # Twice the first step: all of it in one ODE step, where the tolerances allow it.
        control = tolerance_control(rtol, tol, dtype, 2.0)
        end = flow.params(integrate(problem, control, state, first_stride).state)
        error = float(distance(end, target))
        if not np.isfinite(error):
            return Measured(*default_tolerances(dtype), step_length=step_length, departure=np.nan)
        if error / root > 20 * tol or tol == floor:
            break
        tol = max(tol / 100, floor)
    if error <= 8 * noise and step_length > 0:
        again = cast(tuple, _map_params(flow, chunk.start, after, chunk.data))[0]
        step, next_step = _tree.sub(target, flow.params(state)), _tree.sub(again, target)
        if float(distance(next_step, step)) <= 8 * noise:
            return Measured(
                rtol, max(JUMP_TOLERANCE * step_length / int(length) / root, floor), True, step_length
            )
    if dtype != jnp.float64 and error <= noise:
        _warn.warn(
            f"{dtype} cannot carry this order here: the one-step error of {type(flow).__name__} is "
            f"{error:.1e}, and the rounding noise of one step is {noise:.1e} (Euclidean norms). Use "
            "float64 (jax.config.update('jax_enable_x64', True)) or a lower order."
        )
    departure = error / step_length if error > noise and step_length > 0 else 0.0
    # A model that is off by more than it moves needs no larger tolerances than one that is off by that.
    error = min(error, float(distance(end, flow.params(state))))
    atol = max(MAX_ERROR_FRACTION * error / int(length) * flow.stride / root, floor)
    return Measured(rtol, atol, step_length=step_length, departure=departure)


def jump_at(flow: AbstractFlow, k: Any, x: State, data: ChunkData) -> dict[str, Diagnostic]:
    """Return by how much the gradient jumps near the path, for a loss that is piecewise linear.

    A path that comes to a kink to which the gradient points from both sides slides along it.
    """
    meaning = (
        "The loss is piecewise linear, and the flow slides along a kink: the gradient points to it from both sides, and the "
        "optimizer goes to and fro across it by up to a step."
    )
    return {
        KINK_TEST: Diagnostic(_jump(flow, k, x, data)[0], limit=MAX_JUMP, meaning=meaning, is_fault=False)
    }


def jump_where_stopped(flow: AbstractFlow, end: End, args: Args) -> dict[str, Diagnostic]:
    """Return the jump of the gradient where a run has used up its ODE steps, with the tolerance that can be met there."""
    if flow.map is None:
        return {}
    x = end.state.flow
    jump, length = map(float, _jump(flow, np.asarray(int(end.step)), x, no_batches(args), 2.0, 10))
    if not np.isfinite(jump):
        return {}
    atol = JUMP_TOLERANCE * length / np.sqrt(_tree.size(flow.params(x)))
    meaning = (
        "The path comes to a kink of the loss, along which a flow slides in very short steps where the gradient points to it from "
        f"both sides. A tolerance that can be met there is a thousandth of the optimizer's step: `atol={atol:.1e}`."
    )
    return {STOP_TEST: Diagnostic(np.array([jump]), limit=MAX_JUMP, meaning=meaning, is_fault=False)}


@eqx.filter_jit
def _jump(
    flow: AbstractFlow, k: Any, x: State, data: ChunkData, far: float = KINK_DISTANCE, halvings: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Return by how much the optimizer's step jumps near the path, relative, and its length.

    Between a hundredth of the step behind and `far` steps ahead, in the half where the step changes more, and so on: a smooth
    change becomes less with each of the `halvings`.
    """
    here = k - k % flow.stride
    step_map, args = map_of(flow), step_data(data.stride(here, flow.stride), 0)

    def step(x: State) -> State:
        return step_map.increment(x, args, jnp.asarray(here, jnp.result_type(float)))

    own = step(x)

    def at(c: jax.Array) -> tuple[jax.Array, State]:
        return c, step(_tree.add(x, _tree.scale(c, own)))

    def halve(_: Any, ends: tuple) -> tuple:
        (a, before), (b, after) = ends
        c, between = at((a + b) / 2)
        is_first = distance(before, between) > distance(between, after)
        halves = ((a, before), (c, between)), ((c, between), (b, after))
        return jax.tree.map(lambda x, y: jnp.where(is_first, x, y), *halves)

    ends = at(jnp.asarray(-KINK_DISTANCE)), at(jnp.asarray(float(far)))
    (_, behind), (_, ahead) = jax.lax.fori_loop(0, halvings, halve, ends)
    largest = jnp.maximum(_tree.norm(ahead), _tree.norm(behind))
    jump = distance(ahead, behind) / jnp.where(largest > 0, largest, 1)
    return jump, _tree.norm(step_map.params(own))


def _first_steps(chunk: Chunk, stride: int, length: int) -> Chunk:
    """The first `length` steps of a chunk, from a multiple of the stride on, in its own shape: one program for both."""
    between = np.zeros_like(chunk.steps_between)
    single_steps = chunk.single_steps and len(between) >= length
    if single_steps:
        between[:length] = 1
    else:
        between[0] = length
    start = np.asarray(int(chunk.start) - int(chunk.start) % stride)
    return dataclasses.replace(chunk, start=start, steps_between=between, single_steps=single_steps)


@eqx.filter_jit
def _map_params(
    flow: AbstractFlow, k: Any, state: State, data: ChunkData
) -> tuple[Params, jax.Array, jax.Array, State] | None:
    """Parameters after the discrete map, over how many steps that is, the larger of the two norms, and the whole state."""
    here = k - k % flow.stride
    args = data.stride(here, flow.stride)
    start, step_map = flow.params(state), flow.map
    if step_map is None:
        return None
    length = 0
    for n in range(flow.stride):
        state = step_map(state, step_data(args, n), jnp.asarray(here + n, jnp.result_type(float)))
        length += step_map.num_steps(args)
    end = flow.params(state)
    return end, jnp.asarray(length), jnp.maximum(_tree.norm(start), _tree.norm(end)), state


def derivative_diagnostics(flow: AbstractFlow, state: State, chunk: Chunk) -> dict[str, Diagnostic]:
    """Return `derivative_mismatch` of the field that the flow differentiates, and nothing where there is none to tell."""
    found = flow.differentiated(state)
    if found is None:
        return {}
    here = int(chunk.start) - int(chunk.start) % flow.stride
    mismatch = float(derivative_mismatch(found, step_data(chunk.data.stride(here, flow.stride), 0)))
    meaning = (
        "The gradient changes along itself by another amount than its derivative says, so the terms of the flow that "
        f"have derivatives are wrong by about as much. {WHY_MISMATCHED} Take a flow without derivatives: "
        "InterpolatingFlow(optimizer_step(loss, optimizer), learning_rate, points=2)."
    )
    if np.isnan(mismatch):
        return {}
    return {DERIVATIVE_TEST: Diagnostic(np.array([mismatch]), MAX_MISMATCH, meaning)}


def hessian_mismatch(loss: Loss, params: Params, args: Args) -> jax.Array:
    """Return `derivative_mismatch` of the gradient of a loss."""
    return derivative_mismatch(Differentiated(DescentField(loss), params), args)


@eqx.filter_jit
def derivative_mismatch(found: Differentiated, args: Args) -> jax.Array:
    r"""Return by how much $J v$, the derivative of a field f along $v = f / |f|$, is not the change of f there, relative.

    The change is that between $x \pm h v$. The second difference tells how far it can be trusted: it has the noise of f in
    it, and more than the error of the first one. Where the mismatch is not clearly larger, 0 is returned; nan where f is 0
    or not finite.

    **Cost:** four products $J v$, in a loop, so that little is compiled.
    """
    x, rest = eqx.partition(found.x, eqx.is_inexact_array)
    eps = float(jnp.finfo(_tree.dtype(x)).eps)
    length = _tree.norm(x)
    h = eps ** (1 / 3) * jnp.where(length > 0, length, 1)

    def field(real: State) -> State:
        return real_part(found.field(eqx.combine(real, rest), args))

    def evaluate(v: State, shift: jax.Array) -> tuple[State, tuple[State, State]]:
        value, change = jvp(field, _tree.add(x, _tree.scale(shift * h, v)), v)
        is_first = _tree.norm(v) == 0  # f along which to go is not known before
        return jax.tree.map(lambda f, u: jnp.where(is_first, f, u), _tree.unit(value), v), (value, change)

    _, (values, changes) = jax.lax.scan(evaluate, _tree.zeros_like(x), jnp.array([0.0, 0.0, 1.0, -1.0]))
    derivative = jax.tree.map(lambda c: c[1], changes)
    difference = jax.tree.map(lambda f: (f[2] - f[3]) / (2 * h).astype(f.dtype), values)
    bend = jax.tree.map(lambda f: (f[2] - 2 * f[0] + f[3]) / (2 * h).astype(f.dtype), values)
    size = _tree.norm(jax.tree.map(lambda f: f[0], values))
    off = _tree.norm(_tree.sub(derivative, difference))
    is_clear = off > 3 * _tree.norm(bend) + 16 * eps * size / h
    largest = jnp.maximum(_tree.norm(derivative), _tree.norm(difference))
    mismatch = jnp.where(is_clear, off / jnp.where(is_clear, largest, 1), 0)
    return jnp.where((size > 0) & jnp.isfinite(off + _tree.norm(bend)), mismatch, jnp.nan)


@eqx.filter_jit
def distance(a: Params, b: Params) -> jax.Array:
    """Euclidean distance over all leaves, compiled once for a structure."""
    return _tree.norm(_tree.sub(a, b))


distances = eqx.filter_vmap(distance)
