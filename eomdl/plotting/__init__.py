"""Pictures, one theme a file. matplotlib is imported inside: it comes with `pip install eomdl[plot]`.

`plot` draws any result. Every function returns a `matplotlib.figure.Figure`; nothing is shown or written.
"""

from eomdl._result import plot
from eomdl.plotting import (  # noqa: F401  (each registers its pictures with `plot`)
    charges,
    choice,
    comparison,
    convergence,
    edge,
    predicted,
    rates,
    restricted_secant,
    shape,
    spectrum,
    trajectory,
)
from eomdl.plotting.development import plot_barriers, plot_development


__all__ = ["plot", "plot_barriers", "plot_development"]
