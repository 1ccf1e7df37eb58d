"""The shape of paths: curves, clouds and planes whose geometry is known."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import NET, NET_ARGS, QUADRATIC, flat, net_loss, quadratic_loss

import eomdl
from eomdl.geometry.dimension import (
    dimension_along,
    dimension_estimators,
    gradient_points,
    intrinsic_dimension,
    participation_ratio,
    path_points,
)
from eomdl.geometry.path import (
    distance_travelled,
    flow_curvature,
    flow_torsion,
    path_curvature,
    path_length,
    path_shape,
    path_torsion,
    principal_components,
    straightness,
)
from eomdl.geometry.plane import loss_plane
from eomdl.plotting.shape import plot_dimensions, plot_path_plane, plot_path_shape


SHORT = eomdl.iterate(lambda x, args, k: x, jnp.ones(1), 1)


def trajectory(path, steps=None) -> eomdl.Trajectory:
    """A run with these parameters, saved at these steps."""
    steps = np.arange(len(jax.tree.leaves(path)[0])) if steps is None else np.asarray(steps)
    return dataclasses.replace(SHORT, params=path, steps=steps)


def turned(path: np.ndarray, dimension: int, seed: int = 0) -> np.ndarray:
    """The same curve elsewhere in more dimensions: rotated and moved."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(dimension, path.shape[1])))
    return path @ q.T + rng.normal(size=dimension)


def helix(s: np.ndarray, radius=1.0, rise=0.5) -> np.ndarray:
    return np.stack([radius * np.cos(s), radius * np.sin(s), rise * s], axis=1)


EVEN = np.arange(60)
UNEVEN = np.cumsum(np.resize([1, 2, 1, 1, 3, 2], 60))


# ------------------------------------------------------------ curvature, torsion


