"""Trace, spectral density, blocks and minibatches of the Hessian; third derivatives of networks with normalization and attention."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    LABEL_ARGS,
    NET,
    NET_ARGS,
    NORMALIZED,
    assert_close,
    flat,
    net_loss,
    normal,
    quadratic_loss,
    symmetric,
)
from jax.flatten_util import ravel_pytree

import eomdl
from eomdl import curvature
from eomdl.curvature.parts import OverBatches


KNOWN = np.concatenate([[9.0, 5.0], np.linspace(0, 1, 38)])
PARAMS = {"a": normal(0, 39), "b": normal(1, 1)}
ARGS = (jnp.asarray(symmetric(KNOWN)), jnp.zeros(40))


def test_density_of_a_known_spectrum():
    found = curvature.spectral_density(quadratic_loss, PARAMS, ARGS, num_samples=64, num_matvecs=20)
    for power in (1, 2):
        mean = found.mean(lambda values, p=power: values**p)
        assert abs(mean.value - np.mean(KNOWN**power)) < 4 * mean.standard_error
        assert mean.standard_error < 0.1 * mean.value
    np.testing.assert_allclose(found.weights.sum(axis=1), 1, rtol=1e-12)
    points = np.linspace(-3, 12, 1501)
    density, error = found.at(points, 0.3)
    exact = np.mean(np.exp(-((points[:, None] - KNOWN) ** 2) / 0.18), axis=1) / (0.3 * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(np.trapezoid(density, points), 1, rtol=1e-6)
    assert np.all(np.abs(density - exact) < 5 * error + 1e-3)
    assert density[np.argmin(np.abs(points - 9))] == pytest.approx(
        exact[np.argmin(np.abs(points - 9))], rel=0.3
    )
    assert found.num_params == 40


def test_picture_of_a_density():
    found = curvature.spectral_density(quadratic_loss, PARAMS, ARGS, num_samples=16, num_matvecs=20)
    (axes,) = found.plot(width=0.1).axes
    labels = axes.get_legend_handles_labels()[1]
    assert labels == ["95 % interval", "density", "one of 40 eigenvalues"]
    assert axes.get_yscale() == "log"
    points, drawn = axes.lines[0].get_data()
    density, highest = found.at(points, 0.1)[0], found.interval(points, 0.1)[1]
    bottom, top = axes.get_ylim()
    shown = density > bottom
    np.testing.assert_allclose(drawn[shown], density[shown])
    assert np.all(drawn[~shown] < bottom)
    # nine and five stand alone, each about as high as the line of one eigenvalue
    peaks = [drawn[np.argmin(np.abs(points - value))] for value in (5.0, 9.0)]
    np.testing.assert_allclose(peaks, axes.lines[1].get_ydata()[0], rtol=0.5)
    upper = axes.collections[0].get_paths()[0].vertices[:, 1].max()
    np.testing.assert_allclose(upper, min(highest.max(), 10 * top), rtol=1e-6)
    assert top > density.max()
    flat = curvature.spectral_density(quadratic_loss, PARAMS, (jnp.eye(40), jnp.zeros(40)), 2, 4)
    assert np.isfinite(flat.plot().axes[0].get_xlim()).all()


@pytest.mark.parametrize("count", [2, 4, 8])
def test_intervals_cover_what_they_say_over_200_seeds(count):
    """Of few vectors too: two standard errors of two cover 60 to 70 of 100 only."""
    many = curvature.spectral_density(quadratic_loss, PARAMS, ARGS, num_samples=1600, num_matvecs=20)
    points, width = np.array([0.2, 0.5, 5.0, 9.0]), 0.3
    bells = np.exp(-(((points[:, None] - KNOWN) / width) ** 2) / 2) / (width * np.sqrt(2 * np.pi))
    exact = np.array([KNOWN.mean(), np.mean(KNOWN**2), np.mean(KNOWN < 0), *bells.mean(axis=1)])
    inside, two = [], []
    for i in range(200):
        rows = slice(i * count, (i + 1) * count)
        found = curvature.SpectralDensity(many.nodes[rows], many.weights[rows], 40)
        means = [found.mean(f) for f in (np.asarray, np.square, lambda x: (x < -1e-9).astype(float))]
        low, high = np.transpose(
            [e.interval for e in means] + [*zip(*found.interval(points, width), strict=True)]
        )
        inside.append((low - 1e-12 <= exact) & (exact <= high + 1e-12))
        two.append(abs(means[0].value - exact[0]) <= 2 * means[0].standard_error)
    covered = np.mean(inside, axis=0)
    assert np.all(covered >= 0.88), covered
    assert covered.mean() >= 0.93
    assert np.mean(two) < 0.91


def test_an_interval_is_student_s_and_of_positive_samples_on_a_log_scale():
    found = curvature.SpectralDensity(np.array([[1.0], [2.0], [3.0]]), np.ones((3, 1)), 10)
    reach = 4.302652729911275 / np.sqrt(
        3
    )  # Student's quantile for two degrees of freedom, times the standard error
    np.testing.assert_allclose(
        found.mean(lambda x: x - 2.5).interval, (-0.5 - reach, -0.5 + reach), rtol=1e-9
    )
    factor = np.exp(reach / 2)
    np.testing.assert_allclose(found.mean(lambda x: x).interval, (2 / factor, 2 * factor), rtol=1e-9)


def test_trace_has_a_standard_error_that_holds():
    found = [curvature.trace(quadratic_loss, PARAMS, ARGS, 64, seed) for seed in range(8)]
    assert sum(f.interval[0] <= KNOWN.sum() <= f.interval[1] for f in found) >= 6
    off = np.array([(f.value - KNOWN.sum()) / f.standard_error for f in found])
    assert 0.3 < np.sqrt(np.mean(off**2)) < 2
    traced = jax.jit(lambda args: vars(curvature.trace(quadratic_loss, PARAMS, args, 64)))(ARGS)
    np.testing.assert_allclose(traced["standard_error"], found[0].standard_error, rtol=1e-10)
    # the diagonal is seen exactly by signs: no spread
    exact = curvature.trace(quadratic_loss, PARAMS, (jnp.diag(jnp.asarray(KNOWN)), jnp.zeros(40)), 4)
    np.testing.assert_allclose(exact.value, KNOWN.sum(), rtol=1e-12)
    assert exact.standard_error < 1e-12


def test_spectrum_of_a_hessian_of_low_rank():
    args = (jnp.asarray(symmetric([3.0] + [0.0] * 39)), jnp.zeros(40))
    found = curvature.spectral_density(quadratic_loss, PARAMS, args, 4, 8)
    assert np.all(np.isfinite(found.nodes))
    np.testing.assert_allclose(found.nodes[:, 0], 3, rtol=1e-10)


@jax.jit
def dense_hessian(params, args):
    x, unravel = ravel_pytree(params)
    return jax.hessian(lambda x: net_loss(unravel(x), args))(x)


def test_pairs_by_block_are_those_of_the_diagonal_blocks():
    found = curvature.eigenpairs_by_block(net_loss, NET, NET_ARGS, 3, rtol=1e-8)
    whole, sizes = np.asarray(dense_hessian(NET, NET_ARGS)), [leaf.size for leaf in jax.tree.leaves(NET)]
    ends = np.cumsum(sizes)
    for end, size, pairs in zip(ends, sizes, found.values(), strict=True):
        block = whole[end - size : end, end - size : end]
        np.testing.assert_allclose(
            pairs.values, np.linalg.eigvalsh(block)[::-1][:3], rtol=1e-8
        )  # all of fewer
        assert bool(pairs.converged[0])
    assert list(found) == ["layer0.b", "layer0.w", "layer1.b", "layer1.w"]


def test_batches_whose_eigenvalues_did_not_converge_are_counted():
    found = OverBatches(np.ones((3, 2)), np.array([[True, True], [True, False], [False, False]]))
    (note,) = found.notes
    assert note.is_fault
    assert note.startswith("In 2 of 3 batches the eigensolver did not converge")
    assert OverBatches(np.ones((1, 1)), np.array([[True]])).notes == ()


def test_eigenvalues_over_batches():
    batches = jax.tree.map(lambda x: x.reshape(3, 2, *x.shape[1:]), NET_ARGS)
    found = curvature.eigenvalues_over_batches(net_loss, NET, batches, 2, rtol=1e-8)
    for i in range(3):
        batch = jax.tree.map(lambda x, j=i: x[j], batches)
        exact = np.linalg.eigvalsh(dense_hessian(NET, batch))[::-1][:2]
        np.testing.assert_allclose(found.values[i], exact, rtol=1e-8)
    assert np.all(found.converged)
    assert found.mean[0] >= np.linalg.eigvalsh(dense_hessian(NET, NET_ARGS))[-1]
    np.testing.assert_allclose(found.standard_deviation, np.std(found.values, axis=0, ddof=1))


# -------------------------------------------- third derivatives of real networks


def attention_loss(params, args):
    """Layer norm, softmax attention, batch norm, cross entropy."""
    x, labels = args
    h = x @ params["in"]
    h = (
        (h - h.mean(-1, keepdims=True))
        / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)
        * params["gain"][None, None]
    )
    q, k, v = (h @ params[name] for name in "qkv")
    h = h + jax.nn.softmax(jnp.einsum("bid,bjd->bij", q, k) / 2, axis=-1) @ v
    h = h.mean(axis=1)
    h = (h - h.mean(0, keepdims=True)) / jnp.sqrt(h.var(0, keepdims=True) + 1e-5)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(h @ params["out"], labels))


ATTENTION = {
    "in": normal(0, 3, 4),
    "gain": 1 + 0.2 * normal(1, 4),
    **{name: 0.5 * normal(i, 4, 4) for i, name in enumerate("qkv", 2)},
    "out": normal(6, 4, 2),
}


def batch_norm_loss(params, args):
    """Batch norm and layer norm with tanh, softmax."""
    x, labels = args
    h = x @ params["first"]["w"] + params["first"]["b"][None]
    h = (h - h.mean(0, keepdims=True)) / jnp.sqrt(h.var(0, keepdims=True) + 1e-5)
    h = jnp.tanh(h * params["norm"]["gain"][None] + params["norm"]["shift"][None])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(h @ params["head"], labels))


@pytest.mark.parametrize(
    ("loss", "params", "args"),
    [
        (attention_loss, ATTENTION, (normal(7, 6, 5, 3), jnp.array([0, 1, 1, 0, 1, 0]))),
        (batch_norm_loss, NORMALIZED, LABEL_ARGS),
    ],
    ids=["layer norm, attention, softmax, batch norm", "batch norm, softmax"],
)
def test_third_derivatives_of_networks_are_differences_of_products(loss, params, args):
    u, v = (jax.tree.map(lambda x, s=seed: normal(s, *x.shape), params) for seed in (20, 21))
    product = jax.jit(
        lambda h: jax.jvp(
            lambda p: jax.grad(loss)(p, args), (jax.tree.map(lambda p, d: p + h * d, params, u),), (v,)
        )[1]
    )
    exact = jax.jit(curvature.third_derivative, static_argnums=0)(loss, params, args, u, v)

    def difference(h):
        return jax.tree.map(lambda a, b: (a - b) / (2 * h), product(h), product(-h))

    # Richardson: the error of the difference is of fourth order
    one, two = difference(1e-3), difference(2e-3)
    assert_close(jax.tree.map(lambda a, b: (4 * a - b) / 3, one, two), exact, rtol=1e-6)
    assert np.linalg.norm(flat(exact)) > 0.01


def test_gradient_of_the_sharpness_of_an_attention_network():
    args = (normal(7, 6, 5, 3), jnp.array([0, 1, 1, 0, 1, 0]))
    direction = jax.tree.map(lambda x: normal(30, *x.shape), ATTENTION)

    def top(h):
        moved = jax.tree.map(lambda p, d: p + h * d, ATTENTION, direction)
        return curvature.eigenpairs(attention_loss, moved, args, 1, rtol=1e-9, num_matvecs=40)

    vector = jax.tree.map(lambda leaf: leaf[0], top(0.0).vectors)
    ascent = jax.jit(curvature.eigenvalue_gradient, static_argnums=0)
    slope = flat(ascent(attention_loss, ATTENTION, args, vector)) @ flat(direction)
    np.testing.assert_allclose(slope, (top(1e-4).values[0] - top(-1e-4).values[0]) / 2e-4, rtol=1e-4)


def test_wrong_arguments_of_results():
    found = curvature.spectral_density(quadratic_loss, PARAMS, ARGS, 4, 8)
    with pytest.raises(ValueError, match="width: expected a finite number > 0"):
        found.at([1.0], 0.0)
    with pytest.raises(ValueError, match="points: expected"):
        found.at("wrong", 0.1)
    with pytest.raises(ValueError, match="function: expected"):
        found.mean(3)
    assert eomdl.curvature is curvature
