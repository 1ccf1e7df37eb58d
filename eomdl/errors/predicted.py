"""The error of a flow against its optimizer, predicted without a run of the optimizer."""

import dataclasses
from typing import Unpack

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from typing_extensions import override

from eomdl import _check, _tree, _warn
from eomdl._autodiff import jvp
from eomdl._end import End
from eomdl._result import AbstractResult, Note, Table, series_table
from eomdl._types import Args, Array, Params
from eomdl.errors.comparison import top_level_blocks
from eomdl.errors.error_flows import LeadingErrorFlow, LinearizedErrorFlow
from eomdl.flows.base import AbstractFlow, as_ode, map_of
from eomdl.maps.step_map import StepMap
from eomdl.runs.continuous import solve
from eomdl.runs.options import RunOptions
from eomdl.runs.trajectory import Trajectory


MAX_DISAGREEMENT = 0.5  # of the two predictions, relative: above it the asymptotic regime is left


@dataclasses.dataclass(frozen=True)
class PredictedError(AbstractResult):
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
    - `kinks`: about the error that jumps of the gradient add, which neither prediction has in it, (n,); None where it was
        not measured.
    - `notes`: where the prediction is not to be trusted, and why.

    Its picture shows the norms against steps, log scale: black the whole (dashed: by one term more), in colours the blocks. Its option
    `measured`, shape (n,), such as `compare(real, {"flow": predicted.path}).distance["flow"]`, is drawn as circles.
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
    notes: tuple[Note, ...]
    kinks: Float[np.ndarray, " n"] | None = None

    @property
    def corrected(self) -> Trajectory:
        """The flow's path less its predicted error, to be compared like any other run; it ends at its last saved step."""
        params = jax.tree.map(np.subtract, self.path.params, self.vector)
        end = End(int(self.steps[-1]), None, jax.tree.map(lambda x: x[-1], params))
        return dataclasses.replace(self.path, params=params, observables={}, ode_error=None, end=end)

    @override
    def _tables(self) -> tuple[Table, ...]:
        moved = np.where(self.travelled > 0, self.travelled, np.inf)
        columns = {"step": self.steps, "error": self.norm, "error / travelled": self.norm / moved}
        if self.embedded is not None:
            columns["by one term more"] = self.embedded
        if self.kinks is not None and _first_kinks(self.norm, self.kinks) is not None:
            columns["at kinks"] = self.kinks
        columns |= {f"of {name}": norm for name, norm in self.block_norm.items()}
        return (series_table("Predicted error of the flow", columns),)


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
    r"""Predict the error of a flow against its optimizer, $e_k = \theta^{flow}_k - \theta_k$, without a run of the optimizer.

    ```python
    predicted = eomdl.errors.predict_error(eomdl.GradientFlow(loss, 0.1), params, 100, args=data)
    print(predicted.norm[-1], predicted.notes)
    ```

    Two forms of it, both integrated along the flow itself:

    - **leading** (a flow that has a `leading_error`; gradient flow and the equation of motion with n counter terms):
        $e' = -H e + \eta^{n+1} \xi_n$, the error up to $O(\eta^{n+2})$;
    - **linearized** (any flow that has a `map`, its discrete step; strides; an optimizer's state):
        $e_{k+1} = D\Phi(x_k)\, e_k + (x_{k+1} - \Phi(x_k))$, up to $O(|e|^2)$.

    **Arguments:**

    - `flow`, `params`, `num_steps`: as in `eomdl.solve`; `options`: `args`, `batches`, `save_steps`, `resume` and the
        rest of `eomdl.runs.RunOptions` (`save_params` must be True: the prediction is a vector).
    - `leading`: which form; by default leading where the flow has it, else linearized.
    - `check`: also predict by the flow with one term (or point) more (its `next_order`), an independent route, and say
        where the two differ by more than half. And find the kinks that the path crosses (relu, abs, max), where neither
        form holds: what the gradient changes by from saved step to saved step, less the integral of its derivative. This
        is for optimizers without memory, without `batches`, where consecutive steps are saved.
    - `diagnose`: as in `eomdl.solve`.

    **Returns:** `eomdl.errors.PredictedError`.

    **Cost** of one evaluation, leading: 2.7 / 8 / 14 gradients for n = 0, 1, 2 (XLA flops on a tanh MLP), in all about
    twice what `eomdl.solve` with its error estimate costs; linearized: the flow, and a step of the optimizer with its
    derivative in every step. `check` adds a run of that other flow, and about 8 gradients for each saved step.

    **Raises:** `ValueError` for a wrong argument, for `leading=True` with a flow without a `leading_error`, for a flow
    without a `map`, or whose map takes a whole epoch.

    Source: Miyagawa 2022 (arXiv 2210.15898), discretization error.
    """
    as_ode(flow)
    check, diagnose = _check.flag("check", check), _check.flag("diagnose", diagnose)
    has_leading = flow.leading_error is not None
    leading = has_leading if leading is None else _check.flag("leading", leading)
    if leading and not has_leading:
        raise ValueError(
            f"leading: expected False for {type(flow).__name__}, which has no `leading_error`: GradientFlow and "
            "EquationOfMotion have one"
        )
    if options.get("save_params", True) is not True:
        raise ValueError(f"save_params: expected True, got {_check.show(options['save_params'])}")
    with_error = LeadingErrorFlow(flow) if leading else LinearizedErrorFlow(flow)
    path = _warn.quietly(solve)(
        with_error,
        params,
        num_steps,
        observe_state={"error": with_error.error},
        estimate_error=False,
        diagnose=diagnose,
        **options,
    )
    better = None
    if check and flow.next_order is not None:
        # With the default solver, whatever the flow recommends: this is about the error of the flow itself.
        better = _warn.quietly(solve)(
            flow.next_order,
            params,
            num_steps,
            solver=diffrax.Tsit5(),
            estimate_error=False,
            diagnose=False,
            **options,
        )
    kinks = None
    if check and options.get("batches") is None:
        kinks = _error_at_kinks(flow, path, options.get("args"))
    return _result(path, better, kinks)


