"""The monitor of the edge of stability: is a run there, in which block, and what do its finite steps do?"""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from typing_extensions import override

from eomdl import _blocks, _check, _tree
from eomdl._autodiff import hessian_vector_product
from eomdl._types import Args, Loss, Params, State
from eomdl.curvature.pairs import scaled_pairs
from eomdl.maps.response import Response, linear_response
from eomdl.runs.monitor import AbstractMonitor
from eomdl.telemetry.along import Along, Guess, along
from eomdl.telemetry.edge_report import EdgeReport, make_edge_report


FROM_SCRATCH = 16  # Hessian-vector products for each direction in the first measurement of the eigenvalues
RTOL = 1e-2  # a residual at which an eigenvalue is known well enough: its error is about the square of that


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


class EdgeTelemetry(AbstractMonitor):
    r"""Measures a run of any optax optimizer while it trains: is it at the edge of stability, and in which block?

    ```python
    telemetry = eomdl.telemetry.EdgeTelemetry(loss, optimizer)
    for step in range(1000):
        gradient = gradient_of_loss(params, data)
        telemetry.measure(step, params, state, data, gradient=gradient)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    print(telemetry.summary())
    ```

    or `eomdl.descend(loss, params, optimizer, 1000, args=data, monitors=[telemetry])`. It measures two things, each at steps
    of its own.

    **Along the step** u that is about to be taken: the critical multiple (beyond how many times the step the loss is higher
    than before it), the curvature along it, and the drop of the loss that the quadratic model predicts, $-g \cdot u - u^\top H u / 2$,
    against the real one. For any optimizer.

    **At the edge:** the largest eigenvalues $\lambda$ of R H, with the optimizer's rate R of each parameter, against
    its threshold. For gradient descent that is $\eta\lambda_{max}$ against 2; heavy ball $2 + 2\beta$; Nesterov
    $(2 + 2\beta)/(1 + 2\beta)$; RMSProp 2 and Adam $2(1 + \beta_1)/(1 - \beta_1)$ with the second moment held as it is
    (Cohen et al. 2021, arXiv 2103.00065, and 2022, arXiv 2207.14484). The optimizer is known by what it makes of gradients that
    are tried on it: schedules, weight decay, injected hyperparameters and chains are all right. One whose update is not linear in
    the gradient and one memory (by sign, clipped in this step, a memory of another kind) has no threshold that is known: the
    eigenvalues are then those of H. The same measurement tells what discreteness does here: $\eta|\xi_0|/|g|$, the first counter
    term against the gradient, and the local error of gradient flow over the step.

    **Arguments:**

    - `loss`: function `(params, args) -> scalar`; `optimizer`: the `optax.GradientTransformation` of the run.
    - `along_every`, `edge_every`: the steps of the two kinds of measurements, multiples of these numbers; None for none.
    - `k`: how many eigenvalues.
    - `num_matvecs`: at most so many Hessian-vector products for each of them and measurement. (The first one starts
        from scratch, and takes up to 16.)

    **Cost:** a measurement along the step: about one gradient and 2 to 4 forward passes, at most 8. One at the edge: at most k times
    `num_matvecs` Hessian-vector products, about 1.5 gradients each, and one more, in the memory of k (`num_matvecs` + 1) copies of the
    parameters. Without `gradient=` one gradient more. No measurement waits for the device.

    **Raises:** `ValueError` for a wrong argument.
    """

    def __init__(
        self,
        loss: Loss,
        optimizer: optax.GradientTransformation,
        *,
        along_every: int | None = 10,
        edge_every: int | None = 50,
        k: int = 1,
        num_matvecs: int = 6,
    ) -> None:
        self._loss = _check.function("loss", loss)
        _check.optimizer(optimizer)
        self._arrays, self._rest = _partition((loss, optimizer))
        self._along_every = None if along_every is None else _check.integer("along_every", along_every, 1)
        self._edge_every = None if edge_every is None else _check.integer("edge_every", edge_every, 1)
        self._k = _check.integer("k", k, 1)
        self._num_matvecs = _check.integer("num_matvecs", num_matvecs, 1)
        self._names: list[str] = []
        self._vectors: Params = None
        self._guess = Guess(jnp.zeros(()), jnp.ones(()))
        self._along: dict[int, Along] = {}
        self._edge: dict[int, Edge] = {}

    @override
    def is_due(self, step: int) -> bool:
        return any(every and step % every == 0 for every in (self._along_every, self._edge_every))

    @override
    def measure(
        self, step: int, params: Params, state: State, args: Args, *, gradient: Params | None = None
    ) -> None:
        """Measure the step that is about to be taken from `params`, if a measurement is due.

        **Arguments:** `step`: its number; `state`: the optimizer's state before it; `args`: the data that it is taken with;
        `gradient`: that of the loss there, if it is known.

        **Raises:** `ValueError` for a wrong argument, in the steps that are due.
        """
        step = _check.integer("step", step, 0)
        if not self.is_due(step):
            return
        if not self._names:
            self._begin(params, args, gradient)
        run = params, state, args, gradient
        if self._along_every and step % self._along_every == 0:
            self._along[step] = _measure_along(self._rest, self._arrays, run, self._guess)
            self._guess = Guess(self._along[step].multiple, self._along[step].power)
        if self._edge_every and step % self._edge_every == 0:
            depth = self._num_matvecs if self._edge else max(FROM_SCRATCH, self._num_matvecs)
            self._edge[step], self._vectors = _measure_edge(
                self._rest, self._arrays, run, self._vectors, self._k, depth
            )

    def _begin(self, params: Params, args: Args, gradient: Params | None) -> None:
        """Check the arguments, in the first measurement only: a measurement is to cost little."""
        params = _check.params("params", params)
        _check.loss_is_scalar(self._loss, params, args)
        _check.integer("k", self._k, 1, _tree.size(params))
        if gradient is not None:
            _check.same_structure("gradient", gradient, "params", params)
        self._names = _blocks.names(params)
        # Zeros are none: random vectors take their place. One program for all measurements, if as many products are allowed in each.
        self._vectors = jax.tree.map(lambda x: jnp.broadcast_to(0 * x, (self._k, *x.shape)), params)

    def results(self) -> EdgeReport:
        """Return all measurements so far."""
        return make_edge_report(self._names, _columns(self._along), _columns(self._edge))

    def summary(self) -> str:
        """Return the verdict of all measurements so far and their table, as text."""
        return self.results().table()


