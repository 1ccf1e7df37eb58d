"""What a continuous-time model of an optimizer is."""

import abc

import equinox as eqx
import jax
from jax.typing import ArrayLike

from eomdl._types import Args, Params, State


class AbstractFlow(eqx.Module):
    """A vector field $\\dot x = F(t, x)$ that models a discrete optimizer.

    Step k of the optimizer sits at time $t = k h$, where $h$ is `step_size`. To write
    your own, subclass and define `step_size` (a field or a property) and `__call__`;
    override the rest where the state holds more than the parameters, or where the
    discrete map is known.
    """

    step_size: eqx.AbstractVar[jax.Array]

    @property
    def stride(self) -> int:
        """The flow passes through every m-th iterate; m = 1 but for strided flows."""
        return 1

    @abc.abstractmethod
    def __call__(self, t: ArrayLike, state: State, args: Args) -> State:
        """$F(t, x)$: the state's velocity per unit of time (not per step)."""

    def init(self, params: Params, args: Args) -> State:
        """The state that starts at `params`."""
        del args
        return params

    def params(self, state: State) -> Params:
        """The parameters held in the state."""
        return state

    def step(self, t: ArrayLike, state: State, args: Args) -> State | None:
        """One step of the discrete map that this flow models; `None` if there is none.

        `solve` measures the flow's own defect against it to choose its tolerances.
        """
        del t, state, args
        return None

    def validate(self, params: Params, args: Args) -> None:
        """Raise `ValueError` if the flow cannot start from `params`."""
        del params, args

    def diagnostics(self, t: ArrayLike, state: State, args: Args) -> dict[str, jax.Array]:
        """Named scalars that tell whether the model is valid here; recorded by `solve`."""
        del t, state, args
        return {}
