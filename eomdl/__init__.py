"""eomdl: the learning dynamics of neural networks as differential equations."""

from importlib.metadata import version as _version

from eomdl import (
    curvature,
    errors,
    flows,
    geometry,
    losses,
    maps,
    observe,
    plotting,
    reports,
    runs,
    series,
    symmetry,
)
from eomdl.errors import Comparison, compare
from eomdl.flows import AbstractFlow, EquationOfMotion, GradientFlow, InterpolatingFlow, citation
from eomdl.losses import WeightDecay
from eomdl.maps import Ensemble, StepMap, optimizer_step
from eomdl.observe import on_batch, sharpness
from eomdl.reports import report
from eomdl.runs import RESULTS, Checkpoints, Trajectory, descend, iterate, solve
from eomdl.series import counterterms


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
    "observe",
    "on_batch",
    "optimizer_step",
    "plotting",
    "report",
    "reports",
    "runs",
    "series",
    "sharpness",
    "solve",
    "symmetry",
]
