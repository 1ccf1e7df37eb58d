"""eomdl: the learning dynamics of neural networks as differential equations."""

from eomdl.compare import Comparison as Comparison, compare as compare
from eomdl.convergence import (
    Convergence as Convergence,
    convergence as convergence,
    defect as defect,
    observed_order as observed_order,
)
from eomdl.counterterms import counterterms as counterterms
from eomdl.flows import (
    AbstractFlow as AbstractFlow,
    EquationOfMotion as EquationOfMotion,
    GradientFlow as GradientFlow,
)
from eomdl.integrate import solve as solve
from eomdl.losses import WeightDecay as WeightDecay
from eomdl.observables.curvature import sharpness as sharpness
from eomdl.observables.norms import (
    angle_per_step as angle_per_step,
    block_norm as block_norm,
    decay_rate as decay_rate,
    rate as rate,
    shift_component as shift_component,
)
from eomdl.observables.symmetry import (
    SymmetryCheck as SymmetryCheck,
    check_scale as check_scale,
    check_translation as check_translation,
    equilibrium_angle as equilibrium_angle,
    equilibrium_norm as equilibrium_norm,
    scale_norm_after_step as scale_norm_after_step,
    scale_norm_rate as scale_norm_rate,
    translation_decay_rate as translation_decay_rate,
)
from eomdl.optimizers import descend as descend
from eomdl.trajectory import RESULTS as RESULTS, Trajectory as Trajectory
