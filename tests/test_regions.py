"""Linear regions of ReLU networks: against hand-worked networks, hyperplanes and dense sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import net_params, normal

from eomdl.geometry.regions import RegionMap, count_regions_on_line, region_map
from eomdl.plotting import plot


def preactivations(params, x):
    """Of every hidden layer of a ReLU network, as a pytree."""
    hidden = []
    for layer in list(params.values())[:-1]:
        hidden.append(x @ layer["w"] + layer["b"])
        x = jax.nn.relu(hidden[-1])
    return hidden


def one_layer(params, x):
    w, b = params
    return w @ x + b


def units(*crossings, slopes=None):
    """One hidden layer on the line from 0 to 1: unit i is slope_i (t - crossing_i)."""
    c = jnp.array(crossings)
    s = jnp.ones_like(c) if slopes is None else jnp.array(slopes)
    return jnp.stack([s, 0 * s], axis=1), -s * c


ORIGIN, ACROSS = jnp.array([0.0, 7.0]), jnp.array([1.0, 7.0])


# ----------------------------------------------------------------------- lines


@pytest.mark.parametrize(
    ("crossings", "slopes", "expected"),
    [
        ([0.25, 0.7, -0.5, 1.5], None, [0.25, 0.7]),  # two outside the segment
        ([0.7, 0.25, 0.5, 0.9], [-3.0, 1e-3, 40.0, -1e3], [0.25, 0.5, 0.7, 0.9]),
        ([0.5, 0.5, 0.5, 0.75], [1.0, -2.0, 0.3, 1.0], [0.5, 0.75]),  # three at once
        ([0.0, 1.0, 0.4, 0.4], None, [0.4]),  # at the ends: no region between
        ([0.3, 0.6, 0.6, 0.3], [0.0, 0.0, 0.0, 0.0], []),  # dead units, z = 0 throughout
        ([1.0 / 3, 1.0 / 3 + 1e-9, 0.5, 0.5], None, [1 / 3, 1 / 3 + 1e-9, 0.5]),  # a narrow region
        ([1.0 / 3, 1.0 / 3 + 1e-13, 0.5, 0.5], None, [1 / 3, 0.5]),  # narrower than the resolution
    ],
)
def test_one_hidden_layer_by_hand(crossings, slopes, expected):
    found = count_regions_on_line(one_layer, units(*crossings, slopes=slopes), ORIGIN, ACROSS)
    np.testing.assert_allclose(found.breakpoints, expected, atol=1e-12)
    assert found.count == len(expected) + 1
    assert found.reached == 1
    assert found.notes == ()


def test_two_layers_by_hand():
    """relu(t - 1/4) - relu(t - 1/2) rises to 1/4 and stays; the second layer crosses 1/8 once, 1/4 never."""

    def two_layers(params, x):
        first = one_layer(params, x)
        a, b = jax.nn.relu(first)
        return {"first": first, "second": jnp.stack([a - b - 1 / 8, a - b - 0.3, -(a + b)])}

    found = count_regions_on_line(two_layers, units(0.25, 0.5), ORIGIN, ACROSS)
    # -(a + b) is 0 and leaves it at 1/4, where the first unit crosses anyway.
    np.testing.assert_allclose(found.breakpoints, [0.25, 0.375, 0.5], atol=1e-12)


DEEP = [net_params(seed, (5, 12, 12, 12, 2)) for seed in range(3)]
PATTERNS = jax.jit(
    jax.vmap(
        lambda params, a, b, t: jnp.concatenate(preactivations(params, a + t * (b - a))) > 0,
        (None, None, None, 0),
    )
)


@pytest.mark.parametrize("seed", range(3))
def test_walk_finds_what_dense_sampling_finds(seed):
    params, a, b = DEEP[seed], normal(seed, 5, scale=2.0), normal(seed + 10, 5, scale=2.0)
    found = count_regions_on_line(preactivations, params, a, b)
    assert found.count > 8
    # One sample in every region that the walk claims, by sampling alone in the second count.
    edges = np.concatenate([[0], found.breakpoints, [1]])
    inside = np.asarray(PATTERNS(params, a, b, jnp.asarray((edges[1:] + edges[:-1]) / 2)))
    assert np.all(np.any(inside[1:] != inside[:-1], axis=1))
    t = np.linspace(0, 1, 100_001)
    sampled = np.asarray(PATTERNS(params, a, b, jnp.asarray(t)))
    change = np.flatnonzero(np.any(sampled[1:] != sampled[:-1], axis=1))
    assert np.diff(edges).min() > 1e-5  # wider than the sampling, which then misses none
    assert len(change) == len(found.breakpoints)
    assert np.all((t[change] <= found.breakpoints) & (found.breakpoints <= t[change + 1]))


def test_walking_back_gives_the_same_regions():
    a, b = normal(0, 5, scale=2.0), normal(10, 5, scale=2.0)
    there = count_regions_on_line(preactivations, DEEP[0], a, b)
    back = count_regions_on_line(preactivations, DEEP[0], b, a)
    np.testing.assert_allclose(back.breakpoints[::-1], 1 - there.breakpoints, atol=1e-12)


def test_single_precision_finds_the_same_regions():
    a, b = normal(0, 5, scale=2.0), normal(10, 5, scale=2.0)
    double = count_regions_on_line(preactivations, DEEP[0], a, b)
    single = jax.tree.map(lambda x: x.astype(jnp.float32), (DEEP[0], a, b))
    found = count_regions_on_line(preactivations, *single)
    apart = np.diff(double.breakpoints, prepend=-1) > found.resolution
    np.testing.assert_allclose(found.breakpoints, double.breakpoints[apart], atol=1e-5)
    assert 1e5 * double.resolution < found.resolution < 1e-4


def test_inputs_of_any_shape():
    image = lambda params, x: preactivations(params, jnp.ravel(x[:, :, 0])[:5])
    a, b = normal(0, 2, 3, 1, scale=2.0), normal(10, 2, 3, 1, scale=2.0)
    flat = count_regions_on_line(preactivations, DEEP[0], a.ravel()[:5], b.ravel()[:5])
    found = count_regions_on_line(image, DEEP[0], a, b)
    np.testing.assert_allclose(found.breakpoints, flat.breakpoints, rtol=1e-12)


def test_a_walk_cut_short_says_so():
    params = units(0.2, 0.4, 0.6, 0.8)
    found = count_regions_on_line(one_layer, params, ORIGIN, ACROSS, max_regions=3)
    np.testing.assert_allclose(found.breakpoints, [0.2, 0.4])
    assert found.notes == ("Stopped at t = 0.6 with 3 regions found so far. Raise `max_regions`.",)
    whole = count_regions_on_line(one_layer, params, ORIGIN, ACROSS, max_regions=5)
    assert whole.count == 5
    assert whole.notes == ()


def test_wrong_lines_are_refused():
    params = units(0.25, 0.5)
    cases = [
        (r"^b: expected another input than a", (one_layer, params, ORIGIN, ORIGIN)),
        (
            r"^b: expected shape \(2,\), that of the first, got \(3,\)",
            (one_layer, params, ORIGIN, jnp.ones(3)),
        ),
        (r"^a: expected an input, an array of finite numbers", (one_layer, params, ORIGIN * jnp.nan, ACROSS)),
        (r"^params", (one_layer, None, ORIGIN, ACROSS)),
        (r"^preactivations: expected a function", (lambda p, x: p[0] @ x[:1], params, ORIGIN, ACROSS)),
        (r"^preactivations: expected finite", (lambda p, x: one_layer(p, x) / 0, params, ORIGIN, ACROSS)),
        (
            r"^preactivations: expected a piecewise affine",
            (lambda p, x: jnp.tanh(one_layer(p, x)), params, ORIGIN, ACROSS),
        ),
    ]
    for message, arguments in cases:
        with pytest.raises(ValueError, match=message):
            count_regions_on_line(*arguments)
    with pytest.raises(ValueError, match=r"^max_regions: expected an integer >= 1"):
        count_regions_on_line(one_layer, params, ORIGIN, ACROSS, max_regions=0)


# ---------------------------------------------------------------------- planes

CORNERS = np.array([[1.0, 1.0, 0.0], [4.0, 1.0, 0.0], [1.0, 1.0, 4.0]])  # the plane y = 1


def test_lines_in_general_position_cut_a_plane_into_seven():
    # x = 2, z = 1 and x + z = 4 in the plane, in which the triangle of the three lies.
    w = jnp.array([[1.0, 0, 0], [0, 0, 1], [1, 0, 1]])
    b = -jnp.array([2.0, 1.0, 4.0])
    found = region_map(one_layer, (w, b), CORNERS, resolution=61)
    assert found.count == 7  # 1 + n + n (n - 1) / 2
    np.testing.assert_allclose(found.corners, [[0, 0], [3, 0], [0, 4]], atol=1e-12)
    np.testing.assert_allclose([found.x[0], found.x[-1], found.y[0], found.y[-1]], [-0.6, 3.6, -0.8, 4.8])
    # The labels are those of the three signs at each point, whatever they are called.
    x, y = np.meshgrid(found.x + 1, found.y)
    signs = (x > 2) + 2 * (y > 1) + 4 * (x + y > 4)
    pairs = set(zip(found.labels.ravel(), signs.ravel(), strict=True))
    assert len(pairs) == 7 == len({label for label, _ in pairs}) == len({sign for _, sign in pairs})


def test_a_line_of_the_map_meets_the_regions_that_the_walk_meets():
    corners = np.stack([normal(i, 5, scale=2.0) for i in (0, 10, 20)])
    found = region_map(preactivations, DEEP[0], corners, resolution=41, margin=0.0, batch_size=7)
    whole = region_map(preactivations, DEEP[0], corners, resolution=41, margin=0.0)
    np.testing.assert_array_equal(found.labels, whole.labels)
    # The bottom row is the segment from the first corner to the second, if the third lies beside it.
    assert found.corners[2, 0] > 0 or found.x[0] < 0
    row = int(np.argmin(np.abs(found.y)))
    on_segment = (found.x >= 0) & (found.x <= found.corners[1, 0])
    labels = found.labels[row, on_segment]
    seen = 1 + np.count_nonzero(np.diff(labels))
    walked = count_regions_on_line(preactivations, DEEP[0], corners[0], corners[1])
    t = found.x[on_segment] / found.corners[1, 0]
    between = np.unique(np.searchsorted(walked.breakpoints, t))
    assert seen == len(between) > 5


@pytest.mark.parametrize("nothing", [(), "a string"])
def test_a_function_without_preactivations_is_refused(nothing):
    with pytest.raises(ValueError, match=r"^preactivations: expected a function \(params, one input\)"):
        count_regions_on_line(lambda params, x: nothing, jnp.ones(2), np.zeros(2), np.ones(2))


def test_wrong_planes_are_refused():
    params = (jnp.eye(3), jnp.zeros(3))
    with pytest.raises(
        ValueError, match=r"^corners: expected three inputs, shape \(3, ...\), got shape \(2, 3\)"
    ):
        region_map(one_layer, params, CORNERS[:2])
    with pytest.raises(ValueError, match=r"^corners: expected three inputs that are not on one line"):
        region_map(one_layer, params, CORNERS[[0, 1, 0]])
    for name, value in (("resolution", 1), ("batch_size", 0), ("margin", -0.1)):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            region_map(one_layer, params, CORNERS, **{name: value})


def test_the_picture_has_a_panel_a_map():
    labels = np.arange(9).reshape(3, 3)
    regions = RegionMap(labels, np.arange(3.0), np.arange(3.0), np.zeros((3, 2)))
    figure = plot({"early": regions, "late": regions})
    assert [axes.get_title() for axes in figure.axes] == ["early: 9 regions seen", "late: 9 regions seen"]
    # One colour a region, and no two of one colour.
    assert len(np.unique(figure.axes[0].collections[0].get_array())) == 9
    with pytest.raises(ValueError, match=r"^result: expected a dict"):
        plot({})
