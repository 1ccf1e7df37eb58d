"""Which flow to take: fitted weights, what the first steps of the run tell of flows and solvers, and the choice."""

import dataclasses
import math

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import NET, NET_ARGS, VALLEY, net_loss, valley_loss

import eomdl
from eomdl.choice import choose_flow
from eomdl.choice.candidates import Estimate, Model, estimates, probe_run
from eomdl.choice.differences import differences
from eomdl.choice.step_lengths import METHODS, stable_length, step_lengths
from eomdl.choice.trials import Search
from eomdl.series.weights import (
    difference_coefficients,
    log_coefficients,
    taylor_weights,
    weights_of_differences,
)


RATES = jnp.array([0.1, 0.35, 0.8])  # eta * lambda of a parabola in three directions
START = jnp.array([1.0, -0.7, 0.4])


def decay(state, args, k):
    """Gradient descent on a parabola: each direction has its own multiplier."""
    del args, k
    return (1 - RATES) * state


SGD, ONE = optax.sgd(0.1), optax.sgd(1.0)  # one for all: programs are known by the optimizer's identity
STEP = eomdl.optimizer_step(net_loss, SGD)


def found(count=12, order=8, stride=1):
    step_map = eomdl.InterpolatingFlow(decay, 1.0, 1).step_map
    return differences(step_map, START, 0, None, stride, count, order)


def iterates(count):
    return np.asarray(START) * np.asarray(1 - RATES) ** np.arange(count)[:, None]


@pytest.mark.parametrize("kind", ["Taylor", "random"])
def test_weights_and_differences_are_two_forms_of_one_polynomial(kind):
    c = log_coefficients(5) if kind == "Taylor" else np.random.default_rng(0).normal(size=5)
    b = weights_of_differences(c)
    np.testing.assert_allclose(difference_coefficients(b), c, rtol=1e-12)
    if kind == "Taylor":
        np.testing.assert_allclose(b, taylor_weights(5), rtol=1e-12)


def test_errors_of_the_velocity_add_up_to_what_telescopes():
    u = np.array([0.0, 0.3, -0.2, 0.5])
    x = iterates(40)
    terms = sum(u[j] * np.diff(x, j + 1, axis=0)[:12] for j in range(1, 4))
    sums = np.linalg.norm(np.cumsum(terms, axis=0), axis=1)
    np.testing.assert_allclose(found().local(u), np.linalg.norm(terms, axis=1), rtol=1e-9)
    # The sum up to stride k is known at stride k, so the last of 12 is not.
    np.testing.assert_allclose(found().largest_sum(u), sums[:11].max(), rtol=1e-9)
    whole = sum(u[j] * np.diff(x, j, axis=0)[0] for j in range(1, 4))
    np.testing.assert_allclose(found().sum_at_rest(u), np.linalg.norm(whole), rtol=1e-9)


def test_fitted_weights_are_exact_on_as_many_multipliers_as_they_have_points():
    z = np.asarray(1 - RATES)
    exact = np.log(z) / (z - 1)
    off = {}
    for name, b in {
        "fitted": eomdl.choice.fitted_weights(decay, START, 4, order=1),
        "Taylor": taylor_weights(4),
    }.items():
        off[name] = np.abs(np.polynomial.Polynomial(b)(z) - exact)
        assert abs(sum(b) - 1) < 1e-12
    # What is fitted to is the logarithm's series, cut after four more differences: 0.8^8 / 8 of it is left out.
    left_out = np.abs(np.polynomial.Polynomial(taylor_weights(8))(z) - exact)
    np.testing.assert_allclose(off["fitted"], left_out, atol=1e-6)
    assert off["Taylor"][2] > 3 * off["fitted"][2]


