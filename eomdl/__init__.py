"""eomdl: the learning dynamics of neural networks as differential equations."""

from importlib.metadata import version as _version

from eomdl import (
    choice,
    curvature,
    errors,
    flows,
    geometry,
    losses,
    maps,
    noise,
    observe,
    plotting,
    runs,
    series,
    symmetry,
    telemetry,
)
from eomdl._end import RESULTS
from eomdl.errors.comparison import Comparison, compare
from eomdl.flows.base import AbstractFlow
from eomdl.flows.equation_of_motion import EquationOfMotion
from eomdl.flows.gradient import GradientFlow
from eomdl.flows.interpolating import InterpolatingFlow
from eomdl.flows.references import citation
from eomdl.losses.penalties import WeightDecay
from eomdl.maps.optimizer import optimizer_step
from eomdl.maps.step_map import StepMap
from eomdl.observe.batch import on_batch
from eomdl.observe.curvature import sharpness
from eomdl.reports.written import report
from eomdl.runs.checkpoints import Checkpoints
from eomdl.runs.continuous import solve
from eomdl.runs.discrete import descend, iterate
from eomdl.runs.ensemble import Ensemble
from eomdl.runs.trajectory import Trajectory
from eomdl.series.euler import counterterms


__version__ = _version("eomdl")

__all__ = [
    "RESULTS",
    "AbstractFlow",
    "Checkpoints",
    "Comparison",
    "Ensemble",
    "EquationOfMotion",
    "GradientFlow",
    "InterpolatingFlow",
    "StepMap",
    "Trajectory",
    "WeightDecay",
    "__version__",
    "choice",
    "citation",
    "compare",
    "counterterms",
    "curvature",
    "descend",
    "errors",
    "flows",
    "geometry",
    "iterate",
    "losses",
    "maps",
    "noise",
    "observe",
    "on_batch",
    "optimizer_step",
    "plotting",
    "report",
    "runs",
    "series",
    "sharpness",
    "solve",
    "symmetry",
    "telemetry",
]
