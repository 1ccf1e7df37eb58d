"""Laws without sampling: the generator of a stochastic differential equation, applied to functions of the flat state."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import eomdl


def coefficients(flow: eomdl.AbstractFlow, t: Any, x: jax.Array, unravel: Any, args: Any) -> Any:
    """Return drift and diffusion matrix at a flat state. (Matrices are for tests only.)"""
    state = unravel(x)
    columns = jax.vmap(lambda e: ravel_pytree(flow.diffusion(t, state, args, unravel(e)))[0])(jnp.eye(x.size))
    return ravel_pytree(flow.ito_drift(t, state, args))[0], columns


def generate(
    phi: Callable[[jax.Array], jax.Array], x: jax.Array, drift: jax.Array, diffusion: jax.Array
) -> Any:
    r"""Return $F \cdot \nabla\phi + \frac12 \mathrm{tr}(D \nabla^2 \phi)$ of a function with values of shape (m,)."""
    first, second = jax.jacfwd(phi)(x), jax.jacfwd(jax.jacrev(phi))(x)
    return first @ drift + 0.5 * jnp.einsum("mij,ij->m", second, diffusion)


def mixed(x):
    """Test functions of every component and of their products: gradient flow passes the linear ones of order 1."""
    pairs = jnp.outer(x, x)[jnp.triu_indices(len(x))]
    return jnp.concatenate([x, pairs, jnp.sin(x), jnp.array([x[0] ** 3, jnp.sum(x) ** 3])])


# The generator's square needs two derivatives of its own values: by differences of the fourth order, with an error of about 1e-7.
WIDTH = 0.02
NODES = np.arange(-2, 3)
SLOPE = np.array([1, -8, 0, 8, -1]) / 12 / WIDTH
CURVE = np.array([-1, 16, -30, 16, -1]) / 12 / WIDTH**2
HERE = np.array([0, 0, 1, 0, 0])


@eqx.filter_jit
def coefficients_on_grid(flow, t, state, args):
    """Return the grid around (t, state), time as the first axis, with drift and diffusion on it."""
    x, unravel = ravel_pytree(state)
    here = jnp.concatenate([jnp.asarray(t, float)[None], x])
    grid = here[None] + np.array(list(itertools.product(NODES, repeat=here.size)), float) * WIDTH
    return grid, *jax.vmap(lambda z: coefficients(flow, z[0], z[1:], unravel, args))(grid)


@jax.jit  # one program for all flows with as many numbers in their state
def generate_on_grid(grid, drift, diffusion):
    at = lambda z, f, d: generate(mixed, z[1:], f, d)
    return jax.vmap(at)(grid, drift, diffusion), mixed(grid[len(grid) // 2, 1:])


@eqx.filter_jit
def mean_after(outcomes, weights):
    return weights @ jax.vmap(lambda state: mixed(ravel_pytree(state)[0]))(outcomes)


def local_error(
    flow: eomdl.AbstractFlow, t: float, state: Any, args: Any, outcomes: Any, weights: Any
) -> np.ndarray:
    r"""Return $E\,\phi(x_1) - (\phi + h L\phi + \frac{h^2}{2} L^2 \phi)$, for the outcomes of a step with their probabilities."""
    grid, *fields = coefficients_on_grid(flow, t, state, args)
    values, phi = map(np.asarray, generate_on_grid(grid, *fields))
    drift, diffusion = (np.asarray(field)[len(grid) // 2] for field in fields)
    dims = drift.size + 1
    values = values.reshape(*[5] * dims, -1)

    def derivative(**along):
        weights = [along.get(f"x{i}", HERE) for i in range(dims)]
        return functools.reduce(lambda v, w: np.tensordot(w, v, 1), weights, values)

    second = derivative(x0=SLOPE) + sum(f * derivative(**{f"x{i + 1}": SLOPE}) for i, f in enumerate(drift))
    for i, j in itertools.product(range(dims - 1), repeat=2):
        along = {f"x{i + 1}": CURVE} if i == j else {f"x{i + 1}": SLOPE, f"x{j + 1}": SLOPE}
        second = second + diffusion[i, j] / 2 * derivative(**along)
    h = float(flow.step_size)
    expected = phi + h * derivative() + h**2 / 2 * second
    return np.asarray(mean_after(outcomes, weights)) - expected
