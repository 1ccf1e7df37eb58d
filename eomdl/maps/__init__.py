"""The discrete side: step maps, those of optax optimizers, and ensembles of them."""

from eomdl.maps.ensemble import Ensemble, EnsembleState, each, members, stack
from eomdl.maps.optimizer import OptimizerStep, optimizer_step
from eomdl.maps.step_map import StepMap


__all__ = [
    "Ensemble",
    "EnsembleState",
    "OptimizerStep",
    "StepMap",
    "each",
    "members",
    "optimizer_step",
    "stack",
]
