"""The laws of flows with noise, over every one in the registry. No sampling: all batches are enumerated."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
from helpers import VALLEY, flat, normal, pulled_loss, pulled_losses, valley_loss
from registry import BATCH, EXAMPLES, NOISY, NOISY_FLOWS, for_each
from weak import coefficients, generate, local_error, mixed

import eomdl
from eomdl.flows import (
    DiscretizedLangevinFlow,
    LangevinFlow,
    StochasticInterpolatingFlow,
    StochasticModifiedFlow,
    StochasticMomentumFlow,
    UnderdampedLangevinFlow,
)


SGD = StochasticModifiedFlow(pulled_losses, 0.1, BATCH)


def law_defect(entry, rate):
    flow, t = entry.make(pulled_losses, rate), entry.time
    state = entry.state(flow)
    return local_error(flow, t, state, entry.args, *entry.outcomes(flow, t, state))


@NOISY
def test_expectations_in_one_step_are_of_its_order(entry):
    defects = [np.abs(law_defect(entry, rate)).max() for rate in entry.rates]
    steps = [float(entry.make(pulled_losses, rate).step_size) for rate in entry.rates]
    assert abs(eomdl.errors.observed_order(steps, defects) - (entry.order + 1)) < 0.2


@NOISY
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_it_keeps_structure_and_dtype(entry, dtype):
    params, args = jax.tree.map(lambda x: x.astype(dtype), (VALLEY, entry.args))
    flow = entry.make(pulled_losses, entry.rates[0])

    def everything(params):
        state = flow.init(params, args)
        like = jax.tree.map(lambda x: (x.shape, x.dtype), state)
        assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(dtype)}
        normals = jax.tree.map(
            lambda z: jnp.ones(z.shape, z.dtype), flow.noise(0.0, state, args).normals_like
        )
        for other in (
            flow.ito_drift(0.0, state, args),
            flow.diffusion(0.0, state, args, state),
            flow.noisy_velocity(0.0, state, args, normals),
        ):
            assert jax.tree.map(lambda x: (x.shape, x.dtype), other) == like
        return flow.params(state)

    assert jax.tree.structure(jax.eval_shape(everything, params)) == jax.tree.structure(params)


@for_each([entry for entry in NOISY_FLOWS if entry.name.startswith("StochasticModifiedFlow")])
def test_drift_and_noise_together_are_their_sum(entry):
    flow, t = entry.make(pulled_losses, entry.rates[0]), entry.time
    state = entry.state(flow)
    like = flow.noise(t, state, entry.args).normals_like
    normals = jax.tree.map(lambda z: normal(0, *z.shape), like)

    @jax.jit
    def both(state):
        noise = flow.noise(t, state, entry.args)(normals)
        sum_of_both = jax.tree.map(jnp.add, flow.ito_drift(t, state, entry.args), noise)
        return sum_of_both, flow.noisy_velocity(t, state, entry.args, normals)

    a, b = both(state)
    np.testing.assert_allclose(flat(a), flat(b), rtol=1e-12, atol=1e-14)


@functools.cache
def real_run():
    return eomdl.descend(valley_loss, VALLEY, optax.sgd(0.1), 2)


@NOISY
def test_no_verb_integrates_its_drift_alone(entry):
    flow = entry.make(pulled_losses, entry.rates[0])
    real = real_run()
    verbs = [
        lambda: eomdl.solve(flow, VALLEY, 2, args=entry.args),
        lambda: eomdl.solve(eomdl.Ensemble(flow), VALLEY, 2, args=entry.args),
        lambda: eomdl.errors.predict_error(flow, VALLEY, 2, args=entry.args),
        lambda: eomdl.errors.local_error(flow, real, args=entry.args),
        lambda: eomdl.errors.convergence_study(
            lambda rate: flow, pulled_loss, VALLEY, [0.1, 0.05], time=0.2, args=entry.args
        ),
        lambda: eomdl.geometry.flow_curvature(flow),
        lambda: eomdl.geometry.flow_torsion(flow),
        lambda: eomdl.observe.lie_derivative(lambda p, a: p["x"], flow),
    ]
    for verb in verbs:
        with pytest.raises(
            ValueError, match=r"flow: expected one without noise, got .*ito_drift.*guide Noise"
        ):
            verb()


@pytest.mark.parametrize("name", ["order", "noise_order"])
def test_order_three_says_why_there_is_none(name):
    with pytest.raises(ValueError, match=rf"^{name}: expected 1 or 2, got 3.*third cumulant"):
        StochasticModifiedFlow(pulled_losses, 0.1, 2, **{name: 3})


# ------------------------------------------------------- SGD on least squares, at a fixed time


X6, Y6 = normal(5, 6, 2), normal(6, 6)  # eigenvalues of the Hessian: 0.33, 1.18
TIME, START = 2.0, np.array([1.0, -0.8])


def square_losses(w, args):
    x, y = args
    return 0.5 * (x @ w - y) ** 2


def monomials(w):
    """1, the numbers, and their products."""
    return jnp.concatenate([jnp.ones(1), w, jnp.outer(w, w)[jnp.triu_indices(len(w))]])


def unisolvent(n):
    """Points at which a polynomial of degree 2 in n numbers is known."""
    unit = np.eye(n)
    pairs = [unit[i] + unit[j] for i in range(n) for j in range(i, n)]
    return jnp.array([np.zeros(n), *unit, *pairs])


POINTS = unisolvent(2)


@eqx.filter_jit
def images(flow):
    """The generator of the flow on the monomials, and a step of SGD's law, at all points: both are linear there."""
    data = (X6, Y6)
    at = lambda w: generate(monomials, w, *coefficients(flow, 0.0, w, lambda v: v, data))
    generated = jax.vmap(at)(POINTS)
    step = lambda w, i: w - flow.learning_rate * X6[i] * (X6[i] @ w - Y6[i])
    after = jax.vmap(lambda w: jnp.mean(jax.vmap(lambda i: monomials(step(w, i)))(jnp.arange(6)), 0))(POINTS)
    return generated, after


