"""What a model predicts of a real run."""

import dataclasses
import math
import operator

from eomdl import _check


@dataclasses.dataclass(frozen=True)
class Target:
    r"""A target is what a model predicts of a real run at step k: a mean over the steps around it, $\sum_j a_j \theta_{k+j}$.

    ```python
    class OfMidpoints(eomdl.AbstractFlow):
        @property
        def target(self):
            return eomdl.flows.Target("midpoints", ((0, 0.5), (1, 0.5)))
    ```

    `eomdl.compare` measures a model against it: parameters and observables of the real run are averaged so. It is the
    iterate itself for most flows, $(\theta_k + \theta_{k+1})/2$ for `RodFlow`, and
    $(\theta_{k-1} + 2 \theta_k + \theta_{k+1})/4$ for `EdgeFlow` and `CentralFlow`.

    **Arguments:** `name`: in words; `weights`: pairs $(j, a_j)$ with integers j, whose $a_j$ sum to 1.

    **Raises:** `ValueError` for a wrong argument.
    """

    name: str
    weights: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        _check.kind("name", self.name, str, "a string")
        expected = "pairs (integer j, number a_j), the numbers of sum 1"
        try:
            pairs = tuple((operator.index(j), float(a)) for j, a in self.weights)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"weights: expected {expected}, got {_check.show(self.weights)}") from None
        total = math.fsum(a for _, a in pairs)
        if not abs(total - 1) < 1e-9:
            raise ValueError(f"weights: expected {expected}, got {_check.show(self.weights)} of sum {total}")
        object.__setattr__(self, "weights", pairs)


ITERATES = Target("iterates", ((0, 1.0),))
MIDPOINTS = Target("midpoints (w_k + w_{k+1})/2", ((0, 0.5), (1, 0.5)))
SMOOTHED = Target("smoothed path (w_{k-1} + 2 w_k + w_{k+1})/4", ((-1, 0.25), (0, 0.5), (1, 0.25)))
