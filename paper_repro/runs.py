"""What several reproductions do: families of flows, paths of all of them, one row per model, a grid of real runs."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from tqdm import tqdm
from typing_extensions import override

import eomdl


Loss = Callable[[Any, Any], jax.Array]


def counter_terms(loss: Loss, eta: float, orders: Iterable[int]) -> dict[str, eomdl.EquationOfMotion]:
    """The equation of motion with 0, 1, 2, ... counter terms, by name; 0 is gradient flow."""
    return {f"EoM {n}" if n else "gradient flow": eomdl.EquationOfMotion(loss, eta, n) for n in orders}


def dimension_estimators() -> dict[str, Any]:
    """TwoNN (Facco et al. 2017) and maximum likelihood (Levina & Bickel 2004), by name."""
    import skdim  # it takes seconds to import

    return {"TwoNN": skdim.id.TwoNN(), "MLE": skdim.id.MLE()}


def solve_all(
    flows: Mapping[str, eomdl.AbstractFlow], params: Any, steps: int, **options: Any
) -> dict[str, eomdl.Trajectory]:
    """The path of every flow, with the same options of `eomdl.solve`."""
    return {
        name: eomdl.solve(flow, params, steps, **options)
        for name, flow in tqdm(flows.items(), desc="flows", leave=False)
    }


def summary(comparison: eomdl.Comparison) -> pd.DataFrame:
    """One row per model: the largest errors along the path, the ODE solver's share, the notes."""
    rows = []
    for model in comparison.models:
        distance = comparison.distance[model].max()
        row = {"model": model, "largest distance": distance}
        row["largest distance / travelled"] = distance / comparison.travelled.max()
        for name, difference in comparison.differences[model].items():
            row[f"largest {name} difference"] = np.abs(difference).max()
        if model in comparison.ode_error:
            row["ODE error"] = comparison.ode_error[model].max()
        rows.append(row | {"notes": " ".join(comparison.notes)})
    return pd.DataFrame(rows)


def by(table: pd.DataFrame, key: str | list[str], value: str) -> dict[Any, float]:
    """Column `value` as a dict by column `key`."""
    return table.set_index(key)[value].to_dict()


class Setting(NamedTuple):
    """One real run of the grid: learning rate, weight decay, seed, where it starts and what was observed."""

    eta: float
    decay: float
    seed: int
    start: Any
    observed: dict[str, np.ndarray]


def descend_grid(
    loss: Loss,
    starts: list[Any],
    rates: Iterable[float],
    steps: int,
    args: Any,
    observe: Callable[[Loss], Mapping[str, Loss]],
) -> Iterator[Setting]:
    """Real gradient descent for every (learning rate, weight decay, start), in one compiled program.

    `observe(decayed loss)` gives the observables.
    """
    stacked = eomdl.runs.stack(starts)
    grid = list(itertools.product(rates, rates, range(len(starts))))
    etas, decays, which = (jnp.asarray(column) for column in zip(*grid, strict=True))

    @jax.jit
    @jax.vmap
    def descend(eta: jax.Array, decay: jax.Array, seed: jax.Array) -> dict[str, jax.Array]:
        decayed = eomdl.WeightDecay(loss, decay)
        params = jax.tree.map(lambda leaf: leaf[seed], stacked)
        options: dict[str, Any] = {"args": args, "observe": observe(decayed), "save_params": False}
        return eomdl.descend(decayed, params, optax.sgd(eta), steps, **options).observables

    measured = jax.tree.map(np.asarray, descend(etas, decays, which))
    for i, (eta, decay, seed) in enumerate(tqdm(grid, desc="grid of learning rates and decays")):
        yield Setting(eta, decay, seed, starts[seed], {name: v[i] for name, v in measured.items()})


def norm_rates(
    setting: Setting, loss: Loss, orders: Iterable[int], steps: int, args: Any, norm: Loss
) -> dict[str, np.ndarray]:
    """Decay rate of a norm along every flow from the setting's start, per unit of time, one per step."""
    flows = counter_terms(eomdl.WeightDecay(loss, setting.decay), setting.eta, orders)
    options: dict[str, Any] = {"args": args, "observe": {"norm": norm}, "save_params": False}
    return {
        name: np.asarray(
            eomdl.observe.decay_rate(
                eomdl.solve(flow, setting.start, steps, estimate_error=False, **options).observables["norm"],
                setting.eta,
            )
        )
        for name, flow in flows.items()
    }


