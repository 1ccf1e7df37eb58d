"""How accurately to integrate: the units of a state, and tolerances from the flow's own local error."""

import warnings
from typing import Any, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eomdl import _tree
from eomdl._types import Params, State
from eomdl.flows.base import AbstractFlow
from eomdl.flows.stride import step_data
from eomdl.runs.data import Window
from eomdl.runs.dynamics import Span


_FRACTION = 5e-4  # of the flow's local error: the ODE error allowed in one ODE step
_FIRST = 1e-5  # of a discrete step: the tolerance tried first
_HORIZON = 32  # discrete steps over which the units of an optimizer's state are measured


class OneStep(Protocol):
    """Integrates over a span with given tolerances."""

    def __call__(self, rtol: float, atol: float, x: State, span: Span, window: Window) -> State:
        """The state after the gaps of the span."""


def default_tolerances(dtype: Any) -> tuple[float, float]:
    """`rtol` and `atol` where nothing can be measured: under `jit`, or without a discrete map."""
    tol = 1e-7 if dtype == jnp.float64 else 1e-5
    return tol, tol


def state_units(flow: AbstractFlow, state: State, span: Span, window: Window) -> State | None:
    """One number a leaf, by which the solver's errors in it are weighed; None for 1 everywhere.

    An optimizer's momenta and averages live on scales of their own. A relative error in
    them makes the same relative error in the step of the parameters, so their unit is
    (size of a step of the parameters) / (their own size), over the first few discrete steps.
    """
    params = flow.params(state)
    shape = jax.tree.structure(params)
    if shape == jax.tree.structure(state):
        return None
    measured = _sizes(flow, span.start, state, window)
    if measured is None:
        return None
    moved, sizes = measured
    # Powers of two, so that going back and forth does not round.
    units = [2.0 ** round(float(np.log2(moved / s))) if s > 0 and moved > 0 else 1.0 for s in sizes]
    groups, outer = jax.tree.flatten(state, is_leaf=lambda x: jax.tree.structure(x) == shape)
    units = [1.0 if _is(group, params) else unit for group, unit in zip(groups, units, strict=True)]
    trees = [
        jax.tree.map(lambda leaf, unit=unit: jnp.asarray(unit, leaf.dtype), group)
        for group, unit in zip(groups, units, strict=True)
    ]
    return jax.tree.unflatten(outer, trees)


def _is(a: Any, b: Any) -> bool:
    """Whether two trees hold the same arrays."""
    same = jax.tree.structure(a) == jax.tree.structure(b)
    return same and all(x is y for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@eqx.filter_jit
def _sizes(
    flow: AbstractFlow, k: Any, state: State, window: Window
) -> tuple[jax.Array, list[jax.Array]] | None:
    """Largest root mean squares: of a step of the parameters, and of every group of the state."""
    shape = jax.tree.structure(flow.params(state))
    data = window.stride(k - k % flow.stride, flow.stride)
    t = (k - k % flow.stride) * flow.step_size
    if flow.step(t, state, step_data(data, 0)) is None:
        return None

    def rms(tree: Any) -> jax.Array:
        return _tree.norm(tree) / np.sqrt(_tree.size(tree))

    def one(x: State, n: jax.Array) -> tuple[State, Any]:
        new = flow.step(t + n * flow.step_size, x, step_data(data, n))
        groups = jax.tree.leaves(new, is_leaf=lambda y: jax.tree.structure(y) == shape)
        return new, (rms(_tree.sub(flow.params(new), flow.params(x))), [rms(g) for g in groups])

    _, sizes = jax.lax.scan(one, state, jnp.arange(_HORIZON))
    return jax.tree.map(jnp.max, sizes)


def measured_tolerances(
    flow: AbstractFlow, state: State, span: Span, window: Window, one_step: OneStep
) -> tuple[float, float]:
    """Tolerances from the flow's local error: its distance after one step (stride, epoch) to the discrete map.

    The tolerance is lowered until the local error stands clear of the error of the ODE solver. It begins where one
    ODE step of order 5 ends in most runs, so that this is mostly the one: 7 evaluations of the flow.
    """
    stepped = _stepped(flow, span.start, state, window)
    dtype = _tree.dtype(state)
    if stepped is None:
        return default_tolerances(dtype)
    target, length, size = stepped
    single = _single(span, flow.stride, int(length))
    root = np.sqrt(_tree.size(flow.params(state)))
    # The noise of the discrete step itself, which rounds x.
    noise = float(jnp.finfo(dtype).eps) * float(size)
    floor = max(noise / root, float(jnp.finfo(dtype).tiny))
    rtol = 4 * float(jnp.finfo(dtype).eps)
    tol = max(_FIRST * float(distance_of(target, flow.params(state))) / root, floor)
    while True:
        end = one_step(rtol, tol, state, single, window)
        error = float(distance_of(flow.params(end), target))
        if not np.isfinite(error):
            return default_tolerances(dtype)
        if error / root > 20 * tol or tol == floor:
            break
        tol = max(tol / 100, floor)
    if dtype != jnp.float64 and error <= noise:
        warnings.warn(
            f"{dtype} cannot carry this order here: the one-step error of {type(flow).__name__} is "
            f"{error:.1e}, and the rounding noise of one step is {noise:.1e} (Euclidean norms). Use "
            "float64 (jax.config.update('jax_enable_x64', True)) or a lower order.",
            stacklevel=6,
        )
    # A model that is off by more than it moves needs no looser integration than one that is off by that.
    error = min(error, float(distance_of(flow.params(end), flow.params(state))))
    return rtol, max(_FRACTION * error / int(length) * flow.stride / root, floor)


def _single(span: Span, stride: int, length: int) -> Span:
    """The first `length` steps of a span, in its own shape: one program for both."""
    gaps = np.zeros_like(span.gaps)
    single = span.single and len(gaps) >= length
    if single:
        gaps[:length] = 1
    else:
        gaps[0] = length
    return Span(np.asarray(int(span.start) - int(span.start) % stride), gaps, single)


@eqx.filter_jit
def _stepped(
    flow: AbstractFlow, k: Any, state: State, window: Window
) -> tuple[Params, jax.Array, jax.Array] | None:
    """Parameters after the discrete map, over how many steps that is, and the norm of those before."""
    here = k - k % flow.stride
    data = window.stride(here, flow.stride)
    start = flow.params(state)
    length = 0
    for n in range(flow.stride):
        state = flow.step((here + n) * flow.step_size, state, step_data(data, n))
        length += flow.step_span(data)
        if state is None:
            return None
    return flow.params(state), jnp.asarray(length), _tree.norm(start)


@eqx.filter_jit
def distance_of(a: Params, b: Params) -> jax.Array:
    """Euclidean distance over all leaves, compiled once for a structure."""
    return _tree.norm(_tree.sub(a, b))


distances = eqx.filter_vmap(distance_of)
