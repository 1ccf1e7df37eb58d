"""Nothing computed is lost: whatever is raised in a run carries its rows, and Ctrl-C returns them."""

import errno
import inspect
import shutil
import sys
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import VALLEY, assert_identical, valley_loss

import eomdl
from eomdl.runs.chunk import MAX_STEPS
from eomdl.runs.run import Run


ADAM = optax.adam(0.02)
MANY = 2500  # three stretches of a real run


def target_loss(params, args):
    return jnp.sum((params - args) ** 2)


TARGETS = jnp.sin(jnp.arange(float(MANY)))[:, None]


class Failure(Exception):
    pass


class Meter(diffrax.NoProgressMeter):
    """A meter that raises at one of its calls, and counts how often it was closed."""

    raises: str
    closed: list

    def __init__(self, raises):
        self.raises, self.closed = raises, []

    def step(self, state, progress):
        if self.raises == "step" and progress > 0.5:
            raise Failure("step")
        return state

    def close(self, state):
        self.closed.append(1)
        if self.raises == "close":
            raise Failure("close")


def descend(num_steps=MANY, **options):
    return eomdl.descend(target_loss, jnp.zeros(1), ADAM, num_steps, **options)


@pytest.fixture(scope="module")
def whole():
    return descend(batches=TARGETS)


def assert_part(part, whole, step):
    """Rows up to a step (whose own may be the first of the next stretch), and an end that goes with them."""
    assert int(part.end.step) == step
    assert part.steps[-1] in (step - 1, step)
    np.testing.assert_array_equal(part.params, np.asarray(whole.params)[: len(part.steps)])
    np.testing.assert_array_equal(part.final_params, whole.at(step))
    assert int(part.stats.gradient_evaluations) == step


def raised(error=Failure, **options):
    with pytest.raises(error) as caught:
        descend(**options)
    rows = len(caught.value.trajectory.steps)
    assert any(
        f"{rows} saved steps up to step" in note and "resume=" in note for note in caught.value.__notes__
    )
    return caught.value


# ------------------------------------------------------------ what may raise


def test_an_iterator_of_batches(whole):
    def broken():
        yield from TARGETS[:1500]
        raise Failure

    part = raised(batches=broken()).trajectory
    assert_part(part, whole, 1500)
    resumed = descend(batches=iter(TARGETS[1500:]), resume=part)
    np.testing.assert_array_equal(resumed.params, whole.params)


def test_an_iterator_of_batches_closes_the_meter():
    meter = Meter("never")
    raised(
        batches=(TARGETS[0] if k < 1500 else 1 / 0 for k in range(MANY)),
        progress=meter,
        error=ZeroDivisionError,
    )
    assert meter.closed == [1]


@pytest.mark.parametrize(("when", "step"), [("step", 2048), ("close", MANY)])
def test_a_progress_meter(whole, when, step):
    meter = Meter(when)
    assert_part(raised(batches=TARGETS, progress=meter).trajectory, whole, step)
    assert meter.closed == [1]


def test_an_observable():
    def check(x):
        if x > real.params[1600, 0]:
            raise Failure
        return np.asarray(x)

    def observable(params, args):
        return jax.pure_callback(check, jax.ShapeDtypeStruct((), float), params[0])

    slow = optax.sgd(1e-4)
    real = eomdl.descend(target_loss, jnp.zeros(1), slow, MANY, args=1.0)
    with pytest.raises(Exception, match="Failure") as caught:
        eomdl.descend(target_loss, jnp.zeros(1), slow, MANY, args=1.0, observe={"checked": observable})
    assert_part(caught.value.trajectory, real, 1024)


@pytest.mark.parametrize("kind", ["full", "deleted", "read-only"])
def test_a_disk(whole, tmp_path, kind, monkeypatch):
    store = eomdl.Checkpoints(tmp_path / "run", [0, 1200, 2000])
    real = np.savez

    def savez(file, **arrays):
        if "step-0000001200" in file.name:
            if kind == "full":
                file.write(b"half")
                raise OSError(errno.ENOSPC, "No space left on device")
            if kind == "read-only":
                raise PermissionError(errno.EROFS, "Read-only file system", file.name)
            shutil.rmtree(store.folder)
        return real(file, **arrays)

    monkeypatch.setattr(np, "savez", savez)
    error = raised(OSError, batches=TARGETS, checkpoints=store)
    assert "step-0000001200.npz" in str(error)
    assert_part(error.trajectory, whole, 2000)
    assert not list(tmp_path.rglob("*.part"))
    monkeypatch.undo()
    other = eomdl.Checkpoints(tmp_path / "other", [2000, MANY])
    resumed = descend(batches=TARGETS, resume=error.trajectory, checkpoints=other)
    np.testing.assert_array_equal(resumed.params, whole.params)


def test_a_failed_run_that_is_to_raise():
    with pytest.raises(RuntimeError, match="infinite or NaN") as caught:
        eomdl.descend(target_loss, jnp.zeros(1), optax.sgd(3.0), 800, args=1.0, throw=True)
    part = caught.value.trajectory
    assert part.result == eomdl.RESULTS.nonfinite
    assert len(part.steps) > 1


