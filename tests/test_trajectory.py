"""A trajectory on disk: no pickle, no half files, and every kind of pytree."""

import zipfile

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import VALLEY, assert_close, assert_identical, valley_loss

import eomdl
from eomdl.runs.tolerances import DERIVATIVE_TEST


SGD = optax.sgd(0.1)


class Model(eqx.Module):
    weight: jax.Array
    bias: jax.Array


def sum_of_squares(params, args):
    return 0.5 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


PYTREES = {
    "array": jnp.ones((2, 3)),
    "dict": {"w": jnp.ones((2, 3)), "b": jnp.array(0.5)},
    "list": [jnp.ones(2), jnp.zeros(1)],
    "tuple": (jnp.ones(2), jnp.zeros(1)),
    "nested": {"a": [(jnp.ones(1), {"c": jnp.ones(2)}), jnp.array(2.0)], "b": (jnp.ones((1, 1)),)},
    "dict with integer keys": {0: jnp.ones(2), 3: jnp.ones(1)},
}


@pytest.mark.parametrize("name", PYTREES)
def test_params_come_back_as_they_were(name, tmp_path):
    run = eomdl.descend(sum_of_squares, PYTREES[name], SGD, 3, step_size=0.1)
    run.save(tmp_path / "run.npz")
    loaded = eomdl.Trajectory.load(tmp_path / "run.npz")
    assert_identical(loaded.params, run.params)
    assert jax.tree.structure(loaded.params) == jax.tree.structure(PYTREES[name])
    assert_identical(eomdl.Trajectory.load(tmp_path / "run.npz", like=PYTREES[name]).params, run.params)


def test_module_comes_back_with_like_and_by_name_without(tmp_path):
    model = Model(jnp.ones((2, 2)), jnp.zeros(2))
    run = eomdl.descend(sum_of_squares, model, SGD, 3)
    run.save(tmp_path / "run.npz")
    loaded = eomdl.Trajectory.load(tmp_path / "run.npz", like=model)
    assert isinstance(loaded.params, Model)
    assert_identical(loaded.params, run.params)
    by_name = eomdl.Trajectory.load(tmp_path / "run.npz").params
    np.testing.assert_array_equal(by_name["bias"], run.params.bias)
    np.testing.assert_array_equal(by_name["weight"], run.params.weight)


def test_everything_else_comes_back_too(tmp_path):
    observe = {"x": lambda p, args: p["x"], "both": lambda p, args: jnp.stack([p["x"], p["y"]])}
    run = eomdl.solve(eomdl.EquationOfMotion(valley_loss, 0.1), VALLEY, 5, observe=observe)
    run.save(tmp_path / "run.npz")
    loaded = eomdl.Trajectory.load(tmp_path / "run.npz")
    assert_identical(loaded.observables, run.observables)
    assert_identical((loaded.steps, loaded.times, loaded.ode_error), (run.steps, run.times, run.ode_error))
    assert_identical(loaded.stats, run.stats)
    assert loaded.stats.diagnostics.keys() == {"eta*lambda_max", DERIVATIVE_TEST}
    assert_identical(loaded.end.state, run.end.state)
    assert loaded.end.step == run.end.step
    assert loaded.result == run.result
    assert loaded.message == run.message == ""


def test_a_failed_run_says_so_after_loading(tmp_path):
    run = eomdl.solve(eomdl.GradientFlow(valley_loss, 0.5), VALLEY, 100, rtol=1e-10, atol=1e-10, max_steps=30)
    run.save(tmp_path / "run.npz")
    loaded = eomdl.Trajectory.load(tmp_path / "run.npz")
    assert loaded.result == eomdl.RESULTS.max_steps_reached
    assert loaded.message == run.message != ""


def test_observables_alone(tmp_path):
    run = eomdl.descend(valley_loss, VALLEY, SGD, 3, observe={"loss": valley_loss}, save_params=False)
    run.save(tmp_path / "run.npz")
    loaded = eomdl.Trajectory.load(tmp_path / "run.npz")
    assert loaded.params is None
    assert loaded.ode_error is None
    assert_identical(loaded.observables, run.observables)


