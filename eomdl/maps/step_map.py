"""Step maps: one step of an optimizer as a function of a floating-point state and time."""

import abc
from collections.abc import Callable
from typing import ClassVar, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from typing_extensions import override

from eomdl import _check, _reads, _structure, _tree
from eomdl._end import real_part
from eomdl._types import Args, Params, State


StepFunction: TypeAlias = Callable[[State, Args, ArrayLike], State]  # (state, args, k) -> the next state


class StepMap(eqx.Module):
    r"""A discrete optimizer as a map $x_{k+1} = \Psi(x_k, k)$ on a state of real arrays.

    `eomdl.optimizer_step(loss, optimizer)` gives that of any optax optimizer. To write your own, subclass
    and define `__call__`:

    ```python
    class Halve(eomdl.StepMap):
        def __call__(self, state, args, k):
            return jax.tree.map(lambda x: x / 2, state)


    run = eomdl.iterate(Halve(), params, 10)
    ```

    Override `init` and `params` where the state holds more than the parameters, and `increment` where
    $\Psi(x, k) - x$ is known without the rounding of that subtraction.
    """

    # Whether no real run takes this step: it has a state of a flow's own, or averages as they are after a transient.
    is_model: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(self, state: State, args: Args, k: ArrayLike) -> State:
        r"""Return $\Psi(x, k)$. It is a pure function; the step number k is a real number."""

    def init(self, params: Params) -> State:
        """Return the state that starts at `params`. `ValueError` if there is none."""
        return params

    def params(self, state: State) -> Params:
        """Return the parameters held in the state."""
        return state

    def memory(self, state: State) -> State:
        """What a monitor of a run sees of the state beside the parameters: an optimizer's own state, or all of it."""
        return state

    def restore(self, state: State, params: Params) -> State:
        """Return the state of this map where a real run ended in `state`, with `params` in it.

        That is the floating-point part of `state`, or `params` where the map carries nothing else. `ValueError` if
        it is the state of another map.
        """
        start = self.init(params)
        if start is params:
            return params
        hint = "begin with the state of a new run by `resume.without_state()`"
        return _structure.restore("end.state", real_part(state), start, hint)

    def starts_cold(self, params: Params, args: Args) -> bool | jax.Array:
        """Whether a new run begins with an empty memory that scales its steps, as Adam does: they then follow no smooth path."""
        del params, args
        return False

    def increment(self, state: State, args: Args, k: ArrayLike) -> State:
        r"""Return the change of the state in a step, $\Psi(x, k) - x$."""
        return _tree.sub(self(state, args, k), state)

    def num_steps(self, args: Args) -> int:
        """Return how many steps of the optimizer one call takes: 1, except where a map is of a whole epoch."""
        del args
        return 1


class _FunctionStep(StepMap):
    function: StepFunction

    @override
    def __call__(self, state: State, args: Args, k: ArrayLike) -> State:
        return self.function(state, args, k)


def as_step_map(step_map: StepMap | StepFunction) -> StepMap:
    """Return a `StepMap` as it is; make one of a function `(state, args, k) -> state` whose state is the parameters."""
    if isinstance(step_map, StepMap):
        return step_map
    if isinstance(step_map, optax.GradientTransformation) or not callable(step_map):
        raise ValueError(
            "step_map: expected an eomdl.StepMap, such as eomdl.optimizer_step(loss, optimizer), or a "
            f"function (state, args, k) -> state, got {_check.show(step_map)}"
        )
    return _FunctionStep(step_map)


def check_step(step_map: StepMap, params: Params, args: Args) -> None:
    """Check that the map keeps structure, shapes and dtypes of its state, which has only real arrays."""
    _reads.assert_unchanged("step_map", step_map)
    state = _check.params("step_map.init(params)", step_map.init(params))
    k = jnp.zeros((), jnp.result_type(float))
    names = ("the state of params", "args", "k")
    new = _check.shape_of(
        "step_map", "a function (state, args, k) -> state", step_map, state, args, k, names=names
    )
    _check.same_structure("step_map(state, args, k)", new, "its state", state)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(new), jax.tree.leaves(state), strict=True):
        if a.dtype != b.dtype:
            raise ValueError(
                f"step_map(state, args, k){jax.tree_util.keystr(path)}: expected the dtype of its state, "
                f"{b.dtype}, got {a.dtype}"
            )
