"""Eigenpairs followed along a path, from those of the step before: more are tracked as eigenvalues come near a threshold."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from eomdl import _tree
from eomdl._types import Args, Loss, Params
from eomdl.curvature.pairs import Eigenpairs, preconditioned_pairs


RTOL = 1e-2  # the residual of a tracked pair, over the largest eigenvalue: the value is wrong by about its square
_NUM_MATVECS = 4  # Hessian-vector products at most, for each tracked pair at a step
_STEPS_BETWEEN_SEARCHES = 16


class Search(NamedTuple):
    """A search for the next pair: `rounds`, each from the vector of the one before; products in each; tolerance of the residual."""

    rounds: int
    num_matvecs: int
    rtol: float


THOROUGH = Search(1, 16, RTOL)
CHEAP = Search(2, 4, 5e-2)  # one round of 8 would take 8 copies of the parameters more


class TrackedPairs(NamedTuple):
    r"""The tracked eigenpairs of $P^{-1} H$, largest first, with room for k of them; places that are not active are 0.

    - `vectors`: with $u_i^\top P u_j = \delta_{ij}$, a leading axis k on every leaf. `values`: shape (k,).
    - `since`: (k,), the step from which 1, 2, ... k pairs are tracked, 0 for those from the start; -1 for a place that is not active.
    """

    vectors: Params
    values: jax.Array
    since: jax.Array

    @property
    def num_active(self) -> jax.Array:
        """How many pairs are tracked."""
        return jnp.sum(self.since >= 0)

    @property
    def num_places(self) -> int:
        """How many pairs there is room for."""
        return len(self.since)


class EigenpairTracker(eqx.Module):
    r"""Tracks the largest eigenpairs of $P^{-1} H$ at one place, from those at the place before.

    - `loss`, `params`, `args`: whose Hessian, and where; `preconditioner`: P, like the parameters.
    - `threshold`: the first pair is always tracked, another one from where the next eigenvalue is at least this.
    """

    loss: Loss
    params: Params
    args: Args
    preconditioner: Params
    threshold: float = eqx.field(static=True)

    def init(self, num_places: int) -> TrackedPairs:
        """Return the pairs that are tracked from the start of a path."""
        dtype = _tree.dtype(self.params)
        vectors = jax.tree.map(lambda x: jnp.zeros((num_places, *x.shape), x.dtype), self.params)
        none = TrackedPairs(vectors, jnp.zeros(num_places, dtype), jnp.full(num_places, -1, dtype))
        return self._grow(none, 0, THOROUGH)

    def refresh(self, tracked: TrackedPairs, step: ArrayLike) -> tuple[TrackedPairs, jax.Array]:
        """Return the pairs here, and the largest residual of those above the threshold, over the largest eigenvalue.

        Every 16 steps, while there is room for it, the next pair is searched for. **Cost:** for m tracked pairs at most 4 m
        Hessian-vector products, and 8 for a search.
        """
        if tracked.num_places > 1:  # else a loop is compiled that never runs
            is_due = (jnp.asarray(step) % _STEPS_BETWEEN_SEARCHES == 0) & (
                tracked.num_active < tracked.num_places
            )
            tracked = jax.lax.cond(is_due, lambda: self._grow(tracked, step, CHEAP), lambda: tracked)
        pairs = self._solve(
            tracked.num_places, tracked.vectors, _NUM_MATVECS, RTOL, num_active=tracked.num_active
        )
        relative = pairs.residuals / jnp.max(jnp.abs(pairs.values))
        residual = jnp.max(jnp.where(pairs.values >= self.threshold, relative, 0))
        return tracked._replace(vectors=pairs.vectors, values=pairs.values), residual

    def find_next(self, tracked: TrackedPairs, search: Search) -> Eigenpairs:
        """Return the largest pair that is not tracked."""

        def run_round(start: Params) -> Eigenpairs:
            return self._solve(1, start, search.num_matvecs, search.rtol, deflate=tracked.vectors)

        # Zeros are no start: a random vector takes their place.
        none = jax.tree.map(lambda x: jnp.zeros_like(x[None]), self.params)
        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run_round, none))
        return jax.lax.fori_loop(0, search.rounds, lambda _, pair: run_round(pair.vectors), empty)

    @eqx.filter_jit  # `init` runs on the host: compiled once
    def _grow(self, tracked: TrackedPairs, step: ArrayLike, search: Search) -> TrackedPairs:
        """Return the tracked pairs with all that follow them above the threshold, and the first one wherever it is."""

        def goes_on(carry: tuple[TrackedPairs, jax.Array]) -> jax.Array:
            tracked, was_added = carry
            return was_added & (tracked.num_active < tracked.num_places)

        def advance(carry: tuple[TrackedPairs, jax.Array]) -> tuple[TrackedPairs, jax.Array]:
            tracked, _ = carry
            place = tracked.num_active
            pair = self.find_next(tracked, search)
            is_added = (pair.values[0] >= self.threshold) | (place == 0)
            new = TrackedPairs(pair.vectors, pair.values, jnp.full(1, step, tracked.since.dtype))
            return jax.tree.map(
                lambda old, x: old.at[place].set(jnp.where(is_added, x[0], old[place])), tracked, new
            ), is_added

        return jax.lax.while_loop(goes_on, advance, (tracked, jnp.asarray(True)))[0]

    def _solve(
        self,
        k: int,
        start: Params,
        num_matvecs: int,
        rtol: float,
        *,
        num_active: ArrayLike | None = None,
        deflate: Params | None = None,
    ) -> Eigenpairs:
        """Return k pairs in the dtypes of the parameters."""
        pairs = preconditioned_pairs(
            self.loss,
            self.params,
            self.args,
            k,
            start,
            self.preconditioner,
            num_matvecs,
            rtol,
            num_active,
            deflate,
        )
        vectors = jax.tree.map(lambda x, like: x.astype(like.dtype), pairs.vectors, self.params)
        values, residuals = (x.astype(_tree.dtype(self.params)) for x in (pairs.values, pairs.residuals))
        return Eigenpairs(values, vectors, residuals, pairs.converged, pairs.matvecs)
