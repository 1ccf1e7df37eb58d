"""Claims in the common forms: sentence, number and verdict are made from the same values, so they cannot disagree.

A value that is NaN, as of a run that failed, holds nothing; nor does no value at all.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Claim:
    """One sentence, what was measured, and whether it holds (None: not asserted here).

    `full_only`: asserted at full size only, since it takes more steps or runs than the smoke size has.
    """

    text: str
    measured: str
    holds: bool | None
    full_only: bool = False


def law(text: str, errors: Any, limit: float, what: str = "Largest relative error", **options: Any) -> Claim:
    """A law holds: every error is below the limit."""
    worst = _worst(errors)
    return Claim(text, f"{what} {worst:.1e} (limit {limit:.0e}).", worst < limit, **options)


def orders(
    text: str, observed: Mapping[Any, float], expected: Mapping[Any, float], within: float, **options: Any
) -> Claim:
    """Observed orders are the expected ones, to `within`. Both are given by model."""
    off = _worst([abs(observed[name] - value) for name, value in expected.items()])
    shown = "; ".join(f"{_name(n)}: {observed[n]:.2f} (expected {value:g})" for n, value in expected.items())
    said = f"Observed orders: {shown}. Largest difference {off:.3f} (limit {within:g})."
    return Claim(text, said, off < within, **options)


def gain(
    text: str, better: Any, base: Any, *, least: float = 1.0, what: str = "times nearer", **options: Any
) -> Claim:
    """The errors `better` are smaller than `base` by more than the factor `least`, in every case."""
    ratio: np.ndarray = np.asarray(base, float) / np.asarray(better, float)
    low, high = ratio.min(), ratio.max()
    shown = _factor(low) if ratio.size == 1 else f"{_factor(low)} to {_factor(high)}"
    return Claim(text, f"{shown} {what} (asserted: more than {least:g}).", bool(low > least), **options)


def falling(text: str, values: Mapping[Any, float], what: str, notes: str = "", **options: Any) -> Claim:
    """Each value is below the one before it; no run has a note (a model outside its validity, a run that failed)."""
    numbers = np.array(list(values.values()))
    shown = "; ".join(f"{_name(name)}: {value:.3g}" for name, value in values.items())
    holds = bool(np.all(np.diff(numbers) < 0)) and not notes
    return Claim(text, f"{what}: {shown}.{notes and ' ' + notes}", holds, **options)


def close(text: str, measured: float, predicted: float, *, within: float, **options: Any) -> Claim:
    """A measured value is the predicted one, to the relative error `within`."""
    error = measured / predicted - 1
    shown = f"Measured {measured:.4f}, predicted {predicted:.4f} ({error:+.1%}; limit {within:.0%})."
    return Claim(text, shown, bool(abs(error) < within), **options)


def share(text: str, parts: Any, limit: float, **options: Any) -> Claim:
    """What is a part of something is at most a small share of it."""
    worst = _worst(parts)
    return Claim(text, f"At most {worst:.2%} (limit {limit:.0%}).", worst < limit, **options)


def symmetries(checks: Any, text: str) -> list[Claim]:
    """Symmetries of the loss, checked numerically: one per row of (network, message, holds)."""
    return [
        Claim(text.format(network=row["network"]), f"{row['message']}.", bool(row["holds"]))
        for _, row in checks.iterrows()
    ]


def listed(values: Any, form: str = ".3g") -> str:
    """Numbers in a sentence."""
    return ", ".join(format(value, form) for value in values)


def _worst(values: Any) -> float:
    """The largest; NaN if one is, or if there is none."""
    array = np.asarray(values, float)
    return float(array.max()) if array.size else np.nan


def _name(name: Any) -> str:
    return ", ".join(map(str, name)) if isinstance(name, tuple) else str(name)


def _factor(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}" if value < 1e5 else f"{value:.0e}"
