"""The measurements of one step, each a compiled program: along it, and at the edge."""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from eomdl import _tree
from eomdl._autodiff import hessian_vector_product
from eomdl._types import Args, Loss, Params, State
from eomdl.curvature.pairs import scaled_pairs
from eomdl.maps.memory import whole_step
from eomdl.maps.response import Response, linear_response
from eomdl.telemetry.along import Along, Guess, along


RTOL = 1e-2  # a residual at which an eigenvalue is known well enough: its error is about the square of that
LEAD = 0.05  # of an eigenvalue, by which the next one may be larger and has not been found yet


class Edge(eqx.Module):
    """A measurement at the edge: the fields of `EdgeReport`, of one step."""

    values: jax.Array
    threshold: jax.Array
    residuals: jax.Array
    converged: jax.Array
    matvecs: jax.Array
    fractions: jax.Array  # of the first eigenvector, in the order of the leaves
    discreteness: jax.Array
    local_errors: jax.Array  # in the order of the leaves
    unknown: jax.Array  # why there is no threshold, an `Unknown`
    data: jax.Array  # a number that tells other data from these


class Run(NamedTuple):
    """Where a run is, before a step."""

    params: Params
    state: State
    args: Args
    gradient: Params | None  # None: it is not known


class Rest(NamedTuple):
    """A pytree without its arrays; it can be hashed if its leaves can."""

    leaves: tuple
    structure: Any

    def join(self, arrays: list) -> Any:
        """Return the pytree with these arrays in their places."""
        leaves = [x if array is None else array for x, array in zip(self.leaves, arrays, strict=True)]
        return self.structure.unflatten(leaves)


def partition(tree: Any) -> tuple[list, Rest]:
    """Split a pytree once, which `equinox.filter_jit` would do in each measurement, for half of the time of a short one."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = [leaf if eqx.is_array(leaf) else None for leaf in leaves]
    return arrays, Rest(tuple(None if eqx.is_array(leaf) else leaf for leaf in leaves), structure)


@functools.partial(jax.jit, static_argnums=0)
def measure_along(rest: Rest, arrays: list, run: Run, guess: Guess) -> Along:
    """Return the measurement along the step that is about to be taken, or by which the optimizer ends what it accumulates."""
    loss, optimizer, gradient = _begin(rest, arrays, run)
    step = whole_step(optimizer, run.state, gradient, run.params)
    updates, _ = step.update(step.gradient, step.state, run.params)
    return along(loss, run.params, updates, run.args, guess)


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def measure_edge(
    rest: Rest, arrays: list, run: Run, vectors: Params, salt: jax.Array, k: int, num_matvecs: int
) -> tuple[Edge, Params]:
    """Return the measurement at the edge of k pairs, and the vectors from which to begin the next one.

    `vectors` may be one more than k: a random vector is mixed into the last one, made of the integer `salt`. So a direction that the
    tracked ones have nothing in common with is found once its eigenvalue is among the largest.
    """
    loss, optimizer, gradient = _begin(rest, arrays, run)
    params, args = run.params, run.args
    response = linear_response(optimizer, run.state, gradient, params)
    known = response.is_known
    scale = jax.tree.map(lambda r: jnp.sqrt(jnp.where(known, r, 1)), response.rates)
    decay = jax.tree.map(lambda d: jnp.where(known, d, 0), response.decay)
    count = len(jax.tree.leaves(vectors)[0])
    if count > k:
        vectors = _mix_last(vectors, _tree.hashed(salt, params), scale)
    pairs = scaled_pairs(_Decayed(loss, decay), params, args, count, vectors, scale, num_matvecs, RTOL)
    # A direction that may be about to overtake: the values are then lower bounds.
    highest = jnp.max((pairs.values + pairs.residuals)[k:], initial=-jnp.inf)
    is_first = highest <= (1 + LEAD) * pairs.values[k - 1]
    squares = [jnp.sum(leaf[0] ** 2) for leaf in jax.tree.leaves(pairs.vectors)]
    errors, speed = _discreteness(loss, params, args, gradient, response)
    unknown = jnp.where(known, 1, jnp.nan)
    edge = Edge(
        values=pairs.values[:k],
        threshold=response.threshold,
        residuals=pairs.residuals[:k],
        converged=pairs.converged[:k] & is_first,
        matvecs=pairs.matvecs,
        fractions=jnp.stack(squares),
        discreteness=unknown * jnp.linalg.norm(errors) / speed,
        local_errors=unknown * errors,
        unknown=response.unknown,
        data=_checksum(args),
    )
    return edge, pairs.vectors


def _begin(rest: Rest, arrays: list, run: Run) -> tuple[Loss, optax.GradientTransformation, Params]:
    """Return the loss, the optimizer, which is given the loss's value if it needs it, and the gradient."""
    loss, optimizer = rest.join(arrays)

    def update(gradient: Params, state: State, params: Params) -> Any:
        try:
            return optimizer.update(gradient, state, params)
        except TypeError:
            given = optax.with_extra_args_support(optimizer)
            return given.update(gradient, state, params, value=loss(run.params, run.args))

    gradient = jax.grad(loss)(run.params, run.args) if run.gradient is None else run.gradient
    return loss, optax.GradientTransformation(optimizer.init, update), gradient


class _Decayed(eqx.Module):
    """A loss with a quadratic penalty that has a strength of its own for each parameter."""

    loss: Loss
    strengths: Params

    def __call__(self, params: Params, args: Args) -> jax.Array:
        value = self.loss(params, args)
        penalty = _tree.vdot(params, jax.tree.map(jnp.multiply, self.strengths, params))
        return value + (penalty / 2).astype(value.dtype)


def _mix_last(vectors: Params, random: Params, scale: Params) -> Params:
    """Return the stack with the random vector added to its last one, with nothing in directions that have no rate."""
    last = _tree.unit(jax.tree.map(lambda x: x[-1], vectors))
    new = _tree.unit(jax.tree.map(lambda x, s: jnp.where(s > 0, x, 0), random, scale))
    return jax.tree.map(lambda x, a, b: x.at[-1].set(a + b), vectors, last, new)


def _discreteness(
    loss: Loss, params: Params, args: Args, gradient: Params, response: Response
) -> tuple[jax.Array, jax.Array]:
    r"""Return what the flow of the long run is off in one step, by its first counter term, for each block; and its speed.

    Without a memory and for one rate these are $\eta^2 |\xi_0|$ and $\eta |g|$.
    """
    velocity = response.velocity(gradient, params)
    product = hessian_vector_product(loss, params, args, velocity)
    errors = response.counterterm(product, velocity)
    return jnp.stack([_tree.norm(leaf) for leaf in jax.tree.leaves(errors)]), _tree.norm(velocity)


def _checksum(args: Args) -> jax.Array:
    """Return an integer made of the bits of all numbers in the data, in no order of them: exact in every program."""
    total = jnp.zeros((), jnp.uint32)
    for leaf in jax.tree.leaves(args):
        if eqx.is_array(leaf):
            total = 31 * total + jnp.sum(_bits(leaf), dtype=jnp.uint32)
    return total


def _bits(array: jax.Array) -> jax.Array:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(array)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        return _bits(array.real) + 3 * _bits(array.imag)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(jnp.uint32)
    width = min(jnp.finfo(array.dtype).bits, 32)
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
