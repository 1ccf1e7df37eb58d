"""How far a model is from the real run."""

from eomdl.errors.candidates import Candidate
from eomdl.errors.choice import Choice, choose_flow
from eomdl.errors.comparison import Comparison, compare
from eomdl.errors.convergence import Convergence, convergence_study, observed_order
from eomdl.errors.local import local_error
from eomdl.errors.oscillation import variances_along
from eomdl.errors.predicted import PredictedError, predict_error
from eomdl.errors.rates import LargestRate, largest_learning_rate


__all__ = [
    "Candidate",
    "Choice",
    "Comparison",
    "Convergence",
    "LargestRate",
    "PredictedError",
    "choose_flow",
    "compare",
    "convergence_study",
    "largest_learning_rate",
    "local_error",
    "observed_order",
    "predict_error",
    "variances_along",
]
