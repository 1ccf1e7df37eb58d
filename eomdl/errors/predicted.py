"""The error of a flow against its optimizer, foretold without a run of the optimizer."""

import dataclasses
import io
from typing import Any, Unpack, cast

import jax
import numpy as np
from jaxtyping import Float, Int

from eomdl import _check
from eomdl._end import End
from eomdl._types import Params
from eomdl.errors.carried import LeadingError, LinearizedError, leaf_by_leaf, recorded
from eomdl.errors.comparison import row_norms, top_level_blocks
from eomdl.flows.base import AbstractFlow
from eomdl.flows.equation_of_motion import EquationOfMotion
from eomdl.flows.gradient import GradientFlow
from eomdl.flows.interpolating import InterpolatingFlow
from eomdl.runs.continuous import solve
from eomdl.runs.options import RunOptions
from eomdl.runs.trajectory import Trajectory
from eomdl.series.euler import MAX_ORDER
from eomdl.series.weights import MAX_POINTS


_KNOWN = (GradientFlow, EquationOfMotion)
AGREE = 0.5  # relative difference of the two predictions above which the asymptotic regime is left


@dataclasses.dataclass(frozen=True)
class PredictedError:
    r"""The predicted error of a flow at its n saved steps: flow minus optimizer.

    ```python
    predicted = eomdl.errors.predict_error(flow, params, 100, args=data)
    print(predicted.table())
    ```

    - `steps`, `times`: shape (n,).
    - `vector`: a pytree like the parameters, leaves with leading axis n.
    - `norm`: Euclidean norms over all parameters, (n,); `block_norm`: `{block: (n,)}`, for each top-level block.
    - `embedded`: norms of a second, independent prediction, the difference to the flow with one term (or point)
        more, (n,); None where there is no such flow, or it was not asked for. `difference`: the norm of the two
        predictions' difference.
    - `travelled`: distance of the flow from its start, (n,).
    - `path`: the run of the flow. `corrected`: its path less the predicted error, one order nearer to the optimizer.
    - `notes`: where the prediction is not to be trusted, and why.
    """

    steps: Int[np.ndarray, " n"]
    times: Float[np.ndarray, " n"]
    vector: Params
    norm: Float[np.ndarray, " n"]
    block_norm: dict[str, Float[np.ndarray, " n"]]
    travelled: Float[np.ndarray, " n"]
    embedded: Float[np.ndarray, " n"] | None
    difference: Float[np.ndarray, " n"] | None
    path: Trajectory
    notes: tuple[str, ...]

    @property
    def corrected(self) -> Trajectory:
        """The flow's path less its predicted error, to be compared like any other run; it ends at its last row."""
        params = jax.tree.map(np.subtract, self.path.params, self.vector)
        end = End(int(self.steps[-1]), None, jax.tree.map(lambda x: x[-1], params))
        return dataclasses.replace(self.path, params=params, observables={}, ode_error=None, end=end)

    def table(self) -> str:
        """The prediction as text: one row per step, then the notes."""
        from rich.console import Console
        from rich.table import Table

        at = np.unique(np.linspace(0, len(self.steps) - 1, 6).round().astype(int))
        table = Table(title="Predicted error of the flow")
        heads = [
            "step",
            "error",
            "error / travelled",
            *(["by one term more"] if self.embedded is not None else []),
        ]
        for head in [*heads, *(f"of {name}" for name in self.block_norm)]:
            table.add_column(head, justify="right")
        for i in at:
            share = self.norm[i] / self.travelled[i] if self.travelled[i] > 0 else 0.0
            cells = [self.norm[i], share, *([] if self.embedded is None else [self.embedded[i]])]
            cells += [block[i] for block in self.block_norm.values()]
            table.add_row(f"{self.steps[i]}", *(f"{cell:.2e}" for cell in cells))
        text = io.StringIO()
        Console(file=text, width=20 + 20 * len(table.columns), legacy_windows=False).print(table)
        return text.getvalue() + "".join(f"! {note}\n" for note in self.notes)

    def plot(self) -> Any:
        """The predicted error against steps, whole and for each block, as a matplotlib figure."""
        from eomdl.plotting import plot_predicted_error

        return plot_predicted_error(self)


