"""The geometry of training paths, one theme a file."""

from eomdl.geometry.connectivity import barriers, clusters
from eomdl.geometry.dimension import (
    IntrinsicDimension,
    gradient_points,
    intrinsic_dimension,
    participation_ratio,
    path_points,
)
from eomdl.geometry.path import (
    PathComponents,
    PathShape,
    flow_curvature,
    flow_torsion,
    path_shape,
    principal_components,
)
from eomdl.geometry.plane import LossPlane, loss_plane
from eomdl.geometry.regions import RegionMap, count_regions_on_line, region_map
from eomdl.geometry.restricted_secant import Secants, secant, secants


__all__ = [
    "IntrinsicDimension",
    "LossPlane",
    "PathComponents",
    "PathShape",
    "RegionMap",
    "Secants",
    "barriers",
    "clusters",
    "count_regions_on_line",
    "flow_curvature",
    "flow_torsion",
    "gradient_points",
    "intrinsic_dimension",
    "loss_plane",
    "participation_ratio",
    "path_points",
    "path_shape",
    "principal_components",
    "region_map",
    "secant",
    "secants",
]