def test_a_flow_that_raises(tmp_path):
    meter = Meter("close")
    flow = eomdl.EquationOfMotion(valley_loss, 0.01, 1)
    whole = eomdl.solve(flow, VALLEY, 600)
    with pytest.raises(Failure) as caught:
        eomdl.solve(flow, VALLEY, 600, progress=meter)
    assert_identical(caught.value.trajectory.params, whole.params)


# -------------------------------------------------------------------- Ctrl-C


class Injected:
    """Raises KeyboardInterrupt at the n-th line of the run core, from `Run.run` on."""

    def __init__(self, n):
        self.n, self.seen, self.where = n, 0, None
        self.code = inspect.unwrap(Run.run).__code__  # conftest's import hook wraps every function

    def __call__(self, frame, event, arg):
        if self.where is not None or "eomdl/runs/" not in frame.f_code.co_filename:
            return None
        if event == "line" and self._inside(frame):
            self.seen += 1
            if self.seen == self.n:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self

    def _inside(self, frame):
        while frame is not None:
            if frame.f_code is self.code:
                return True
            frame = frame.f_back
        return False


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a file just being opened
def test_ctrl_c_at_every_line(tmp_path):
    """Rows, end, counts and parameters fit each other wherever the run is stopped; nothing finished is lost."""
    num_steps = 1500

    def run(name, injected=None):
        store = eomdl.Checkpoints(tmp_path / name, [1100])
        before = sys.gettrace()  # coverage has one
        sys.settrace(injected)
        try:
            return descend(num_steps, batches=TARGETS[:num_steps], checkpoints=store, save_steps=100)
        finally:
            sys.settrace(before)

    whole = run("whole")
    lines = Injected(0)
    run("count", lines)
    assert lines.seen > 150
    returned = 0
    for n in range(1, lines.seen + 1, 3):
        injected = Injected(n)
        try:
            part = run(f"{n}", injected)
        except KeyboardInterrupt as error:
            part = getattr(error, "trajectory", None)
            assert part is not None or "run.py" in injected.where, injected.where
            if part is None:  # the lines before the run has begun
                continue
            assert len(part.steps) == 1, injected.where
        else:
            returned += 1
            assert part.result == eomdl.RESULTS.interrupted, injected.where
        step = int(part.end.step)
        rows = len(part.steps)
        np.testing.assert_array_equal(part.steps, whole.steps[:rows], err_msg=injected.where)
        np.testing.assert_array_equal(part.params, np.asarray(whole.params)[:rows])
        assert part.steps[-1] <= step <= part.steps[-1] + 100, injected.where
        assert int(part.stats.gradient_evaluations) == step, injected.where
        if step in whole.steps:
            np.testing.assert_array_equal(part.final_params, whole.at(step))
        for path in (tmp_path / f"{n}").glob("step-*.npz"):
            eomdl.Trajectory.load(path)
    assert returned > 50


def test_a_source_that_raises_between_two_stretches():
    def batches():
        yield from TARGETS[:MAX_STEPS]
        raise Failure

    with pytest.raises(Failure) as caught:
        descend(MAX_STEPS + 8, batches=batches(), save_steps=MAX_STEPS // 2)
    part = caught.value.trajectory
    np.testing.assert_array_equal(part.steps, [0, MAX_STEPS // 2])
    assert int(part.end.step) == MAX_STEPS  # every step that had a batch is taken
    whole = descend(MAX_STEPS, batches=TARGETS[:MAX_STEPS], save_steps=MAX_STEPS // 2)
    assert_identical(part.params, whole.params[:2])
    assert_identical(part.final_params, whole.final_params)


def test_an_observable_that_raises_leaves_no_row_of_the_start():
    def fails(params, args):
        if not isinstance(params, jax.core.Tracer):
            raise Failure
        return jnp.stack([jnp.sum(params)] * 2)

    class Pressed(diffrax.NoProgressMeter):
        def init(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        descend(3, batches=TARGETS[:3], progress=Pressed(), observe={"two": fails})
    part = caught.value.trajectory
    assert len(part.steps) == 0
    assert part.observables["two"].shape == (0, 2)
    assert int(part.end.step) == 0


def test_ctrl_c_before_the_first_rows_is_raised_with_the_start():
    def batches():
        yield TARGETS[0]
        raise KeyboardInterrupt

    part = descend(2, batches=batches())
    assert part.result == eomdl.RESULTS.interrupted
    assert int(part.end.step) == 1

    class Pressed(diffrax.NoProgressMeter):
        def init(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        descend(3, batches=TARGETS[:3], progress=Pressed(), observe={"sum": lambda p, a: jnp.sum(p)})
    part = caught.value.trajectory
    assert list(part.steps) == [0]
    assert part.observables["sum"] == [0.0]
    whole = descend(3, batches=TARGETS[:3], observe={"sum": lambda p, a: jnp.sum(p)})
    resumed = descend(3, batches=TARGETS[:3], resume=part, observe={"sum": lambda p, a: jnp.sum(p)})
    np.testing.assert_array_equal(resumed.params, whole.params)
