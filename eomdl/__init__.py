"""eomdl: the learning dynamics of neural networks as differential equations."""

from eomdl._batches import on_batch as on_batch
from eomdl.checkpoints import (
    Checkpoints as Checkpoints,
    Crossing as Crossing,
    logarithmic_steps as logarithmic_steps,
)
from eomdl.compare import Comparison as Comparison, compare as compare
from eomdl.convergence import (
    Convergence as Convergence,
    convergence as convergence,
    defect as defect,
    observed_order as observed_order,
)
from eomdl.counterterms import counterterms as counterterms
from eomdl.ensemble import (
    Ensemble as Ensemble,
    each as each,
    members as members,
    stack as stack,
)
from eomdl.flows import (
    AbstractFlow as AbstractFlow,
    AdamFlow as AdamFlow,
    EquationOfMotion as EquationOfMotion,
    GradientFlow as GradientFlow,
    InterpolatingFlow as InterpolatingFlow,
    MomentumFlow as MomentumFlow,
    ReshufflingFlow as ReshufflingFlow,
    rmsprop_flow as rmsprop_flow,
)
from eomdl.geometry.barriers import (
    barrier as barrier,
    barriers as barriers,
    clusters as clusters,
    loss_on_line as loss_on_line,
)
from eomdl.geometry.dimension import (
    DimensionEstimator as DimensionEstimator,
    IntrinsicDimension as IntrinsicDimension,
    dimension_along as dimension_along,
    dimension_estimators as dimension_estimators,
    gradient_points as gradient_points,
    intrinsic_dimension as intrinsic_dimension,
    participation_ratio as participation_ratio,
    path_points as path_points,
)
from eomdl.geometry.path import (
    PathComponents as PathComponents,
    PathShape as PathShape,
    distance_travelled as distance_travelled,
    flow_curvature as flow_curvature,
    flow_torsion as flow_torsion,
    path_curvature as path_curvature,
    path_length as path_length,
    path_shape as path_shape,
    path_torsion as path_torsion,
    principal_components as principal_components,
    straightness as straightness,
)
from eomdl.geometry.plane import LossPlane as LossPlane, loss_plane as loss_plane
from eomdl.geometry.regions import (
    RegionMap as RegionMap,
    RegionsOnLine as RegionsOnLine,
    count_regions_on_line as count_regions_on_line,
    region_map as region_map,
)
from eomdl.geometry.secant import Secants as Secants, secant as secant, secants as secants
from eomdl.integrate import solve as solve
from eomdl.logarithm import minimax_weights as minimax_weights, taylor_weights as taylor_weights
from eomdl.losses import GradientPenalty as GradientPenalty, WeightDecay as WeightDecay
from eomdl.observables.curvature import sharpness as sharpness
from eomdl.observables.norms import (
    angle_per_step as angle_per_step,
    block_norm as block_norm,
    decay_rate as decay_rate,
    rate as rate,
    shift_component as shift_component,
)
from eomdl.optimizers import descend as descend, iterate as iterate
from eomdl.points import (
    Points as Points,
    choose_points as choose_points,
    departure_from_identity as departure_from_identity,
)
from eomdl.step_maps import StepMap as StepMap, optimizer_step as optimizer_step
from eomdl.symmetry.checks import (
    SymmetryCheck as SymmetryCheck,
    check_symmetry as check_symmetry,
    propose_symmetries as propose_symmetries,
)
from eomdl.symmetry.conservation import Conservation as Conservation, conservation as conservation
from eomdl.symmetry.groups import Scaling as Scaling, Translation as Translation
from eomdl.symmetry.laws import (
    effective_learning_rate as effective_learning_rate,
    equilibrium_angle as equilibrium_angle,
    equilibrium_norm as equilibrium_norm,
    scale_norm_after_step as scale_norm_after_step,
    scale_norm_rate as scale_norm_rate,
    translation_decay_rate as translation_decay_rate,
)
from eomdl.trajectory import RESULTS as RESULTS, Trajectory as Trajectory