def _result(path: Trajectory, better: Trajectory | None, kinks: np.ndarray | None) -> PredictedError:
    """Return the prediction from the run of the flow with its error, and the run of the flow with one term more."""
    vector = jax.tree.map(np.asarray, path.observables["error"])
    norm, embedded, difference = _tree.row_norms(vector), None, None
    steps = np.asarray(path.steps)
    notes = path.notes + _kinks_note(steps, norm, kinks)
    if better is not None:
        other = jax.tree.map(lambda a, b: a - _as_long(b, len(a)), path.params, better.params)
        embedded, difference = (
            _tree.row_norms(other),
            _tree.row_norms(jax.tree.map(np.subtract, other, vector)),
        )
        notes += _disagreement(steps, norm, difference)
        if better.message:
            stopped = Note(better.message, is_fault=True)
            notes += (stopped.about("The flow with one term more, by which this is checked"),)
    return PredictedError(
        steps=steps,
        times=np.asarray(path.times),
        vector=vector,
        norm=norm,
        block_norm={name: _tree.row_norms(block) for name, block in top_level_blocks(vector).items()},
        travelled=_tree.row_norms(jax.tree.map(lambda x: x - x[:1], path.params)),
        embedded=embedded,
        difference=difference,
        path=path,
        notes=notes,
        kinks=kinks,
    )


