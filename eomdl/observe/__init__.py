"""Observables, functions `(params, args) -> array` recorded along a path, and functions of what was recorded."""

from eomdl.observe.norms import angle_per_step, block_norm, decay_rate, lie_derivative, shift_component


__all__ = [
    "angle_per_step",
    "block_norm",
    "decay_rate",
    "lie_derivative",
    "shift_component",
]