def test_like_is_for_the_final_parameters_where_no_others_were_saved(tmp_path):
    model = Model(jnp.ones((2, 2)), jnp.zeros(2))
    run = eomdl.descend(sum_of_squares, model, SGD, 3, save_params=False)
    run.save(tmp_path / "run.npz")
    loaded = eomdl.Trajectory.load(tmp_path / "run.npz", like=model)
    assert loaded.params is None
    assert isinstance(loaded.final_params, Model)
    assert_identical(loaded.final_params, run.final_params)


def test_a_traced_run_says_its_columns():
    def columns(rate):
        run = eomdl.solve(eomdl.GradientFlow(valley_loss, rate), VALLEY, 2, observe={"loss": valley_loss})
        assert repr(run) == "Trajectory(params, loss)"
        return run.steps

    np.testing.assert_array_equal(jax.jit(columns)(0.1), [0, 1, 2])


def test_file_holds_no_pickle_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "run"  # the name is kept as it is
    eomdl.descend(valley_loss, VALLEY, SGD, 3).save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    with np.load(path, allow_pickle=False) as file:
        assert all(file[name].dtype != object for name in file.files)
    eomdl.descend(valley_loss, VALLEY, SGD, 7).save(str(path))  # replaces it
    assert len(eomdl.Trajectory.load(str(path)).steps) == 8


def test_truncated_file(tmp_path):
    whole = tmp_path / "run.npz"
    eomdl.descend(valley_loss, VALLEY, SGD, 3).save(whole)
    data = whole.read_bytes()
    for size in (0, 10, len(data) // 2, len(data) - 1):
        short = tmp_path / "short.npz"
        short.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"path: expected a whole file .*got .*short\.npz"):
            eomdl.Trajectory.load(short)


def test_other_files(tmp_path):
    path = tmp_path / "other.npz"
    np.savez(path, a=np.ones(3))
    with pytest.raises(ValueError, match=r"path: expected .*eomdl\.Trajectory.*got .*other\.npz"):
        eomdl.Trajectory.load(path)
    np.save(tmp_path / "array.npy", np.ones(3))
    with pytest.raises(ValueError, match=r"path: expected .*eomdl\.Trajectory.*got .*array\.npy"):
        eomdl.Trajectory.load(tmp_path / "array.npy")
    path.write_text("steps: 3")
    with pytest.raises(ValueError, match="path: expected"):
        eomdl.Trajectory.load(path)
    real = eomdl.descend(valley_loss, VALLEY, SGD, 3)
    eomdl.compare(real, {"itself": real}).save(path)
    with pytest.raises(ValueError, match=r"path: expected .*eomdl\.Trajectory.*got .*'eomdl\.Comparison"):
        eomdl.Trajectory.load(path)
    with pytest.raises(FileNotFoundError):
        eomdl.Trajectory.load(tmp_path / "missing.npz")


def test_a_file_that_needs_pickle_is_refused(tmp_path):
    path = tmp_path / "pickled.npz"
    np.savez(path, meta=np.array([{"format": "eomdl.Trajectory 1"}], dtype=object))
    with pytest.raises(ValueError, match="path: expected"):
        eomdl.Trajectory.load(path)
    assert zipfile.is_zipfile(path)


def test_like_that_does_not_fit(tmp_path):
    path = tmp_path / "run.npz"
    eomdl.descend(valley_loss, VALLEY, SGD, 3).save(path)
    for like in ({"x": jnp.ones(2), "y": jnp.ones(())}, {"x": jnp.ones(())}):
        with pytest.raises(ValueError, match="like: expected leaves of shapes"):
            eomdl.Trajectory.load(path, like=like)


def test_at():
    run = eomdl.descend(valley_loss, VALLEY, SGD, 10, save_steps=5)
    whole = eomdl.descend(valley_loss, VALLEY, SGD, 10)
    assert_close(run.at(5), {k: v[5] for k, v in whole.params.items()}, atol=0.0)
    assert_close(run.at(0), VALLEY, atol=0.0)
    with pytest.raises(ValueError, match=r"step: expected a saved step, \[ 0  5 10\], got 3"):
        run.at(3)
    alone = eomdl.descend(valley_loss, VALLEY, SGD, 10, save_params=False)
    with pytest.raises(ValueError, match=r"params: expected saved parameters, got .*save_params=False"):
        alone.at(3)