def predict_error(
    flow: AbstractFlow,
    params: Params,
    num_steps: int,
    *,
    leading: bool | None = None,
    check: bool = True,
    diagnose: bool = True,
    **options: Unpack[RunOptions],
) -> PredictedError:
    r"""The error of a flow against its optimizer, $e_k = \theta^{flow}_k - \theta_k$, without a run of the optimizer.

    ```python
    predicted = eomdl.errors.predict_error(eomdl.GradientFlow(loss, 0.1), params, 100, args=data)
    print(predicted.norm[-1], predicted.notes)
    ```

    Two forms of it, both integrated along the flow itself:

    - **leading** (gradient flow and the equation of motion with n counter terms):
        $e' = -H e + \eta^{n+1} \xi_n$, the error up to $O(\eta^{n+2})$;
    - **linearized** (any flow that knows its discrete step; strides; an optimizer's state):
        $e_{k+1} = D\Phi(x_k)\, e_k + (x_{k+1} - \Phi(x_k))$, up to $O(|e|^2)$.

    **Arguments:**

    - `flow`, `params`, `num_steps`: as in `eomdl.solve`; `options`: `args`, `batches`, `save_steps`, `resume` and the
        rest of `eomdl.runs.RunOptions` (`save_params` must be True: the prediction is a vector).
    - `leading`: which form; by default leading for gradient flow and the equation of motion, else linearized.
    - `check`: also predict by the flow with one term (or point) more, an independent route, and say where the two
        differ by more than half.
    - `diagnose`: as in `eomdl.solve`.

    **Returns:** `eomdl.errors.PredictedError`.

    **Cost** of one evaluation, leading: 2.7 / 8 / 14 gradients for n = 0, 1, 2 (XLA flops on a tanh MLP), in all about
    twice what `eomdl.solve` with its error estimate costs; linearized: the flow, and a step of the optimizer with its
    derivative in every step. `check` adds a run of that other flow.

    **Raises:** `ValueError` for a wrong argument, for `leading=True` with a flow of another kind, for a flow that does
    not know its discrete step or speaks of epochs.

    Source: Miyagawa 2022 (arXiv 2210.15898), discretization error.
    """
    _check.kind("flow", flow, AbstractFlow, "an eomdl.AbstractFlow")
    check, diagnose = _check.flag("check", check), _check.flag("diagnose", diagnose)
    knows = type(flow) in _KNOWN  # and not a class of the user's made from one, which may be another flow
    leading = knows if leading is None else _check.flag("leading", leading)
    if leading and not knows:
        raise ValueError(
            f"leading: expected False for {type(flow).__name__}: counter terms are known for GradientFlow and "
            "EquationOfMotion"
        )
    if leading and _leading(flow).order == MAX_ORDER:
        raise ValueError(
            f"flow: expected at most {MAX_ORDER - 1} counter terms, got {MAX_ORDER}: the next is not known"
        )
    if options.get("save_params", True) is not True:
        raise ValueError(f"save_params: expected True, got {options['save_params']!r}")
    carried = _leading(flow) if leading else _linearized(flow)
    observed = leaf_by_leaf("error", carried.observed, params)
    path = solve(
        carried,
        params,
        num_steps,
        observe_state=observed,
        estimate_error=False,
        diagnose=diagnose,
        **options,
    )
    other = _with_one_more(flow) if check else None
    better = None
    if other is not None:
        better = solve(other, params, num_steps, estimate_error=False, diagnose=False, **options)
    return _result(path, better)


def _leading(flow: AbstractFlow) -> LeadingError:
    known = cast(EquationOfMotion, flow)
    return LeadingError(known.loss, known.learning_rate, getattr(known, "order", 0))


def _with_one_more(flow: AbstractFlow) -> AbstractFlow | None:
    """The flow with one counter term or point more; None if there is none."""
    if type(flow) in _KNOWN:
        known = _leading(flow)
        return EquationOfMotion(known.loss, known.learning_rate, known.order + 1)
    if isinstance(flow, InterpolatingFlow) and flow.weights is None and flow.points < MAX_POINTS:
        return dataclasses.replace(flow, points=flow.points + 1)
    return None


def _linearized(flow: AbstractFlow) -> LinearizedError:
    """Of a flow that defines the optimizer's single step."""
    kind = type(flow)
    if kind.step is AbstractFlow.step:
        raise ValueError(f"flow: expected one that defines `step`, which it models, got {kind.__name__}")
    if kind.step_span is not AbstractFlow.step_span:
        raise ValueError(f"flow: expected a model of single steps, got {kind.__name__}, which models epochs")
    return LinearizedError(flow)


def _result(path: Trajectory, better: Trajectory | None) -> PredictedError:
    """What the run of the flow with its error says, and the run of the flow with one term more."""
    vector = recorded(path, "error")
    norm, embedded, difference = row_norms(vector), None, None
    notes = path.notes
    if better is not None:
        other = jax.tree.map(lambda a, b: a - _as_long(b, len(a)), path.params, better.params)
        embedded, difference = row_norms(other), row_norms(jax.tree.map(np.subtract, other, vector))
        notes += _disagreement(np.asarray(path.steps), norm, difference)
        if better.message:
            notes += (f"The flow with one term more, by which this is checked: {better.message}",)
    return PredictedError(
        steps=np.asarray(path.steps),
        times=np.asarray(path.times),
        vector=vector,
        norm=norm,
        block_norm={name: row_norms(block) for name, block in top_level_blocks(vector).items()},
        travelled=row_norms(jax.tree.map(lambda x: x - x[:1], path.params)),
        embedded=embedded,
        difference=difference,
        path=path,
        notes=notes,
    )


def _as_long(rows: np.ndarray, count: int) -> np.ndarray:
    """The rows of a run that failed, with NaN for those that it has not."""
    missing = np.full((max(count - len(rows), 0), *rows.shape[1:]), np.nan)
    return np.concatenate([rows[:count], missing])


def _disagreement(steps: np.ndarray, norm: np.ndarray, difference: np.ndarray) -> tuple[str, ...]:
    """A note from where the two predictions differ by more than `AGREE`."""
    apart = np.flatnonzero(difference > AGREE * norm)
    if len(apart) == 0:
        return ()
    return (
        f"From step {steps[apart[0]]} on the prediction and that by one term more differ by more than {AGREE:.0%} "
        f"({difference[apart[0]]:.1e} of {norm[apart[0]]:.1e}): the learning rate is too large for the leading term to "
        "be the error, and only its size is known. Lower the learning rate, or take `leading=False`.",
    )
