"""What a continuous-time model of an optimizer is."""

import abc
import math
from typing import ClassVar

import equinox as eqx
import jax
from jax.typing import ArrayLike

from eomdl._end import Diagnostic
from eomdl._target import ITERATES, Target
from eomdl._types import Args, Params, State


class AbstractFlow(eqx.Module):
    r"""A vector field $\dot x = F(t, x)$ that models a discrete optimizer.

    Step k of the optimizer sits at time $t = k h$, where $h$ is `step_size`. To write
    your own, subclass and define `step_size` (a field or a property) and `__call__`;
    override the rest where the state holds more than the parameters, or where the
    discrete map is known.

    ```python
    class PlainDescent(eomdl.AbstractFlow):
        loss: Callable
        step_size: jax.Array

        def __call__(self, t, state, args):
            return jax.tree.map(lambda g: -g, jax.grad(self.loss)(state, args))
    ```
    """

    # What `eomdl.citation` cites: keys of `eomdl/flows/references.py`, or whole BibTeX entries.
    references: ClassVar[tuple[str, ...]] = ()

    step_size: eqx.AbstractVar[jax.Array]

    @property
    def stride(self) -> int:
        """The flow passes through every m-th iterate; m = 1 but for strided flows.

        A flow of stride m sees the data of m steps: `eomdl.flows.step_data(args, n)` is that of the n-th.
        """
        return 1

    @property
    def target(self) -> Target:
        """What the flow predicts of a real run, which `eomdl.compare` measures it against: by default its iterates."""
        return ITERATES

    @property
    def refreshes(self) -> bool:
        """Whether `refresh` does something: `solve` then integrates stride by stride."""
        return False

    @property
    def gradients(self) -> float:
        """What one evaluation costs, in gradients of the loss; NaN where that is not known."""
        return math.nan

    @abc.abstractmethod
    def __call__(self, t: ArrayLike, state: State, args: Args) -> State:
        """$F(t, x)$: the state's velocity per unit of time (not per step)."""

    def init(self, params: Params, args: Args) -> State:
        """The state that starts at `params`."""
        del args
        return params

    def begin(self, t: ArrayLike, params: Params, state: State, args: Args) -> State:
        """The state that goes on where a real run ended at time t with `params`, carrying `state`."""
        del t, state
        return self.init(params, args)

    def params(self, state: State) -> Params:
        """The parameters held in the state."""
        return state

    def refresh(self, t: ArrayLike, state: State, args: Args) -> State:
        """The state with what is carried beside the parameters made anew (re-tracked eigenvectors, say).

        Called at the start of every stride if `refreshes`; the parameters must stay as they are.
        """
        del t, args
        return state

    def step(self, t: ArrayLike, state: State, args: Args) -> State | None:
        """`step_span(args)` steps of the discrete map that this flow models; `None` if there is none.

        `solve` measures the flow's own error against it to choose its tolerances.
        """
        del t, state, args
        return None

    def step_span(self, args: Args) -> int:
        """How many steps of the optimizer `step` takes at once: 1, but where a model speaks of epochs only."""
        del args
        return 1

    def validate(self, params: Params, args: Args) -> None:
        """Raise `ValueError` if the flow cannot start from `params`."""
        del params, args

    def diagnostics(self, t: ArrayLike, state: State, args: Args) -> dict[str, Diagnostic]:
        """Named numbers that tell whether the model is valid here, each with its limit; recorded by `solve`."""
        del t, state, args
        return {}