@pytest.mark.parametrize("steps", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("dimension", [3, 8])
def test_helix_has_its_curvature_and_torsion_at_their_orders(steps, dimension):
    # a / (a^2 + b^2) and b / (a^2 + b^2)
    spacings, errors = np.array([0.1, 0.05, 0.025]), []
    for h in spacings:
        run = trajectory(turned(helix(h * steps, 2.0, 0.5), dimension), steps)
        errors.append(
            [
                np.nanmax(np.abs(path_curvature(run) - 2 / 4.25)),
                np.nanmax(np.abs(path_torsion(run) - 0.5 / 4.25)),
            ]
        )
    slopes = np.polyfit(np.log(spacings), np.log(errors), 1)[0]
    # Uneven stencils give x'' one order less, unless rows happen to be symmetric.
    assert slopes[0] > (3.9 if steps is EVEN else 2.9)
    np.testing.assert_allclose(slopes[1], 2, atol=0.1)
    assert max(errors[-1]) < 1e-3
    for values in (path_curvature(run), path_torsion(run)):
        assert np.isnan(values[[0, 1, -2, -1]]).all() and np.isfinite(values[2:-2]).all()


def test_curvature_does_not_depend_on_the_speed():
    s = np.linspace(0.5, 2, 800)
    run = trajectory(turned(helix(s**3), 5))
    np.testing.assert_allclose(path_curvature(run)[2:-2], 1 / 1.25, rtol=1e-5)
    np.testing.assert_allclose(path_torsion(run)[2:-2], 0.5 / 1.25, rtol=1e-3)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("dimension", [2, 7])
def test_circle_has_one_over_its_radius_and_no_torsion(dimension, dtype):
    s = 0.1 * EVEN
    run = trajectory(turned(3 * np.stack([np.cos(s), np.sin(s)], 1), dimension).astype(dtype))
    tolerance = 1e-4 if dtype == np.float64 else 3e-3
    np.testing.assert_allclose(path_curvature(run)[2:-2], 1 / 3, rtol=tolerance)
    torsion = path_torsion(run)[2:-2]
    assert np.nanmax(torsion) < (1e-10 if dtype == np.float64 else 0.1 / 3)
    assert dtype == np.float32 or np.isfinite(torsion).all()


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_straight_line_does_not_bend_and_has_no_torsion(dtype):
    run = trajectory(turned(0.01 * EVEN[:, None] ** 2.0, 6).astype(dtype), UNEVEN)
    curvature = path_curvature(run)[2:-2]
    # Near the start it moves by little more than a float32 resolves: then NaN, never a number.
    assert np.nanmax(curvature) == 0 and np.isfinite(curvature[10:]).all()
    assert np.isnan(path_torsion(run)).all()
    one_parameter = trajectory((0.1 * EVEN).astype(dtype))
    assert np.nanmax(path_curvature(one_parameter)) == 0


def test_where_the_path_stands_still_it_has_no_curvature():
    path = np.concatenate([helix(0.1 * EVEN), np.repeat(helix(np.array([5.9])), 20, axis=0)])
    curvature = path_curvature(trajectory(path))
    assert np.isfinite(curvature[2:58]).all()
    assert np.isnan(curvature[62:]).all() and np.isnan(path_torsion(trajectory(path))[62:]).all()


def test_torsion_under_the_rounding_is_refused_not_invented():
    # A nearly plane arc, finely sampled: the third difference is rounding.
    run = trajectory((5 + helix(1e-3 * EVEN, 1.0, 1e-3)).astype(np.float32))
    assert np.isnan(path_torsion(run)).all()
    exact = trajectory(5 + helix(1e-3 * EVEN, 1.0, 1e-3))
    np.testing.assert_allclose(path_torsion(exact)[2:-2], 1e-3, atol=1e-4)


GRADIENT_FLOW = eomdl.GradientFlow(net_loss, 0.05)
FLOW_RUN = eomdl.solve(
    GRADIENT_FLOW,
    NET,
    40,
    args=NET_ARGS,
    observe={"curvature": flow_curvature(GRADIENT_FLOW), "torsion": flow_torsion(GRADIENT_FLOW)},
    rtol=1e-11,
    atol=1e-11,
    estimate_error=False,
)


def test_differences_along_a_flow_agree_with_its_exact_derivatives():
    curvature, torsion = path_curvature(FLOW_RUN), path_torsion(FLOW_RUN)
    inner = slice(2, -2)
    np.testing.assert_allclose(curvature[inner], FLOW_RUN.observables["curvature"][inner], rtol=1e-5)
    np.testing.assert_allclose(torsion[inner], FLOW_RUN.observables["torsion"][inner], rtol=1e-2)


def test_flow_curvature_on_a_quadratic_is_that_of_gram_determinants():
    # x' = -g, x'' = H g, x''' = -H^2 g
    hessian, b = (np.asarray(a) for a in QUADRATIC.args)
    g = hessian @ flat(QUADRATIC.params) - b
    derivatives = np.stack([-g, hessian @ g, -hessian @ hessian @ g])
    g1, g2, g3 = (np.linalg.det(derivatives[:j] @ derivatives[:j].T) for j in (1, 2, 3))
    flow = eomdl.GradientFlow(quadratic_loss, 0.1)
    both = jax.jit(lambda *at: (flow_curvature(flow)(*at), flow_torsion(flow)(*at)))
    curvature, torsion = both(QUADRATIC.params, QUADRATIC.args)
    np.testing.assert_allclose(curvature, np.sqrt(g2) / g1**1.5, rtol=1e-10)
    np.testing.assert_allclose(torsion, np.sqrt(g3) / g2, rtol=1e-9)


class HelixFlow(eomdl.AbstractFlow):
    step_size: float = 1.0

    def __call__(self, t, state, args):
        x, y, _ = state
        return jnp.stack([-y, x, args])


def test_flow_along_a_helix_knows_it():
    flow, at = HelixFlow(), (jnp.array([0.0, 2.0, 3.0]), jnp.array(0.5))
    np.testing.assert_allclose(flow_curvature(flow)(*at), 2 / 4.25, rtol=1e-12)
    np.testing.assert_allclose(flow_torsion(flow)(*at), 0.5 / 4.25, rtol=1e-12)
    still = (jnp.array([0.0, 0.0, 3.0]), jnp.array(0.0))
    assert np.isnan(flow_curvature(flow)(*still)) and np.isnan(flow_torsion(flow)(*still))


def test_flows_without_a_path_of_parameters_are_refused():
    for observable in (flow_curvature, flow_torsion):
        with pytest.raises(ValueError, match=r"^flow: expected an eomdl\.AbstractFlow"):
            observable(net_loss)
    with_state = eomdl.InterpolatingFlow(eomdl.optimizer_step(net_loss, optax.sgd(0.1)), 0.1, points=2)
    with pytest.raises(ValueError, match=r"^flow: expected one whose state is only the parameters"):
        flow_curvature(with_state)(NET, NET_ARGS)


# ---------------------------------------------------------------------- length


def test_length_and_distance_of_a_triangle():
    run = trajectory({"a": np.array([0.0, 3.0, 3.0, 0.0]), "b": [np.array([[0.0], [0.0], [4.0], [0.0]])]})
    np.testing.assert_allclose(path_length(run), [0, 3, 7, 12])
    np.testing.assert_allclose(distance_travelled(run), [0, 3, 5, 0])
    np.testing.assert_allclose(straightness(run), [np.nan, 1, 5 / 7, 0])


def test_shape_is_its_parts():
    shape = path_shape(FLOW_RUN)
    for values, expected in (
        (shape.length, path_length(FLOW_RUN)),
        (shape.distance, distance_travelled(FLOW_RUN)),
        (shape.curvature, path_curvature(FLOW_RUN)),
        (shape.torsion, path_torsion(FLOW_RUN)),
    ):
        np.testing.assert_array_equal(values, expected)


def test_paths_that_cannot_be_read_are_refused():
    without = dataclasses.replace(SHORT, params=None)
    for function in (path_length, distance_travelled, straightness, path_curvature, principal_components):
        with pytest.raises(ValueError, match=r"^trajectory: expected saved params"):
            function(without)
        with pytest.raises(ValueError, match=r"^trajectory: expected an eomdl.Trajectory"):
            function(np.zeros((9, 3)))
    with pytest.raises(ValueError, match=r"^trajectory: expected one run, got a batch with steps \(2, 5\)"):
        path_length(trajectory(np.zeros((2, 5, 3)), np.zeros((2, 5))))
    with pytest.raises(ValueError, match=r"^trajectory: expected at least 5 saved steps, got 4"):
        path_curvature(trajectory(helix(0.1 * EVEN[:4])))
    with pytest.raises(
        ValueError, match=r"^trajectory: expected finite values, got infinity or NaN in row 2"
    ):
        path_length(trajectory(np.array([0.0, 1.0, np.nan])))


# --------------------------------------------------------- principal components


def random_walk(rows: int, dimension: int, seed: int = 0) -> np.ndarray:
    return np.cumsum(np.random.default_rng(seed).normal(size=(rows, dimension)), axis=0)


WALK = random_walk(1200, 1000)


def test_components_of_an_ellipse_are_its_axes():
    s = np.linspace(0, 2 * np.pi, 80, endpoint=False)
    axes = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 2)))[0]
    path = np.stack([3 * np.cos(s), np.sin(s)], 1) @ axes.T + 7
    found = principal_components(trajectory({"a": path[:, :2], "b": path[:, 2:].reshape(-1, 2, 2)}), 3)
    np.testing.assert_allclose(found.explained, [0.9, 0.1, 0], atol=1e-12)
    np.testing.assert_allclose(flat(found.mean), np.full(6, 7), rtol=1e-12)
    for i in range(2):
        direction = flat(found.direction(i))
        np.testing.assert_allclose(direction, direction @ axes[:, i] * axes[:, i], atol=1e-10)
        np.testing.assert_allclose(np.linalg.norm(direction), 1, rtol=1e-12)
    np.testing.assert_allclose(found.scores[:, 0], found.scores[0, 0] * np.cos(s), atol=1e-10)
    np.testing.assert_allclose(np.abs(found.scores[0, 0]), 3, rtol=1e-10)


