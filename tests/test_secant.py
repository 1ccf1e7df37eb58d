"""RSI and EB along a path (theory.md, section 7): quadratics, exact contraction, two equal passes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import NET, NET_ARGS, NET_BATCHES, flat, net_loss, normal, quadratic_loss, symmetric

import eomdl
from eomdl.plotting import plot


SGD = optax.sgd(0.1)
EIGENVALUES = [0.3, 0.8, 1.5, 2.0]
HESSIAN = jnp.asarray(symmetric(EIGENVALUES))
LINEAR = jnp.array([0.5, -0.3, 0.2, 0.1])
MINIMUM = jnp.linalg.solve(HESSIAN, LINEAR)
START = MINIMUM + jnp.array([1.0, -2.0, 0.5, 0.3])


def descent(**options):
    return eomdl.descend(quadratic_loss, START, SGD, 30, args=(HESSIAN, LINEAR), **options)


def net_descent(**options):
    return eomdl.descend(net_loss, NET, SGD, 12, args=NET_ARGS, batches=NET_BATCHES, **options)


# ------------------------------------------------------------------ quadratics


@pytest.fixture(scope="module")
def to_minimum():
    return eomdl.geometry.secants(descent, {"full": quadratic_loss}, end=MINIMUM)["full"]


def test_rsi_and_eb_of_a_quadratic_lie_between_the_extreme_eigenvalues(to_minimum):
    for values in (to_minimum.rsi, to_minimum.eb):
        assert values.min() >= EIGENVALUES[0] - 1e-12
        assert values.max() <= EIGENVALUES[-1] + 1e-12
    assert to_minimum.rsi.max() > 1.2 * to_minimum.rsi.min()  # the path visits more than one
    assert np.all(to_minimum.rsi <= to_minimum.eb)


def test_definition_on_the_stored_path(to_minimum):
    path = descent()
    displacement = np.asarray(path.params) - np.asarray(MINIMUM)
    gradient = displacement @ np.asarray(HESSIAN)
    inner, square = np.sum(gradient * displacement, 1), np.sum(displacement**2, 1)
    np.testing.assert_allclose(to_minimum.rsi, inner / square, rtol=1e-12)
    np.testing.assert_allclose(to_minimum.eb, np.linalg.norm(gradient, axis=1) / np.sqrt(square), rtol=1e-12)
    np.testing.assert_allclose(
        to_minimum.gamma,
        inner / np.linalg.norm(gradient, axis=1) / np.linalg.norm(displacement, axis=1),
        rtol=1e-12,
    )


def test_one_step_at_the_best_learning_rate_contracts_by_one_minus_gamma_squared(to_minimum):
    """$|w - \\eta G - w^*|^2 = (1 - \\gamma^2) |w - w^*|^2$ at $\\eta = RSI/EB^2$, and no other rate does better."""
    path = np.asarray(descent().params)
    displacement = path - np.asarray(MINIMUM)
    gradient = displacement @ np.asarray(HESSIAN)
    before = np.sum(displacement**2, 1)

    def left(rate):
        return np.sum((displacement - rate[:, None] * gradient) ** 2, 1) / before

    best = to_minimum.learning_rate
    np.testing.assert_allclose(left(best), to_minimum.contraction, rtol=1e-9, atol=1e-14)
    assert np.all(left(0.99 * best) > left(best))
    assert np.all(left(1.01 * best) > left(best))


def test_isotropic_quadratic_never_turns():
    def run(**options):
        return eomdl.descend(
            quadratic_loss, jnp.ones(3), SGD, 5, args=(2.0 * jnp.eye(3), jnp.zeros(3)), **options
        )

    study = eomdl.geometry.secants(run, {"full": quadratic_loss})["full"]
    np.testing.assert_allclose(study.gamma[:-1], 1.0, rtol=1e-14)


# ------------------------------------------------------------- the end point


def test_the_end_point_itself_is_masked_and_said():
    study = eomdl.geometry.secants(net_descent, {"full": net_loss})["full"]
    assert study.distance[-1] == 0
    for values in (study.rsi, study.eb, study.gamma, study.learning_rate, study.contraction):
        assert np.isnan(values[-1])
        assert np.all(np.isfinite(values[:-1]))
    assert any("0/0" in note and "12" in note for note in study.notes)


def test_no_gradient_no_gamma():
    def flat_loss(params, args):
        return 0.0 * jnp.sum(params)

    def run(**options):
        return eomdl.descend(flat_loss, jnp.ones(2), SGD, 3, **options)

    study = eomdl.geometry.secants(run, {"flat": flat_loss}, end=jnp.zeros(2))["flat"]
    assert np.all(np.isnan(study.gamma))
    assert np.all(study.eb == 0)
    assert any("no gradient" in note for note in study.notes)


def test_a_failed_run_says_so():
    def run(**options):
        return eomdl.descend(
            quadratic_loss, jnp.ones(1), optax.sgd(1e300), 9, args=(jnp.ones((1, 1)), jnp.zeros(1)), **options
        )

    study = eomdl.geometry.secants(run, {"full": quadratic_loss}, end=jnp.zeros(1))["full"]
    assert any("infinite" in note for note in study.notes)


def test_the_end_of_a_diverging_run_is_its_last_good_row():
    def run(**options):
        return eomdl.descend(lambda p, a: jnp.sum(p**4), jnp.ones(1), optax.sgd(5.0), 20, **options)

    study = eomdl.geometry.secants(run, {"quartic": lambda p, a: jnp.sum(p**4)})["quartic"]
    assert study.distance[-1] == 0
    assert np.all(study.distance[:-1] > 0)
    assert any("infinite" in note for note in study.notes)


# ---------------------------------------------- minibatches, and the same path twice


def test_full_batch_and_minibatch():
    losses = {"full": net_loss, "minibatch": eomdl.on_batch(net_loss)}
    studies = eomdl.geometry.secants(net_descent, losses)
    path = net_descent()
    end = flat(path.at(12))
    for k in (0, 5, 11):
        d = flat(path.at(k)) - end
        batch = jax.tree.map(lambda leaf, k=k: leaf[k], NET_BATCHES)
        for name, data in (("full", NET_ARGS), ("minibatch", batch)):
            g = flat(jax.grad(net_loss)(path.at(k), data))
            np.testing.assert_allclose(studies[name].rsi[k], g @ d / (d @ d), rtol=1e-10)
            np.testing.assert_allclose(studies[name].eb[k], np.linalg.norm(g) / np.linalg.norm(d), rtol=1e-10)
    # The minibatch's step is what the path itself shows.
    step = flat(path.at(1)) - flat(path.at(0))
    np.testing.assert_allclose(studies["minibatch"].gradient_norm[0], np.linalg.norm(step) / 0.1, rtol=1e-10)


def test_batches_one_by_one_give_the_same():
    batches = [jax.tree.map(lambda leaf, k=k: leaf[k], NET_BATCHES) for k in range(12)]

    def run(**options):
        return eomdl.descend(net_loss, NET, SGD, 12, args=NET_ARGS, batches=iter(batches), **options)

    losses = {"minibatch": eomdl.on_batch(net_loss)}
    stacked = eomdl.geometry.secants(net_descent, losses)["minibatch"]
    listed = eomdl.geometry.secants(run, losses)["minibatch"]
    np.testing.assert_array_equal(stacked.gamma, listed.gamma)


def test_both_passes_are_the_same_path_bit_for_bit():
    first = net_descent(save_params=False)
    second = net_descent(save_params=False, observe={"loss": net_loss})
    np.testing.assert_array_equal(flat(first.final_params), flat(second.final_params))
    np.testing.assert_array_equal(flat(first.final_params), flat(net_descent().at(12)))


def test_a_run_that_differs_is_refused():
    seeds = iter(range(10))

    def run(**options):
        batches = normal(next(seeds), 12, 2, 3), NET_BATCHES[1]
        return eomdl.descend(net_loss, NET, SGD, 12, batches=batches, args=NET_ARGS, **options)

    with pytest.raises(ValueError, match=r"run: expected the same path twice, .*fixed seed"):
        eomdl.geometry.secants(run, {"full": net_loss})


# ------------------------------------------------------------------- baseline, flows


def test_random_directions_have_cosine_of_one_over_root_dimension():
    dimension = 400
    observable = eomdl.geometry.secant(lambda p, a: jnp.sum(jnp.sin(p)), jnp.zeros(dimension), num_random=64)
    moments = np.asarray(jax.jit(observable)(normal(0, dimension), None))
    assert moments.shape == (67,)
    np.testing.assert_allclose(np.sqrt(np.mean(moments[3:] ** 2)), dimension**-0.5, rtol=0.25)


def test_the_equation_of_motion_has_the_geometry_of_gradient_descent():
    def along(order):
        flow = eomdl.EquationOfMotion(quadratic_loss, 0.1, order)
        return lambda **options: eomdl.solve(
            flow, START, 30, args=(HESSIAN, LINEAR), rtol=1e-9, atol=1e-9, estimate_error=False, **options
        )

    real = eomdl.geometry.secants(descent, {"full": quadratic_loss})["full"]
    errors = []
    for order in (0, 1, 2):
        model = eomdl.geometry.secants(along(order), {"full": quadratic_loss})["full"]
        errors.append(np.nanmax(np.abs(model.rsi / real.rsi - 1)))
        assert model.parts_from(real, 0.5) is None
        assert model.parts_from(real, 1e-13) == 0
    assert errors[1] < errors[0] / 3
    assert errors[2] < errors[1] / 3


def test_parting_is_the_last_time():
    real = eomdl.geometry.secants(descent, {"full": quadratic_loss})["full"]
    gamma = real.gamma.copy()
    gamma[[3, 10, 11]] += 1.0
    away = dataclasses.replace(real, gamma=gamma)
    assert away.parts_from(real) is None  # they meet again
    gamma[20:] += 1.0
    assert dataclasses.replace(real, gamma=gamma).parts_from(real) == 20
    with pytest.raises(ValueError, match="step in common"):
        real.parts_from(dataclasses.replace(real, gamma=np.full(31, np.nan)))


def test_frame_and_plot(to_minimum):
    frame = to_minimum.to_frame()
    assert list(frame["steps"]) == list(range(31))
    figure = plot({"GD": to_minimum, "model": to_minimum})
    cosines, bounds, rates = ({x.get_label(): x.get_ydata() for x in axes.lines} for axes in figure.axes)
    for name in ("GD", "model"):
        np.testing.assert_array_equal(cosines[name], to_minimum.gamma)
        np.testing.assert_array_equal(bounds[f"EB, {name}"], to_minimum.eb)
        np.testing.assert_array_equal(bounds[f"RSI, {name}"], to_minimum.rsi)
        np.testing.assert_array_equal(rates[name], to_minimum.learning_rate)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="run: expected a function"):
        eomdl.geometry.secants(3, {"full": net_loss})
    with pytest.raises(ValueError, match="losses: expected a dict"):
        eomdl.geometry.secants(net_descent, net_loss)
    with pytest.raises(ValueError, match=r"run: .*returns an eomdl.Trajectory"):
        eomdl.geometry.secants(lambda **options: 1, {"full": net_loss})
    with pytest.raises(ValueError, match="num_random: expected an integer >= 1"):
        eomdl.geometry.secant(net_loss, NET, 0)
    with pytest.raises(ValueError, match="function: expected"):
        eomdl.on_batch(3)
    with pytest.raises(ValueError, match="params"):
        eomdl.geometry.secants(net_descent, {"full": net_loss}, end={"other": jnp.ones(2)})
