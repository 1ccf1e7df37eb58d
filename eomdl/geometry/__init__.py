"""The geometry of training paths, one theme per file."""

from eomdl.geometry.connectivity import barrier, barriers, clusters, loss_on_line
from eomdl.geometry.dimension import (
    DimensionEstimator,
    IntrinsicDimension,
    dimension_along,
    dimension_estimators,
    gradient_points,
    intrinsic_dimension,
    participation_ratio,
    path_points,
)
from eomdl.geometry.path import (
    PathComponents,
    PathShape,
    distance_travelled,
    flow_curvature,
    flow_torsion,
    path_curvature,
    path_length,
    path_shape,
    path_torsion,
    principal_components,
    straightness,
)
from eomdl.geometry.plane import LossPlane, loss_plane
from eomdl.geometry.regions import RegionMap, RegionsOnLine, count_regions_on_line, region_map
from eomdl.geometry.restricted_secant import Secants, secant, secants


__all__ = [
    "DimensionEstimator",
    "IntrinsicDimension",
    "LossPlane",
    "PathComponents",
    "PathShape",
    "RegionMap",
    "RegionsOnLine",
    "Secants",
    "barrier",
    "barriers",
    "clusters",
    "count_regions_on_line",
    "dimension_along",
    "dimension_estimators",
    "distance_travelled",
    "flow_curvature",
    "flow_torsion",
    "gradient_points",
    "intrinsic_dimension",
    "loss_on_line",
    "loss_plane",
    "participation_ratio",
    "path_curvature",
    "path_length",
    "path_points",
    "path_shape",
    "path_torsion",
    "principal_components",
    "region_map",
    "secant",
    "secants",
    "straightness",
]
