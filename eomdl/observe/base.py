"""The base class of the observables of this package."""

import abc

import equinox as eqx
import jax
from typing_extensions import override

from eomdl._types import Args, Observable, Params


class AbstractObservable(eqx.Module):
    """An observable that is a module, so that two of the same share a compiled program of a run.

    Two are equal only if they are one object, as functions are: `jax.jit(observable)` works whatever arrays
    there are in it.
    """

    @property
    def per_member(self) -> bool:
        """Whether its value has a leading axis of the members of an `eomdl.Ensemble`."""
        return False

    @property
    def sees_batch(self) -> bool:
        """Whether a run gives it the batch of the step in place of `args`."""
        return False

    @abc.abstractmethod
    def __call__(self, params: Params, args: Args) -> jax.Array:
        """Return the value at the parameters, with the data."""

    @override
    def __hash__(self) -> int:
        return id(self)

    @override
    def __eq__(self, other: object) -> bool:
        return self is other


def sees_batch(observable: Observable) -> bool:
    """Whether a run gives an observable the batch of the step in place of `args`: not a plain function."""
    return isinstance(observable, AbstractObservable) and observable.sees_batch


def is_per_member(observable: Observable) -> bool:
    """Whether an observable's value has a leading axis of the members of an ensemble: not that of a plain function."""
    return isinstance(observable, AbstractObservable) and observable.per_member