def test_components_of_a_random_walk_follow_their_law():
    """Antognini & Sohl-Dickstein 2018: 6 / (pi k)^2, cosines, effective dimension 5/2."""
    found = principal_components(trajectory(WALK[::4]), 3)
    # Each variance is a sum over the 1000 dimensions: three standard deviations of chi^2.
    three_sigma = 3 * np.sqrt(2 / 1000)
    np.testing.assert_allclose(found.explained, 6 / (np.pi * np.arange(1, 4)) ** 2, rtol=three_sigma)
    cosines = np.cos(np.pi * (np.arange(300) + 0.5)[:, None] / 300 * np.arange(1, 4))
    overlap = np.sum(cosines * found.scores, 0) / np.linalg.norm(cosines, axis=0)
    assert np.all(np.abs(overlap) / np.linalg.norm(found.scores, axis=0) > 0.99)
    np.testing.assert_allclose(participation_ratio(WALK), 2.5, rtol=three_sigma)


def test_another_run_is_seen_in_the_same_axes():
    found = principal_components(FLOW_RUN, 3)
    np.testing.assert_allclose(found.project(FLOW_RUN), found.scores, atol=1e-12)
    shift = jax.tree.map(lambda x, d: x + 2 * d[1], FLOW_RUN.params, found.directions)
    moved = found.project(dataclasses.replace(FLOW_RUN, params=shift))
    np.testing.assert_allclose(moved, found.scores + np.array([0, 2, 0]), atol=1e-12)
    with pytest.raises(ValueError, match=r"^trajectory: expected 26 parameters, got 1"):
        found.project(SHORT)


