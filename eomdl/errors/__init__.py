"""How far a model is from the real run: before the run, after it, and as the learning rate falls."""

from eomdl.errors.convergence import convergence_study, observed_order
from eomdl.errors.local import local_error
from eomdl.errors.oscillation import variances_along
from eomdl.errors.predicted import PredictedError, predict_error
from eomdl.errors.rates import LargestRate, largest_learning_rate


__all__ = [
    "LargestRate",
    "PredictedError",
    "convergence_study",
    "largest_learning_rate",
    "local_error",
    "observed_order",
    "predict_error",
    "variances_along",
]
