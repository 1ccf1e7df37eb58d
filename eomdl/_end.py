"""Where a run is, what it has cost and how it ended: the words that maps, flows and runs share."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eomdl import _check
from eomdl._target import ITERATES, Target
from eomdl._types import STATIC, Params, State, record_type


class RESULTS(eqx.Enumeration):
    """How a run ended. Each message names the remedy."""

    successful = ""
    nonfinite = (
        "The state or its gradient became infinite or NaN, so the run stopped there; what was computed up to then is returned. "
        "Use a smaller learning rate, a lower order, or float64 (jax.config.update('jax_enable_x64', True)); if that does not "
        "help, look at the data of that step."
    )
    max_steps_reached = (
        "The ODE solver used up its step limit, so the run stopped there. Raise `max_steps`, loosen `rtol` "
        "and `atol`, or lower the order: past eta*lambda_max = 1 the terms grow without bound. Where the gradient jumps "
        "(L1, hinge, relu) a flow slides along the kink in very short steps: `atol` of a thousandth of an optimizer's step is "
        "enough there. An optimizer's first steps may be too rough for any flow: start after them (`resume=` a real run)."
    )
    interrupted = "Interrupted from the keyboard. Continue with `resume=` this trajectory."
    batches_exhausted = (
        "`batches` ended before the run did. Give as many batches as steps (an iterator that another run has read from has fewer "
        "left), then continue with `resume=` this trajectory."
    )


def succeeded(result: Any) -> bool:
    """Whether a run did; it is known of most without looking at an array."""
    return result is RESULTS.successful or bool(result == RESULTS.successful)


def result_where(condition: Any, this: Any, other: Any) -> Any:
    """`this` item of `RESULTS` where the condition holds, else the `other`."""
    return RESULTS.where(condition, this, other)


STOPPED_MEMBERS = "members that stopped"  # a diagnostic of an ensemble, of none of its members


@record_type
class Diagnostic:
    """A number that tells whether a model is valid: it is while `value` stays below `limit`. Or one that a reader should know.

    - `value`: a scalar; in `Stats`, shape (m,), at the start of the run, every 64 to 1024 steps, and at its end; (1,) for what
        is measured at the start only.
    - `limit`: where validity ends.
    - `meaning`: what it means to reach the limit, and what to do then.
    - `is_fault`: whether the model is not valid from there on (then its note in `Trajectory.notes` is a fault); else it is only told.
    """

    value: Any
    limit: float = dataclasses.field(metadata=STATIC)
    meaning: str = dataclasses.field(metadata=STATIC)
    is_fault: bool = dataclasses.field(metadata=STATIC, default=True)

    @property
    def exceeded(self) -> bool:
        """Whether the limit was reached anywhere. NaN was not below it either."""
        return not bool(np.all(np.asarray(self.value) < self.limit))

    def note(self, name: str) -> str:
        """Return what it means that the limit was reached, in words."""
        most = np.max(self.value)
        if not self.is_fault:
            return f"{name}: {most:g}. {self.meaning}"
        return f"{name} reached {most:{'.2f' if abs(most) >= 0.01 else '.1e'}} along the path. {self.meaning}"


@record_type
class Stats:
    """What a run has cost from its first step on, and how it was made.

    - `gradient_evaluations`: gradients of the loss. A step of `descend` is one. For `solve` they are the evaluations of the field
        in both integrations times its cost (`flow.gradient_cost`), NaN where that or the solver's stages are not known; the
        measurements of tolerances and diagnostics are not counted.
    - `num_steps`, `num_accepted_steps`, `num_rejected_steps`: ODE steps, of both integrations where the
        error is estimated.
    - `rtol`, `atol`: tolerances of the ODE solver, or None.
    - `stride`: the flow passes through every m-th step.
    - `target`: what the flow predicts of a real run, an `eomdl.flows.Target`.
    - `flow`: the flow's fingerprint; empty for a real run.
    - `run`: which run, a checksum of its beginning; 0 if it was not written to checkpoints.
    - `data`: the fingerprint of data on the host (`eomdl.losses.OnHost`) in a run written to checkpoints, else empty.
    - `diagnostics`: `{name: Diagnostic}` measured along the path; of an ensemble with one column for each member.
    - `warmup`: how many real steps of the optimizer came before the flow began (`warmup=` of `eomdl.solve`).
    - `first_step`, `first_length`: the step at which a flow's tolerances were measured, and the length of the stride that the
        optimizer then takes according to the flow; None where the flow does not know the optimizer's own step.
    """

    gradient_evaluations: Any = 0
    num_steps: Any = 0
    num_accepted_steps: Any = 0
    num_rejected_steps: Any = 0
    rtol: Any = None
    atol: Any = None
    stride: int = dataclasses.field(metadata=STATIC, default=1)
    target: Target = dataclasses.field(metadata=STATIC, default=ITERATES)
    flow: str = dataclasses.field(metadata=STATIC, default="")
    run: Any = 0
    data: str = dataclasses.field(metadata=STATIC, default="")
    diagnostics: dict[str, Diagnostic] = dataclasses.field(default_factory=dict)
    warmup: int = dataclasses.field(metadata=STATIC, default=0)
    first_step: Any = None
    first_length: Any = None

    def with_counts(self, counts: Mapping[str, Any]) -> "Stats":
        """Return these stats with counts added, by the names of fields."""
        return dataclasses.replace(self, **{k: getattr(self, k) + v for k, v in counts.items()})

    def with_diagnostics(self, found: Mapping[str, Diagnostic]) -> "Stats":
        """Return these stats with the values of diagnostics appended."""
        if not found:
            return self
        longer = {}
        for name, new in found.items():
            value = np.atleast_1d(new.value)
            before = np.asarray(self.diagnostics[name].value) if name in self.diagnostics else value[:0]
            if before.ndim < value.ndim:
                # Of an ensemble in a file of before: the largest one stands for each member.
                before = np.broadcast_to(before[:, None], (len(before), *value.shape[1:]))
            longer[name] = dataclasses.replace(new, value=np.concatenate([before, value]))
        return dataclasses.replace(self, diagnostics=self.diagnostics | longer)

    def of_member(self, s: int) -> "Stats":
        """Return what holds for one member of an ensemble. What its run has cost by itself is not known.

        A diagnostic that was measured of several members at once is the largest of theirs, and its name says so.
        """
        found = {}
        for name, d in self.diagnostics.items():
            if np.ndim(d.value) == 2:
                found[name] = dataclasses.replace(d, value=np.asarray(d.value)[:, s])
            elif name != STOPPED_MEMBERS:
                found[f"{name} (the largest of the members measured)"] = d
        kept = {name: getattr(self, name) for name in ("rtol", "atol", "stride", "target", "warmup")}
        return Stats(gradient_evaluations=np.nan, diagnostics=found, **kept)


@record_type
class End:
    """Where a run is: what `resume=` takes, what a checkpoint holds.

    - `step`: the step number.
    - `state`: all that is carried on (parameters, optimizer state, both integrations of a flow), or None for
        the state that a new run has at `params`.
    - `params`: the parameters there.
    - `stats`: `Stats` so far.
    """

    step: Any
    state: State
    params: Params
    stats: Stats = dataclasses.field(default_factory=Stats)

    def without_state(self) -> "End":
        """The same step and parameters, to begin another optimizer at."""
        return dataclasses.replace(self, state=None)

    def with_diagnostics(self, found: Mapping[str, Diagnostic]) -> "End":
        """The same with diagnostics that were measured after the run."""
        stats = dataclasses.replace(self.stats, diagnostics=self.stats.diagnostics | dict(found))
        return dataclasses.replace(self, stats=stats)


def require_end(name: str, end: End) -> None:
    """Raise unless an end that was made by hand, or read from a file, is where a run can be.

    **Raises:** `ValueError` that names the field.
    """
    _check.integer(f"{name}.step", end.step, 0, 2**63 - 1)
    _check.floating(f"{name}.params", end.params)
    _check.kind(f"{name}.stats", end.stats, Stats, "the stats of a run")
    for field in dataclasses.fields(Stats):
        value, place = getattr(end.stats, field.name), f"{name}.stats.{field.name}"
        if field.name in _OTHER_STATS:
            _check.kind(place, value, _OTHER_STATS[field.name], f"a {_OTHER_STATS[field.name].__name__}")
        elif field.name == "stride":
            _check.integer(place, value, 1)
        elif value is not None or field.name not in _MAY_BE_NONE:
            # The cost of a flow is not always known.
            allowed = _is_cost if field.name == "gradient_evaluations" else _is_count
            _check.numbers(place, value, "a number >= 0", allowed, ndim=0)


def _is_count(x: np.ndarray) -> Any:
    return np.isfinite(x) & (x >= 0)


def _is_cost(x: np.ndarray) -> Any:
    return np.isnan(x) | _is_count(x)


_MAY_BE_NONE = ("rtol", "atol", "first_step", "first_length")
_OTHER_STATS: dict[str, type] = {"flow": str, "data": str, "diagnostics": dict, "target": Target}


def real_part(state: Any) -> Any:
    """The floating-point arrays of an optimizer's state, None in place of counters and keys."""
    return eqx.filter(state, eqx.is_inexact_array)


def is_finite(tree: Any) -> jax.Array:
    """Whether every floating-point leaf is finite."""
    leaves = jax.tree.leaves(real_part(tree))
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
