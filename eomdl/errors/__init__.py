"""How far a model is from the real run."""

from eomdl.errors.comparison import Comparison, compare
from eomdl.errors.convergence import Convergence, convergence_study, observed_order
from eomdl.errors.local import local_error
from eomdl.errors.predicted import PredictedError, predict_error


__all__ = [
    "Comparison",
    "Convergence",
    "PredictedError",
    "compare",
    "convergence_study",
    "local_error",
    "observed_order",
    "predict_error",
]
