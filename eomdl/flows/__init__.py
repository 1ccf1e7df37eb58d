"""Continuous-time models of optimizers, one a file."""

from eomdl.flows.base import AbstractFlow
from eomdl.flows.equation_of_motion import EquationOfMotion
from eomdl.flows.gradient import GradientFlow


__all__ = ["AbstractFlow", "EquationOfMotion", "GradientFlow"]
