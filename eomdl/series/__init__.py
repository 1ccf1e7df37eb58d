"""The parts of a modified equation: trees, elementary differentials, power series, weights of the logarithm."""

from eomdl.series.euler import counterterms, modified_field
from eomdl.series.power import modified_field_series
from eomdl.series.trees import EULER, HEUN, MIDPOINT, RK4, ButcherTableau, modified_equation
from eomdl.series.weights import difference_weights, minimax_weights, taylor_weights


__all__ = [
    "EULER",
    "HEUN",
    "MIDPOINT",
    "RK4",
    "ButcherTableau",
    "counterterms",
    "difference_weights",
    "minimax_weights",
    "modified_equation",
    "modified_field",
    "modified_field_series",
    "taylor_weights",
]
