"""What the central flow needs to know of an optimizer: the matrix that it divides gradients by, and how that moves."""

import abc
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from eomdl import _check, _tree
from eomdl._types import Params


class AbstractPreconditioner(eqx.Module):
    r"""The diagonal matrix P of a step $\theta - P^{-1} g$, made of the learning rate and a `moment` that follows $g^2$."""

    @abc.abstractmethod
    def init(self, gradient: Params) -> Any:
        """The moment where gradients have long been like this one; None where there is none."""

    @abc.abstractmethod
    def read(self, state: Any) -> Any:
        """The moment in a state of the optimizer; None where there is none."""

    @abc.abstractmethod
    def diagonal(self, learning_rate: jax.Array, moment: Any, like: Params) -> Params:
        """P, a pytree like the parameters."""

    @abc.abstractmethod
    def collected(self, squares: Params) -> Any:
        """What the moment averages, from a pytree like $g^2$."""

    @abc.abstractmethod
    def rate(self, moment: Any, squares: Any) -> Any:
        """The moment's velocity per step where it averages these squares."""

    @abc.abstractmethod
    def next(self, moment: Any, squares: Any) -> Any:
        """The moment after a step of the optimizer."""

    @abc.abstractmethod
    def diagonal_rate(self, learning_rate: jax.Array, diagonal: Params, rate: Any) -> Params:
        """The velocity of P, from that of the moment."""


class NoMoment(AbstractPreconditioner):
    r"""Gradient descent: $P = 1/\eta$."""

    def init(self, gradient: Params) -> None:
        """None."""

    def read(self, state: Any) -> None:
        """None."""

    def diagonal(self, learning_rate: jax.Array, moment: None, like: Params) -> Params:
        r"""$1/\eta$."""
        return jax.tree.map(lambda x: jnp.full_like(x, 1 / learning_rate.astype(x.dtype)), like)

    def collected(self, squares: Params) -> None:
        """None."""

    def rate(self, moment: None, squares: None) -> None:
        """None."""

    def next(self, moment: None, squares: None) -> None:
        """None."""

    def diagonal_rate(self, learning_rate: jax.Array, diagonal: Params, rate: None) -> Params:
        """0."""
        return _tree.zeros_like(diagonal)


DESCENT = NoMoment()


class SecondMoment(AbstractPreconditioner):
    r"""RMSProp: $P = \sqrt{\nu + \epsilon} / \eta$, and $\nu$ averages $g^2$, or $|g|^2$ for all parameters together.

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

    def init(self, gradient: Params) -> Any:
        """$g^2$."""
        return self.collected(jax.tree.map(jnp.square, gradient))

    def read(self, state: Any) -> Any:
        """The `nu` of a state of optax."""
        return optax.tree.get(state, "nu")

    def diagonal(self, learning_rate: jax.Array, moment: Any, like: Params) -> Params:
        r"""$\sqrt{\nu + \epsilon}/\eta$."""
        moment = self._spread(moment, like)
        return jax.tree.map(
            lambda x, nu: (jnp.sqrt(nu + self.eps) / learning_rate).astype(x.dtype), like, moment
        )

    def collected(self, squares: Params) -> Any:
        """Themselves, or their sum."""
        return optax.tree.sum(squares) if self.scalar else squares

    def rate(self, moment: Any, squares: Any) -> Any:
        r"""$\frac{1-\beta_2}{\beta_2} (g^2 - \nu)$, whose map over a step near rest is that of the average."""
        return _tree.scale((1 - self.decay) / self.decay, _tree.sub(squares, moment))

    def next(self, moment: Any, squares: Any) -> Any:
        r"""$\beta_2 \nu + (1-\beta_2) g^2$."""
        return _tree.add(moment, _tree.scale(1 - self.decay, _tree.sub(squares, moment)))

    def diagonal_rate(self, learning_rate: jax.Array, diagonal: Params, rate: Any) -> Params:
        r"""$\dot\nu / (2 \eta^2 P)$."""
        rate = self._spread(rate, diagonal)
        return jax.tree.map(lambda p, r: (r / (2 * learning_rate**2 * p)).astype(p.dtype), diagonal, rate)

    def _spread(self, moment: Any, like: Params) -> Params:
        return jax.tree.map(lambda x: jnp.broadcast_to(moment, x.shape), like) if self.scalar else moment
