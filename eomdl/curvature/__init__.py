"""Curvature of a loss, matrix-free: eigenpairs and spectrum of the Hessian, and derivatives of third order."""

from eomdl.curvature.derivatives import eigenvalue_gradient, third_derivative
from eomdl.curvature.pairs import Eigenpairs, eigenpairs
from eomdl.curvature.parts import eigenpairs_by_block, eigenvalues_over_batches
from eomdl.curvature.spectrum import SpectralDensity, spectral_density, trace


__all__ = [
    "Eigenpairs",
    "SpectralDensity",
    "eigenpairs",
    "eigenpairs_by_block",
    "eigenvalue_gradient",
    "eigenvalues_over_batches",
    "spectral_density",
    "third_derivative",
    "trace",
]
