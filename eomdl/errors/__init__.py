"""How far a model is from the real run."""

from eomdl.errors.comparison import Comparison, compare
from eomdl.errors.convergence import Convergence, convergence_study, observed_order
from eomdl.errors.local import local_error


__all__ = ["Comparison", "Convergence", "compare", "convergence_study", "local_error", "observed_order"]
