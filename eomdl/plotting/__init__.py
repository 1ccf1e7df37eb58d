"""Pictures, one theme a file. matplotlib is imported inside: it comes with `pip install eomdl[plot]`.

Every function returns a `matplotlib.figure.Figure`; nothing is shown or written.
"""

from eomdl.plotting.charges import plot_conservation
from eomdl.plotting.choice import plot_choice
from eomdl.plotting.comparison import plot_comparison
from eomdl.plotting.development import plot_barriers, plot_development
from eomdl.plotting.edge import plot_edge
from eomdl.plotting.predicted import plot_predicted_error
from eomdl.plotting.rates import plot_largest_rate
from eomdl.plotting.restricted_secant import plot_secants
from eomdl.plotting.shape import plot_dimensions, plot_path_plane, plot_path_shape, plot_regions
from eomdl.plotting.spectrum import plot_spectral_density


__all__ = [
    "plot_barriers",
    "plot_choice",
    "plot_comparison",
    "plot_conservation",
    "plot_development",
    "plot_dimensions",
    "plot_edge",
    "plot_largest_rate",
    "plot_path_plane",
    "plot_path_shape",
    "plot_predicted_error",
    "plot_regions",
    "plot_secants",
    "plot_spectral_density",
]