def test_wrong_components_are_named():
    for k in (0, 4, 1.5):
        with pytest.raises(ValueError, match=r"^k: expected"):
            principal_components(trajectory(helix(0.1 * EVEN)), k)
    with pytest.raises(ValueError, match=r"^trajectory: expected a path that moves"):
        principal_components(trajectory(np.full((9, 4), 0.1)))


def test_participation_ratio_counts_equal_directions():
    # The corners of a cross: equal variance along m axes.
    for m in (1, 3):
        cross = np.concatenate([np.eye(m), -np.eye(m)])
        np.testing.assert_allclose(participation_ratio(turned(cross, 7)), m, rtol=1e-12)
    for one in (np.ones((1, 3)), np.full((5, 3), 0.1)):
        with pytest.raises(ValueError, match=r"^points: expected at least 2"):
            participation_ratio(one)


# ----------------------------------------------------------- intrinsic dimension


def torus(seed: int, dimension: int, points: int = 400) -> np.ndarray:
    """A product of circles: a manifold without a boundary, in 2 `dimension` coordinates."""
    angles = np.random.default_rng(seed).uniform(0, 2 * np.pi, (points, dimension))
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


@pytest.mark.parametrize("name, dimension", [("TwoNN", 1), ("TwoNN", 2), ("MLE", 1)])
def test_the_standard_error_is_the_spread_over_clouds_and_covers_the_truth(name, dimension):
    estimator = dimension_estimators()[name]
    found = [intrinsic_dimension(torus(i, dimension), estimator, seed=i) for i in range(30)]
    estimates, errors = np.array([(f.dimension, f.standard_error) for f in found]).T
    assert 0.7 < errors.mean() / estimates.std(ddof=1) < 1.4
    assert np.mean(np.abs(estimates - dimension) < 2 * errors) >= 0.8
    np.testing.assert_allclose(estimates.mean(), dimension, rtol=0.03)


def test_a_larger_cloud_has_a_smaller_error_like_one_over_the_root():
    small, large = (intrinsic_dimension(torus(0, 2, n), partitions=20) for n in (400, 6400))
    np.testing.assert_allclose(small.standard_error / large.standard_error, 4, rtol=0.35)
    assert large.estimator == "TwoNN" and large.num_points == 6400 and large.notes == ()


def test_both_estimators_find_the_dimension_of_a_random_walk_and_of_a_smooth_path():
    walk = trajectory(random_walk(5000, 200))
    s = np.linspace(0, 30, 5000)
    smooth = trajectory(turned(np.stack([np.cos(s), np.sin(s), s], 1), 10))
    for estimator in dimension_estimators().values():
        for run, truth in ((walk, 2), (smooth, 1)):
            found = intrinsic_dimension(path_points(run, 200), estimator)
            assert abs(found.dimension - truth) < max(2.5 * found.standard_error, 0.06)


def test_saved_rows_are_no_independent_points():
    """What `path_points` is for: neighbours at equal distances, sqrt(lag) in a walk and lag on a line."""
    mle = dimension_estimators()["MLE"]
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


class Fixed:
    """An estimator of one's own; says what it was given."""

    def __init__(self, value):
        self.value = value

    def fit(self, X):
        if len(X) < 30:
            raise ValueError("want more")
        self.dimension_ = self.value
        return self


def test_an_estimator_of_ones_own():
    found = intrinsic_dimension({"a": torus(0, 1), "b": torus(1, 1)}, Fixed(3.5))
    assert dataclasses.astuple(found) == (3.5, 0.0, 3.5, 400, "Fixed", ())
    with pytest.raises(ValueError, match=r"^estimator: expected one that takes 25 points, got Fixed"):
        intrinsic_dimension(torus(0, 1, 125), Fixed(3.5))
    with pytest.raises(ValueError, match=r"^estimator: expected a finite dimension, got inf of Fixed"):
        intrinsic_dimension(torus(0, 1), Fixed(np.inf))
    with pytest.raises(ValueError, match=r"^estimator: expected an object with a method fit"):
        intrinsic_dimension(torus(0, 1), "TwoNN")


