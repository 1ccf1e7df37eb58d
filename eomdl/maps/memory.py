"""Where an optimizer's state keeps what it remembers: which number belongs to which parameter, whatever it is wrapped in."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from eomdl import _tree
from eomdl._types import Params, State


_MOST_MICRO_STEPS = 2**14  # that are tried, to find how many make a step

# The fields in which a kind of state keeps a mean of gradients, and one of their squares.
_MEANS: dict[type, str] = {
    optax.TraceState: "trace",
    optax.EmaState: "ema",
    optax.ScaleByAdamState: "mu",
}
_SQUARES: dict[type, str] = {optax.ScaleByRmsState: "nu", optax.ScaleByAdamState: "nu"}

Update = Callable[[Params, State, Params], tuple[Params, State]]


class Memories(NamedTuple):
    """The leaves of a state, by number, that are the memories of each leaf of the parameters; None where it has none."""

    mean: tuple[int | None, ...]
    square: tuple[int | None, ...]

    def split(self, leaves: list[Any], mean: list[Any], square: list[Any]) -> tuple[list[Any], ...]:
        """Return the means and the squares, with the given ones where there is none, and the real numbers that are neither."""
        known = {*self.mean, *self.square}
        rest = [x for i, x in enumerate(leaves) if i not in known and eqx.is_inexact_array(x)]
        found = (
            [other if i is None else leaves[i] for i, other in zip(places, others, strict=True)]
            for places, others in zip(self, (mean, square), strict=True)
        )
        return *found, rest

    def replace(self, leaves: list[Any], mean: list[Any], square: list[Any]) -> list[Any]:
        """Return the leaves with these memories in their places."""
        leaves = list(leaves)
        for places, values in zip(self, (mean, square), strict=True):
            for i, x in zip(places, values, strict=True):
                if i is not None:
                    leaves[i] = x.astype(leaves[i].dtype)
        return leaves


def find_memories(params: Params, state: State) -> Memories | None:
    """Return the memories of each parameter in a state; None if one has several.

    They are found by the paths of their leaves, in every group of a partition and within every wrapper. A frozen parameter has none.
    """
    paths = {path: i for i, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(params))}
    numbers = {path: i for i, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(state))}
    found: dict[str, list[int | None]] = {kind: [None] * len(paths) for kind in ("mean", "square")}
    for where, part in jax.tree_util.tree_leaves_with_path(state, is_leaf=_is_known):
        for kind, fields in (("mean", _MEANS), ("square", _SQUARES)):
            field = fields.get(type(part))
            leaves = () if field is None else jax.tree_util.tree_leaves_with_path(getattr(part, field))
            for path, _ in leaves:
                place, number = paths.get(path), numbers[(*where, jax.tree_util.GetAttrKey(field), *path)]
                if place is None or found[kind][place] is not None:
                    return None
                found[kind][place] = number
    return Memories(tuple(found["mean"]), tuple(found["square"]))


def _is_known(part: Any) -> bool:
    return type(part) in _MEANS or type(part) in _SQUARES


def fit_state(optimizer: optax.GradientTransformation, state: State, params: Params) -> State:
    """Return the state in the structure that the optimizer itself makes, if it has the same leaves in another.

    `flax.nnx.Optimizer` keeps every leaf in a box of its own.
    """
    own = jax.eval_shape(optimizer.init, params)
    if jax.tree.structure(own) == jax.tree.structure(state):
        return state
    leaves, wanted = jax.tree.leaves(state), jax.tree.leaves(own)
    if [jnp.shape(x) for x in leaves] != [x.shape for x in wanted]:
        return state
    return jax.tree.structure(own).unflatten(leaves)


# ------------------------------------------------- steps of several gradients


class WholeStep(NamedTuple):
    r"""An optimizer's step as a function of one gradient, where it accumulates n gradients (`optax.MultiSteps`) too.

    - `update`: `(gradient, state, params) -> (updates, state)`, a whole step whose n gradients are all this one.
    - `state`: that from which it is taken. `gradient`: the mean of those that have been accumulated, and of the present one in the
        place of those still to come.
    - `is_found`: whether n was found.
    """

    update: Update
    state: State
    gradient: Params
    is_found: jax.Array


def whole_step(
    optimizer: optax.GradientTransformation, state: State, gradient: Params, params: Params
) -> WholeStep:
    """Return the step that an optimizer takes from `state`, or by which it ends what it is accumulating.

    **Cost:** none for an optimizer that accumulates nothing.
    """
    state = fit_state(optimizer, state, params)
    if not accumulates(state):
        return WholeStep(optimizer.update, state, gradient, jnp.asarray(True))
    (sums,) = _accumulations(state)
    if jax.tree.structure(sums.acc_grads) != jax.tree.structure(params):
        raise ValueError("optimizer: expected all gradients to be accumulated or none, got some")

    def after(mini_step: jax.Array, gradient: Params, total: Params) -> optax.MultiStepsState:
        before = _replace(state, mini_step=mini_step, acc_grads=total)
        return _accumulations(optimizer.update(gradient, before, params)[1])[0]

    def is_not_over(mini_step: jax.Array) -> jax.Array:
        is_last = after(mini_step, gradient, sums.acc_grads).gradient_step != sums.gradient_step
        return ~is_last & (mini_step < _MOST_MICRO_STEPS)

    # XLA leaves all but the counter out of the loop.
    last = jax.lax.while_loop(is_not_over, lambda i: i + 1, jnp.asarray(sums.mini_step))
    # After the second of three micro-steps, the mean of 1 and 0 is 1/2 and their sum is 1.
    second = after(jnp.asarray(1), _tree.zeros_like(params), jax.tree.map(jnp.ones_like, params))
    is_sum = (last >= 2) & (jnp.max(jax.tree.leaves(second.acc_grads)[0]) > 0.75)
    done, n = 1.0 * sums.mini_step, last + 1.0
    # What has been accumulated before the last of n equal gradients, in units of one.
    weight = jnp.where(is_sum, last, jnp.minimum(last, 1))

    def mean(total: jax.Array, g: jax.Array) -> jax.Array:
        return ((jnp.where(is_sum, 1, done) * total + (n - done) * g) / n).astype(g.dtype)

    def update(gradient: Params, state: State, params: Params) -> tuple[Params, State]:
        state = _replace(state, acc_grads=_tree.scale(weight, gradient))
        return optimizer.update(gradient, state, params)

    whole = _replace(state, mini_step=last)
    return WholeStep(update, whole, jax.tree.map(mean, sums.acc_grads, gradient), last < _MOST_MICRO_STEPS)


def accumulates(state: State) -> bool:
    """Whether a state is that of an optimizer that takes a step only after several gradients."""
    return bool(_accumulations(state))


def _accumulations(state: State) -> list[optax.MultiStepsState]:
    return [part for part in jax.tree.leaves(state, is_leaf=_is_accumulation) if _is_accumulation(part)]


def _replace(state: State, **fields: Any) -> State:
    """Return the state with these fields in its accumulation, in the dtypes that it has there."""

    def put(part: Any) -> Any:
        if not _is_accumulation(part):
            return part
        same = {
            name: jax.tree.map(lambda x, old: jnp.astype(x, old.dtype), new, getattr(part, name))
            for name, new in fields.items()
        }
        return part._replace(**same)

    return jax.tree.map(put, state, is_leaf=_is_accumulation)


def _is_accumulation(part: Any) -> bool:
    return isinstance(part, optax.MultiStepsState)
