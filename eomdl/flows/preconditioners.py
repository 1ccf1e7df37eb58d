"""Preconditioners of the central flow: the matrix by which an optimizer divides gradients, and how that moves."""

import abc
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from typing_extensions import override

from eomdl import _check, _tree
from eomdl._types import Params, State


class AbstractPreconditioner(eqx.Module):
    r"""The diagonal matrix P of a step $\theta - P^{-1} g$, made of the learning rate and a `moment` that follows $g^2$."""

    @abc.abstractmethod
    def init(self, gradient: Params) -> Any:
        """Return the moment where gradients have long been like this one; None where there is none."""

    @abc.abstractmethod
    def read(self, state: State, like: Params) -> Any:
        """Return the moment in a state of the optimizer, None where the flow needs none. **Raises:** `ValueError` if it is not there."""

    @abc.abstractmethod
    def diagonal(self, learning_rate: jax.Array, moment: Any, like: Params) -> Params:
        """Return P, a pytree like the parameters."""

    @abc.abstractmethod
    def collect(self, squares: Params) -> Any:
        """Return what the moment averages, from a pytree like $g^2$."""

    @abc.abstractmethod
    def rate(self, moment: Any, squares: Any) -> Any:
        """Return the moment's velocity per step where it averages these squares."""

    @abc.abstractmethod
    def next(self, moment: Any, squares: Any) -> Any:
        """Return the moment after a step of the optimizer."""

    @abc.abstractmethod
    def diagonal_rate(self, learning_rate: jax.Array, diagonal: Params, rate: Any) -> Params:
        """Return the velocity of P, from that of the moment."""


class NoMoment(AbstractPreconditioner):
    r"""The preconditioner of gradient descent, $P = 1/\eta$."""

    @override
    def init(self, gradient: Params) -> None:
        return None

    @override
    def read(self, state: State, like: Params) -> None:
        return None

    @override
    def diagonal(self, learning_rate: jax.Array, moment: None, like: Params) -> Params:
        return jax.tree.map(lambda x: jnp.full_like(x, 1 / learning_rate.astype(x.dtype)), like)

    @override
    def collect(self, squares: Params) -> None:
        return None

    @override
    def rate(self, moment: None, squares: None) -> None:
        return None

    @override
    def next(self, moment: None, squares: None) -> None:
        return None

    @override
    def diagonal_rate(self, learning_rate: jax.Array, diagonal: Params, rate: None) -> Params:
        return _tree.zeros_like(diagonal)


DESCENT = NoMoment()


class SecondMoment(AbstractPreconditioner):
    r"""The preconditioner of RMSProp, $P = \sqrt{\nu + \epsilon} / \eta$.

    $\nu$ averages $g^2$, or $|g|^2$ for all parameters together. In a step it becomes $\beta_2 \nu + (1-\beta_2) g^2$; its velocity per
    step is $\frac{1-\beta_2}{\beta_2} (g^2 - \nu)$, whose map over a step near rest is that of the average.

    ```python
    flow = eomdl.flows.CentralFlow(loss, 1e-3, directions=2, preconditioner=eomdl.flows.SecondMoment(0.99))
    ```

    **Arguments:** `decay` $\beta_2$ and `eps` $\epsilon$ (in the root) as in `optax.rmsprop`, leaves of the pytree;
    `scalar`: one number for all parameters, $|g|^2$ in place of $g^2$ (scalar RMSProp).

    **Raises:** `ValueError` for a wrong argument.
    """

    decay: jax.Array = eqx.field(default=0.99, converter=lambda x: _check.fraction("decay", x))
    eps: jax.Array = eqx.field(default=1e-8, converter=lambda x: _check.nonnegative_scalar("eps", x))
    scalar: bool = eqx.field(default=False, static=True, converter=lambda x: _check.flag("scalar", x))

    if TYPE_CHECKING:  # a checker knows no converters

        def __init__(self, decay: ArrayLike = 0.99, eps: ArrayLike = 1e-8, scalar: bool = False) -> None: ...

    @override
    def init(self, gradient: Params) -> Any:
        return self.collect(jax.tree.map(jnp.square, gradient))

    @override
    def read(self, state: State, like: Params) -> Any:
        try:
            found = optax.tree.get(state, "nu")
            wanted = jax.eval_shape(self.init, like)
            if jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, wanted):
                return found
            got = "none" if found is None else "one in another form (of some of the parameters, say)"
        except KeyError:  # more than one
            got = "several (of groups of the parameters, say)"
        raise ValueError(
            "resume: expected the end of an optimizer with one second moment `nu` for all parameters, as this flow has, got "
            f"{got}; `resume=end.without_state()` begins with that of the gradient there"
        )

    @override
    def diagonal(self, learning_rate: jax.Array, moment: Any, like: Params) -> Params:
        moment = self._spread(moment, like)
        return jax.tree.map(
            lambda x, nu: (jnp.sqrt(nu + self.eps) / learning_rate).astype(x.dtype), like, moment
        )

    @override
    def collect(self, squares: Params) -> Any:
        return optax.tree.sum(squares) if self.scalar else squares

    @override
    def rate(self, moment: Any, squares: Any) -> Any:
        return _tree.scale((1 - self.decay) / self.decay, _tree.sub(squares, moment))

    @override
    def next(self, moment: Any, squares: Any) -> Any:
        return _tree.add(moment, _tree.scale(1 - self.decay, _tree.sub(squares, moment)))

    @override
    def diagonal_rate(self, learning_rate: jax.Array, diagonal: Params, rate: Any) -> Params:
        rate = self._spread(rate, diagonal)
        return jax.tree.map(lambda p, r: (r / (2 * learning_rate**2 * p)).astype(p.dtype), diagonal, rate)

    def _spread(self, moment: Any, like: Params) -> Params:
        return jax.tree.map(lambda x: jnp.broadcast_to(moment, x.shape), like) if self.scalar else moment
