"""Loss barriers along straight lines between runs, and the clusters that they make."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from eomdl import _check, _tree
from eomdl._types import Args, Array, Loss, Numbers, Params
from eomdl.runs.ensemble import ensemble_state, stacked_size
from eomdl.runs.trajectory import Trajectory


def barriers(
    loss: Loss,
    runs: Params | Trajectory,
    args: Args = None,
    num_points: int = 25,
    *,
    batch_size: int = 8,
    progress: bool = False,
) -> Float[Array, "S S"] | Float[np.ndarray, "n S S"]:
    r"""Return the loss barrier between every two of S members: symmetric, zero diagonal, shape (S, S).

    $B_{ab} = \max_{0 \le \alpha \le 1} \big[ L((1 - \alpha) a + \alpha b) - (1 - \alpha) L(a) - \alpha L(b) \big] \ge 0$

    is how far the loss rises above its chord on the straight line from a to b (Entezari et al. 2022, arXiv 2110.06296).
    Frankle et al. 2020 (arXiv 1912.05671) subtract the mean of the losses at the ends instead, which is the same where both
    are equal. The barrier is 0 where the loss is convex along the line. Of two networks a and b it is
    `eomdl.geometry.barriers(loss, eomdl.runs.stack([a, b]), args)[0, 1]`.

    **Arguments:**

    - `loss`, `args`: a function `(params, args) -> scalar`, and its data.
    - `runs`: params with a leading axis S in every leaf (`eomdl.runs.stack`), or the trajectory of an
        `eomdl.Ensemble`, for the barriers at each of its n saved steps, shape (n, S, S), with
        NaN for a member that is frozen at a step.
    - `num_points`: $\alpha$ takes as many equal steps from 0 to 1. The result is too small by at most
        $h^2 \max |L''(\alpha)| / 8$ with $h = 1/(\mathtt{num\_points} - 1)$. An odd number has the middle among them.
    - `batch_size`: how many lines are evaluated at once.
    - `progress`: True for a tqdm bar over the saved steps.

    A checkpoint (`eomdl.Checkpoints`) is such a trajectory of one step, so
    `[eomdl.geometry.barriers(loss, c, args) for c in store]` studies a long run with one checkpoint in memory.
    On params it can be traced, so it can also be an observable of the ensemble's run:
    `observe={"barriers": lambda p, a: eomdl.geometry.barriers(loss, p, a)}`.

    **Cost:** $\frac12 S (S - 1) (\mathtt{num\_points} - 2) + S$ evaluations of the loss (about a third of a gradient each),
    for each saved step, in one compiled program with the memory of `batch_size` evaluations.

    **Raises:** `ValueError` for a wrong argument.
    """
    num_points = _check.integer("num_points", num_points, 2)
    batch_size = _check.integer("batch_size", batch_size, 1)
    progress = _check.flag("progress", progress)
    if not isinstance(runs, Trajectory):
        runs = _check.params("runs", runs)
        stacked_size("runs", runs)
        _check_loss_is_scalar(loss, jax.tree.map(lambda x: x[0], runs), args, "runs[0]")
        return _barriers(loss, runs, args, num_points, batch_size)
    reached = np.asarray(ensemble_state(runs).reached)
    if runs.params is None:
        raise ValueError("runs: expected saved parameters, got a run with save_params=False")
    params = _check.params("runs.params", runs.params)
    _check_loss_is_scalar(loss, jax.tree.map(lambda x: x[0, 0], params), args)
    matrices = []
    for i, step in enumerate(tqdm(np.asarray(runs.steps), desc="barriers", disable=not progress)):
        members = jax.tree.map(lambda x, i=i: x[i], params)
        matrix = np.array(_barriers(loss, members, args, num_points, batch_size))
        frozen = step > reached + 0.5
        matrix[frozen] = matrix[:, frozen] = np.nan
        matrices.append(matrix)
    return np.stack(matrices)


@eqx.filter_jit
def _barriers(loss: Loss, stacked: Params, args: Args, num_points: int, batch_size: int) -> jax.Array:
    size = jax.tree.leaves(stacked)[0].shape[0]
    ends = jax.lax.map(lambda params: loss(params, args), stacked)
    inner = jnp.linspace(0, 1, num_points)[1:-1]

    def barrier(pair: tuple) -> jax.Array:
        i, j = pair
        a, b = (jax.tree.map(lambda x, n=n: x[n], stacked) for n in (i, j))
        between = jax.lax.map(lambda alpha: loss(_interpolate(a, b, alpha), args), inner)
        return _height_above_chord(jnp.concatenate([ends[i][None], between, ends[j][None]]))

    pairs = np.triu_indices(size, 1)
    count = len(pairs[0])
    # A whole number of batches, since `lax.map` would compile the rest a second time.
    batch_size = min(batch_size, max(count, 1))
    padded = tuple(jnp.asarray(np.pad(index, (0, -count % batch_size))) for index in pairs)
    upper = jax.lax.map(barrier, padded, batch_size=batch_size)[:count]
    matrix = jnp.zeros((size, size), ends.dtype).at[pairs].set(upper)
    return matrix + matrix.T


def _interpolate(a: Params, b: Params, alpha: jax.Array) -> Params:
    # This form, unlike a + alpha (b - a), is exactly a and b at the ends.
    return _tree.add(_tree.scale(1 - alpha, a), _tree.scale(alpha, b))


def _height_above_chord(losses: jax.Array) -> jax.Array:
    alpha = jnp.linspace(0, 1, len(losses), dtype=losses.dtype)
    height = losses - (1 - alpha) * losses[0] - alpha * losses[-1]
    # The ends are 0 by definition; where the loss is not finite there, there is no chord.
    return jnp.max(height.at[jnp.array([0, -1])].set(0 * (losses[0] + losses[-1])))


def _check_loss_is_scalar(loss: Loss, params: Params, args: Args, name: str = "params") -> None:
    """Raise unless the loss is a scalar; it need not be finite where a barrier is measured."""
    _check.function("loss", loss)
    expected = "a function (params, args) -> real scalar"
    out = _check.shape_of("loss", expected, loss, params, args, names=(name, "args"))
    if getattr(out, "shape", None) != ():
        raise ValueError(f"loss: expected {expected}, got output {out}")


def clusters(matrix: Numbers, threshold: float, linkage: str = "complete") -> Int[np.ndarray, " S"]:
    """Return labels 0, 1, ... of the clusters of a barrier matrix, the largest cluster first; shape (S,).

    Agglomerative clustering (`scipy.cluster.hierarchy`), cut where the linkage exceeds the threshold. Barriers satisfy
    no triangle inequality, so the linkage matters where clusters are not clearly separated:

    - `"complete"`, the default: every two members of a cluster have a barrier of at most the threshold. A
        cluster is a set of runs that are all linearly connected; two clusters may have connected pairs.
    - `"single"`: every pair across two clusters is above the threshold. Within one, a chain of connected pairs is enough.
    - `"average"`: between every two clusters the mean is above the threshold.

    **Arguments:** `matrix`: symmetric, shape (S, S); NaN or infinite: not connected. `threshold`: in units of
    the loss. `linkage`: `"complete"`, `"single"` or `"average"`.

    Clusters of equal size are in the order of their first members. **Cost:** $O(S^2)$, no evaluation of the loss.

    **Raises:** `ValueError` for a wrong argument.
    """
    matrix = np.array(_check.numbers("matrix", matrix, "a symmetric matrix (S, S)", lambda x: True), float)
    if (
        matrix.ndim != 2
        or matrix.shape[0] != matrix.shape[1]
        or matrix.size == 0
        or not np.allclose(matrix, matrix.T, equal_nan=True)
    ):
        raise ValueError(f"matrix: expected a symmetric matrix (S, S), got shape {matrix.shape}")
    threshold = float(_check.nonnegative_scalar("threshold", threshold))
    if not isinstance(linkage, str) or linkage not in ("complete", "single", "average"):
        raise ValueError(f"linkage: expected 'complete', 'single' or 'average', got {_check.show(linkage)}")
    if len(matrix) == 1:
        return np.zeros(1, int)
    # scipy.cluster would take as long to import as the whole rest of the package.
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import squareform

    np.fill_diagonal(matrix, 0)
    finite = np.isfinite(matrix)
    # So far apart that no average over clusters is below the threshold.
    matrix[~finite] = 2 * len(matrix) ** 2 * max(matrix[finite].max(), threshold, 1)
    tree = hierarchy.linkage(squareform(matrix, checks=False), method=linkage)
    numbers = hierarchy.fcluster(tree, threshold, criterion="distance")
    _, first, label, size = np.unique(numbers, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, -size))
    return np.argsort(order)[label]
