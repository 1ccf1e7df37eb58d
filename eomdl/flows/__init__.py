"""Continuous-time models of optimizers, one model a file."""

from eomdl._end import Diagnostic
from eomdl._target import ITERATES, MIDPOINTS, SMOOTHED, Target
from eomdl.flows.adam import AdamFlow, rmsprop_flow
from eomdl.flows.base import AbstractFlow
from eomdl.flows.central import CentralFlow, CentralState
from eomdl.flows.edge import EdgeFlow, EdgeState
from eomdl.flows.equation_of_motion import EquationOfMotion
from eomdl.flows.fitted import fitted_weights
from eomdl.flows.gradient import GradientFlow
from eomdl.flows.interpolating import InterpolatingFlow
from eomdl.flows.modified import ModifiedFlow
from eomdl.flows.momentum import MomentumFlow
from eomdl.flows.points import Points, choose_points, departure_from_identity
from eomdl.flows.preconditioners import SecondMoment
from eomdl.flows.principal import ComplexPrincipalFlow, PrincipalFlow
from eomdl.flows.references import citation
from eomdl.flows.reshuffling import ReshufflingFlow
from eomdl.flows.rod import RodFlow, RodState
from eomdl.flows.stride import step_data
from eomdl.series.weights import minimax_weights, taylor_weights


__all__ = [
    "ITERATES",
    "MIDPOINTS",
    "SMOOTHED",
    "AbstractFlow",
    "AdamFlow",
    "CentralFlow",
    "CentralState",
    "ComplexPrincipalFlow",
    "Diagnostic",
    "EdgeFlow",
    "EdgeState",
    "EquationOfMotion",
    "GradientFlow",
    "InterpolatingFlow",
    "ModifiedFlow",
    "MomentumFlow",
    "Points",
    "PrincipalFlow",
    "ReshufflingFlow",
    "RodFlow",
    "RodState",
    "SecondMoment",
    "Target",
    "choose_points",
    "citation",
    "departure_from_identity",
    "fitted_weights",
    "minimax_weights",
    "rmsprop_flow",
    "step_data",
    "taylor_weights",
]
