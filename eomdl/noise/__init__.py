"""The noise of gradients: of minibatches, of a heat bath, and its law on a quadratic loss."""

from eomdl.noise.additive import DiagonalNoise, IsotropicNoise
from eomdl.noise.base import AbstractNoise, NoiseOperator
from eomdl.noise.minibatch import MinibatchNoise
from eomdl.noise.quadratic import quadratic_law


__all__ = [
    "AbstractNoise",
    "DiagonalNoise",
    "IsotropicNoise",
    "MinibatchNoise",
    "NoiseOperator",
    "quadratic_law",
]