@eqx.filter_jit
def heavy_ball_images(flow):
    data, points, h = (X6, Y6), unisolvent(4), flow.step_size

    def step(w, i):
        x, v = w[:2], w[2:]
        v = flow.momentum * v - h * X6[i] * (X6[i] @ x - Y6[i])
        return jnp.concatenate([x + h * v, v])

    unravel = lambda w: (w[:2], w[2:])
    at = lambda w: generate(monomials, w, *coefficients(flow, 0.0, w, unravel, data))
    mean = lambda w: jnp.mean(jax.vmap(lambda i: monomials(step(w, i)))(jnp.arange(6)), axis=0)
    return jax.vmap(at)(points), jax.vmap(mean)(points)


def moments(flow, images=images, start=START):
    """Mean and second moments at a fixed time, of the flow and of SGD, with one example a batch."""
    known = np.asarray(jax.vmap(monomials)(unisolvent(len(start))))
    generated, after = (np.linalg.solve(known, np.asarray(x)) for x in images(flow))
    begin = np.asarray(monomials(jnp.asarray(start)))
    num_steps = round(TIME / float(flow.step_size))
    return begin @ scipy.linalg.expm(TIME * generated), begin @ np.linalg.matrix_power(after, num_steps)


def covariance(m):
    return np.array([m[3] - m[1] ** 2, m[4] - m[1] * m[2], m[5] - m[2] ** 2])


RATES = (0.05, 0.025, 0.0125)


@functools.cache
def errors_of(order, noise_order):
    found = []
    for rate in (0.1, *RATES):
        model, real = moments(StochasticModifiedFlow(square_losses, rate, 1, order, noise_order, True))
        spread = np.linalg.norm(covariance(model) - covariance(real)) / np.linalg.norm(covariance(real))
        found.append((np.abs(model - real).max(), spread))
    return np.array(found)


@pytest.mark.parametrize(
    ("order", "noise_order", "slope", "of_covariance"), [(1, 1, 1, 1), (2, 1, 2, 1), (2, 2, 2, 2)]
)
def test_moments_on_least_squares_are_of_their_order_and_so_is_the_covariance(
    order, noise_order, slope, of_covariance
):
    errors = errors_of(order, noise_order)[1:]
    assert abs(eomdl.errors.observed_order(RATES, errors[:, 0]) - slope) < 0.05
    assert abs(eomdl.errors.observed_order(RATES, errors[:, 1]) - of_covariance) < 0.05


def test_the_counter_term_of_the_noise_is_what_the_covariance_needs():
    # At a rate of 0.1: order 2 alone is further off than order 1.
    first, second, both = (errors_of(*orders)[0, 1] for orders in ((1, 1), (2, 1), (2, 2)))
    assert second > 1.5 * first
    assert both < 0.1 * first


