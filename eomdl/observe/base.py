"""What an observable of this package is."""

import abc

import equinox as eqx
import jax

from eomdl._types import Args, Params


class AbstractObservable(eqx.Module):
    """An observable that is a module, so that two of the same share a compiled program of a run.

    Two are equal only if they are one object, as functions are: `jax.jit(observable)` works whatever arrays
    there are in it.
    """

    @property
    def per_member(self) -> bool:
        """Whether its value has a leading axis of the members of an `eomdl.Ensemble`."""
        return False

    @abc.abstractmethod
    def __call__(self, params: Params, args: Args) -> jax.Array:
        """The value at the parameters, with the data."""

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other