@pytest.mark.parametrize("name, value", [("blocks", 1), ("partitions", 0)])
def test_wrong_options_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected an integer"):
        intrinsic_dimension(torus(0, 1), Fixed(1.0), **{name: value})
    with pytest.raises(ValueError, match=r"^points: expected arrays with one leading axis"):
        intrinsic_dimension([np.ones((3, 2)), np.ones((4, 2))])


def test_without_scikit_dimension_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "skdim", None)
    for function in (dimension_estimators, lambda: intrinsic_dimension(torus(0, 1))):
        with pytest.raises(ImportError, match=r"pip install eomdl\[shape\]"):
            function()


def test_dimension_along_a_run_is_that_of_every_checkpoint():
    # A cloud that the parameters stretch from a line into a plane.
    angles = np.random.default_rng(0).uniform(0, 2 * np.pi, 300)
    stretch = lambda p, args: jnp.stack([jnp.cos(args), jnp.sin(args)], 1) * jnp.stack([p, p**2])[None]
    run = trajectory(np.array([1.0, 2.0, 3.0]), [0, 4, 9])
    found = dimension_along(run, stretch, jnp.asarray(angles), steps=[0, 9])
    assert list(found) == [0, 9]
    for step, p in ((0, 1.0), (9, 3.0)):
        alone = intrinsic_dimension(np.asarray(stretch(p, angles)))
        np.testing.assert_allclose(found[step].dimension, alone.dimension, rtol=1e-6)
    with pytest.raises(ValueError, match=r"^step: expected a saved step"):
        dimension_along(run, stretch, jnp.asarray(angles), steps=[5])


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


# ------------------------------------------------------------------- loss plane


def test_loss_plane_of_a_quadratic_is_its_closed_form():
    centre, args = QUADRATIC.params, QUADRATIC.args
    u, v = (jax.tree.map(lambda x, s=s: jnp.full_like(x, s) * (1 + x), centre) for s in (0.3, -0.7))
    x, y = np.linspace(-1, 2, 4), np.linspace(-2, 1, 3)
    plane = loss_plane(quadratic_loss, centre, u, v, x, y, args)
    hessian, b = (np.asarray(a) for a in args)
    for i, at_y in enumerate(y):
        for j, at_x in enumerate(x):
            p = flat(centre) + at_x * flat(u) + at_y * flat(v)
            np.testing.assert_allclose(plane.loss[i, j], p @ hessian @ p / 2 - b @ p, rtol=1e-10)
    assert plane.loss.shape == (3, 4)
    with pytest.raises(ValueError, match=r"^v: expected the structure of centre"):
        loss_plane(quadratic_loss, centre, u, jnp.ones(5), x, y, args)
    for name, wrong in (("x", (np.ones((2, 2)), y)), ("y", (x, [np.nan]))):
        with pytest.raises(ValueError, match=f"^{name}: expected finite coordinates"):
            loss_plane(quadratic_loss, centre, u, v, *wrong, args)


# --------------------------------------------------------------------- pictures


def test_pictures_draw_what_they_are_given():
    shape = path_shape(FLOW_RUN)
    figure = plot_path_shape({"GD": shape, "flow": shape})
    bend, _, off, length = figure.axes
    assert off.get_ylabel() == "relative difference to GD"
    assert [line.get_label() for line in bend.lines] == ["GD", "flow"]
    np.testing.assert_array_equal(bend.lines[0].get_ydata(), shape.curvature)
    np.testing.assert_array_equal(length.lines[1].get_xdata(), shape.length)

    found = principal_components(FLOW_RUN)
    grid = np.linspace(-1, 1, 3)
    plane = loss_plane(net_loss, found.mean, found.direction(0), found.direction(1), grid, grid, NET_ARGS)
    axes = plot_path_plane(plane, {"GD": found.scores}).axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), found.scores)
    with pytest.raises(ValueError, match=r"^paths\['GD'\]: expected coordinates of shape \(n, 2\)"):
        plot_path_plane(plane, {"GD": found.scores[:, :1]})

    by_step = {k: intrinsic_dimension(torus(k, 1), Fixed(1.0 + k)) for k in (0, 5)}
    layers, training = plot_dimensions({"hidden 1": by_step, "hidden 2": by_step}).axes
    np.testing.assert_array_equal(training.lines[0].get_ydata(), [1, 6])
    np.testing.assert_array_equal(layers.lines[0].get_ydata(), [1, 1])
    for function in (plot_path_shape, plot_dimensions):
        with pytest.raises(ValueError, match=r"expected at least one entry"):
            function({})
