"""Continuous-time models of optimizers, one a file."""

from eomdl.flows.adam import AdamFlow, rmsprop_flow
from eomdl.flows.base import AbstractFlow
from eomdl.flows.equation_of_motion import EquationOfMotion
from eomdl.flows.gradient import GradientFlow
from eomdl.flows.interpolating import InterpolatingFlow
from eomdl.flows.momentum import MomentumFlow, ReshufflingFlow


__all__ = [
    "AbstractFlow",
    "AdamFlow",
    "EquationOfMotion",
    "GradientFlow",
    "InterpolatingFlow",
    "MomentumFlow",
    "ReshufflingFlow",
    "rmsprop_flow",
]
