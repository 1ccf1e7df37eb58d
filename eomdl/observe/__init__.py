"""Observables, functions `(params, args) -> array` recorded along a path, functions of what was recorded, and telemetry."""

from eomdl.observe.batch import on_batch
from eomdl.observe.curvature import sharpness
from eomdl.observe.edge import EdgeReport
from eomdl.observe.norms import angle_per_step, block_norm, decay_rate, lie_derivative, shift_component
from eomdl.observe.telemetry import EdgeTelemetry


__all__ = [
    "EdgeReport",
    "EdgeTelemetry",
    "angle_per_step",
    "block_norm",
    "decay_rate",
    "lie_derivative",
    "on_batch",
    "sharpness",
    "shift_component",
]
