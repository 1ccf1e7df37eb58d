"""Symmetries of the loss, what they conserve, and what learning rates and noise break."""

from eomdl.symmetry.charges import Conservation, conservation
from eomdl.symmetry.checks import check, propose
from eomdl.symmetry.groups import Scaling, Translation
from eomdl.symmetry.laws import (
    effective_learning_rate,
    equilibrium_angle,
    equilibrium_norm,
    scale_norm_after_step,
    scale_norm_rate,
    translation_decay_rate,
)


__all__ = [
    "Conservation",
    "Scaling",
    "Translation",
    "check",
    "conservation",
    "effective_learning_rate",
    "equilibrium_angle",
    "equilibrium_norm",
    "propose",
    "scale_norm_after_step",
    "scale_norm_rate",
    "translation_decay_rate",
]
