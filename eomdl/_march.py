"""The loop that `descend` and `solve` share.

A run is cut into chunks of saved steps. One compiled program advances a chunk; between
chunks the host moves the rows out of device memory (which stays flat in the number of
steps), shows progress, and can stop: at a non-finite state, at the end of the batches, or
at Ctrl-C. Inside `jit`, `vmap` or `grad` the whole run is one chunk.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eomdl import _check, _tree
from eomdl._batches import Batches, OnBatch, batch_at
from eomdl._types import Args, Observable, Params, State
from eomdl.checkpoints import CHECKPOINT, Checkpoints, saved_steps
from eomdl.trajectory import RESULTS, Trajectory, result_where


_MAX_ROWS = 256  # saved steps a chunk ...
_MAX_STEPS = 1024  # ... steps a chunk ...
_MAX_SCALARS = 2**24  # ... and parameters a chunk, so that its rows fit in memory


class Chunk(NamedTuple):
    """What advancing over one chunk gives: R rows recorded *before* each of R gaps."""

    state: State
    params: Params  # leaves with leading axis R
    ode_error: jax.Array | None  # (R,)
    result: Any  # an item of RESULTS
    observables: dict[str, jax.Array]  # of the whole state, (R, ...)
    counts: dict[str, jax.Array]  # summed over chunks
    diagnostics: dict[str, jax.Array]  # one value a chunk


Advance = Callable[[State, jax.Array, jax.Array, Any, jax.Array, bool], Chunk]


def scan_rows(
    step: Callable[[jax.Array, Any], Any],
    state: Any,
    read: Callable[[jax.Array, Any], Any],
    start: Any,
    gaps: jax.Array,
    every: bool,
) -> tuple[Any, Any]:
    """For every gap: record `read(k, state)`, then apply `step(k, state)` gap times.

    With `every` the gaps are 0 or 1, and the loop is one that `jax.grad` can reverse.
    """

    def row(carry: tuple, gap: jax.Array) -> tuple:
        k, state = carry
        if every:
            new = jax.lax.cond(gap > 0, step, lambda k, state: state, k, state)
        else:
            new = jax.lax.fori_loop(k, k + gap, step, state)
        return (k + gap, new), read(k, state)

    first = (jnp.asarray(start, gaps.dtype), state)
    records: Any
    (_, state), records = jax.lax.scan(row, first, gaps)
    return state, records


@eqx.filter_jit
def _record(
    observe: dict[str, Observable], params: Params, args: Args, batches: Any, index: jax.Array
) -> tuple[dict, jax.Array]:
    """Observables of every row, and whether its parameters are finite."""

    def row(at: tuple[Params, jax.Array]) -> tuple[dict, jax.Array]:
        params, i = at
        finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]
        values = {
            name: f(params, batch_at(batches, i, args) if isinstance(f, OnBatch) else args)
            for name, f in observe.items()
        }
        return values, jnp.all(jnp.stack(finite))

    return jax.lax.map(row, (params, index))


def march(
    advance: Advance,
    state: State,
    num_steps: int,
    *,
    params: Params,
    step_size: Any,
    save_steps: int | Sequence[int],
    observe: dict[str, Observable],
    args: Args,
    source: Batches,
    save_params: bool,
    progress: bool | diffrax.AbstractProgressMeter,
    resume: Trajectory | None,
    checkpoints: Checkpoints | None,
    throw: bool,
    state_observables: Iterable[str] = (),
    stats: Callable[[], dict[str, Any]] = dict,
) -> Trajectory:
    """Run `advance` from `state` to `num_steps` and collect the saved steps.

    `state_observables` are the names of what `advance` records itself; `stats` gives what else is to
    be kept with the run, asked for when it is kept.
    """
    saved = saved_steps("save_steps", num_steps, save_steps)
    start = 0
    counts: dict[str, Any] = {}
    if resume is not None:
        start, state = _resumed(resume, state, num_steps)
        if CHECKPOINT in resume.stats:
            # Its row is recorded again, with the observables of this run.
            counts, resume = dict(resume.stats), None
        else:
            resume = _up_to(resume, start)
            _check_joinable(resume, save_params, {*observe, *state_observables})
            saved = saved[saved > max(resume.steps, default=-1)]
    saved = saved[saved >= start]
    traced = _tree.is_traced(state, step_size, args, source.example)
    kept = np.array([], int)
    if checkpoints is not None:
        if not isinstance(checkpoints, Checkpoints):
            raise ValueError(f"checkpoints: expected an eomdl.Checkpoints, got {checkpoints!r}")
        if traced:
            raise ValueError("checkpoints: expected a run outside jit, vmap and grad, got traced values")
        shapes = {name: jax.eval_shape(f, params, source.seen_by(f)).shape for name, f in observe.items()}
        kept = checkpoints.begin(num_steps, start, state, shapes)
    # Rows between saved ones bound the work between two looks at the clock; they are dropped.
    rows = saved if traced else np.union1d(saved, np.arange(start, num_steps, _MAX_STEPS))
    rows = np.union1d(np.union1d(rows, kept), [start, num_steps])
    per_chunk = len(rows) if traced else _rows_a_chunk(rows, _tree.size(params))
    chunks = _chunks(rows, kept, per_chunk)
    gaps = [np.diff(np.append(c, n[0] if n is not None else c[-1])) for c, n in _with_next(chunks)]
    longest = max(int(gap.sum()) for gap in gaps)
    every = bool(np.all(np.concatenate(gaps) <= 1))

    meter = _meter(False if traced else progress)
    bar = meter.init()
    records: list[dict[str, Any]] = []
    diagnostics: list[dict[str, Any]] = []
    result: Any = RESULTS.successful
    step = start
    end: Params = None  # the parameters of `state`, where a row holds them
    read = None  # ... and how to get them where none does
    try:
        for chunk, gap in zip(chunks, gaps, strict=True):
            stack, offset, available = source.take(step, int(gap.sum()), longest)
            if available < gap.sum():
                gap = np.minimum(gap, np.maximum(available - np.cumsum(gap) + gap, 0))
                result = RESULTS.batches_exhausted

            def run(gap, state=state, step=step, stack=stack, offset=offset):
                padded = np.pad(gap, (0, per_chunk - len(gap)))
                # Arrays, since a Python number would be a constant of the program: one compilation a chunk.
                return advance(
                    state, jnp.asarray(step), jnp.asarray(padded), stack, jnp.asarray(offset), every
                )

            out = run(gap)
            # Observables may be dear: not for the rows of the padding.
            params_rows = jax.tree.map(lambda leaf, chunk=chunk: leaf[: len(chunk)], out.params)
            # Where no step follows, the last batch stands for the next.
            index = np.clip(chunk - offset, 0, max(source.length(available) - 1, 0))
            observed, finite = _record(observe, params_rows, args, stack, jnp.asarray(index))
            observed |= jax.tree.map(lambda leaf, chunk=chunk: leaf[: len(chunk)], out.observables)
            record = {"step": chunk, "observables": observed, "ode_error": out.ode_error}
            if save_params or checkpoints is not None:
                record["params"] = params_rows
            if _tree.is_traced(out.params, finite, observed):
                keep = np.isin(chunk, saved)
                end = jax.tree.map(lambda leaf: leaf[-1], params_rows)
                records.append(_rows(record, np.flatnonzero(keep)))
                failed = result_where(jnp.all(finite), RESULTS.successful, RESULTS.nonfinite)
                result = result_where(out.result == RESULTS.successful, failed, out.result)
                counts = {k: counts.get(k, 0) + v for k, v in out.counts.items()}
                state, step = out.state, step + int(gap.sum())
                continue
            reached = chunk <= step + gap.sum()
            good = np.cumprod(np.asarray(finite) & reached).astype(bool)
            record = jax.device_get(record)
            ended = bool(out.result != RESULTS.successful)
            broken = ended or not np.all(good | ~reached) or not _finite(out.state)
            before = {name: counts.get(name, 0) for name in out.counts}
            if checkpoints is not None:
                known = {step + int(gap.sum()): (out.state, _sum(before, out.counts)), step: (state, before)}
                for i, events in checkpoints.due(record["step"], record["observables"], good):
                    at = int(chunk[i])
                    if at not in known:
                        part = run(np.clip(at - chunk, 0, gap))
                        known[at] = (part.state, _sum(before, part.counts))
                    row = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], record)
                    there, so_far = known[at]
                    kept_row = _trajectory(row, step_size, so_far | stats(), there, at, RESULTS.successful)
                    checkpoints.write(kept_row, events)
            if not save_params:
                record.pop("params", None)
            records.append(_rows(record, np.flatnonzero(good & np.isin(chunk, saved))))
            if broken:
                result = out.result if ended else RESULTS.nonfinite
                # Back to the last good row, so that `final` is what the rows end with.
                last = max(int(good.sum()) - 1, 0)
                part = run(np.clip(int(chunk[last]) - chunk, 0, gap)) if chunk[last] > step else None
                if part is not None and _finite(part.state):
                    state, step, counts = part.state, int(chunk[last]), _sum(before, part.counts)
                else:
                    last, counts = 0, before
                end = jax.tree.map(lambda leaf, i=last: leaf[i], params_rows)
                break
            counts = _sum(before, out.counts)
            diagnostics.append(jax.device_get(out.diagnostics))
            state, step = out.state, step + int(gap.sum())
            end, read = None, run
            if chunk[-1] == step:
                end = jax.tree.map(lambda leaf: leaf[-1], params_rows)
            bar = meter.step(bar, jnp.asarray((step - start) / max(num_steps - start, 1)))
            if bool(result != RESULTS.successful):
                break
    except KeyboardInterrupt:
        if not records:
            raise
        result = RESULTS.interrupted
    meter.close(bar)
    if end is None and read is not None:
        end = jax.tree.map(lambda leaf: leaf[0], read(np.zeros(1, int), state, step).params)

    table = _concatenate(records)
    measured = _concatenate([jax.tree.map(np.atleast_1d, d) for d in diagnostics])
    trajectory = _trajectory(table, step_size, counts | measured | stats(), state, step, result, end)
    if resume is not None:
        trajectory = _joined(resume, trajectory, set(counts))
    if throw and not _tree.is_traced(result._value) and trajectory.message:
        raise RuntimeError(trajectory.message)
    return trajectory


def _trajectory(
    table: dict[str, Any],
    step_size: Any,
    stats: dict[str, Any],
    state: State,
    step: int,
    result: Any,
    end: Params = None,
) -> Trajectory:
    params = table.get("params")
    return Trajectory(
        steps=table["step"],
        times=_times(table["step"], step_size),
        params=params,
        observables=table["observables"],
        ode_error=table["ode_error"],
        result=result,
        stats=stats,
        final=state,
        final_step=step,
        final_params=jax.tree.map(lambda leaf: leaf[-1], params) if end is None else end,
    )


def _chunks(rows: np.ndarray, cuts: np.ndarray, per_chunk: int) -> list[np.ndarray]:
    """Rows in groups of at most `per_chunk`, a new one at every cut: there the state is at hand."""
    groups = np.split(rows, np.searchsorted(rows, cuts[cuts > rows[0]]))
    return [group[i : i + per_chunk] for group in groups for i in range(0, len(group), per_chunk)]


def _sum(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    return {k: v + np.asarray(b[k]) for k, v in a.items()}


def _times(steps: np.ndarray, step_size: Any) -> Any:
    return steps * (step_size if _tree.is_traced(step_size) else np.asarray(step_size))


def _rows_a_chunk(rows: np.ndarray, num_scalars: int) -> int:
    """A power of two, so that runs of other lengths find their program compiled."""
    most = min(
        _MAX_ROWS, _MAX_SCALARS // num_scalars, int(_MAX_STEPS // max(np.diff(rows).max(initial=1), 1))
    )
    enough = 1 << (len(rows) - 1).bit_length()
    return min(enough, 1 << (max(most, 1).bit_length() - 1))


def _with_next(items: list) -> Iterable[tuple[Any, Any]]:
    return zip(items, [*items[1:], None], strict=True)


def _meter(progress: bool | diffrax.AbstractProgressMeter) -> diffrax.AbstractProgressMeter:
    if isinstance(progress, diffrax.AbstractProgressMeter):
        return progress
    return diffrax.TqdmProgressMeter(refresh_steps=1) if progress else diffrax.NoProgressMeter()


def _finite(tree: Any) -> bool:
    return all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in _tree.real_leaves(tree))


def _rows(record: dict[str, Any], index: np.ndarray) -> dict[str, Any]:
    step = record.pop("step")
    return jax.tree.map(lambda leaf: leaf[index], record) | {"step": step[index]}


def _concatenate(records: list[dict[str, Any]]) -> Any:
    if not records:
        return {}
    xp = jnp if _tree.is_traced(records) else np
    return jax.tree.map(lambda *leaves: xp.concatenate(leaves), *records)


def starting_params(params: Params, resume: Trajectory | None) -> Params:
    """Where the state begins: at `params`, or at those of a run that keeps no state."""
    if resume is None or resume.final is not None:
        return params
    _check.same_structure("resume.final_params", resume.final_params, "params", params)
    return jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), resume.final_params, params)


def _resumed(resume: Trajectory, state: State, num_steps: int) -> tuple[int, State]:
    """The step and the state to go on from; `state` shows the structure to restore."""
    start = int(resume.final_step)
    if start > num_steps:
        raise ValueError(f"resume: expected a run of at most num_steps = {num_steps} steps, got {start}")
    if resume.final is None:
        return start, state
    leaves, structure = jax.tree.flatten(state)
    old = jax.tree.leaves(resume.final)
    if [np.shape(x) for x in old] != [np.shape(x) for x in leaves]:
        raise ValueError(
            "resume: expected a run of the same params and optimizer or flow, with a state of shapes "
            f"{[np.shape(x) for x in leaves]}, got {[np.shape(x) for x in old]}; another optimizer begins anew "
            "with `resume.without_state()`"
        )
    old = [jnp.asarray(x, y.dtype) for x, y in zip(old, leaves, strict=True)]
    return start, jax.tree.unflatten(structure, old)


def _up_to(run: Trajectory, step: int) -> Trajectory:
    """Without the rows after a step: those of a run that failed behind the state it keeps."""
    keep = np.asarray(run.steps) <= step
    if keep.all():
        return run
    rows = (run.steps, run.times, run.params, run.observables, run.ode_error)
    steps, times, params, observables, error = jax.tree.map(lambda leaf: np.asarray(leaf)[keep], rows)
    return dataclasses.replace(
        run, steps=steps, times=times, params=params, observables=observables, ode_error=error
    )


def _check_joinable(run: Trajectory, save_params: bool, observed: set[str]) -> None:
    if (run.params is not None) != save_params or set(run.observables) != observed:
        raise ValueError(
            "resume: expected a run with the same save_params and observe, got "
            f"save_params={run.params is not None}, observe={sorted(run.observables)}"
        )


def _joined(first: Trajectory, second: Trajectory, counted: set[str]) -> Trajectory:
    """One trajectory from a run and its continuation; of the numbers in `stats` those counted add up."""

    def join(a: Any, b: Any) -> Any:
        return jax.tree.map(lambda x, y: np.concatenate([x, y]), a, b)

    stats = dict(second.stats)
    for k in set(stats) & set(first.stats):
        if np.ndim(stats[k]):
            stats[k] = join(first.stats[k], stats[k])
        elif k in counted:
            stats[k] = first.stats[k] + stats[k]
    error = second.ode_error
    if error is not None:
        unknown = np.full(len(first.steps), np.nan)
        error = join(unknown if first.ode_error is None else first.ode_error, error)
    return Trajectory(
        steps=join(first.steps, second.steps),
        times=join(first.times, second.times),
        params=join(first.params, second.params),
        observables=join(first.observables, second.observables),
        ode_error=error,
        result=second.result,
        stats=stats,
        final=second.final,
        final_step=second.final_step,
        final_params=second.final_params,
    )
