"""The monitor of the edge of stability: is a run there, in which block, and what do its finite steps do?"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from typing_extensions import override

from eomdl import _blocks, _check, _tree
from eomdl._types import Args, Loss, Params, State
from eomdl.maps.memory import accumulates
from eomdl.runs.monitor import AbstractMonitor
from eomdl.runs.tolerances import hessian_mismatch
from eomdl.telemetry.along import Along, Guess
from eomdl.telemetry.at_step import Edge, Run, measure_along, measure_edge, partition
from eomdl.telemetry.edge_report import EdgeReport, make_edge_report


_MOST_FAILURES = 3  # of one kind of measurement, each of which is as long as a compilation
FROM_SCRATCH = 16  # Hessian-vector products for each direction in the first measurement of the eigenvalues


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
    (Cohen et al. 2021, arXiv 2103.00065, and 2022, arXiv 2207.14484). The optimizer is known by the derivative of its own update at the
    gradient and the state that are there: schedules, injected hyperparameters, chains, frozen parts and groups with rates and memories
    of their own are all right. A decay of the weights, before or after the memory, is part of R H. With `optax.MultiSteps` the step is
    that of all its gradients. An update that is not linear in the gradient and one memory (by sign, clipped in this step, a memory of
    another kind) has no threshold that is known: the eigenvalues are then those of H, and the report says why. The same measurement
    tells what discreteness does here: $\eta|\xi_0|/|g|$, the first counter
    term against the gradient, and the local error of gradient flow over the step.

    **Arguments:**

    - `loss`: function `(params, args) -> scalar`; `optimizer`: the `optax.GradientTransformation` of the run, or what has it as `tx`,
        as `flax.nnx.Optimizer` does: then give that, or its `opt_state`, as the state.
    - `along_every`, `edge_every`: the steps of the two kinds of measurements, multiples of these numbers; None for none.
    - `k`: how many eigenvalues.
    - `num_matvecs`: at most so many Hessian-vector products for each of them and measurement. (The first one starts
        from scratch, and takes up to 16.)

    With minibatches both are of the batch: the verdict then says that the threshold is that for the whole data. Where the Hessian is not
    the derivative of the gradient (`stop_gradient`, as in temporal differences, or a custom rule) the verdict says so: this is tested
    once, in the first measurement.

    **Cost:** a measurement along the step: about one gradient and 2 to 4 forward passes, at most 8. One at the edge: at most k + 1 times
    `num_matvecs` Hessian-vector products (a random direction is searched beside the k), about 1.5 gradients each, and one more, in the
    memory of (k + 1) (`num_matvecs` + 1) copies of the parameters. Without `gradient=` one gradient more. Once, about 11 gradients for
    the test of the Hessian. No measurement waits for the device.

    **Raises:** `ValueError` for a wrong argument. It ends no run: where a loss or an optimizer raises in a measurement its numbers are nan,
    and the report has the error. Pickled or copied it keeps its measurements only, since a loss and an optimizer are functions.
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
        optimizer = getattr(optimizer, "tx", optimizer)
        _check.optimizer(optimizer)
        self._functions = partition((loss, optimizer))
        self._along_every = None if along_every is None else _check.integer("along_every", along_every, 1)
        self._edge_every = None if edge_every is None else _check.integer("edge_every", edge_every, 1)
        self._k = _check.integer("k", k, 1)
        self._num_matvecs = _check.integer("num_matvecs", num_matvecs, 1)
        self._names: list[str] = []
        self._vectors: Params = None
        self._guess = Guess(jnp.zeros(()), jnp.ones(()))
        self._accumulates = False
        self._mismatch: jax.Array | None = None
        self._along: dict[int, Along | None] = {}  # None: it failed
        self._edge: dict[int, Edge | None] = {}
        self._failures: dict[str, list[int]] = {}

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
        if self._functions is None:
            raise ValueError(
                "measure: expected a telemetry with a loss and an optimizer, got one that was pickled or copied, which has its "
                "measurements only; make another one for the steps to come"
            )
        if not self._names:
            self._begin(params, args, gradient)
        if getattr(state, "tx", None) is not None:
            state = state.opt_state
        run = Run(params, state, args, gradient)
        if not self._along and not self._edge:
            self._mismatch = self._try("the derivative of the gradient", step, self._measure_mismatch, run)
        self._accumulates |= accumulates(state)
        if self._along_every and step % self._along_every == 0:
            self._along[step] = self._try("along the step", step, self._measure_along, run)
        if self._edge_every and step % self._edge_every == 0:
            self._edge[step] = self._try("at the edge", step, self._measure_edge, run)

    def _measure_mismatch(self, step: int, run: Run) -> jax.Array:
        return hessian_mismatch(self._loss, run.params, run.args)

    def _measure_along(self, step: int, run: Run) -> Along:
        arrays, rest = self._functions
        found = measure_along(rest, arrays, run, self._guess)
        self._guess = Guess(found.multiple, found.power)
        return found

    def _measure_edge(self, step: int, run: Run) -> Edge:
        arrays, rest = self._functions
        depth = self._num_matvecs if self._edge else max(FROM_SCRATCH, self._num_matvecs)
        found, self._vectors = measure_edge(rest, arrays, run, self._vectors, step, self._k, depth)
        return found

    def _try(self, where: str, step: int, measure: Callable[[int, Run], Any], run: Run) -> Any:
        """Return the measurement, or None if it raises: it must not end the run. After a few failures nothing is tried."""
        if (
            sum(len(steps) for words, steps in self._failures.items() if words.startswith(where))
            >= _MOST_FAILURES
        ):
            return None
        try:
            return measure(step, run)
        except Exception as error:  # of any type: it is the loss's and the optimizer's own code
            words = str(error).splitlines() or [""]
            self._failures.setdefault(f"{where} ({type(error).__name__}: {words[0]:.200})", []).append(step)
            return None

    def _begin(self, params: Params, args: Args, gradient: Params | None) -> None:
        """Check the arguments, in the first measurement only: a measurement is to cost little."""
        params = _check.params("params", params)
        eqx.filter_eval_shape(
            _check.loss_is_scalar, self._loss, params, args
        )  # not evaluated: it may be infinite
        _check.integer("k", self._k, 1, _tree.size(params))
        if gradient is not None:
            _check.same_structure("gradient", gradient, "params", params)
        self._names = _blocks.names(params)
        # Zeros are none: random vectors take their place. One program for all measurements, if as many products are allowed in each.
        count = min(self._k + 1, _tree.size(params))
        self._vectors = jax.tree.map(lambda x: jnp.broadcast_to(0 * x, (count, *x.shape)), params)

    def results(self) -> EdgeReport:
        """Return all measurements so far."""
        failures = [f"{words} at {_say_steps(steps)}" for words, steps in self._failures.items()]
        along = _columns(self._along, _no_along())
        edge = _columns(self._edge, _no_edge(self._k, len(self._names)))
        mismatch = np.nan if self._mismatch is None else float(self._mismatch)
        return make_edge_report(self._names, along, edge, self._accumulates, failures, mismatch)

    def summary(self) -> str:
        """Return the verdict of all measurements so far and their table, as text."""
        return self.results().table()

    @override
    def __getstate__(self) -> dict[str, Any]:
        """Return what pickling and copying keep: the measurements, on the host."""
        along, edge, mismatch = jax.device_get((self._along, self._edge, self._mismatch))
        left_out = dict.fromkeys(("_loss", "_functions", "_vectors", "_guess"))
        return {**vars(self), "_along": along, "_edge": edge, "_mismatch": mismatch, **left_out}


def _no_along() -> Along:
    """Return what stands for a measurement that raised."""
    nan = jnp.asarray(jnp.nan)
    return Along(nan, nan, nan, nan, nan, nan, nan, jnp.asarray(0))


def _no_edge(k: int, num_blocks: int) -> Edge:
    """Return what stands for a measurement that raised."""
    nan, values, blocks = jnp.asarray(jnp.nan), jnp.full(k, jnp.nan), jnp.full(num_blocks, jnp.nan)
    none = jnp.asarray(0)
    return Edge(values, nan, values, values > 0, none, blocks, nan, blocks, none, none)


def _say_steps(steps: list[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"{len(steps)} steps from {steps[0]} to {steps[-1]}"


def _columns(measurements: dict[int, Any], none: Any) -> tuple[np.ndarray, Any]:
    """Return the steps, and the measurements in one with a leading axis; None where there is none."""
    rows = jax.device_get([none if row is None else row for row in measurements.values()])
    columns = jax.tree.map(lambda *leaves: np.stack(leaves), *rows) if rows else None
    return np.array(list(measurements), int), columns