def notes(table: pd.DataFrame) -> str:
    """The notes of a `summary`, read back or not."""
    return " ".join(table["notes"].dropna().unique()).strip()


def observed_orders(table: pd.DataFrame, error: str, last: int = 0) -> dict[Any, float]:
    """The order in the learning rate of each model's error, from the `last` rates only if given."""
    return {
        name: eomdl.errors.observed_order(some["learning rate"][-last:], some[error][-last:])
        for name, some in table.groupby("model", sort=False)
    }


def values(path: eomdl.Trajectory) -> Any:
    """The saved parameters of a run that saved them."""
    if path.params is None:
        raise ValueError("path: expected a run with saved parameters, got one made with save_params=False")
    return path.params


def coordinates(paths: Mapping[str, eomdl.Trajectory]) -> pd.DataFrame:
    """Runs of a few scalar parameters, one row per run and step."""
    return pd.concat(
        pd.DataFrame({"run": name, "step": path.steps} | {k: np.asarray(v) for k, v in values(path).items()})
        for name, path in paths.items()
    )


def charge_errors(found: Any) -> pd.DataFrame:
    """One row per prediction of an `eomdl.symmetry.Conservation`: its largest error along the run."""
    kinds = {name: "law" if name in found.laws else "integrated flow" for name in found.errors}
    largest = {name: error.max() for name, error in found.errors.items()}
    frame = pd.DataFrame({"kind": kinds, "largest error": largest, "charge changes by": found.change})
    frame["error / largest charge"] = frame["largest error"] / np.abs(found.charge).max()
    return frame.rename_axis("prediction").reset_index()


def turning(
    paths: Mapping[str, eomdl.Trajectory], block: Callable[[Any], Any], eta: float, beta: float = 0.0
) -> pd.DataFrame:
    """Angle per step and effective learning rate of a scale-invariant block, one row per run and step."""
    parts = []
    for name, path in paths.items():
        weights = block(path.params)
        norm = np.linalg.norm(np.asarray(weights).reshape(len(weights), -1), axis=1)
        columns = {"run": name, "step": path.steps, "norm": norm}
        columns["angle per step"] = np.append(eomdl.observe.angle_per_step(weights), np.nan)
        rate = eomdl.symmetry.effective_learning_rate(norm, eta, beta)
        parts.append(pd.DataFrame(columns | {"effective learning rate": np.asarray(rate)}))
    return pd.concat(parts)


class Still(eomdl.AbstractFlow):
    """The flow of a central flow's optimizer if nothing oscillated: gradient flow, or RMSProp's; against the smoothed path too."""

    step_size: jax.Array
    flow: eomdl.flows.CentralFlow

    @property
    @override
    def target(self) -> eomdl.flows.Target:
        """The smoothed path."""
        return self.flow.target

    @override
    def init(self, params: Any, args: Any) -> Any:
        """The state of the central flow before its first step."""
        return self.flow.init(params, args)

    @override
    def begin(self, t: Any, params: Any, state: Any, args: Any) -> Any:
        """The same, with a real run's moment."""
        return self.flow.begin(t, params, state, args)

    @override
    def params(self, state: Any) -> Any:
        """The parameters."""
        return state.params

    @override
    def __call__(self, t: Any, state: Any, args: Any) -> Any:
        """The velocity, with no oscillation ever found."""
        return self.flow(t, state, args)


def curvature_of(flow: eomdl.flows.CentralFlow) -> Callable:
    """The largest eigenvalue of P^-1 H at a central flow's parameters, computed again and not from the directions that it tracks."""

    def of(t: Any, state: Any, args: Any) -> jax.Array:
        del t
        diagonal = flow.preconditioner.diagonal(flow.learning_rate, state.moment, state.params)
        options: dict[str, Any] = {"preconditioner": diagonal, "num_matvecs": 24, "rtol": 1e-3}
        return eomdl.curvature.eigenpairs(flow.loss, state.params, args, 1, **options).values[0]

    return of
