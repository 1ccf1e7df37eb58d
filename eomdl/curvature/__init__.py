"""Curvature of a loss, matrix-free: eigenpairs of the Hessian, and derivatives of third order."""

from eomdl.curvature.derivatives import eigenvalue_gradient, third_derivative
from eomdl.curvature.pairs import Eigenpairs, eigenpairs


__all__ = ["Eigenpairs", "eigenpairs", "eigenvalue_gradient", "third_derivative"]
