"""The noise of gradients against its definition: every batch is enumerated."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from helpers import NET, NET_ARGS, assert_close, net, normal

import eomdl
from eomdl.noise import AbstractNoise, DiagonalNoise, IsotropicNoise, MinibatchNoise, quadratic_law


def losses(params, args):
    """Squared error of a tanh network, by example."""
    x, y = args
    return jnp.sum((net(params, x) - y) ** 2, axis=1)


X, DATA = {"w": normal(0, 3)}, (normal(1, 5, 3), normal(2, 5))


def small_losses(params, args):
    x, y = args
    return jnp.tanh(x @ params["w"] - y) ** 2 + jnp.cos(x[:, 0] * params["w"][0])


MEAN = eomdl.losses.mean_loss(small_losses)


def batches(size: int, replacement: bool) -> list[tuple[int, ...]]:
    """All batches, each as likely as another."""
    if replacement:
        return list(itertools.product(range(5), repeat=size))
    return list(itertools.combinations(range(5), size))


@jax.jit
def gradients(params):
    return jax.jacrev(small_losses)(params, DATA)["w"]


CASES = [(1, False), (2, False), (3, True), (4, False), (5, False)]


@pytest.mark.parametrize(("size", "replacement"), CASES)
def test_covariance_trace_and_third_cumulant_are_those_over_all_batches(size, replacement):
    noise = MinibatchNoise(small_losses, size, replacement)
    g = np.asarray(gradients(X))
    kicks = np.array([g[list(batch)].mean(axis=0) for batch in batches(size, replacement)]) - g.mean(axis=0)
    covariance = kicks.T @ kicks / len(kicks)
    found = [noise.covariance_product(X, {"w": e}, DATA)["w"] for e in jnp.eye(3)]
    np.testing.assert_allclose(found, covariance, rtol=1e-12, atol=1e-15)
    for chunk_size in (1, 2, 7):
        np.testing.assert_allclose(
            noise.trace(X, DATA, chunk_size), np.trace(covariance), rtol=1e-12, atol=1e-15
        )
    if size < 5 or replacement:
        skewness = np.abs(np.mean(kicks**3, axis=0)).sum() / (np.diag(covariance) ** 1.5).sum()
        np.testing.assert_allclose(noise.third_cumulant_ratio(X, DATA), skewness, rtol=1e-11)


def test_the_noise_of_a_batch_is_its_gradient_less_the_mean():
    noise, g = MinibatchNoise(small_losses, 2), np.asarray(gradients(X))
    weights = jnp.array([0.5, 0, 0, 0.5, 0]) - 1 / 5
    np.testing.assert_allclose(
        noise.apply(X, weights, DATA)["w"], g[[0, 3]].mean(0) - g.mean(0), rtol=1e-12, atol=1e-15
    )


def test_weights_have_sum_0_and_samples_are_applied_weights():
    noise, key = MinibatchNoise(small_losses, 2), jax.random.key(3)
    weights = noise.sample_weights(key, DATA)
    assert weights.shape == (5,)
    assert abs(float(jnp.sum(weights))) < 1e-15
    assert jax.tree.structure(noise.sample(key, X, DATA)) == jax.tree.structure(X)
    # The map from normals to weights is linear: its matrix has the covariance f/N (1 - 1/N).
    matrix = np.asarray(jax.vmap(lambda z: noise.weights_from(z, DATA))(jnp.eye(5)))
    np.testing.assert_allclose(matrix @ matrix.T, (3 / 8) / 5 * (np.eye(5) - 1 / 5), atol=1e-16)


def test_mean_loss_is_the_mean_and_goes_in_chunks():
    whole = jax.grad(MEAN)(X, DATA)
    np.testing.assert_allclose(whole["w"], gradients(X).mean(0), rtol=1e-13)
    assert_close(jax.grad(eomdl.losses.MeanOverChunks(MEAN, 2))(X, DATA), whole, rtol=1e-13)


def compiled(function, *inputs):
    """Optimized as in a user's process: the suite compiles quickly, and merges nothing."""
    with jax.disable_jit(False):
        options = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
        return jax.jit(function).lower(*inputs).compile(compiler_options=options)


def test_apply_is_one_gradient_in_flops_and_memory():
    noise, mean = MinibatchNoise(losses, 2), eomdl.losses.mean_loss(losses)
    data = (normal(1, 64, 3), normal(2, 64, 2))
    gradient = compiled(jax.grad(mean), NET, data)
    applied = compiled(noise.apply, NET, normal(3, 64), data)
    assert applied.cost_analysis()["flops"] <= 1.05 * gradient.cost_analysis()["flops"]
    memory = [program.memory_analysis().temp_size_in_bytes for program in (applied, gradient)]
    assert memory[0] <= 1.1 * memory[1] + 64 * 8  # the weights of 64 examples


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_noise_keeps_structure_and_dtype(dtype):
    params, args = jax.tree.map(lambda x: x.astype(dtype), (NET, NET_ARGS))
    scales = jax.tree.map(lambda x: jnp.abs(x) + 0.1, params)
    for noise in (MinibatchNoise(losses, 2), IsotropicNoise(0.3), DiagonalNoise(0.2), DiagonalNoise(scales)):
        for found in (
            jax.eval_shape(noise.sample, jax.random.key(0), params, args),
            jax.eval_shape(noise.covariance_product, params, params, args),
        ):
            assert jax.tree.structure(found) == jax.tree.structure(params)
            assert [(x.shape, x.dtype) for x in jax.tree.leaves(found)] == [
                (x.shape, x.dtype) for x in jax.tree.leaves(params)
            ]


