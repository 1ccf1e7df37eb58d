"""How accurately to integrate: the units of a state, and tolerances from the flow's own defect."""

import warnings
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eomdl import _tree
from eomdl._batches import batch_of
from eomdl._types import Args, Params, State
from eomdl.flows.base import AbstractFlow


_FRACTION = 5e-4  # of the flow's one-step error: the ODE error allowed in one ODE step
_HORIZON = 32  # discrete steps over which the units of an optimizer's state are measured


def default_tolerances(params: Params) -> tuple[float, float]:
    """`rtol` and `atol` where nothing can be measured: under `jit`, or without a discrete map."""
    tol = 1e-7 if _tree.dtype(params) == jnp.float64 else 1e-5
    return tol, tol


def units(flow: AbstractFlow, t: Any, state: State, args: Args) -> State | None:
    """One number a leaf, by which the solver's errors in it are weighed; None for 1 everywhere.

    An optimizer's momenta and averages live on scales of their own. A relative error in
    them makes the same relative error in the step of the parameters, so their unit is
    (size of a step of the parameters) / (their own size), over the first few discrete steps.
    """
    params = flow.params(state)
    if jax.tree.structure(params) == jax.tree.structure(state) or _stepped(flow, t, state, args) is None:
        return None
    shape = jax.tree.structure(params)
    groups, outer = jax.tree.flatten(state, is_leaf=lambda x: jax.tree.structure(x) == shape)
    moved, sizes = _sizes(flow, t, state, args)
    # Powers of two, so that going back and forth does not round.
    units = [2.0 ** round(float(np.log2(moved / s))) if s > 0 and moved > 0 else 1.0 for s in sizes]
    is_params = [jax.tree.structure(g) == shape and _same(g, params) for g in groups]
    trees = [
        jax.tree.map(lambda leaf, u=u: jnp.asarray(u, leaf.dtype), g)
        for g, u in zip(groups, [1.0 if p else u for p, u in zip(is_params, units, strict=True)], strict=True)
    ]
    return jax.tree.unflatten(outer, trees)


def _same(a: Any, b: Any) -> bool:
    return all(x is y for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@eqx.filter_jit
def _sizes(flow: AbstractFlow, t: Any, state: State, args: Args) -> tuple[jax.Array, list[jax.Array]]:
    """Largest root mean squares: of a step of the parameters, and of every group of the state."""
    shape = jax.tree.structure(flow.params(state))

    def rms(tree: Any) -> jax.Array:
        return _tree.norm(tree) / np.sqrt(_tree.size(tree))

    def one(x: State, n: jax.Array) -> tuple[State, Any]:
        new = flow.step(t + n * flow.step_size, x, batch_of(args, n))
        groups = jax.tree.leaves(new, is_leaf=lambda y: jax.tree.structure(y) == shape)
        return new, (rms(_tree.sub(flow.params(new), flow.params(x))), [rms(g) for g in groups])

    _, sizes = jax.lax.scan(one, state, jnp.arange(_HORIZON))
    return jax.tree.map(jnp.max, sizes)


def measured_tolerances(
    flow: AbstractFlow, t: Any, state: State, args: Args, one_step: Callable[[Any], Any]
) -> tuple[float, float]:
    """Tolerances from the flow's defect: its distance after one step to the discrete step.

    The tolerance is lowered until the defect stands clear of the error of the ODE solver,
    so it costs a few ODE steps; `one_step(controller)` integrates over one step (one stride).
    """
    target = _stepped(flow, t, state, args)
    if target is None:
        return default_tolerances(state)
    target, state = flow.params(target), flow.params(state)
    dtype = _tree.dtype(state)
    eps = float(jnp.finfo(dtype).eps)
    root = np.sqrt(_tree.size(state))
    noise = eps * float(_tree.norm(state))  # of the discrete step itself, which rounds x
    floor = max(noise / root, float(jnp.finfo(dtype).tiny))
    rtol = 4 * eps
    tol = max(1e-2 * float(distance_of(target, state)) / root, floor)
    while True:
        controller = diffrax.PIDController(jnp.asarray(rtol, dtype), jnp.asarray(tol, dtype))
        defect = float(distance_of(flow.params(one_step(controller)[0]), target))
        if not np.isfinite(defect):
            return default_tolerances(state)
        if defect / root > 20 * tol or tol == floor:
            break
        tol = max(tol / 100, floor)
    if dtype != jnp.float64 and defect <= noise:
        warnings.warn(
            f"{dtype} cannot carry this order here: the one-step error of {type(flow).__name__} is "
            f"{defect:.1e}, and the rounding noise of one step is {noise:.1e} (Euclidean norms). Use "
            "float64 (jax.config.update('jax_enable_x64', True)) or a lower order.",
            stacklevel=5,
        )
    return rtol, max(_FRACTION * defect / root, floor)


@eqx.filter_jit
def _stepped(flow: AbstractFlow, t: Any, state: State, args: Args) -> State | None:
    """The discrete map of the flow, over one stride."""
    for n in range(flow.stride):
        state = flow.step(t + n * flow.step_size, state, batch_of(args, n))
        if state is None:
            break
    return state


@eqx.filter_jit
def distance_of(a: Params, b: Params) -> jax.Array:
    """Euclidean distance over all leaves, compiled once for a structure."""
    return _tree.norm(_tree.sub(a, b))
