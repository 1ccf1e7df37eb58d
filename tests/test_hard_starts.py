"""Starts that are hard: overflowing trial steps, gradients and batches that are NaN, leaves of several dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, flat

import eomdl


QUARTIC_START = {"x": jnp.array(2.0, float), "y": jnp.array(2.0, float)}


def quartic_loss(params, args):
    x, y = params["x"], params["y"]
    return 6 * x**2 + y**2 + x**4 + y**4


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5, 2.0, 4.0])
def test_a_trial_step_that_overflows_is_cut(scale):
    start = jax.tree.map(lambda x: scale * x, QUARTIC_START)
    flow = eomdl.EquationOfMotion(quartic_loss, 0.1, 1)
    path = eomdl.solve(flow, start, 10)
    assert path.message == ""
    assert list(path.steps) == list(range(11))
    small = eomdl.solve(flow, start, 10, dt0=1e-3, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(path.params["y"], small.params["y"], atol=5e-3 * scale)
    assert path.stats.diagnostics["eta*lambda_max"].exceeded


def cone_loss(params, args):
    """Its gradient at the start is NaN: 0/0."""
    return jnp.sqrt((params["x"] - 2) ** 2) + params["y"] ** 2


@pytest.mark.parametrize(
    "flow", [eomdl.GradientFlow(cone_loss, 0.1), eomdl.EquationOfMotion(cone_loss, 0.1, 1)]
)
def test_a_gradient_that_is_nan_at_the_start_leaves_the_start(flow):
    path = eomdl.solve(flow, QUARTIC_START, 10)
    assert list(path.steps) == [0]
    assert path.end.step == 0
    assert_close(path.at(0), QUARTIC_START, atol=0.0)
    assert_close(path.final_params, QUARTIC_START, atol=0.0)
    assert path.result == eomdl.RESULTS.nonfinite
    assert "gradient became infinite or NaN" in path.message
    assert all("reached nan" in note for note in path.notes if note.is_fault and note != path.message)
    assert path.stats.num_steps == 0  # of steps taken


def target_loss(params, args):
    return jnp.sum((params - args) ** 2)


def test_a_batch_that_is_nan_is_not_a_step_limit():
    batches = jnp.ones((20, 2)).at[7].set(jnp.nan)
    path = eomdl.solve(eomdl.EquationOfMotion(target_loss, 0.1, 1), jnp.zeros(2), 20, batches=batches)
    real = eomdl.descend(target_loss, jnp.zeros(2), optax.sgd(0.1), 20, batches=batches)
    for run in (path, real):
        assert list(run.steps) == list(range(8))
        assert run.result == eomdl.RESULTS.nonfinite
        assert "Stopped after step 7" in run.message
        assert "data of that step" in run.message


def test_a_step_limit_is_one():
    path = eomdl.solve(eomdl.EquationOfMotion(quartic_loss, 0.1, 1), QUARTIC_START, 10, max_steps=3)
    assert path.result == eomdl.RESULTS.max_steps_reached
    assert path.steps[0] == 0


def test_a_comparison_with_a_run_without_rows():
    real = eomdl.descend(cone_loss, {"x": jnp.array(1.0), "y": jnp.array(2.0)}, optax.sgd(0.1), 5)
    path = eomdl.solve(eomdl.GradientFlow(cone_loss, 0.1), QUARTIC_START, 5, save_steps=[5], diagnose=False)
    assert len(path.steps) == 0
    whole = eomdl.solve(eomdl.GradientFlow(cone_loss, 0.1), real.at(0), 5)
    comparison = eomdl.compare(real, {"failed": path, "whole": whole})
    assert np.all(np.isnan(comparison.distance["failed"]))
    assert len(comparison.steps) == 6
    assert np.all(np.isfinite(comparison.distance["whole"]))
    assert "failed: Stopped after step 0" in comparison.notes[0]
    assert "nan" in comparison.table()
    with pytest.raises(ValueError, match=r"^reference: expected a run with saved steps, got none"):
        eomdl.compare(path, {"whole": whole})


# --------------------------------------------------------------------- dtypes


MIXED = {"a": jnp.full(2, 0.7, jnp.float32), "b": jnp.full(3, 0.4, jnp.float64)}


def mixed_loss(params, args):
    return jnp.sum(params["a"] ** 2) + jnp.sum(params["b"] ** 4) + jnp.sum(params["a"]) * jnp.sum(params["b"])


def path_of(params, **options):
    return eomdl.solve(eomdl.EquationOfMotion(mixed_loss, 0.05, 1), params, 20, **options)


def test_leaves_of_two_dtypes_keep_them():
    expected = path_of(jax.tree.map(lambda x: x.astype(jnp.float64), MIXED))
    path = path_of(MIXED)
    in_jit = jax.jit(lambda params: path_of(params).final_params)(MIXED)
    for final in (path.final_params, in_jit):
        assert {k: x.dtype for k, x in final.items()} == {k: x.dtype for k, x in MIXED.items()}
        np.testing.assert_allclose(flat(final), flat(expected.final_params), atol=2e-5)
    halves = path_of(MIXED, resume=eomdl.solve(eomdl.EquationOfMotion(mixed_loss, 0.05, 1), MIXED, 7))
    np.testing.assert_allclose(flat(halves.final_params), flat(path.final_params), rtol=1e-4)


def test_sixteen_bits_are_refused_by_name():
    short = {"a": MIXED["a"].astype(jnp.bfloat16), "b": MIXED["b"]}
    with pytest.raises(ValueError, match=r"^params\['a'\]: expected float32 or float64 .*got bfloat16"):
        path_of(short)
    adam = optax.adam(0.01, mu_dtype=jnp.bfloat16)
    flow = eomdl.InterpolatingFlow(eomdl.optimizer_step(mixed_loss, adam), 0.01, 2)
    with pytest.raises(
        ValueError, match=r"^the state of flow.*mu.*expected float32 or float64 .*got bfloat16"
    ):
        eomdl.solve(flow, MIXED, 5)
    assert eomdl.descend(mixed_loss, short, optax.sgd(0.01), 3).final_params["a"].dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sharpness_of_sixteen_bits(dtype):
    short = jax.tree.map(lambda x: x.astype(dtype), MIXED)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), short)
    sharpness = eomdl.sharpness(mixed_loss)
    np.testing.assert_allclose(sharpness(short, None), sharpness(wide, None), rtol=1e-5)
