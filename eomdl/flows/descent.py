"""What the flows of gradient descent and of Adam have in common: a loss, and the learning rate as the time of a step."""

import equinox as eqx
import jax
from typing_extensions import override

from eomdl import _check
from eomdl._autodiff import DescentField
from eomdl._types import Args, Loss, Params, State
from eomdl.flows.base import AbstractFlow, Differentiated
from eomdl.maps.gradient_descent import GradientDescentStep
from eomdl.maps.step_map import StepMap


class AbstractDescentFlow(AbstractFlow):
    """A flow of a loss in which a step takes the learning rate as its time: of gradient descent, where it has no other `map`."""

    loss: eqx.AbstractVar[Loss]
    learning_rate: eqx.AbstractVar[jax.Array]

    # Equinox lets a property fill an AbstractVar; mypy does not know.
    @property  # type: ignore[misc]
    @override
    def step_size(self) -> jax.Array:
        return self.learning_rate

    @property
    @override
    def map(self) -> StepMap:
        return GradientDescentStep(self.loss, self.learning_rate)

    @override
    def differentiated(self, state: State) -> Differentiated | None:
        return Differentiated(DescentField(self.loss), self.params(state))

    @override
    def validate(self, params: Params, args: Args) -> None:
        _check.loss_is_scalar(self.loss, params, args)
