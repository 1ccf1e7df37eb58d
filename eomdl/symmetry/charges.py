"""The charges of a run, compared with what is predicted for them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int
from typing_extensions import override

from eomdl import _check, _tree
from eomdl._result import AbstractResult, Note, Table, series_table
from eomdl._types import Params
from eomdl.runs.trajectory import Trajectory
from eomdl.symmetry.groups import AbstractSymmetry, Scaling, Translation


@dataclasses.dataclass(frozen=True)
class Conservation(AbstractResult):
    """The charge of one symmetry along a run, and its predictions, at n consecutive steps.

    - `symmetry`: in words.
    - `steps`: shape (n,).
    - `charge`: (n, ...), measured, a value for every unit.
    - `laws`: `{law: (n, ...)}`, made of the start, the learning rate, decay and momentum, and (but for gradient flow)
        the sizes of the updates measured along the real path.
    - `models`: `{name: (n, ...)}`, the charges of flows integrated from the start; NaN at steps that they did not reach.

    Its table has the sums over units, with the error of each prediction. Its picture shows them against steps, solid the measured charge,
    dashed the laws, dotted the models; `eomdl.plotting.plot` takes several charges, one row for each.
    """

    symmetry: str
    steps: Int[np.ndarray, " n"]
    charge: Float[np.ndarray, "n ..."]
    laws: dict[str, Float[np.ndarray, "n ..."]]
    models: dict[str, Float[np.ndarray, "n ..."]]
    notes: tuple[Note, ...] = ()

    @property
    def predictions(self) -> dict[str, Float[np.ndarray, "n ..."]]:
        """Laws and models in one dict."""
        return self.laws | self.models

    @property
    def change(self) -> float:
        """The largest change of the charge along the run, Euclidean norm over units."""
        return float(np.max(_tree.row_norms(self.charge - self.charge[:1])))

    @property
    def errors(self) -> dict[str, Float[np.ndarray, " n"]]:
        """`{prediction: (n,)}`: distance to the measured charge, Euclidean norm over units."""
        return {name: _tree.row_norms(values - self.charge) for name, values in self.predictions.items()}

    @override
    def _tables(self) -> tuple[Table, ...]:
        columns = {"step": self.steps, "measured": total_over_units(self.charge)}
        columns |= {name: total_over_units(values) for name, values in self.predictions.items()}
        columns |= {f"error {name}": values for name, values in self.errors.items()}
        return (series_table(f"Charge of the {self.symmetry}", columns),)


def total_over_units(charge: Float[np.ndarray, "n ..."]) -> Float[np.ndarray, " n"]:
    """Return the sum of a charge over its units, at every step."""
    return _tree.rows(charge).sum(axis=1)


def conservation(
    run: Trajectory,
    symmetry: AbstractSymmetry,
    *,
    learning_rate: ArrayLike,
    weight_decay: ArrayLike = 0.0,
    momentum: ArrayLike = 0.0,
    models: Mapping[str, Trajectory] | None = None,
) -> Conservation:
    r"""Compare a charge Q along a real run of SGD with its laws and with flows.

    Where the loss has the symmetry, $\langle \partial_\alpha, \nabla f \rangle = 0$ leaves of the heavy-ball step (coupled decay
    $\lambda$, any minibatch), with $\Delta_k = \theta_{k+1} - \theta_k$ and the product
    $\langle a, b \rangle_S$ whose square is the charge,

    - **exact** (scalings): $Q_{k+1} = Q_k + 2 P_k + N_k$, $P_k = \beta (P_{k-1} + N_{k-1}) - \eta\lambda Q_k$, with the measured
        $N_k = \langle \Delta_k, \Delta_k \rangle_S$; translations: $p_{k+1} = p_k - \eta m_{k+1}$, $m_{k+1} = \beta m_k + \lambda p_k$.
        Without momentum $Q_{k+1} = (1 - \eta\lambda)^2 Q_k + \eta^2 \langle \nabla f, \nabla f \rangle_S$.
    - **gradient flow**: $\dot Q = -2\lambda Q$, $\dot p = -\lambda p$, with $h = \eta / (1 - \beta)$ the time of a step.
    - **first order** (one counter term; with momentum that of `eomdl.flows.MomentumFlow`), $\kappa = (1 + \beta) / (1 - \beta)$:
        $\dot Q = -(2\lambda + h\kappa\lambda^2) Q + h\kappa \langle \nabla f, \nabla f \rangle_S$, integrated with
        $\nabla f + \lambda\theta$ of each step, averaged over the memory ($-\Delta_k / h$), and
        $\dot p = -(\lambda + h\kappa\lambda^2/2) p$. It has no transient: with momentum do not use it from step 0 on, but from
        when the memory has filled.
    - **damped oscillator** (Kunin et al. 2021): $\frac{\eta}{2}(1+\beta)\ddot\theta + (1-\beta)\dot\theta = -\nabla f - \lambda\theta$
        in time $k\eta$, so
        $\frac{\eta}{2}(1+\beta)\ddot Q + (1-\beta)\dot Q + 2\lambda Q = \eta (1+\beta) \langle\dot\theta,\dot\theta\rangle_S$
        with the measured $\dot\theta = \Delta_k / \eta$, and the same for p without a drive and with $\lambda$ for $2\lambda$. It begins
        with the mean of the updates before and after the start, of which the first is 0 at step 0.

    The exact law holds to rounding, which tests symmetry, optimizer and arguments at once. Orders beyond are those
    of `models`: flows integrated from the start, which predict the path as well.

    **Arguments:**

    - `run`: of `optax.sgd(learning_rate, momentum)` on a loss with `eomdl.WeightDecay(f, weight_decay)`; parameters saved
        at consecutive steps. If it does not begin at step 0, its first update is taken as given.
    - `symmetry`: an `eomdl.symmetry.Translation` or `eomdl.symmetry.Scaling` of f (see `eomdl.symmetry.check`).
    - `models`: `{name: trajectory}` with saved parameters.

    **Returns:** `eomdl.symmetry.Conservation`. **Cost:** no gradients: everything is computed from the saved parameters.

    **Raises:** `ValueError` for a wrong argument.

    Source: after Kunin et al. 2021 (arXiv 2012.04728); the exact laws are derived here.
    """
    _check.kind("run", run, Trajectory, "an eomdl.Trajectory")
    if models is not None and not (isinstance(models, Mapping) and not models):
        _check.mapping("models", models, Trajectory, "eomdl.Trajectory with saved params")
    if not isinstance(symmetry, Translation | Scaling):
        raise ValueError(
            f"symmetry: expected an eomdl.symmetry.Translation or eomdl.symmetry.Scaling, got {_check.show(symmetry)}"
        )
    if run.params is None:
        raise ValueError("run: expected saved params, got a run with save_params=False")
    steps = np.asarray(run.steps)
    if len(steps) < 2 or np.any(np.diff(steps) != 1):
        raise ValueError("run: expected parameters saved at two or more consecutive steps, got others")
    eta, decay, beta = (
        float(x)
        for x in (
            _check.positive_scalar("learning_rate", learning_rate),
            _check.nonnegative_scalar("weight_decay", weight_decay),
            _check.fraction("momentum", momentum),
        )
    )
    params = jax.tree.map(np.asarray, run.params)
    charge = _map_over_steps(symmetry.charge, params)
    settings = (int(steps[0]) == 0, eta, decay, beta)
    if isinstance(symmetry, Translation):
        laws = _translation_laws(charge, *settings)
    else:
        laws = _scaling_laws(symmetry, params, charge, *settings)
    predicted = {}
    for name, model in (models or {}).items():
        if model.params is None:
            raise ValueError(
                f"models[{name!r}]: expected an eomdl.Trajectory with saved params, got {type(model)}"
            )
        values = np.full(charge.shape, np.nan)
        _, at_run, at_model = np.intersect1d(steps, model.steps, return_indices=True)
        values[at_run] = _map_over_steps(symmetry.charge, jax.tree.map(np.asarray, model.params))[at_model]
        predicted[name] = values
    return Conservation(symmetry.label, steps, charge, laws, predicted)


def _translation_laws(
    charge: np.ndarray, from_rest: bool, eta: float, decay: float, beta: float
) -> dict[str, np.ndarray]:
    exact = charge.copy()
    buffer = decay * charge[0] if from_rest else (charge[0] - charge[1]) / eta
    for k in range(len(charge) - 1):
        exact[k + 1] = exact[k] - eta * buffer
        buffer = beta * buffer + decay * exact[k + 1]
    h = eta / (1 - beta)
    rates = {"gradient flow": decay, "first order": decay + h * (1 + beta) / (1 - beta) * decay**2 / 2}
    flows = {name: charge[:1] * np.exp(-rate * h * _step_column(charge)) for name, rate in rates.items()}
    after = charge[1] - charge[0]
    before = _update_before(after, decay * charge[0], from_rest, eta, beta)
    slope, drive = (before + after) / (2 * eta), np.zeros_like(charge[1:])
    oscillator = _oscillator(charge[0], slope, drive, eta, decay, beta)
    return {"exact": exact, **flows, "damped oscillator": oscillator}


def _scaling_laws(
    symmetry: Scaling,
    params: Params,
    charge: np.ndarray,
    from_rest: bool,
    eta: float,
    decay: float,
    beta: float,
) -> dict[str, np.ndarray]:
    h, kappa = eta / (1 - beta), (1 + beta) / (1 - beta)
    before = jax.tree.map(lambda leaf: leaf[:-1], params)
    update = jax.tree.map(lambda leaf: np.diff(leaf, axis=0), params)
    square = _map_over_steps(symmetry.pair, update, update)
    exact = charge.copy()
    inner = -eta * decay * charge[0] if from_rest else _map_over_steps(symmetry.pair, before, update)[0]
    for k in range(len(square)):
        exact[k + 1] = exact[k] + 2 * inner + square[k]
        inner = beta * (inner + square[k]) - eta * decay * exact[k + 1]

    # The velocity is the gradient averaged over the memory. So a gradient that stays counts kappa
    # times, and the noise of minibatches, independent from step to step, once.
    rate = 2 * decay + 2 * h * kappa * decay**2
    growth = kappa / h * square
    kept = np.exp(-rate * h)
    weight = h if rate == 0 else -np.expm1(-rate * h) / rate
    first = charge.copy()
    for k in range(len(square)):
        first[k + 1] = kept * first[k] + weight * growth[k]
    flow = charge[:1] * np.exp(-2 * decay * h * _step_column(charge))
    after = _map_over_steps(symmetry.pair, before, update)[0]
    earlier = _update_before(after, decay * charge[0], from_rest, eta, beta)
    # Q' = 2 <theta, theta'>, with theta' the mean of the two updates over eta.
    slope, drive = (earlier + after) / eta, (1 + beta) / eta * square
    oscillator = _oscillator(charge[0], slope, drive, eta, 2 * decay, beta)
    return {"exact": exact, "gradient flow": flow, "first order": first, "damped oscillator": oscillator}


def _update_before(
    after: np.ndarray, pull: np.ndarray, from_rest: bool, eta: float, beta: float
) -> np.ndarray:
    """Return a linear function of the update before the start: after = beta * before - eta * pull."""
    return np.zeros_like(after) if from_rest or beta == 0 else (after + eta * pull) / beta


def _oscillator(
    start: np.ndarray, slope: np.ndarray, drive: np.ndarray, eta: float, stiffness: float, beta: float
) -> np.ndarray:
    r"""Solve $\frac{\eta}{2}(1 + \beta) \ddot q + (1 - \beta) \dot q + c q = d_k$ on $[k\eta, (k+1)\eta]$; return q at every step.

    `start` and `slope` are q and its derivative at 0, c is the `stiffness`, `drive` has shape (n - 1, ...).
    """
    from scipy.linalg import expm  # it takes as long to import as half of the package

    mass = eta / 2 * (1 + beta)
    generator = np.array([[0, 1, 0], [-stiffness / mass, -(1 - beta) / mass, 1 / mass], [0, 0, 0]])
    propagator = expm(eta * generator)
    path, state = [start], np.stack([start, slope, np.zeros_like(start)])
    for force in drive:
        state[2] = force
        state = np.tensordot(propagator, state, 1)
        path.append(state[0])
    return np.stack(path)


def _step_column(charge: np.ndarray) -> np.ndarray:
    """Return 0, 1, 2, ... along the first axis."""
    return np.arange(len(charge)).reshape(-1, *[1] * (charge.ndim - 1))


def _map_over_steps(function: Any, *trees: Params) -> np.ndarray:
    return np.asarray(jax.jit(jax.vmap(function))(*trees))
