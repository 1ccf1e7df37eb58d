"""Which flow describes a run, with how many points, which weights and which solver."""

from eomdl.choice.choice import Choice, choose_flow
from eomdl.choice.fitted import fitted_weights
from eomdl.choice.points import choose_points


__all__ = ["Choice", "choose_flow", "choose_points", "fitted_weights"]