def _error_at_kinks(flow: AbstractFlow, path: Trajectory, args: Args) -> np.ndarray | None:
    r"""Return $\frac12 |\sum_k J_k|$ up to each saved step, with $J_k$ the jumps of the optimizer's step on the way there.

    The optimizer moves by the gradient before a kink to the end of its step, on average over half of it, where the flow takes
    the new gradient: the flow is off by J / 2. Steps that were not saved count for nothing. None for an optimizer with memory.
    """
    steps = np.asarray(path.steps)
    follows = np.flatnonzero(np.diff(steps) == 1)
    start = jax.tree.map(lambda leaf: leaf[0], path.params)
    if len(follows) == 0 or _tree.size(map_of(flow).init(start)) != _tree.size(start):
        return None
    before, after = (jax.tree.map(lambda leaf, at=at: leaf[at], path.params) for at in (follows, follows + 1))
    jumps = jax.tree.map(np.asarray, _jumps(map_of(flow), before, after, steps[follows], args))
    total = np.zeros((len(steps), _tree.size(start)))
    total[follows + 1] = _tree.rows(jumps)
    found = np.linalg.norm(np.cumsum(total, axis=0), axis=1) / 2
    rounding = 64 * float(jnp.finfo(_tree.dtype(start)).eps) * np.max(_tree.row_norms(path.params))
    return np.where(found > rounding, found, 0.0)


@eqx.filter_jit
def _jumps(step_map: StepMap, before: Params, after: Params, steps: Array, args: Args) -> Params:
    r"""Return $d(b) - d(a) - \int_a^b d' dx$, d the step, for pairs of points, by Simpson's rule: exact to the fourth power."""

    def jump(at: tuple[Params, Params, jax.Array]) -> Params:
        a, b, k = at
        way = _tree.sub(b, a)

        def step(x: Params) -> Params:
            return step_map.params(step_map.increment(step_map.init(x), args, k))

        parts = jnp.array([0.0, 0.5, 1.0])
        values, changes = jax.lax.map(
            lambda part: jvp(step, _tree.add(a, _tree.scale(part, way)), way), parts
        )
        return jax.tree.map(
            lambda d, slope: d[2] - d[0] - (slope[0] + 4 * slope[1] + slope[2]) / 6, values, changes
        )

    return jax.lax.map(jump, (before, after, steps.astype(jnp.result_type(float))))


def _first_kinks(norm: np.ndarray, kinks: np.ndarray) -> int | None:
    """Return the place of the first saved step where kinks add more than `MAX_DISAGREEMENT` of the prediction."""
    apart = np.flatnonzero(kinks > MAX_DISAGREEMENT * norm)
    return int(apart[0]) if len(apart) else None


def _kinks_note(steps: np.ndarray, norm: np.ndarray, kinks: np.ndarray | None) -> tuple[Note, ...]:
    first = None if kinks is None else _first_kinks(norm, kinks)
    if kinks is None or first is None:
        return ()
    said = (
        f"From step {steps[first]} on the path crosses kinks of the loss (relu, abs, max), where the gradient jumps and no "
        f"derivative of it tells: they add an error of about {kinks[-1]:.1e}, which the prediction ({norm[-1]:.1e} at the end) "
        "does not have in it. Compare with a run of the optimizer (`eomdl.compare`)."
    )
    return (Note(said, is_fault=True),)


def _as_long(rows: np.ndarray, count: int) -> np.ndarray:
    """Return the saved steps of a run that failed, with NaN for those that it has not reached."""
    missing = np.full((max(count - len(rows), 0), *rows.shape[1:]), np.nan)
    return np.concatenate([rows[:count], missing])


def _disagreement(steps: np.ndarray, norm: np.ndarray, difference: np.ndarray) -> tuple[Note, ...]:
    """Return a note from where on the two predictions differ by more than `MAX_DISAGREEMENT`."""
    apart = np.flatnonzero(difference > MAX_DISAGREEMENT * norm)
    if len(apart) == 0:
        return ()
    said = (
        f"From step {steps[apart[0]]} on the prediction and that by one term more differ by more than {MAX_DISAGREEMENT:.0%} "
        f"({difference[apart[0]]:.1e} of {norm[apart[0]]:.1e}): the learning rate is too large for the leading term to "
        "be the error, and only its size is known. Lower the learning rate, or compare with a run of the optimizer "
        "(`eomdl.compare`)."
    )
    return (Note(said, is_fault=True),)
