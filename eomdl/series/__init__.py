"""The exact coefficients of modified equations, for explicit Runge-Kutta methods."""

from eomdl.series.trees import HEUN, MIDPOINT, RK4, ButcherTableau, modified_equation


__all__ = [
    "HEUN",
    "MIDPOINT",
    "RK4",
    "ButcherTableau",
    "modified_equation",
]
