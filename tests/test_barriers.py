"""Barriers of a known landscape, clusters of known matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import NET_ARGS, net_loss, net_params, normal, quadratic_loss, symmetric

import eomdl
from eomdl.geometry import barriers, clusters
from eomdl.plotting.development import plot_barriers, plot_development
from eomdl.runs import stack


def wells_loss(params, args):
    """sum_i h_i (x_i^2 - 1)^2 + c x: minima at the corners of a cube, the barrier a sum over the x_i that differ."""
    heights, tilt = args
    return jnp.sum(heights * (params**2 - 1) ** 2) + jnp.vdot(tilt, params)


HEIGHTS = np.array([1.0, 0.3, 0.02])
WELLS = (jnp.asarray(HEIGHTS), jnp.zeros(3))
CORNERS = np.array([[s, t, u] for s in (-1.0, 1.0) for t in (-1.0, 1.0) for u in (-1.0, 1.0)])
# On the line between corners every differing x_i passes 0 at the middle: h_i each.
KNOWN = (CORNERS[:, None] != CORNERS[None]) @ HEIGHTS


# --------------------------------------------------------------- one barrier


def barrier(loss, a, b, args, num_points=25):
    return barriers(loss, stack([a, b]), args, num_points)[0, 1]


@pytest.mark.parametrize("tilt", [0.0, 0.7])
def test_barrier_of_a_double_well(tilt):
    # The chord takes the tilt away; the mean of the ends would leave some of it.
    args = (jnp.ones(1), jnp.array([tilt]))
    measured = barrier(wells_loss, jnp.array([-1.0]), jnp.array([1.0]), args)
    np.testing.assert_allclose(measured, 1.0, rtol=1e-14)


@pytest.mark.parametrize("num_points", [2, 4, 10, 25])
def test_barrier_on_its_grid(num_points):
    args = (jnp.ones(1), jnp.zeros(1))
    measured = barrier(wells_loss, jnp.array([-1.0]), jnp.array([1.0]), args, num_points)
    nearest = 0.0 if num_points % 2 else 1 / (num_points - 1)
    np.testing.assert_allclose(measured, (1 - nearest**2) ** 2, rtol=1e-13)
    # dx = 2 d alpha and L'' = 12 x^2 - 4 in x: 4 * 4 at the top in alpha
    assert 1 - measured <= (1 / (num_points - 1)) ** 2 * 16 / 8 + 1e-14


def test_barrier_where_the_top_is_not_in_the_middle():
    # On the line from 0 to 1, x^2 (1 - x) above its chord of zeros: 4/27 at x = 2/3.
    loss = lambda x, args: x**2 * (1 - x)
    np.testing.assert_allclose(barrier(loss, jnp.array(0.0), jnp.array(1.0), None, 31), 4 / 27, rtol=1e-14)
    np.testing.assert_allclose(barrier(loss, jnp.array(1.0), jnp.array(0.0), None, 31), 4 / 27, rtol=1e-14)


def test_no_barrier_on_a_convex_loss():
    args = (jnp.asarray(symmetric([0.1, 0.7, 1.3, 2.0])), jnp.ones(4))
    points = normal(0, 6, 4)
    np.testing.assert_array_equal(barriers(quadratic_loss, points, args), np.zeros((6, 6)))
    assert barrier(quadratic_loss, points[0], points[1], args) == 0


def test_barrier_is_the_height_of_the_losses_on_the_line_above_their_chord():
    a, b = net_params(0), net_params(1)
    alpha = np.linspace(0, 1, 5)
    points = [jax.tree.map(lambda x, y, s=s: (1 - s) * x + s * y, a, b) for s in alpha]
    losses = np.array([net_loss(p, NET_ARGS) for p in points])
    expected = np.max(losses - (1 - alpha) * losses[0] - alpha * losses[-1])
    np.testing.assert_allclose(barrier(net_loss, a, b, NET_ARGS, 5), expected, rtol=1e-12, atol=1e-15)


# ------------------------------------------------------------------ matrices


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_barriers_of_the_corners_of_a_cube(batch_size):
    matrix = barriers(wells_loss, jnp.asarray(CORNERS), WELLS, 11, batch_size=batch_size)
    np.testing.assert_allclose(matrix, KNOWN, rtol=1e-14, atol=1e-15)
    np.testing.assert_array_equal(matrix, matrix.T)


def test_barriers_are_those_of_every_two():
    nets = [net_params(seed) for seed in range(4)]
    matrix = np.asarray(barriers(net_loss, stack(nets), NET_ARGS, 9))
    for i in range(4):
        for j in range(4):
            expected = barrier(net_loss, nets[i], nets[j], NET_ARGS, 9)
            np.testing.assert_allclose(matrix[i, j], expected, rtol=1e-12, atol=1e-15)
    assert matrix.max() > 0.01


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_dtype_is_that_of_the_params(dtype):
    args = jax.tree.map(lambda x: x.astype(dtype), WELLS)
    matrix = barriers(wells_loss, jnp.asarray(CORNERS, dtype), args, 11)
    assert matrix.dtype == dtype
    np.testing.assert_allclose(matrix, KNOWN, rtol=1e-6, atol=1e-6)


def test_one_run_has_no_barrier():
    np.testing.assert_array_equal(barriers(wells_loss, jnp.ones((1, 3)), WELLS), [[0]])


STEP = eomdl.Ensemble(eomdl.optimizer_step(wells_loss, optax.sgd(0.1)))
STARTS = jnp.array([[-0.3, 0.2, 0.4], [0.2, 0.2, 0.5], [-0.1, 0.4, 0.3], [40.0, 1.0, 1.0]])


def test_barriers_at_every_saved_step_of_an_ensemble():
    observe = {"barriers": lambda params, args: barriers(wells_loss, params, args, 5)}
    run = eomdl.iterate(STEP, STARTS, 60, args=WELLS, save_steps=[0, 5, 60], observe=observe)
    history = barriers(wells_loss, run, WELLS, 5)
    assert history.shape == (3, 4, 4)
    # The last start diverges at once: after that it has no barrier with the others, nor with itself.
    np.testing.assert_array_equal(run.end.state.alive, [1, 1, 1, 0])
    assert np.all(np.isnan(history[1:, 3]))
    assert np.all(np.isnan(history[1:, :, 3]))
    np.testing.assert_array_equal(history[:, :3, :3], run.observables["barriers"][:, :3, :3])
    # Two valleys of the first coordinate: they part while the loss falls.
    np.testing.assert_array_equal(clusters(history[-1], 0.1), [0, 1, 0, 2])
    assert history[0, 0, 1] < history[1, 0, 1] < history[2, 0, 1]


def test_wrong_arguments_are_named():
    two = jnp.ones((2, 3))
    alone = eomdl.iterate(lambda x, args, k: x, jnp.ones(3), 2)
    bare = eomdl.iterate(STEP, STARTS, 2, args=WELLS, save_params=False)
    for name, call in {
        "num_points": lambda: barriers(wells_loss, two, WELLS, 1),
        "loss": lambda: barriers(lambda p, a: p, two, WELLS),
        "runs": lambda: barriers(wells_loss, {"a": two, "b": jnp.ones(3)}, WELLS),
        "batch_size": lambda: barriers(wells_loss, two, WELLS, batch_size=0),
        "trajectory": lambda: barriers(wells_loss, alone, WELLS),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            call()
    with pytest.raises(ValueError, match=r"^runs: expected saved parameters"):
        barriers(wells_loss, bare, WELLS)


# ------------------------------------------------------------------ clusters


def test_clusters_of_the_cube_at_every_height():
    bits = (CORNERS > 0) @ np.array([4, 2, 1])
    np.testing.assert_array_equal(clusters(KNOWN, 0.01), bits)
    np.testing.assert_array_equal(clusters(KNOWN, 0.1), bits // 2)
    np.testing.assert_array_equal(clusters(KNOWN, 0.5), bits // 4)
    np.testing.assert_array_equal(clusters(KNOWN, 1.5), np.zeros(8))
    # At the height itself: a barrier that is not above the threshold joins.
    np.testing.assert_array_equal(clusters(KNOWN, 0.02), bits // 2)


def test_labels_do_not_depend_on_the_order_and_the_largest_is_first():
    sizes = [2, 5, 3, 1]
    true = np.repeat(np.arange(4), sizes)
    matrix = np.where(true[:, None] == true, 0.05, 1.0 + 0.1 * np.abs(true[:, None] - true))
    np.fill_diagonal(matrix, 0)
    shuffle = np.random.default_rng(0).permutation(11)
    expected = np.array([2, 0, 1, 3])[true]
    np.testing.assert_array_equal(clusters(matrix[shuffle][:, shuffle], 0.1), expected[shuffle])


def test_complete_linkage_joins_no_ends_of_a_chain():
    chain = np.minimum(np.abs(np.subtract.outer(np.arange(4), np.arange(4))), 2) * 0.1
    assert len(set(clusters(chain, 0.15, "single"))) == 1
    labels = clusters(chain, 0.15)
    assert len(set(labels)) == 2
    assert np.all(chain[labels[:, None] == labels] <= 0.15)


@pytest.mark.parametrize("linkage", ["complete", "single", "average"])
def test_what_is_not_finite_is_not_connected(linkage):
    matrix = np.zeros((5, 5))
    matrix[4] = matrix[:, 4] = np.nan
    matrix[0, 3] = matrix[3, 0] = np.inf
    labels = clusters(matrix, 1e6, linkage)
    assert labels[4] == max(labels)
    assert np.sum(labels == labels[4]) == 1
    # 0 and 3 are both connected to 1 and 2: a chain does join them
    assert (labels[0] == labels[3]) == (linkage == "single")
    np.testing.assert_array_equal(clusters(np.full((3, 3), np.nan), 1.0, linkage), [0, 1, 2])
    np.testing.assert_array_equal(clusters([[np.nan]], 1.0, linkage), [0])


def test_wrong_clusters_are_named():
    for name, call in {
        "matrix": lambda: clusters([[0, 1], [2, 0]], 1.0),
        "threshold": lambda: clusters(KNOWN, -1.0),
        "linkage": lambda: clusters(KNOWN, 1.0, "ward"),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            call()
    with pytest.raises(ValueError, match=r"^matrix: expected"):
        clusters(np.zeros((2, 3)), 1.0)


# --------------------------------------------------------------------- plots


def test_plots_show_every_checkpoint():
    matrices = np.stack([0 * KNOWN, KNOWN / 2, KNOWN])
    losses = np.ones((3, 8)) * np.array([3.0, 2.0, 1.0])[:, None]
    labels = clusters(KNOWN, 0.5)
    figure = plot_barriers([0, 5, 60], matrices, labels)
    order = np.argsort(labels, kind="stable")
    for axes, step, matrix in zip(figure.axes[:3], (0, 5, 60), matrices, strict=True):
        assert axes.get_title() == f"step {step}"
        np.testing.assert_array_equal(axes.images[0].get_array(), matrix[order][:, order])
    figure = plot_development([0, 5, 60], matrices, losses, labels, 0.5, intervention=5)
    barrier_axes, count_axes, loss_axes = figure.axes
    between = {line.get_label(): line.get_ydata() for line in barrier_axes.lines}["between clusters, median"]
    np.testing.assert_allclose(between, np.array([0, 0.5, 1]) * np.median(KNOWN[:4, 4:]))
    np.testing.assert_array_equal(count_axes.lines[0].get_ydata(), [1, 2, 2])
    assert len(loss_axes.lines) >= 8
    with pytest.raises(ValueError, match=r"^labels: expected"):
        plot_barriers([0, 5, 60], matrices, labels[:3])
    with pytest.raises(ValueError, match=r"^(matrices|steps): expected"):
        plot_development([0, 5], matrices, losses, labels, 0.5)
