r"""The finite differences of the first steps of a real run, of which the logarithm of its step map is made.

With the iterates $\theta_k$, $\Delta^j \theta_k$ the j-th forward difference, and the map $\Psi$ of m steps of the
optimizer, a flow of difference coefficients $c_1 = 1, c_2, \dots$ has the velocity $\sum_j c_j \Delta^j \theta$ per stride; the
logarithm has $(-1)^{j+1}/j$. A difference $u = c - c^{log}$ makes the error $\sum_j u_j \Delta^j \theta_k$ per stride, and these
sums telescope: $\sum_{l<k} \Delta^j \theta_l = \Delta^{j-1} \theta_k - \Delta^{j-1} \theta_0$.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from eomdl import _check, _tree
from eomdl._end import End
from eomdl._types import Args, Params, State
from eomdl.maps.step_map import StepMap
from eomdl.series.weights import difference_weights


def starting_state(step_map: StepMap, params: Params, start: End | None) -> tuple[State, int]:
    """Return the state and the step at which a real run begins, or continues from `start`."""
    if start is None:
        return step_map.init(params), 0
    _check.kind("start", start, End, "an eomdl.runs.End (trajectory.end)")
    if start.state is None:
        return step_map.init(start.params), int(start.step)
    return step_map.restore(start.state, start.params), int(start.step)


def scan_increments(
    step_map: StepMap,
    state: State,
    start: Any,
    args: Args,
    stride: int,
    length: int,
    count: int,
    measure: Callable[[Params, Params], Any],
) -> Any:
    """Return `measure(first, here)` at `count` strides of a run, stacked.

    `here` holds `length` increments of the parameters, each over a stride, from that stride on: leaves with leading
    axis `length`. `first` are those at the start.
    """

    def advance(carry: tuple, _: None) -> tuple:
        def one(n: jax.Array, carry: tuple) -> tuple:
            x, k, total = carry
            d = step_map.increment(x, args, k)
            return _tree.add(x, d), k + 1, _tree.add(total, step_map.params(d))

        x, k = carry
        zero = _tree.zeros_like(step_map.params(x))
        x, k, d = jax.lax.fori_loop(0, stride, one, (x, k, zero))
        return (x, k), d

    k = start.astype(jnp.result_type(float))
    first: Params
    end, first = jax.lax.scan(advance, (state, k), length=length)

    def one(carry: tuple, _: None) -> tuple:
        end, here = carry
        out = measure(first, here)
        end, d = advance(end, None)
        return (end, jax.tree.map(lambda x, new: jnp.concatenate([x[1:], new[None]]), here, d)), out

    return jax.lax.scan(one, (end, first), length=count)[1]


@dataclasses.dataclass(frozen=True)
class Differences:
    r"""Inner products of the differences $\Delta^1 \dots \Delta^J$ of the parameters, at n strides of a real run.

    - `products`: shape (n, 2J, 2J), of those at stride k followed by those at the first one.
    - `size`: the number of parameters.
    """

    products: Float[np.ndarray, "n twice twice"]
    size: int

    @property
    def order(self) -> int:
        """The order J of the highest difference."""
        return self.products.shape[-1] // 2

    def local(self, u: np.ndarray) -> Float[np.ndarray, " n"]:
        r"""Return $|\sum_j u_j \Delta^j \theta_k|$ for each stride: an error of the velocity, per stride."""
        return self._norms(np.pad(u, (0, 2 * self.order - len(u))))

    def sizes(self) -> Float[np.ndarray, " order"]:
        r"""Return the mean of $|\Delta^j \theta_k|$ over the strides, for each j."""
        squares = np.diagonal(self.products, axis1=1, axis2=2)[:, : self.order]
        return np.sqrt(np.maximum(squares, 0)).mean(axis=0)

    def largest_sum(self, u: np.ndarray) -> float:
        r"""Return the largest sum of these errors as vectors, $|\sum_j u_j (\Delta^{j-1} \theta_k - \Delta^{j-1} \theta_0)|$.

        $u_1 = 0$. What the later steps make of an error is left out: where they contract, this is too much.
        """
        here = np.append(u[1:], np.zeros(self.order - len(u) + 1))
        return float(self._norms(np.concatenate([here, -here])).max())

    def sum_at_rest(self, u: np.ndarray) -> float:
        r"""Return the same sum over the whole of a run that comes to rest, where only $|\sum_j u_j \Delta^{j-1} \theta_0|$ is left."""
        here = np.append(u[1:], np.zeros(self.order - len(u) + 1))
        return float(self._norms(np.concatenate([np.zeros(self.order), here]))[0])

    def _norms(self, u: np.ndarray) -> np.ndarray:
        return np.sqrt(np.maximum(np.einsum("i,kij,j->k", u, self.products, u), 0))


def differences(
    step_map: StepMap, state: State, start: int, args: Args, stride: int, count: int, order: int
) -> Differences:
    """Return those of the real run from a state on. **Raises:** `ValueError` if it does not stay finite."""
    products = np.asarray(
        _products(step_map, state, np.asarray(start), args, stride, count, order), np.float64
    )
    if not np.all(np.isfinite(products)):
        raise ValueError("params: expected a run that stays finite, got infinite or NaN differences")
    return Differences(products, _tree.size(step_map.params(state)))


@eqx.filter_jit
def _products(
    step_map: StepMap, state: State, start: Any, args: Args, stride: int, count: int, order: int
) -> jax.Array:
    weights = jnp.asarray(
        np.stack([np.pad(difference_weights(j), (0, order - j)) for j in range(1, order + 1)])
    )

    def measure(first: Params, here: Params) -> jax.Array:
        def of(leaf: jax.Array, begin: jax.Array) -> jax.Array:
            w = weights.astype(leaf.dtype)
            rows = jnp.concatenate([jnp.tensordot(w, x.reshape(order, -1), 1) for x in (leaf, begin)])
            return rows @ rows.T

        return sum(jax.tree.leaves(jax.tree.map(of, here, first)), jnp.zeros((2 * order, 2 * order)))

    return scan_increments(step_map, state, start, args, stride, order, count, measure)