def _columns(measurements: dict[int, Any]) -> tuple[np.ndarray, Any]:
    """Return the steps, and the measurements in one with a leading axis; None where there is none."""
    rows = jax.device_get(list(measurements.values()))
    columns = jax.tree.map(lambda *leaves: np.stack(leaves), *rows) if rows else None
    return np.array(list(measurements), int), columns


class _Rest(NamedTuple):
    """A pytree without its arrays; it can be hashed if its leaves can."""

    leaves: tuple
    structure: Any

    def join(self, arrays: list) -> Any:
        """Return the pytree with these arrays in their places."""
        leaves = [x if array is None else array for x, array in zip(self.leaves, arrays, strict=True)]
        return self.structure.unflatten(leaves)


def _partition(tree: Any) -> tuple[list, _Rest]:
    """Split a pytree once, which `equinox.filter_jit` would do in each measurement, for half of the time of a short one."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = [leaf if eqx.is_array(leaf) else None for leaf in leaves]
    return arrays, _Rest(tuple(None if eqx.is_array(leaf) else leaf for leaf in leaves), structure)


@functools.partial(jax.jit, static_argnums=0)
def _measure_along(rest: _Rest, arrays: list, run: Any, guess: Guess) -> Along:
    loss, optimizer = rest.join(arrays)
    params, state, args, gradient = run
    gradient = jax.grad(loss)(params, args) if gradient is None else gradient
    updates, _ = optimizer.update(gradient, state, params)
    return along(loss, params, updates, args, guess)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _measure_edge(
    rest: _Rest, arrays: list, run: Any, vectors: Params, k: int, num_matvecs: int
) -> tuple[Edge, Params]:
    loss, optimizer = rest.join(arrays)
    params, state, args, gradient = run
    gradient = jax.grad(loss)(params, args) if gradient is None else gradient
    response = linear_response(optimizer, state, gradient, params)
    rates, is_known = _rates(response, params)
    scale = jax.tree.map(jnp.sqrt, rates)
    pairs = scaled_pairs(loss, params, args, k, vectors, scale, num_matvecs, RTOL)
    squares = [jnp.sum(leaf[0] ** 2) for leaf in jax.tree.leaves(pairs.vectors)]
    errors, speed = _discreteness(loss, params, args, gradient, rates, response)
    unknown = jnp.where(is_known, 1, jnp.nan)
    total = jnp.linalg.norm(errors)
    edge = Edge(
        values=pairs.values,
        threshold=unknown * (jnp.nan if response is None else response.threshold),
        residuals=pairs.residuals,
        converged=pairs.converged,
        matvecs=pairs.matvecs,
        fractions=jnp.stack(squares),
        discreteness=unknown * total / speed,
        local_errors=unknown * errors,
    )
    return edge, pairs.vectors


def _rates(response: Response | None, params: Params) -> tuple[Params, jax.Array]:
    """Return the rate of each parameter, or 1 where the optimizer has none; and whether it has one."""
    ones = jax.tree.map(jnp.ones_like, params)
    if response is None:
        return ones, jnp.asarray(False)
    rates = jax.tree.map(lambda r, one: jnp.where(response.is_linear, r, one), response.rates, ones)
    return rates, response.is_linear


def _discreteness(
    loss: Loss, params: Params, args: Args, gradient: Params, rates: Params, response: Response | None
) -> tuple[jax.Array, jax.Array]:
    r"""Return F/2 |D H D g| of each block with D = G R, the rates in the long run; and the speed |D g|.

    Without a memory and for one rate it is $\eta^2 |\xi_0|$, what one step is off from the flow.
    """
    gain, factor = (1.0, 1.0) if response is None else (response.gain, response.memory_factor)

    def step_along(vector: Params) -> Params:
        return jax.tree.map(lambda r, x: (gain * r * x).astype(x.dtype), rates, vector)

    velocity = step_along(gradient)
    change = step_along(hessian_vector_product(loss, params, args, velocity))
    norms = [_tree.norm(leaf) for leaf in jax.tree.leaves(change)]
    return factor / 2 * jnp.stack(norms), _tree.norm(velocity)
