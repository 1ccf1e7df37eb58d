"""When is a run at the edge of stability: one rule, for the telemetry and for the report on a learning rate."""

import dataclasses

import numpy as np
from jaxtyping import Float


NEAR = 0.9  # of the threshold, from which on a measurement is at the edge
MOSTLY = 0.75  # of the measurements that follow are there too, where the run has come to stay


@dataclasses.dataclass(frozen=True)
class Stay:
    """A run's stay at its edge: rows of the `first` and of the `last` measurement there, and whether it `lasts` to the end."""

    first: int
    last: int
    lasts: bool


def find_stay(ratios: Float[np.ndarray, " n"]) -> Stay | None:
    """Return when a run was at its edge, from the finite ratios of its eigenvalue to its threshold; None where it never was.

    A measurement is at the edge from 0.9 of the threshold on. The run is there *since* the first such measurement from which on at
    least three quarters of all measurements are: a run hovers at its edge and is now and then found a little below it, and a single
    large value at first (a catapult, the second moments of Adam made of one gradient) is no stay. Where there is no such
    measurement the stay ended with the last one at the edge.
    """
    near = ratios >= NEAR
    if not near.any():
        return None
    rows = np.flatnonzero(near)
    fraction_from_there = np.cumsum(near[::-1])[::-1] / np.arange(len(near), 0, -1)
    since = np.flatnonzero(near & (fraction_from_there >= MOSTLY))
    if len(since):
        return Stay(int(since[0]), int(rows[-1]), lasts=True)
    return Stay(int(rows[0]), int(rows[-1]), lasts=False)
