"""What models predict of a real run: means of its iterates, by hand."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import VALLEY, assert_close, assert_identical, flat, valley_loss

import eomdl
from eomdl._target import ITERATES, MIDPOINTS, SMOOTHED, Target


OBSERVE = {"loss": valley_loss, "both": lambda p, args: jnp.stack([p["x"], p["y"]])}


class Smooth(eomdl.AbstractFlow):
    """Gradient flow that claims to predict means."""

    step_size: jax.Array
    predicts: Target

    @property
    def target(self):
        return self.predicts

    def __call__(self, t, state, args):
        return jax.tree.map(jnp.negative, jax.grad(valley_loss)(state, args))


@pytest.fixture(scope="module")
def real():
    return eomdl.descend(valley_loss, VALLEY, optax.sgd(0.1), 12, observe=OBSERVE)


def path(target, **options):
    return eomdl.solve(Smooth(jnp.asarray(0.1), target), VALLEY, 12, observe=OBSERVE, **options)


BY_HAND = {
    MIDPOINTS: (range(12), lambda x, k: (x[k] + x[k + 1]) / 2),
    SMOOTHED: (range(1, 12), lambda x, k: (x[k - 1] + 2 * x[k] + x[k + 1]) / 4),
}


@pytest.mark.parametrize("target", BY_HAND, ids=lambda target: target.name)
def test_a_model_is_measured_against_what_it_predicts(real, target):
    model = path(target)
    assert model.stats.target == target
    rows, mean = BY_HAND[target]
    averaged = real.averaged(target)
    np.testing.assert_array_equal(averaged.steps, rows)
    found = eomdl.compare(real, {"mean": model, "iterates": path(ITERATES)})
    np.testing.assert_array_equal(found.steps, rows)
    for i, k in enumerate(rows):
        expected = jax.tree.map(lambda x, k=k: mean(x, k), real.params)
        assert_close(averaged.at(k), expected, rtol=1e-14)
        apart = np.linalg.norm(flat(model.at(k)) - flat(expected))
        np.testing.assert_allclose(found.distance["mean"][i], apart, rtol=1e-10)
        plain = np.linalg.norm(flat(model.at(k)) - flat(real.at(k)))
        np.testing.assert_allclose(found.distance["iterates"][i], plain, rtol=1e-10)
        travelled = np.linalg.norm(flat(real.at(k)) - flat(VALLEY))
        np.testing.assert_allclose(found.travelled[i], travelled, rtol=1e-12)
        for name in OBSERVE:
            expected = model.observables[name][k] - mean(real.observables[name], k)
            np.testing.assert_allclose(found.differences["mean"][name][i], expected, rtol=1e-10)
    (note,) = found.notes
    assert note.startswith(f"mean: the flow predicts the {target.name}")


def test_a_straight_path_is_its_own_mean():
    line = eomdl.iterate(lambda x, args, k: x + args, jnp.array([1.0, 2.0]), 6, args=jnp.array([0.5, -1.0]))
    assert_close(line.averaged(SMOOTHED).params, line.params[1:-1], rtol=1e-14)


def test_an_oscillation_of_period_two_is_smoothed_away():
    flip = eomdl.iterate(lambda x, args, k: -x, jnp.array(3.0), 7)
    for target in (MIDPOINTS, SMOOTHED):
        assert_identical(flip.averaged(target).params, np.zeros_like(flip.averaged(target).params))


def test_only_rows_whose_neighbours_were_saved_remain(real):
    kept = real.rows(np.isin(real.steps, [0, 1, 2, 5, 6, 9]))
    np.testing.assert_array_equal(kept.averaged(SMOOTHED).steps, [1])
    np.testing.assert_array_equal(kept.averaged(MIDPOINTS).steps, [0, 1, 5])
    np.testing.assert_array_equal(kept.averaged(ITERATES).steps, kept.steps)


def test_a_reference_without_neighbours_is_refused_with_what_is_missing(real):
    sparse = real.rows(slice(None, None, 3))
    with pytest.raises(ValueError, match=r"^trajectories: .* in common, .*smoothed path.*: \[\]"):
        eomdl.compare(sparse, {"mean": path(SMOOTHED)})


def test_smoothing_comes_after(real):
    model = path(MIDPOINTS)
    found = eomdl.compare(real, {"mean": model}, smooth=2)
    expected = model.smoothed(2).at(3)
    middle = jax.tree.map(lambda x: (x[3] + 2 * x[4] + x[5]) / 4, real.params)
    apart = np.linalg.norm(flat(expected) - flat(middle))
    np.testing.assert_allclose(found.distance["mean"][3], apart, rtol=1e-10)


def test_the_target_survives_the_disk(tmp_path):
    model = path(SMOOTHED)
    model.save(tmp_path / "run.npz")
    assert eomdl.Trajectory.load(tmp_path / "run.npz").stats.target == SMOOTHED


@pytest.mark.parametrize("weights", [((0, 0.5),), ((0.5, 1.0),), 3, ((0, "a"),), ((0, float("nan")),)])
def test_weights_are_checked(weights):
    message = "weights: expected pairs (integer j, number a_j), the numbers of sum 1, got "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Target("wrong", weights)