class Multiplicative(AbstractNoise):
    """A user's own noise."""

    scale: float

    def apply(self, params, weights, args):
        return jax.tree.map(lambda x, w: self.scale * x * w, params, weights)


def test_covariances_of_noise_that_is_diagonal():
    v = {"w": jnp.array([1.0, -2.0, 0.5])}
    assert_close(IsotropicNoise(0.3).covariance_product(X, v, None), {"w": 0.6 * v["w"]}, 1e-15)
    assert_close(DiagonalNoise(0.3).covariance_product(X, v, None), {"w": 0.09 * v["w"]}, 1e-15)
    scale = {"w": jnp.array([1.0, 0.0, 3.0])}
    assert_close(DiagonalNoise(scale).covariance_product(X, v, None), {"w": scale["w"] ** 2 * v["w"]}, 1e-15)
    assert_close(Multiplicative(0.5).covariance_product(X, v, None), {"w": (X["w"] / 2) ** 2 * v["w"]}, 1e-14)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MinibatchNoise(small_losses, 0), r"^batch_size: expected an integer >= 1"),
        (lambda: MinibatchNoise(small_losses, 6).sample_weights(jax.random.key(0), DATA), "replacement=True"),
        (
            lambda: MinibatchNoise(small_losses, 1).factor((jnp.ones((1, 3)), jnp.ones(1))),
            "at least 2 examples",
        ),
        (lambda: MinibatchNoise(MEAN, 2).trace(X, DATA), r"^losses: expected .*take no mean"),
        (
            lambda: MinibatchNoise(lambda p, a: jnp.ones(3), 2).validate(X, DATA),
            r"^losses: expected .*\(5,\)",
        ),
        (
            lambda: MinibatchNoise(small_losses, 2).apply(X, jnp.ones(3), DATA),
            r"^weights: expected shape \(5,\)",
        ),
        (lambda: IsotropicNoise(0.0), r"^temperature: expected a finite number > 0"),
        (lambda: DiagonalNoise({"w": -1.0}), r"^scale\['w'\]: expected finite numbers >= 0"),
        (lambda: DiagonalNoise({"v": 1.0}).apply(X, X, None), r"^scale: expected the structure of params"),
        (lambda: eomdl.losses.mean_loss(3), r"^losses: expected a function"),
    ],
)
def test_wrong_arguments_are_named_with_a_way_out(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def normalized(params, args):
    x, y = args
    x = x - jnp.mean(x, axis=0, keepdims=True)
    return (x @ params["w"] - y) ** 2


def test_losses_that_mix_examples_are_found():
    with pytest.raises(ValueError, match="batch normalization"):
        MinibatchNoise(normalized, 2).validate(X, DATA)
    MinibatchNoise(small_losses, 2).validate(X, DATA)


def test_a_batch_of_all_examples_is_said_to_have_no_noise():
    with pytest.warns(UserWarning, match="there is no noise"):
        MinibatchNoise(small_losses, 5).validate(X, DATA)


# ------------------------------------------------------------ the law on a quadratic loss


H = np.array([[1.2, 0.4], [0.4, 0.7]])
ETA = 0.3


def test_quadratic_law_has_the_law_of_sgd_at_every_step():
    c = np.array([[0.5, 0.1], [0.1, 0.3]])
    law = quadratic_law(H, c, ETA)
    step = np.eye(2) - ETA * H
    # Van Loan: the covariance after a time of eta, from zero.
    block = np.block([[-law.drift, law.noise_covariance], [np.zeros((2, 2)), law.drift.T]])
    after = scipy.linalg.expm(ETA * block)
    np.testing.assert_allclose(after[2:, 2:].T, step, atol=1e-14)
    np.testing.assert_allclose(after[2:, 2:].T @ after[:2, 2:], ETA**2 * c, atol=1e-15)
    s = law.stationary_covariance
    np.testing.assert_allclose(step @ s @ step.T + ETA**2 * c, s, atol=1e-15)
    np.testing.assert_allclose(law.drift @ s + s @ law.drift.T, -law.noise_covariance, atol=1e-15)


def test_quadratic_law_of_one_mode_and_without_a_stationary_law():
    law = quadratic_law([[2.0]], [[0.5]], 0.1)
    np.testing.assert_allclose(law.stationary_covariance, [[0.1 * 0.5 / (2 * (2 - 0.2))]], rtol=1e-14)
    flat_law = quadratic_law(np.diag([0.0, 1.0]), np.eye(2), 0.1)
    assert flat_law.stationary_covariance is None
    np.testing.assert_allclose(flat_law.noise_covariance[0, 0], 0.1, rtol=1e-14)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.diag([0.5, 2]), np.ones((2, 2)), 0.1), "eigenvalue of -0.00014 beside 0.2"),
        ((np.diag([0.5, 2]), np.eye(2), 0.5), "got 1: its iterates alternate"),
        ((np.diag([0.5, 2]), np.eye(2), 1.0), "no stationary law"),
        ((np.ones((2, 3)), np.eye(2), 0.1), "^hessian: expected a symmetric matrix"),
        ((np.eye(2), np.eye(3), 0.1), "^covariance: expected the shape of hessian"),
        ((np.eye(2), -np.eye(2), 0.1), "^covariance: expected a positive noise"),
    ],
)
def test_quadratic_law_refuses_what_has_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        quadratic_law(*arguments)
