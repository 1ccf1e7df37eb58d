"""The shape of paths: curves, clouds and planes whose geometry is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from curves import WALK, Fixed, helix, short_run, torus, trajectory, turned
from helpers import NET, NET_ARGS, QUADRATIC, flat, net_loss, quadratic_loss

import eomdl
from eomdl.geometry.dimension import (
    intrinsic_dimension,
    participation_ratio,
)
from eomdl.geometry.path import (
    flow_curvature,
    flow_torsion,
    path_shape,
    principal_components,
)
from eomdl.geometry.plane import loss_plane
from eomdl.plotting import plot


EVEN = np.arange(60)
UNEVEN = np.cumsum(np.resize([1, 2, 1, 1, 3, 2], 60))


# ------------------------------------------------------------ curvature, torsion


def path_curvature(run):
    return path_shape(run).curvature


def path_torsion(run):
    return path_shape(run).torsion


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
        assert np.isnan(values[[0, 1, -2, -1]]).all()
        assert np.isfinite(values[2:-2]).all()


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
    assert np.nanmax(curvature) == 0
    assert np.isfinite(curvature[10:]).all()
    assert np.isnan(path_torsion(run)).all()
    one_parameter = trajectory((0.1 * EVEN).astype(dtype))
    assert np.nanmax(path_curvature(one_parameter)) == 0


def test_where_the_path_stands_still_it_has_no_curvature():
    path = np.concatenate([helix(0.1 * EVEN), np.repeat(helix(np.array([5.9])), 20, axis=0)])
    curvature = path_curvature(trajectory(path))
    assert np.isfinite(curvature[2:58]).all()
    assert np.isnan(curvature[62:]).all()
    assert np.isnan(path_torsion(trajectory(path))[62:]).all()


def test_torsion_under_the_rounding_is_refused_not_invented():
    # A nearly plane arc, finely sampled: the third difference is rounding.
    run = trajectory((5 + helix(1e-3 * EVEN, 1.0, 1e-3)).astype(np.float32))
    assert np.isnan(path_torsion(run)).all()
    exact = trajectory(5 + helix(1e-3 * EVEN, 1.0, 1e-3))
    np.testing.assert_allclose(path_torsion(exact)[2:-2], 1e-3, atol=1e-4)


GRADIENT_FLOW = eomdl.GradientFlow(net_loss, 0.05)


@pytest.fixture(scope="module")
def flow_run():
    return eomdl.solve(
        GRADIENT_FLOW,
        NET,
        40,
        args=NET_ARGS,
        observe={"curvature": flow_curvature(GRADIENT_FLOW), "torsion": flow_torsion(GRADIENT_FLOW)},
        rtol=1e-11,
        atol=1e-11,
        estimate_error=False,
    )


def test_differences_along_a_flow_agree_with_its_exact_derivatives(flow_run):
    curvature, torsion = path_curvature(flow_run), path_torsion(flow_run)
    inner = slice(2, -2)
    np.testing.assert_allclose(curvature[inner], flow_run.observables["curvature"][inner], rtol=1e-5)
    np.testing.assert_allclose(torsion[inner], flow_run.observables["torsion"][inner], rtol=1e-2)


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
    assert np.isnan(flow_curvature(flow)(*still))
    assert np.isnan(flow_torsion(flow)(*still))


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
    shape = path_shape(run)
    np.testing.assert_array_equal(shape.steps, run.steps)
    np.testing.assert_allclose(shape.length, [0, 3, 7, 12])
    np.testing.assert_allclose(shape.distance, [0, 3, 5, 0])
    np.testing.assert_allclose(shape.straightness, [np.nan, 1, 5 / 7, 0])
    # A derivative takes five saved steps.
    assert np.isnan([shape.curvature, shape.torsion]).all()


def test_paths_that_cannot_be_read_are_refused():
    without = dataclasses.replace(short_run(), params=None)
    for function in (path_shape, principal_components):
        with pytest.raises(ValueError, match=r"^trajectory: expected saved params"):
            function(without)
        with pytest.raises(ValueError, match=r"^trajectory: expected an eomdl.Trajectory"):
            function(np.zeros((9, 3)))
    with pytest.raises(ValueError, match=r"^trajectory: expected one run, got a batch with steps \(2, 5\)"):
        path_shape(trajectory(np.zeros((2, 5, 3)), np.zeros((2, 5))))
    with pytest.raises(
        ValueError, match=r"^trajectory: expected finite values, got infinity or NaN in row 2"
    ):
        path_shape(trajectory(np.array([0.0, 1.0, np.nan])))


# --------------------------------------------------------- principal components


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


def test_another_run_is_seen_in_the_same_axes(flow_run):
    found = principal_components(flow_run, 3)
    np.testing.assert_allclose(found.project(flow_run), found.scores, atol=1e-12)
    shift = jax.tree.map(lambda x, d: x + 2 * d[1], flow_run.params, found.directions)
    moved = found.project(dataclasses.replace(flow_run, params=shift))
    np.testing.assert_allclose(moved, found.scores + np.array([0, 2, 0]), atol=1e-12)
    with pytest.raises(ValueError, match=r"^trajectory: expected 26 parameters, got 1"):
        found.project(short_run())


def test_wrong_components_are_named():
    for k in (0, 4, 1.5):
        with pytest.raises(ValueError, match=r"^k: expected"):
            principal_components(trajectory(helix(0.1 * EVEN)), k)
    with pytest.raises(ValueError, match=r"^trajectory: expected a path that moves"):
        principal_components(trajectory(np.full((9, 4), 0.1)))


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


def test_pictures_draw_what_they_are_given(flow_run):
    shape = path_shape(flow_run)
    tighter = dataclasses.replace(shape, curvature=1.5 * shape.curvature)
    figure = plot({"GD": shape, "flow": tighter})
    bend, _, off, length = figure.axes
    apart = {line.get_label(): line.get_ydata() for line in off.lines}
    known = np.isfinite(shape.curvature)
    np.testing.assert_allclose(apart["curvature, flow"][known], 0.5, rtol=1e-12)
    assert [line.get_label() for line in bend.lines] == ["GD", "flow"]
    np.testing.assert_array_equal(bend.lines[0].get_ydata(), shape.curvature)
    np.testing.assert_array_equal(length.lines[1].get_xdata(), shape.length)

    found = principal_components(flow_run)
    grid = np.linspace(-1, 1, 3)
    plane = loss_plane(net_loss, found.mean, found.direction(0), found.direction(1), grid, grid, NET_ARGS)
    axes = plane.plot(paths={"GD": found.scores}).axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), found.scores)
    with pytest.raises(ValueError, match=r"^paths\['GD'\]: expected coordinates of shape \(n, 2\)"):
        plane.plot(paths={"GD": found.scores[:, :1]})

    by_step = {k: intrinsic_dimension(torus(k, 1), Fixed(1.0 + k)) for k in (0, 5)}
    layers, training = plot({"hidden 1": by_step, "hidden 2": by_step}).axes
    np.testing.assert_array_equal(training.lines[0].get_ydata(), [1, 6])
    np.testing.assert_array_equal(layers.lines[0].get_ydata(), [1, 1])
    with pytest.raises(ValueError, match=r"expected a dict"):
        plot({})
