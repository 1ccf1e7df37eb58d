"""The integers and flags in an optimizer's state: which of them count its steps, and which settle after the first ones."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from eomdl import _tree
from eomdl._types import Params


SETTLED = 2  # steps after which a flag must not change any more
_STEPS = 8  # of a real run, to see how each leaf moves
_COUNTS = np.append(np.arange(2**12), 10**9)  # counter values tried; the last is behind any cycle
_FAR = 252_000  # a multiple of every period that is made of 2^5, 3^2, 5^3 and 7
_JUMP = 0.02  # of the size of a leaf, what counts as a jump
_WIDTH = 3  # of an axis of the parameters that the optimizer is tried on
_REMEDY = "`eomdl.descend` runs such an optimizer, but it has no flow"


class Leaf(NamedTuple):
    """A leaf that is not real: its values at the steps 0, ..., `SETTLED`, and whether it counts the steps."""

    first: np.ndarray
    counts: bool

    def at(self, k: jax.Array) -> jax.Array:
        """Return the value at a real step number."""
        if self.counts:
            return jnp.asarray(self.first[0], k.dtype) + k
        return jnp.asarray(self.first)[jnp.clip(k, 0, SETTLED).astype(int)]


def discrete_leaves(optimizer: optax.GradientTransformation, params: Params) -> list[Leaf]:
    """Return the leaves of the optimizer's state that are not real arrays, in order.

    A counter moves by one in every step of a real run and from every value, and the update depends on it
    without isolated values. Any other leaf must stay as it is after the first steps.

    Where the optimizer holds traced values (a learning rate inside `jit`), only its counters are tried.

    **Cost:** about a hundred updates, no gradients; once for an optimizer and shapes of parameters.
    **Raises:** `ValueError` for a state that is neither.
    """
    leaves, structure = jax.tree.flatten(params)
    shapes = tuple((x.shape, jnp.dtype(x.dtype).name) for x in leaves)
    try:
        return _probe_once(optimizer, structure, shapes)
    except _Traced:
        return _probe(optimizer, structure, shapes, traced=True)


class _Traced(Exception):
    """Raised where the optimizer holds traced values, which must not be cached."""


@functools.lru_cache(maxsize=128)
def _probe_once(optimizer: optax.GradientTransformation, structure: Any, shapes: tuple) -> list[Leaf]:
    return _probe(optimizer, structure, shapes, traced=False)


def _probe(
    optimizer: optax.GradientTransformation, structure: Any, shapes: tuple, traced: bool
) -> list[Leaf]:
    def parameters(width: int | None) -> Params:
        cut = [(tuple(d if width is None else min(d, width) for d in shape), kind) for shape, kind in shapes]
        return structure.unflatten([jnp.full(*c) for c in [(shape, 0.5, kind) for shape, kind in cut]])

    is_small = all(d <= _WIDTH for shape, _ in shapes for d in shape)
    with jax.ensure_compile_time_eval():
        try:
            # What counters do does not depend on sizes; but some optimizers are made for some,
            leaves = _classify(optimizer, parameters(_WIDTH), traced)
            if is_small or all(leaf.first.ndim == 1 for leaf in leaves):
                return leaves
        except _Raised:
            if is_small:
                raise
        # and a flag for every parameter has their shape.
        return _classify(optimizer, parameters(None), traced)


def _classify(optimizer: optax.GradientTransformation, params: Params, traced: bool) -> list[Leaf]:
    state = optimizer.init(params)
    discrete = [
        (jax.tree_util.keystr(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if not eqx.is_inexact_array(leaf)
    ]
    for where, leaf in discrete:
        if jnp.issubdtype(jnp.asarray(leaf).dtype, jax.dtypes.prng_key):
            raise _refusal(f"a random key at {where}")
    if not discrete:
        return []
    trial = _Trial(optimizer, params, state)
    if trial.is_traced and not traced:
        raise _Traced
    where = [where for where, _ in discrete]
    leaves = trial.classify(where)
    if any(leaf.counts for leaf in leaves):
        trial.require_counting(where, leaves)
        if not traced:
            trial.require_smooth(leaves)
    return leaves


class _Trial:
    """An optimizer run on numbers that do not matter: only how its integers move matters."""

    def __init__(self, optimizer: optax.GradientTransformation, params: Params, state: Any):
        self._params, self._state = params, state
        self._optimizer = optax.with_extra_args_support(optimizer)
        # Not the gradient of the run: what the state remembers and what it is given must not look the same.
        rng = np.random.default_rng(0)
        self._gradient = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), params)
        self._extra = self._find_arguments()
        real = jax.tree.map(eqx.is_inexact_array, state)
        self._real, self._discrete = eqx.partition(state, real)
        self._structure = jax.tree.structure(self._discrete)

    @property
    def is_traced(self) -> bool:
        """Whether an update depends on traced values."""
        return _tree.is_traced(_call(lambda: self._update(self._state, self._params)))

    def classify(self, where: list[str]) -> list[Leaf]:
        """Return the leaves as a real run moves them.

        The run goes step by step: to compile a loop takes longer.
        """
        states = [jax.tree.map(jnp.asarray, self._state)]
        for _ in range(_STEPS):
            _, new = _call(lambda: self._update(states[-1], self._params))
            states.append(jax.tree.map(lambda x, old: jnp.asarray(x, old.dtype), new, states[0]))
        self._real, _ = self._split(states[-1])
        rows = zip(*(self._split(state)[1] for state in states), strict=True)
        return [
            self._leaf(name, np.stack(jax.device_get(row))) for name, row in zip(where, rows, strict=True)
        ]

    def _leaf(self, where: str, values: np.ndarray) -> Leaf:
        if values.ndim == 1 and np.issubdtype(values.dtype, np.integer):
            if np.array_equal(values, values[0] + np.arange(len(values))):
                return Leaf(values[: SETTLED + 1], counts=True)
            if not np.all(values[SETTLED:] == values[-1]):
                raise _refusal(f"an integer that goes {', '.join(map(str, values))} at {where}")
        elif not np.all(values[SETTLED:] == values[-1]):
            raise _refusal(f"{values.dtype} {values.shape[1:]} that keeps changing at {where}")
        return Leaf(values[: SETTLED + 1], counts=False)

    def require_counting(self, where: list[str], leaves: list[Leaf]) -> None:
        """Require that a counter goes to the next value from every one, also from those that a short run does not reach."""
        counting = [leaf.counts for leaf in leaves]

        def next_values(n: jax.Array) -> list[jax.Array]:
            here = [
                jnp.asarray(leaf.first[0] + n if leaf.counts else leaf.first[-1], leaf.first.dtype)
                for leaf in leaves
            ]
            after = self._split(self._update(self._join(here), self._gradient)[1])[1]
            return [jnp.asarray(x) for x, counts in zip(after, counting, strict=True) if counts]

        # Not compiled, since every optimizer would be compiled anew.
        after = jax.device_get(_call(lambda: jax.vmap(next_values)(jnp.asarray(_COUNTS))))
        counters = [pair for pair in zip(where, leaves, strict=True) if pair[1].counts]
        for (name, leaf), values in zip(counters, after, strict=True):
            wrong = np.flatnonzero(np.asarray(values) != leaf.first[0] + _COUNTS + 1)
            if len(wrong):
                n = leaf.first[0] + _COUNTS[wrong[0]]
                raise _refusal(f"an integer that goes from {n} to {values[wrong[0]]} at {name}")

    def require_smooth(self, leaves: list[Leaf]) -> None:
        """Require that the update at a whole step number is also that just before or just after it."""
        real = jnp.result_type(float)

        def at(k: jax.Array) -> list[jax.Array]:
            updates, new = self._update(self._join([leaf.at(k) for leaf in leaves]), self._gradient)
            return jax.tree.leaves((updates, self._split(new)[0]))

        steps = np.append(np.arange(SETTLED + 1, SETTLED + 33), _FAR)
        widths = np.where(steps > 2**12, 1 / 16, 1 / 1024)  # wide enough to be a difference in float32
        ks = jnp.asarray(np.stack([steps - widths, steps, steps + widths]), real)
        values = jax.device_get(_call(lambda: jax.vmap(jax.vmap(at))(ks)))
        compared = [_compare(*np.asarray(x, float).reshape(3, len(steps), -1)) for x in values]
        alone, jumps = (np.any(column, axis=0) for column in zip(*compared, strict=True))
        if np.any(alone):
            k = steps[np.flatnonzero(alone)[0]]
            raise _refusal(f"an update that at step {k} is not what it is just before and just after")
        if np.mean(jumps) > 1 / 8:
            raise _refusal(f"an update that jumps in {int(np.sum(jumps))} of {len(steps)} steps")

    def _find_arguments(self) -> dict[str, Any]:
        """Return those of the arguments beyond the gradient that this optimizer takes."""
        p = self._params
        value = {"value": jnp.ones(()), "grad": p, "value_fn": lambda q, *a, **kw: _tree.vdot(q, q)}
        errors = []
        for extra in (value, {}, {"grad_fn": lambda q, *a, **kw: q}):
            try:
                jax.eval_shape(lambda s, e=extra: self._optimizer.update(p, s, p, **e), self._state)
            except Exception as error:  # of any type: it is the optimizer's own code
                errors.append(error)
            else:
                return extra
        raise _as_refusal(errors[0])

    def _update(self, state: Any, gradient: Params) -> tuple[Params, Any]:
        return self._optimizer.update(gradient, state, self._params, **self._extra)

    def _join(self, discrete: list[Any]) -> Any:
        return eqx.combine(self._real, self._structure.unflatten(discrete))

    def _split(self, state: Any) -> tuple[Any, list[Any]]:
        """Return the real part, and the leaves that are not real."""
        mask = jax.tree.map(lambda x: x is not None, self._real, is_leaf=lambda x: x is None)
        real, discrete = eqx.partition(state, mask)
        return real, jax.tree.leaves(discrete)


def _compare(before: np.ndarray, here: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return whether `here` is a value by itself, and whether there is a jump: arrays (steps, entries) -> (steps,)."""
    size = np.linalg.norm(here, axis=1) + np.linalg.norm(before, axis=1)
    left, right, across = (np.linalg.norm(d, axis=1) for d in (here - before, after - here, after - before))
    return np.minimum(left, right) > _JUMP * size + 10 * across, across > _JUMP * size


def _call(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except Exception as error:
        raise _as_refusal(error) from error


class _Raised(ValueError):
    """The refusal of an optimizer that itself has raised something."""


def _as_refusal(error: Exception) -> ValueError:
    return _refusal(
        f"an update that raised {type(error).__name__}: {str(error).splitlines()[0]:.200}", _Raised
    )


def _refusal(got: str, kind: type[ValueError] = ValueError) -> ValueError:
    return kind(
        "optimizer: expected an update that is smooth in a real step number, with integers that count the steps and "
        f"flags that settle after {SETTLED} steps, got {got}; {_REMEDY}"
    )
