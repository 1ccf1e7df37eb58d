"""Continuous-time models of optimizers, one model a file."""

from eomdl._end import Diagnostic
from eomdl._target import Target
from eomdl.flows.adam import AdamFlow, rmsprop_flow
from eomdl.flows.central import CentralFlow
from eomdl.flows.discretized_langevin import DiscretizedLangevinFlow
from eomdl.flows.edge import EdgeFlow
from eomdl.flows.langevin import LangevinFlow, UnderdampedLangevinFlow
from eomdl.flows.modified import ModifiedFlow
from eomdl.flows.momentum import MomentumFlow
from eomdl.flows.preconditioners import SecondMoment
from eomdl.flows.principal import ComplexPrincipalFlow, PrincipalFlow
from eomdl.flows.reshuffling import ReshufflingFlow
from eomdl.flows.rod import RodFlow
from eomdl.flows.stochastic_interpolating import StochasticInterpolatingFlow
from eomdl.flows.stochastic_modified import StochasticModifiedFlow
from eomdl.flows.stochastic_momentum import StochasticMomentumFlow
from eomdl.flows.stride import step_data
from eomdl.series.weights import minimax_weights


__all__ = [
    "AdamFlow",
    "CentralFlow",
    "ComplexPrincipalFlow",
    "Diagnostic",
    "DiscretizedLangevinFlow",
    "EdgeFlow",
    "LangevinFlow",
    "ModifiedFlow",
    "MomentumFlow",
    "PrincipalFlow",
    "ReshufflingFlow",
    "RodFlow",
    "SecondMoment",
    "StochasticInterpolatingFlow",
    "StochasticModifiedFlow",
    "StochasticMomentumFlow",
    "Target",
    "UnderdampedLangevinFlow",
    "minimax_weights",
    "rmsprop_flow",
    "step_data",
]
