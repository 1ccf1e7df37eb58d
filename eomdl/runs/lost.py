"""Whether the ODE solver's own error hides a path, and the notes of a flow's run that are no diagnostics of the flow."""

import jax
import numpy as np

from eomdl import _tree
from eomdl._types import Params


MAX_PART = 0.1  # of the distance travelled: the ODE error from which on the path is not resolved
_ROWS = 9  # by which the distance travelled is measured

WARMUP = (
    "The first {} steps are real steps of the optimizer: from an empty memory they follow no smooth path, so the flow begins "
    "after them. `warmup=` of `eomdl.solve` sets how many; `warmup=0` begins at once."
)
LOST = (
    "The ODE error reaches {:.1e}, more than {:.0%} of the distance travelled: the path is not resolved. Lower `rtol` and "
    "`atol`, the order or the learning rate. Where the velocity nearly jumps (an eps of the optimizer much smaller than its "
    "gradients, a kink of the loss), no tolerance helps."
)


@_tree.nonfinite_is_data
def is_lost(error: float, params: Params) -> bool:
    """Whether an ODE error is more than `MAX_PART` of the distance that saved parameters (n, ...) travel, and than rounding."""
    count = len(jax.tree.leaves(params)[0])
    if count < 2:
        return False
    at = np.unique(np.linspace(0, count - 1, _ROWS).round().astype(int))
    few = jax.tree.map(lambda x: np.asarray(x[at]), params)
    travelled = _tree.row_norms(jax.tree.map(lambda x: x - x[:1], few)).max()
    rounding = 100 * np.finfo(_tree.dtype(few)).eps * _tree.row_norms(few).max()
    return bool(error > max(MAX_PART * travelled, rounding))