def test_fitted_weights_come_nearer_to_gradient_descent():
    weights = eomdl.choice.fitted_weights(STEP, NET, 5, args=NET_ARGS)
    real = eomdl.iterate(STEP, NET, 40, args=NET_ARGS)
    paths = {
        name: eomdl.solve(eomdl.InterpolatingFlow(STEP, 0.1, 5, weights=b), NET, 40, args=NET_ARGS, rtol=1e-12, atol=1e-12)
        for name, b in {"fitted": weights, "Taylor": None}.items()
    }  # fmt: skip
    off = {name: d.max() for name, d in eomdl.compare(real, paths).distance.items()}
    assert off["fitted"] < 0.5 * off["Taylor"]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_polynomials_of_a_method(method):
    """R(z) is the exponential up to the order of the method, and the error estimate begins at its own."""
    error, stability = method.polynomials(method.order + 3)
    solver = {"Bosh3": 3, "Tsit5": 5, "Dopri8": 8}[method.name]
    exact = np.array([1 / math.factorial(i) for i in range(1, solver + 2)])
    np.testing.assert_allclose(stability[:solver], exact[:solver], rtol=1e-9)
    assert abs(stability[solver] / exact[solver] - 1) > 1e-3
    first = np.flatnonzero(error)[0]
    assert first + 1 == method.order  # the estimate is of h^order, the error of the embedded method


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_the_longest_stable_step_is_that_of_diffrax(method):
    longest = stable_length(method, np.array([-1.0 + 0j]))

    def grown(h):
        term, y = diffrax.ODETerm(lambda t, y, args: -y), jnp.array(1.0)
        state = method.solver.init(term, 0.0, h, y, None)
        return abs(float(method.solver.step(term, 0.0, h, y, None, state, made_jump=False)[0]))

    assert grown(0.97 * longest) < 1 < grown(1.04 * longest)


@pytest.mark.parametrize(("method", "atol"), [(METHODS[0], 1e-6), (METHODS[1], 1e-8), (METHODS[2], 1e-9)])
def test_predicted_steps_on_a_parabola(method, atol):
    rates = -np.log1p(-np.asarray(RATES))

    def loss(x, args):
        return jnp.sum(rates * x**2) / 2

    path = eomdl.solve(
        eomdl.GradientFlow(loss, 1.0), START, 24, rtol=1e-15, atol=atol, solver=method.solver, estimate_error=False
    )  # fmt: skip
    lengths = step_lengths(method, found(24, 18))
    predicted = np.sum(1 / lengths.along(atol, stable_length(method, -rates + 0j), 24))
    assert abs(predicted / int(path.stats.num_steps) - 1) < 0.3


def ran(choice, real, num_steps, **options):
    path = eomdl.solve(choice.flow, NET, num_steps, args=NET_ARGS, **choice.solve_options, **options)
    return choice.with_runs(real, {choice.chosen.name: path})


def test_the_choice_stays_within_the_tolerance_at_about_the_predicted_cost():
    real = eomdl.iterate(STEP, NET, 60, args=NET_ARGS, step_size=0.1)
    costs = []
    for tolerance in (1e-2, 1e-5):
        choice = choose_flow(net_loss, NET, SGD, 60, tolerance, learning_rate=0.1, args=NET_ARGS)
        assert choice.notes == ()
        assert choice.predicted_error <= tolerance
        done = ran(choice, real, 60).chosen
        assert done.measured_error <= 1.1 * tolerance
        assert 0.5 < done.measured_cost / choice.predicted_cost < 2
        costs.append(done.measured_cost)
    assert costs[1] > 2 * costs[0]
    table = choice.table(rows=3)
    assert choice.chosen.model in table
    assert f"{choice.cost:.0f} gradients" in table
    figure = ran(choice, real, 60).plot()
    assert {t.get_text() for t in figure.axes[0].get_legend().get_texts()} >= {"chosen", "measured", "fitted"}


def test_a_tolerance_that_gradient_flow_meets():
    choice = choose_flow(net_loss, NET, SGD, 60, 1.0, learning_rate=0.1, args=NET_ARGS)
    assert isinstance(choice.flow, eomdl.GradientFlow)
    assert choice.notes == ()
    real = eomdl.descend(net_loss, NET, SGD, 60, args=NET_ARGS)
    with pytest.raises(ValueError, match="paths: expected names of candidates"):
        choice.with_runs(real, {"other": real})


def test_a_tolerance_that_no_flow_meets_is_said():
    choice = choose_flow(net_loss, NET, SGD, 60, 1e-14, learning_rate=0.1, args=NET_ARGS)
    assert "No candidate is within 1.0e-14" in choice.notes[0]
    assert choice.chosen.trial_error > 1e-14
    assert "! No candidate" in choice.table()


