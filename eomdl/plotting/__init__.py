"""Pictures, one theme a file. matplotlib is imported inside: it comes with `pip install eomdl[plot]`.

Every function returns a `matplotlib.figure.Figure`; nothing is shown or written.
"""

from eomdl.plotting.comparison import plot_comparison as plot_comparison
from eomdl.plotting.conservation import plot_conservation as plot_conservation
from eomdl.plotting.development import (
    plot_barriers as plot_barriers,
    plot_development as plot_development,
)
from eomdl.plotting.secant import plot_secants as plot_secants
from eomdl.plotting.shape import (
    plot_dimensions as plot_dimensions,
    plot_path_plane as plot_path_plane,
    plot_path_shape as plot_path_shape,
    plot_regions as plot_regions,
)
