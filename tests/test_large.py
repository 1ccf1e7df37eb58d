"""Large states: row by row, with few looks, from rows on disk. The limits are lowered, so that the problems stay small."""

import shutil
import tracemalloc
import warnings

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import NET_ARGS, VALLEY, assert_identical, net_loss, net_params, valley_loss

import eomdl


@pytest.mark.parametrize("stride", [1, 2])
def test_a_state_too_large_for_rows_in_memory_is_carried_row_by_row(monkeypatch, stride):
    flow = eomdl.InterpolatingFlow(
        eomdl.optimizer_step(valley_loss, optax.sgd(0.1)), 0.1, points=3, stride=stride
    )
    options = {"save_steps": 4, "rtol": 1e-9, "atol": 1e-11}
    whole = eomdl.solve(flow, VALLEY, 13, **options)
    monkeypatch.setattr("eomdl.runs.chunk.MAX_SCALARS", 1)
    monkeypatch.setattr("eomdl.runs.continuous.MAX_FLAT_SIZE", 0)
    single = eomdl.solve(flow, VALLEY, 13, **options)
    np.testing.assert_array_equal(single.steps, whole.steps)
    for a, b in zip(jax.tree.leaves(single.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7)


def test_a_look_at_the_diagnostics_is_not_taken_at_every_row_of_a_large_state(monkeypatch):
    monkeypatch.setattr("eomdl.runs.chunk.MAX_SCALARS", 1)
    flow = eomdl.EquationOfMotion(valley_loss, 0.05, order=1)
    path = eomdl.solve(flow, VALLEY, 80, save_steps=10, rtol=1e-6, atol=1e-8)
    looks = path.stats.diagnostics["eta*lambda_max"].value
    assert len(looks) == 3  # at the start, past step 64, and at the end
    path = eomdl.solve(flow, VALLEY, 3, rtol=1e-6, atol=1e-8)
    assert len(path.stats.diagnostics["eta*lambda_max"].value) == 2


def test_tolerances_are_measured_in_one_ode_step(monkeypatch):
    from eomdl.runs import integrator

    counts = []

    def spy(*arguments):
        out = integrate(*arguments)
        counts.append(int(out.counts["num_steps"]))
        return out

    integrate = integrator.integrate_at_once
    monkeypatch.setattr(integrator, "integrate_at_once", spy)
    flow = eomdl.EquationOfMotion(valley_loss, 0.1, order=1)
    eomdl.solve(flow, VALLEY, 20, estimate_error=False, save_steps=[20])
    assert counts[0] == 1
    assert len(counts) == 2


class Compiled(Exception):
    """Raised with a program's memory analysis in the place of running it."""


@pytest.mark.parametrize(("solver", "most"), [(diffrax.Bosh3(), 11.5), (diffrax.Heun(), 7.5)])
def test_the_state_of_solve_is_a_few_copies_of_the_parameters(monkeypatch, solver, most):
    """Of the program that carries a large state: arguments, results and temporaries."""
    from eomdl.runs import continuous, integrator

    def compiled(*arguments):
        raise Compiled(integrate.lower(*arguments).compile().compiled.memory_analysis())

    integrate = integrator.integrate_at_once
    monkeypatch.setattr(integrator, "integrate_at_once", compiled)
    monkeypatch.setattr(continuous, "MAX_FLAT_SIZE", 0)
    monkeypatch.setattr("eomdl.runs.chunk.MAX_SCALARS", 1)
    params = {name: jnp.zeros((256, 256)) for name in ("first", "second", "third")}
    data = jnp.zeros((2, 256)), jnp.zeros((2, 256))
    flow = eomdl.EquationOfMotion(three_layers, 0.1, order=1)
    options = {"rtol": 1e-6, "atol": 1e-8, "estimate_error": False, "solver": solver}
    with pytest.raises(Compiled) as raised:
        eomdl.solve(flow, params, 4, args=data, save_steps=[4], **options)
    (memory,) = raised.value.args
    parts = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    assert parts / sum(x.nbytes for x in params.values()) <= most


def three_layers(params, args):
    x, y = args
    hidden = jnp.tanh(jnp.tanh(x @ params["first"]) @ params["second"])
    return jnp.mean((hidden @ params["third"] - y) ** 2)


# ------------------------------------------------------------------ rows on disk

SGD = optax.sgd(0.1)


def descended(num_steps, **options):
    return eomdl.descend(valley_loss, VALLEY, SGD, num_steps, step_size=0.1, **options)


def test_rows_on_disk_are_those_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("eomdl.runs.chunk.MAX_SCALARS", 4 * 2)  # several stretches
    whole = descended(20)
    stored = descended(20, save_params=eomdl.runs.RowsOnDisk(tmp_path / "a"))
    assert all(isinstance(leaf, np.memmap) for leaf in jax.tree.leaves(stored.params))
    assert_identical(stored.params, whole.params)
    assert_identical(stored.rows(slice(3, 9)).params, whole.rows(slice(3, 9)).params)
    stored.save(tmp_path / "run.npz")
    assert_identical(eomdl.Trajectory.load(tmp_path / "run.npz").params, whole.params)


@pytest.mark.parametrize("on_disk", [False, True])
def test_stretches_without_a_saved_row(tmp_path, monkeypatch, on_disk):
    monkeypatch.setattr("eomdl.runs.chunk.MAX_SCALARS", 1)
    monkeypatch.setattr("eomdl.runs.chunk.MAX_STEPS", 3)
    kept = eomdl.runs.RowsOnDisk(tmp_path) if on_disk else True
    run = descended(20, save_steps=[7, 20], save_params=kept)
    np.testing.assert_array_equal(run.steps, [7, 20])
    assert_identical(run.params, descended(20).rows([7, 20]).params)
    assert run.end.step == 20


def test_a_resumed_run_takes_its_rows_along(tmp_path):
    whole = descended(20)
    first = descended(8, save_params=eomdl.runs.RowsOnDisk(tmp_path / "a"))
    for name, start in (("b", first), ("c", descended(8))):
        second = descended(20, resume=start, save_params=eomdl.runs.RowsOnDisk(tmp_path / name))
        assert_identical(second.params, whole.params)
        np.testing.assert_array_equal(second.steps, whole.steps)
    assert_identical(descended(20, resume=first).params, whole.params)


def test_what_a_run_has_written_when_it_is_stopped_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr("eomdl.runs.chunk.MAX_SCALARS", 4 * 2)
    batches = (jnp.zeros(()) for _ in range(9))
    store = eomdl.runs.RowsOnDisk(tmp_path)
    stopped = eomdl.descend(valley_loss, VALLEY, SGD, 20, batches=batches, save_params=store)
    assert len(stopped.steps) == 10
    assert_identical(stopped.params, descended(9).params)


def test_a_folder_with_rows_is_refused(tmp_path):
    store = eomdl.runs.RowsOnDisk(tmp_path)
    run = descended(3, save_params=store)
    with pytest.raises(ValueError, match="save_params: expected a folder without rows"):
        descended(3, save_params=store)
    assert_identical(run.params, descended(3).params)
    with pytest.raises(ValueError, match="save_params: expected a run outside jit"):
        jax.jit(lambda p: eomdl.descend(valley_loss, p, SGD, 3, save_params=store).final_params)(VALLEY)


class Stop(Exception):
    """What a user's own code raises."""


def fill_the_disk(folder):
    (folder / "leaf0.npy").unlink()
    (folder / "leaf0.npy").symlink_to("/dev/full")


@pytest.mark.parametrize("raised", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("fault", [shutil.rmtree, fill_the_disk])
def test_a_fault_of_the_disk_takes_neither_the_error_nor_the_rows(tmp_path, monkeypatch, fault, raised):
    monkeypatch.setattr("eomdl.runs.chunk.MAX_SCALARS", 4 * 2)
    folder = tmp_path / "rows"
    store = eomdl.runs.RowsOnDisk(folder)

    def batches(last):
        yield from [jnp.zeros(())] * 9
        fault(folder)
        yield from [jnp.zeros(())] * last
        raise raised

    def run(last):
        options = dict(batches=batches(last), save_params=store, observe={"loss": valley_loss})
        return eomdl.descend(valley_loss, VALLEY, SGD, 30, args=jnp.zeros(()), **options)

    # The user's own error, or Ctrl-C, before another row is written; then the error of the disk, which names the file.
    kept = []
    try:
        kept.append(run(0))
    except Stop as error:
        kept.append(error.trajectory)
    shutil.rmtree(folder, ignore_errors=True)
    with pytest.raises(OSError, match=r"(leaf0|steps)\.npy") as caught:
        run(20)
    assert caught.value.filename.startswith(str(folder))
    kept.append(caught.value.trajectory)
    for found in kept:
        assert len(found.steps) >= 8
        assert_identical(found.params, descended(30).rows(slice(len(found.steps))).params)
        assert len(found.observables["loss"]) == len(found.steps)


def test_a_folder_of_checkpoints_that_is_gone_does_not_take_the_user_s_error(tmp_path):
    store = eomdl.Checkpoints(tmp_path / "store", 5)

    def batches():
        yield from [jnp.zeros(())] * 8
        shutil.rmtree(store.folder)
        raise Stop

    with pytest.raises(Stop) as caught:
        eomdl.descend(valley_loss, VALLEY, SGD, 20, batches=batches(), checkpoints=store)
    assert_identical(caught.value.trajectory.params, descended(8).params)
    assert isinstance(caught.value.__context__, FileNotFoundError)


def test_the_same_line_continues_after_a_crash(tmp_path, monkeypatch):
    monkeypatch.setattr("eomdl.runs.chunk.MAX_SCALARS", 4 * 2)
    checkpoints = eomdl.Checkpoints(tmp_path / "checkpoints", 5)
    rows = tmp_path / "rows"

    def line(fails_at=None):
        def batches():
            start = 0 if checkpoints.latest is None else checkpoints.latest.step
            for k in range(start, 20):
                if k == fails_at:
                    raise Stop
                yield jnp.zeros(())

        resume, disk = checkpoints.latest, eomdl.runs.RowsOnDisk(rows)
        options = dict(batches=batches(), resume=resume, checkpoints=checkpoints, save_params=disk)
        return eomdl.descend(valley_loss, VALLEY, SGD, 20, args=jnp.zeros(()), **options)

    whole = descended(20)
    for fails_at in (12, 13):
        with pytest.raises(Stop):
            line(fails_at)
    last = line()
    assert_identical(last.params, whole.rows(slice(int(last.steps[0]), None)).params)
    # Any program reads what is whole, and of which steps it is.
    folders = [rows, *sorted(rows.glob("from-*"), key=lambda path: path.stat().st_mtime_ns)]
    assert [folder.name for folder in folders] == ["rows", "from-10", "from-10-2"]
    for folder in folders:
        steps, x = np.load(folder / "steps.npy"), np.load(folder / "leaf0.npy")
        assert len(steps) > 1
        np.testing.assert_array_equal(x, whole.params["x"][steps])
    with pytest.raises(
        ValueError, match=r"rows with 1[0-9] whole rows, the last one of step 1[0-9]; give each"
    ):
        descended(20, save_params=eomdl.runs.RowsOnDisk(rows))


def test_rows_of_short_floats_and_of_no_step(tmp_path):
    params = {"w": jnp.ones(3, jnp.bfloat16), "b": jnp.zeros(())}

    def loss(params, args):
        return jnp.sum((params["w"].astype(float) - 0.5) ** 2) + params["b"] ** 2

    run = eomdl.descend(loss, params, SGD, 3, save_params=eomdl.runs.RowsOnDisk(tmp_path / "a"))
    assert run.params["w"].dtype == jnp.bfloat16
    assert_identical(run.params, eomdl.descend(loss, params, SGD, 3).params)


def quadratic(params, args):
    return 0.5 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def test_compare_holds_a_few_rows_in_memory(tmp_path, monkeypatch):
    """Two runs of 40 rows of 0.5 MiB; compared with blocks of 4 rows."""
    params = {"a": jnp.linspace(0, 1, 2**15), "b": jnp.linspace(1, 2, 2**15)}
    runs = {
        name: eomdl.descend(
            quadratic, params, optax.sgd(rate), 39, save_params=eomdl.runs.RowsOnDisk(tmp_path / name)
        )
        for name, rate in (("real", 0.1), ("model", 0.11))
    }
    monkeypatch.setattr("eomdl.runs.rows_on_disk._BLOCK", 2**17)
    tracemalloc.start()
    found = eomdl.compare(runs["real"], {"model": runs["model"]})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20
    factors = np.abs(0.89 ** np.arange(40) - 0.9 ** np.arange(40))
    length = {name: float(jnp.linalg.norm(leaf)) for name, leaf in params.items()}
    np.testing.assert_allclose(
        found.distance["model"], np.hypot(*length.values()) * factors, rtol=1e-10, atol=1e-13
    )
    np.testing.assert_allclose(
        found.block_distance["model"]["b"], length["b"] * factors, rtol=1e-10, atol=1e-13
    )
    np.testing.assert_allclose(
        found.travelled, np.hypot(*length.values()) * (1 - 0.9 ** np.arange(40)), rtol=1e-10
    )


# ------------------------------------------------------------------ float32


@pytest.mark.parametrize(("rate", "is_coarse"), [(0.02, True), (0.5, False)])
def test_float32_says_so_where_it_cannot_carry_order_two(rate, is_coarse):
    """Against the one-step error of the same flow in float64."""
    params = net_params(0)
    exact = {"rtol": 1e-13, "atol": 1e-15, "estimate_error": False, "diagnose": False, "args": NET_ARGS}
    path = eomdl.solve(eomdl.EquationOfMotion(net_loss, rate, 2), params, 1, **exact)
    real = eomdl.descend(net_loss, params, optax.sgd(rate), 1, args=NET_ARGS)
    error = eomdl.compare(real, {"flow": path}).distance["flow"][-1]
    size = np.sqrt(sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(params)))
    noise = float(np.finfo(np.float32).eps) * size
    assert (error < noise) == is_coarse
    short, data = jax.tree.map(lambda x: x.astype(jnp.float32), (params, NET_ARGS))
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        eomdl.solve(eomdl.EquationOfMotion(net_loss, rate, 2), short, 1, args=data, diagnose=False)
    assert any("cannot carry this order" in str(w.message) for w in raised) == is_coarse