@pytest.mark.parametrize("order", [1, 2])
def test_moments_of_heavy_ball_on_least_squares_are_of_their_order(order):
    steps, start, errors = (0.05, 0.025, 0.0125), np.array([*START, 0.0, 0.0]), []
    for h in steps:
        flow = StochasticMomentumFlow(square_losses, h**2, 1 - 1.5 * h, 1, order, replacement=True)
        model, real = moments(flow, heavy_ball_images, start)
        errors.append(np.abs(model - real).max())
    assert abs(eomdl.errors.observed_order(steps, errors) - order) < 0.1


def test_scaling_batch_and_rate_together_leaves_the_noise_of_order_1_per_time():
    """The linear scaling rule: with replacement, eta C does not change."""
    one, two = (StochasticModifiedFlow(square_losses, k * 0.05, k, 1, 1, replacement=True) for k in (1, 4))
    generated, scaled = (np.asarray(images(flow)[0]) for flow in (one, two))
    np.testing.assert_allclose(scaled, generated, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------------------- costs


def test_drift_and_noise_of_order_1_are_one_gradient():
    flow = StochasticModifiedFlow(square_losses, 0.1, 8, 1, 1)
    data, w = (normal(1, 64, 32), normal(2, 64)), normal(3, 32)

    def flops(function, *inputs):
        return jax.jit(function).lower(*inputs).compile().cost_analysis()["flops"]

    gradient = flops(jax.grad(eomdl.losses.mean_loss(square_losses)), w, data)
    both = flops(lambda w, z, data: flow.noisy_velocity(0.0, w, data, z), w, normal(4, 64), data)
    assert both <= 1.05 * gradient


# -------------------------------------------------- a flow in the sense of Stratonovich


class Geometric(eomdl.AbstractFlow):
    """dX = -X dt + s X dW in the sense of Stratonovich, which is of Ito with the drift -X + s^2 X / 2."""

    step_size: jax.Array
    drift_is_ito = False

    def __call__(self, t, state, args):
        return -state

    def noise(self, t, state, args):
        return eomdl.noise.NoiseOperator(lambda z: 0.6 * state * z, state)


def test_a_drift_in_the_sense_of_stratonovich_is_converted():
    flow, x = Geometric(jnp.asarray(0.1)), jnp.array([2.0, -1.0])
    np.testing.assert_allclose(flow.ito_drift(0.0, x, None), -x + 0.18 * x, rtol=1e-14)
    np.testing.assert_allclose(flow.diffusion(0.0, x, None, jnp.ones(2)), 0.36 * x**2, rtol=1e-14)


def test_a_flow_without_noise_has_no_diffusion():
    flow = eomdl.GradientFlow(lambda p, args: jnp.sum(p**2), 0.1)
    x = jnp.ones(2)
    assert not np.any(flow.diffusion(0.0, x, None, x))
    np.testing.assert_array_equal(flow.ito_drift(0.0, x, None), flow.noisy_velocity(0.0, x, None, None))


def test_losses_that_mix_examples_are_refused_by_the_flow():
    mixing = lambda p, pulls: pulled_losses(p, pulls - jnp.mean(pulls))
    with pytest.raises(ValueError, match="batch normalization"):
        StochasticModifiedFlow(mixing, 0.1, BATCH).validate(VALLEY, EXAMPLES)
    SGD.validate(VALLEY, EXAMPLES)
    value = jax.eval_shape(lambda p: SGD.diagnostics(0.0, p, EXAMPLES)["eta*lambda_max"].value, VALLEY)
    assert value.shape == ()
    assert "li2019" in eomdl.citation(SGD)


# --------------------------------------------------------- any optimizer, from its batches


@pytest.mark.parametrize("noise_order", [1, 2])
def test_for_sgd_the_interpolating_flow_is_the_modified_one_on_the_same_batches(noise_order):
    step_map = eomdl.maps.GradientDescentStep(pulled_losses, 0.1)
    of_steps = StochasticInterpolatingFlow(step_map, 0.1, noise_order=noise_order)
    modified = StochasticModifiedFlow(pulled_losses, 0.1, 1, 2, noise_order, replacement=True)
    normals = normal(3, len(EXAMPLES))

    @jax.jit
    def both(x):
        return [(f(0.0, x, EXAMPLES), f.noise(0.0, x, EXAMPLES)(normals)) for f in (of_steps, modified)]

    a, b = both(VALLEY)
    np.testing.assert_allclose(flat(a), flat(b), rtol=1e-13, atol=1e-15)


def test_one_batch_has_no_law():
    flow = StochasticInterpolatingFlow(eomdl.maps.GradientDescentStep(pulled_losses, 0.1), 0.1)
    with pytest.raises(ValueError, match=r"^args: expected at least 2 batches"):
        flow.validate(VALLEY, EXAMPLES[:1])
    flow.validate(VALLEY, EXAMPLES)
    assert flow.begin(0.0, VALLEY, VALLEY, EXAMPLES) is VALLEY


# ----------------------------------------------------------------- Langevin dynamics


def well(x, args):
    del args
    return x**4 / 4 - x**2 / 2


GRID = np.linspace(-2.6, 2.6, 417)
SPACING = GRID[1] - GRID[0]


def density(energy):
    p = np.exp(-(energy - energy.min()) / 0.25)
    return p / (p.sum() * SPACING)


def sampled_density(h):
    """Stationary density of x - h U' + sqrt(2 T h) z, by its transition matrix."""
    mean = GRID - h * (GRID**3 - GRID)
    matrix = np.exp(-((GRID[:, None] - mean[None]) ** 2) / (4 * 0.25 * h))
    matrix /= matrix.sum(axis=0)
    matrix -= np.eye(len(GRID))
    matrix[0] = SPACING
    return np.linalg.solve(matrix, np.eye(len(GRID))[0])


def test_steps_of_discretized_langevin_sample_the_modified_loss():
    found = []
    for h in (0.08, 0.04, 0.02):
        flow = DiscretizedLangevinFlow(well, 0.25, h)
        modified = np.asarray(jax.vmap(lambda x, f=flow.modified_loss: f(x, None))(jnp.asarray(GRID)))
        sampled = sampled_density(h)
        to = [
            np.abs(sampled - density(energy)).sum() * SPACING
            for energy in (GRID**4 / 4 - GRID**2 / 2, modified)
        ]
        found.append(to)
    np.testing.assert_allclose(found, [[5.6e-2, 5.3e-3], [2.7e-2, 1.2e-3], [1.3e-2, 2.8e-4]], rtol=0.04)


def test_the_density_of_gibbs_is_stationary():
    """The mean of the generator over the density is 0, for overdamped and underdamped dynamics."""
    p = density(GRID**4 / 4 - GRID**2 / 2) * SPACING
    v, weights = np.polynomial.hermite_e.hermegauss(8)
    points = np.array([(x, 0.5 * y) for x in GRID for y in v])
    measure = np.outer(p, weights / weights.sum()).ravel()
    flows = [
        (LangevinFlow(well, 0.25), lambda y: y[0], GRID[:, None], p),
        (UnderdampedLangevinFlow(well, 0.25, 0.7), lambda y: (y[0], y[1]), points, measure),
    ]
    for flow, unravel, at, over in flows:
        generated = jax.jit(
            jax.vmap(lambda y, f=flow, u=unravel: generate(mixed, y, *coefficients(f, 0.0, y, u, None)))
        )
        np.testing.assert_allclose(over @ np.asarray(generated(jnp.asarray(at))), 0, atol=1e-9)


def test_temperature_may_be_a_schedule():
    x = jnp.array([0.5, -1.0])
    cooling = LangevinFlow(lambda p, args: jnp.sum(p**2), lambda t: 1 / (1 + t))
    np.testing.assert_allclose(cooling.diffusion(3.0, x, None, x), 2 * 0.25 * x, rtol=1e-14)
    kicked = UnderdampedLangevinFlow(cooling.loss, cooling.temperature, 0.8)
    moved, pushed = kicked.diffusion(3.0, (x, x), None, (x, x))
    assert not np.any(moved)
    np.testing.assert_allclose(pushed, 2 * 0.8 * 0.25 * x, rtol=1e-14)
    cooling.validate(x, None)
    kicked.validate(x, None)
    DiscretizedLangevinFlow(cooling.loss, 0.1, 0.1).validate(x, None)


def test_a_schedule_of_the_temperature_takes_the_time():
    with pytest.raises(ValueError, match=r"^temperature: .*, which cannot be called so"):
        eomdl.flows.LangevinFlow(lambda x, args: x**2, lambda: 1.0)
