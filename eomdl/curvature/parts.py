"""Curvature by block of the parameters, and by minibatch of the data."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Float
from typing_extensions import override

from eomdl import _blocks, _check, _tree
from eomdl._result import AbstractResult, Note, Table, series_table
from eomdl._types import Args, Loss, Params
from eomdl.curvature.pairs import Eigenpairs, scaled_pairs


@dataclasses.dataclass(frozen=True)
class OverBatches(AbstractResult):
    """The largest eigenvalues of the Hessians of b minibatches, from `eigenvalues_over_batches`.

    - `values`: shape (b, k), largest first; `converged`: (b, k), as in `Eigenpairs`.
    - `mean`, `standard_deviation`: (k,), over the batches.

    Its picture shows the eigenvalues of every batch.
    """

    values: Float[np.ndarray, "b k"]
    converged: Bool[np.ndarray, "b k"]

    @property
    @override
    def notes(self) -> tuple[Note, ...]:
        loose = int(np.sum(~self.converged.all(axis=1)))
        if not loose:
            return ()
        said = f"In {loose} of {len(self.values)} batches the eigensolver did not converge: those values are lower bounds."
        return (Note(said, is_fault=True),)

    @override
    def _tables(self) -> tuple[Table, ...]:
        columns: dict[str, Any] = {"batch": np.arange(len(self.values))}
        columns |= {f"eigenvalue {i}": values for i, values in enumerate(self.values.T, 1)}
        return (series_table("Largest eigenvalues of the minibatches", columns),)

    @property
    def mean(self) -> Float[np.ndarray, " k"]:
        """The mean of each eigenvalue over the batches."""
        return self.values.mean(axis=0)

    @property
    def standard_deviation(self) -> Float[np.ndarray, " k"]:
        """The standard deviation of each eigenvalue over the batches; 0 for a single batch."""
        return self.values.std(axis=0, ddof=min(1, len(self.values) - 1))


def eigenpairs_by_block(
    loss: Loss, params: Params, args: Args, k: int = 1, *, num_matvecs: int = 16, rtol: ArrayLike = 1e-3
) -> dict[str, Eigenpairs]:
    r"""Return the largest eigenpairs of each diagonal block of the Hessian, one for each leaf of the parameters.

    ```python
    for name, pairs in eomdl.curvature.eigenpairs_by_block(loss, params, data).items():
        print(name, pairs.values[0])
    ```

    The block $H_{AA}$ is the curvature when only the leaf A moves. Its largest eigenvalue is at most $\lambda_{max}(H)$, and
    $\lambda_{max}(H)$ is at most the sum over the blocks where H is positive semidefinite.

    **Arguments:** as of `eigenpairs`. A leaf of fewer than k numbers has as many pairs as numbers.

    **Returns:** `{name of the leaf: Eigenpairs}`, with vectors in the shape of the leaf and a leading axis.

    **Cost:** that of `eigenpairs` for each leaf. **Raises:** `ValueError` for a wrong argument.
    """
    params = _check.params("params", params)
    _check.loss_is_scalar(loss, params, args)
    k = _check.integer("k", k, 1, max(leaf.size for leaf in jax.tree.leaves(params)))
    num_matvecs = _check.integer("num_matvecs", num_matvecs, 1)
    rtol = _check.nonnegative_scalar("rtol", rtol)
    leaves = jax.tree.leaves(params)
    pairs = {}
    for i, name in enumerate(_blocks.names(params)):
        if leaves[i].size:
            some = min(k, leaves[i].size)
            block = _BlockLoss(loss, i)
            pairs[name] = scaled_pairs(block, leaves[i], (params, args), some, None, None, num_matvecs, rtol)
    return pairs


class _BlockLoss(eqx.Module):
    """The loss as a function of one leaf; `args` are all parameters, and the data."""

    loss: Loss
    place: int = eqx.field(static=True)

    def __call__(self, block: Params, args: Args) -> jax.Array:
        params, data = args
        leaves, structure = jax.tree.flatten(params)
        return self.loss(structure.unflatten([*leaves[: self.place], block, *leaves[self.place + 1 :]]), data)


def eigenvalues_over_batches(
    loss: Loss, params: Params, batches: Any, k: int = 1, *, num_matvecs: int = 16, rtol: ArrayLike = 1e-3
) -> OverBatches:
    r"""Return the largest eigenvalues of the Hessian of each minibatch, with their spread.

    ```python
    found = eomdl.curvature.eigenvalues_over_batches(loss, params, batches)
    print(found.mean, found.standard_deviation)
    ```

    The largest eigenvalue of a mean is at most the mean of the largest eigenvalues: over batches of one size that
    make up the data the mean here is an upper bound of $\lambda_{max}$ of the whole.

    **Arguments:** `batches`: stacked, a pytree of arrays with one leading axis that counts the batches, or a list of batches of one
    shape; the others as of `eigenpairs`.

    **Returns:** an object with `values`, shape (b, k), largest first; `converged`, (b, k), as in `Eigenpairs`; `mean` and
    `standard_deviation` over the b batches, (k,) each.

    **Cost:** that of `eigenpairs` for each batch, one after the other in one program. **Raises:** `ValueError` for a wrong argument.
    """
    params = _check.params("params", params)
    batches = _check.stacked("batches", batches)
    _check.num_examples("batches", batches)
    _check.loss_is_scalar(loss, params, jax.tree.map(lambda leaf: leaf[0], batches), "the first of batches")
    k = _check.integer("k", k, 1, _tree.size(params))
    num_matvecs = _check.integer("num_matvecs", num_matvecs, 1)
    rtol = _check.nonnegative_scalar("rtol", rtol)
    values, converged = _over_batches(loss, params, batches, k, num_matvecs, rtol)
    return OverBatches(np.asarray(values), np.asarray(converged))


@eqx.filter_jit
def _over_batches(
    loss: Loss, params: Params, batches: Any, k: int, num_matvecs: int, rtol: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def compute(batch: Any) -> tuple[jax.Array, jax.Array]:
        pairs = scaled_pairs(loss, params, batch, k, None, None, num_matvecs, rtol)
        return pairs.values, pairs.converged

    return jax.lax.map(compute, jax.tree.map(jnp.asarray, batches))
