"""The dimension of clouds and paths: estimators against manifolds whose dimension is known."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skdim
from curves import WALK, Fixed, random_walk, torus, trajectory, turned
from helpers import NET, NET_ARGS, flat, net_loss

import eomdl
from eomdl.geometry.dimension import (
    gradient_points,
    intrinsic_dimension,
    participation_ratio,
    path_points,
)


ESTIMATORS = {"TwoNN": skdim.id.TwoNN(), "MLE": skdim.id.MLE()}


def test_participation_ratio_counts_equal_directions():
    # The corners of a cross: equal variance along m axes.
    for m in (1, 3):
        cross = np.concatenate([np.eye(m), -np.eye(m)])
        np.testing.assert_allclose(participation_ratio(turned(cross, 7)), m, rtol=1e-12)
    for one in (np.ones((1, 3)), np.full((5, 3), 0.1)):
        with pytest.raises(ValueError, match=r"^points: expected at least 2"):
            participation_ratio(one)
    with pytest.raises(ValueError, match=r"^points: expected real numbers, got dtypes \['complex128'\]"):
        participation_ratio(1j * np.eye(3))


# ----------------------------------------------------------- intrinsic dimension


@pytest.mark.parametrize(("name", "dimension"), [("TwoNN", 1), ("TwoNN", 2), ("MLE", 1)])
def test_the_standard_error_is_the_spread_over_clouds_and_covers_the_truth(name, dimension):
    estimator = ESTIMATORS[name]
    found = [intrinsic_dimension(torus(i, dimension), estimator, seed=i) for i in range(30)]
    estimates, errors = np.array([(f.dimension, f.standard_error) for f in found]).T
    assert 0.7 < errors.mean() / estimates.std(ddof=1) < 1.4
    assert np.mean(np.abs(estimates - dimension) < 2 * errors) >= 0.8
    np.testing.assert_allclose(estimates.mean(), dimension, rtol=0.03)


def test_a_larger_cloud_has_a_smaller_error_like_one_over_the_root():
    small, large = (intrinsic_dimension(torus(0, 2, n), partitions=20) for n in (400, 6400))
    np.testing.assert_allclose(small.standard_error / large.standard_error, 4, rtol=0.35)
    assert large.estimator == "TwoNN"
    assert large.num_points == 6400
    assert large.notes == ()


def test_both_estimators_find_the_dimension_of_a_random_walk_and_of_a_smooth_path():
    walk = trajectory(random_walk(5000, 200))
    s = np.linspace(0, 30, 5000)
    smooth = trajectory(turned(np.stack([np.cos(s), np.sin(s), s], 1), 10))
    for estimator in ESTIMATORS.values():
        for run, truth in ((walk, 2), (smooth, 1)):
            found = intrinsic_dimension(path_points(run, 200), estimator)
            assert abs(found.dimension - truth) < max(2.5 * found.standard_error, 0.06)


def test_saved_rows_are_no_independent_points():
    """What `path_points` is for: neighbours at equal distances, sqrt(lag) in a walk and lag on a line."""
    mle = ESTIMATORS["MLE"]
    lags = np.arange(1, 11)  # 20 neighbours, 10 a side
    on_a_line = 9.5 / np.sum(np.log(10 / lags))
    found = intrinsic_dimension(0.1 * np.arange(2000.0), mle)
    np.testing.assert_allclose(found.dimension, on_a_line, rtol=0.01)
    np.testing.assert_allclose(intrinsic_dimension(WALK, mle).dimension, 2 * on_a_line, rtol=0.06)
    assert intrinsic_dimension(WALK).dimension > 20


def test_path_points_are_uniform_in_length():
    corner = trajectory(np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 3.0]]), [0, 1, 5, 9])
    points = path_points(corner, 4000)
    along = points.sum(axis=1)  # from the corner on, length is 1 + y
    assert np.all((points[:, 1] == 0) | (points[:, 0] == 1))
    quantiles = np.quantile(along, [0.1, 0.25, 0.5, 0.9])
    np.testing.assert_allclose(quantiles, [0.4, 1, 2, 3.6], atol=0.1)
    np.testing.assert_array_equal(points, path_points(corner, 4000))
    with pytest.raises(ValueError, match=r"^trajectory: expected a path that moves"):
        path_points(trajectory(np.ones((4, 2))), 10)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_repeated_points_are_left_out_and_said(dtype):
    cloud = torus(0, 2).astype(dtype)
    alone = intrinsic_dimension(cloud)
    repeated = intrinsic_dimension(np.concatenate([cloud, cloud[:30], cloud[:30] * (1 + dtype(1e-16))]))
    assert repeated.notes == ("60 of 460 points repeat another and were left out",)
    # Centred at another mean, to rounding.
    np.testing.assert_allclose(repeated.dimension, alone.dimension, rtol=1e-5)
    assert repeated.num_points == alone.num_points == 400


def test_too_few_points_are_refused_with_the_number_needed():
    with pytest.raises(ValueError, match=r"^points: expected at least 125 distinct points, 25 for each of 5"):
        intrinsic_dimension(torus(0, 2, 124))
    with pytest.raises(ValueError, match=r"got 100 \(100 of 200 points repeat another and were left out\)"):
        intrinsic_dimension(np.tile(torus(0, 2, 100), (2, 1)))
    with pytest.raises(ValueError, match=r"^points: expected at least 50 distinct points.*got 1 "):
        intrinsic_dimension(np.ones((300, 2)), blocks=2)
    assert intrinsic_dimension(torus(0, 2, 50), blocks=2).num_points == 50


def test_an_estimator_of_ones_own():
    found = intrinsic_dimension({"a": torus(0, 1), "b": torus(1, 1)}, Fixed(3.5))
    assert dataclasses.astuple(found) == (3.5, 0.0, 3.5, 400, "Fixed", ())
    with pytest.raises(ValueError, match=r"^estimator: expected one that takes 25 points, got Fixed"):
        intrinsic_dimension(torus(0, 1, 125), Fixed(3.5))
    with pytest.raises(ValueError, match=r"^estimator: expected a finite dimension, got inf of Fixed"):
        intrinsic_dimension(torus(0, 1), Fixed(np.inf))
    with pytest.raises(ValueError, match=r"^estimator: expected an object with a method fit"):
        intrinsic_dimension(torus(0, 1), "TwoNN")


@pytest.mark.parametrize(("name", "value"), [("blocks", 1), ("partitions", 0)])
def test_wrong_options_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected an integer"):
        intrinsic_dimension(torus(0, 1), Fixed(1.0), **{name: value})
    with pytest.raises(ValueError, match=r"^points: expected arrays with one leading axis"):
        intrinsic_dimension([np.ones((3, 2)), np.ones((4, 2))])


def test_without_scikit_dimension_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "skdim", None)
    with pytest.raises(ImportError, match=r"pip install eomdl\[shape\]"):
        intrinsic_dimension(torus(0, 1))


def test_gradient_points_are_the_gradients_of_single_examples():
    points = np.asarray(gradient_points(net_loss, NET, NET_ARGS, batch_size=4))
    decayed = gradient_points(eomdl.WeightDecay(net_loss, 0.0), NET, NET_ARGS)  # a loss that holds an array
    np.testing.assert_allclose(decayed, points, rtol=1e-12)
    assert points.shape == (6, 26)
    np.testing.assert_allclose(points.mean(0), flat(jax.grad(net_loss)(NET, NET_ARGS)), rtol=1e-10)
    one = jax.grad(net_loss)(NET, (NET_ARGS[0][2:3], NET_ARGS[1][2:3]))
    np.testing.assert_allclose(points[2], flat(one), rtol=1e-10)
    for wrong in (None, (NET_ARGS[0], NET_ARGS[1][:5]), jnp.array(1.0)):
        with pytest.raises(ValueError, match=r"^args: expected arrays with the examples"):
            gradient_points(net_loss, NET, wrong)


def test_it_does_not_need_threadpoolctl(monkeypatch):
    with_it = intrinsic_dimension(torus(0, 1), Fixed(2.5))
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    assert dataclasses.asdict(intrinsic_dimension(torus(0, 1), Fixed(2.5))) == dataclasses.asdict(with_it)