def make_net_problem(loss_of, activation, seed, fraction):
    """A network 3-6-1 with biases of 0 and a target sin 2x, at eta = fraction / sharpness."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(40, 3)))
    params = [(jnp.asarray(rng.normal(size=(a, b)) / np.sqrt(a)), jnp.zeros(b)) for a, b in ((3, 6), (6, 1))]

    def loss(params, args):
        (w, b), (v, c) = params
        return loss_of(activation(args[0] @ w + b[None]) @ v + c[None], args[1])

    args = (x, jnp.sin(2 * x[:, :1]))
    return loss, params, args, fraction / eomdl.curvature.eigenpairs(loss, params, args, 1).values[0]


def test_steps_too_long_for_the_series_cost_no_more_than_the_run():
    """Near the edge differences grow from order 7 on: flows of 14 points, predicted to be near, are far, and dear."""
    huber = lambda out, y: jnp.mean(optax.huber_loss(out, y))
    loss, params, args, eta = make_net_problem(huber, jax.nn.gelu, 22, 0.6)
    choice = choose_flow(loss, params, optax.sgd(eta), 200, 1e-4, learning_rate=eta, args=args)
    assert choice.cost < 5 * 200
    tried = [c for c in choice.candidates if np.isfinite(c.trial_error)]
    assert choice.chosen.trial_error == min(c.trial_error for c in tried) < 0.05
    # Nothing is claimed of what is not known.
    assert all(np.isnan(c.predicted_error) for c in choice.candidates if "14 points" in c.model)
    assert any("no prediction here contains" in note or "No candidate" in note for note in choice.notes)


def test_kinks_do_not_hide_what_is_near():
    """ReLU: high differences are those of the kinks, 2^j of each; what stands before them says how far a flow is."""
    square = lambda out, y: jnp.mean((out - y) ** 2)
    loss, params, args, eta = make_net_problem(square, jax.nn.relu, 3, 0.3)
    step = eomdl.optimizer_step(loss, optax.sgd(eta))
    real = eomdl.iterate(step, params, 32, args=args, step_size=eta)
    probe = probe_run(step, params, eta, args, None, real.end, 200)
    assert probe.num_terms <= 4
    predicted = {e.model.name: e.model_error for e in estimates(loss, probe)}
    path = eomdl.solve(
        eomdl.GradientFlow(loss, eta), params, 32, args=args, rtol=1e-6, atol=1e-4, estimate_error=False
    )
    measured = eomdl.compare(real, {"flow": path}).distance["flow"].max()
    assert measured / 3 < predicted["gradient flow"] < 10 * measured  # 200 times as much with all differences


def fake_estimate(kind, error, cost=1, method=METHODS[1], is_asymptotic=True):
    """An estimate of a flow named by its kind and its error."""
    flow = eomdl.InterpolatingFlow(decay, 1.0, cost)
    lengths = step_lengths(method, found(24, 18))
    model = Model(kind, f"{kind} {error}", flow, np.ones(1))
    return Estimate(model, error, is_asymptotic, lengths, np.inf, 3, 1e-16, 1e-15, 24)


def after_trial(search, estimate, times):
    before = search.candidate(estimate)
    after = dataclasses.replace(before, predicted_error=times * before.predicted_error)
    return search.with_trial(estimate, before, after)


def test_the_failure_of_one_flow_is_not_that_of_the_others():
    fitted, taylor, minimax = (fake_estimate(kind, 1e-6) for kind in ("fitted", "Taylor", "minimax"))
    search = Search(1e-4, [fitted, taylor, minimax])
    search = after_trial(search, fitted, 3000)
    assert search.candidate(fitted).predicted_error > 1e-3
    assert search.next() in (taylor, minimax)
    assert search.candidate(taylor).predicted_error == pytest.approx(1e-4)
    # What two kinds agree on is the path's, and a third one has it too.
    search = after_trial(search, taylor, 1000)
    assert search.candidate(minimax).predicted_error > 1e-3
    # One that does not get to its end says nothing of others.
    stuck = after_trial(Search(1e-4, [fitted, taylor]), fitted, np.inf)
    assert stuck.next() is taylor
    assert stuck.candidate(taylor).predicted_cost == Search(1e-4, []).candidate(taylor).predicted_cost


def test_where_predictions_mislead_other_kinds_have_a_trial_the_cheap_ones_first():
    near, cheap, dear = (
        fake_estimate("fitted", 1e-2),
        fake_estimate("Taylor", 5e-2),
        fake_estimate("minimax", 4e-2, 8),
    )
    search = Search(1e-4, [near, cheap, dear, fake_estimate("Taylor", 1e-3, 14, is_asymptotic=False)])
    assert search.next() is near
    assert after_trial(search, near, 2).next() is None  # as predicted: the nearest is found
    misled = after_trial(search, near, 100)
    assert misled.next() is cheap
    assert after_trial(misled, cheap, 100).next() is dear
    unknown = misled.described(misled.estimates[-1])
    assert np.isnan(unknown.predicted_error)


def test_a_budget_ends_the_search_and_is_told():
    choice = choose_flow(net_loss, NET, SGD, 60, 1e-5, learning_rate=0.1, args=NET_ARGS, budget=1.0)
    assert np.isnan(choice.chosen.trial_error)
    assert choice.cost < 200
    assert any("ended at their budget of 1 gradients" in note for note in choice.notes)


def test_an_optimizer_with_a_memory_has_interpolating_flows_only():
    optimizer = optax.sgd(0.01, momentum=0.9)
    step = eomdl.optimizer_step(net_loss, optimizer)
    warm = eomdl.iterate(step, NET, 40, args=NET_ARGS, step_size=0.1)
    real = eomdl.iterate(step, NET, 100, args=NET_ARGS, step_size=0.1, resume=warm.end)
    choice = choose_flow(
        net_loss, NET, optimizer, 100, 1e-3, learning_rate=0.1, args=NET_ARGS, start=warm.end
    )
    assert all(isinstance(c.flow, eomdl.InterpolatingFlow) for c in choice.candidates)
    assert ran(choice, real, 100, resume=warm.end).chosen.measured_error <= 1e-3


def test_float32_is_told_of_the_rounding_of_the_run():
    params, args = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (NET, NET_ARGS))
    choice = choose_flow(net_loss, params, SGD, 40, 1e-6, learning_rate=0.1, args=args)
    assert any("rounding of the real run" in note for note in choice.notes)


def bowl(x, args):
    """A parabola of this curvature, with waves of this height and frequency."""
    curvature, height, frequency = args
    return curvature * jnp.sum(x**2) / 2 + height * jnp.sum(jnp.cos(frequency * x))


def choose_for_bowl(args, start, num_steps):
    """At a tolerance that gradient flow meets, and with the same programs for any numbers."""
    args = tuple(jnp.array(x, float) for x in args)
    return choose_flow(bowl, jnp.array(start), ONE, num_steps, 10.0, learning_rate=1.0, args=args)


def test_a_run_that_speeds_up_later_is_said():
    choice = choose_for_bowl(
        (0.0, 0.1, 1.0), [1e-4, 1e-4], 400
    )  # from near a top it is fastest at the end of the probe
    assert any("as long at the end of the probe" in note for note in choice.notes)


def test_a_map_far_from_the_identity_is_said():
    choice = choose_for_bowl((1.2, 1.0, 0.1), [0.4, 1.0], 40)
    assert any("departs from the identity by 1.19" in note for note in choice.notes)
    assert any(c.flow.stride == 2 for c in choice.candidates)


def test_wrong_arguments():
    call = dict(loss=valley_loss, params=VALLEY, optimizer=SGD, num_steps=40, tolerance=1e-3)
    call |= dict(learning_rate=0.1)
    with pytest.raises(ValueError, match="optimizer: "):
        choose_flow(**{**call, "optimizer": optax.lbfgs()})
    end = eomdl.iterate(eomdl.optimizer_step(valley_loss, SGD), VALLEY, 2).end
    with pytest.raises(ValueError, match="num_steps: expected more than the 2 steps of start"):
        choose_flow(**{**call, "num_steps": 2, "start": end})
    with pytest.raises(ValueError, match="optimizer: expected a run that stays finite"):
        choose_flow(**{**call, "optimizer": optax.sgd(1e200)})


def test_solvers_are_diffrax_ones():
    assert [type(m.solver) for m in METHODS] == [diffrax.Bosh3, diffrax.Tsit5, diffrax.Dopri8]
