"""When is a run at the edge of stability: one rule, for the telemetry and for the report on a learning rate."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int


NEAR = 0.9  # of the threshold, from which on a measurement is at the edge
MOSTLY = 0.75  # of the measurements that follow are there too, where the run has come to stay
BEYOND = 1.2  # of the threshold, from which on a measurement is beyond the edge: runs that hover there seldom go so far
_TIMES = 10  # the threshold, from which on a ratio is no percentage any more
_NAMED = 3  # intervals at most that are named one by one


@dataclasses.dataclass(frozen=True)
class Interval:
    """The rows of the first and the last of measurements that follow each other and are all at the edge."""

    first: int
    last: int


def find_intervals(ratios: Float[np.ndarray, " n"]) -> list[Interval]:
    """Return when a run was at its edge, at 0.9 of its threshold or more, from the finite ratios of its eigenvalue to its threshold."""
    steps = np.diff(np.concatenate([[0], ratios >= NEAR, [0]]).astype(int))
    ends = zip(np.flatnonzero(steps == 1), np.flatnonzero(steps == -1), strict=True)
    return [Interval(int(first), int(after) - 1) for first, after in ends]


def find_since(ratios: Float[np.ndarray, " n"]) -> int | None:
    """Return the row since which a run is at its edge; None if it is not at the end.

    It is the first measurement at the edge from which on at least three quarters of all are: a run hovers at its edge and is now and
    then found a little below it, and a single large value at first (a catapult, the second moments of Adam made of one gradient) is no
    stay.
    """
    near = ratios >= NEAR
    fraction_from_there = np.cumsum(near[::-1])[::-1] / np.arange(len(near), 0, -1)
    since = np.flatnonzero(near & (fraction_from_there >= MOSTLY))
    return int(since[0]) if len(since) else None


def say_ratio(ratio: float) -> str:
    """Return a ratio in words."""
    if ratio >= _TIMES:
        return f"{ratio:.3g} times the threshold"
    return f"{100 * ratio:.{0 if ratio >= 0.01 else 2}{'f' if ratio >= 0.01 else 'g'}}% of the threshold"


def say_when(steps: Int[np.ndarray, " n"], ratios: Float[np.ndarray, " n"]) -> str:
    """Return from which step to which the run was at its edge or beyond it, in words."""
    intervals, since = find_intervals(ratios), find_since(ratios)
    now = f"{say_ratio(ratios[-1])} at step {steps[-1]}"
    if not intervals:
        top = int(np.argmax(ratios))
        return f"below the edge: at most {say_ratio(ratios[top])}, at step {steps[top]}"
    if since is None:
        if intervals == [
            Interval(0, 0)
        ]:  # the first step of Adam, say, whose second moments are those of one gradient
            return f"below the edge but for the first measurement: {now}"
        return f"at the edge {say_intervals(steps, ratios, intervals)}, now below: {now}"
    earlier = [interval for interval in intervals if interval.last < since]
    before = f", and before {say_intervals(steps, ratios, earlier)}" if earlier else ""
    if ratios[-1] >= BEYOND:
        return f"beyond the edge, {now}: at the edge or beyond {_say_since(steps, ratios, since)}{before}"
    return f"at the edge {_say_since(steps, ratios, since)}{before}"


def say_intervals(
    steps: Int[np.ndarray, " n"], ratios: Float[np.ndarray, " n"], intervals: Sequence[Interval]
) -> str:
    """Return the intervals in words: each one, or how many measurements they hold where they are many."""
    begin, end = intervals[0].first, intervals[-1].last
    if len(intervals) > _NAMED:
        within = ratios[begin : end + 1]
        count = f"in {np.sum(within >= NEAR)} of the {len(within)} measurements"
        return f"{count} from step {steps[begin]} to {steps[end]}{_say_peak(within)}"
    named = []
    for interval in intervals:
        first, last = steps[interval.first], steps[interval.last]
        when = f"at step {first}" if first == last else f"from step {first} to {last}"
        named.append(when + _say_peak(ratios[interval.first : interval.last + 1]))
    return " and ".join([", ".join(named[:-1]), named[-1]] if named[:-1] else named)


def _say_since(steps: Int[np.ndarray, " n"], ratios: Float[np.ndarray, " n"], since: int) -> str:
    """Return since which step a run is at its edge, and in how many of its measurements if not in all."""
    near, top = ratios[since:] >= NEAR, np.max(ratios[since:])
    words = [] if near.all() else [f"in {near.sum()} of {len(near)} measurements"]
    if top >= BEYOND and top > ratios[-1]:
        words.append(f"up to {say_ratio(top)}")
    return f"since step {steps[since]}{_remark(words)}"


def _remark(words: Sequence[str]) -> str:
    return f" ({', '.join(words)})" if words else ""


def _say_peak(ratios: Float[np.ndarray, " n"]) -> str:
    """Return how far the largest ratio is beyond the edge; empty where it is not."""
    top = np.max(ratios)
    return _remark([f"up to {say_ratio(top)}"] if top >= BEYOND else [])
