"""The interpolating flow: its field, its order, strides, and where it begins."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    HESSIAN,
    QUADRATIC,
    VALLEY,
    assert_close,
    assert_identical,
    flat,
    normal,
    pulled_loss,
    quadratic_loss,
    symmetric,
    valley_loss,
)

import eomdl
from eomdl.series.weights import taylor_weights


ETA = 0.2
SGD = optax.sgd(ETA)
HEAVY_BALL = optax.sgd(0.1, momentum=0.5)
VALLEY_SGD = eomdl.optimizer_step(valley_loss, SGD)
VALLEY_HEAVY_BALL = eomdl.optimizer_step(valley_loss, HEAVY_BALL)
THREE_POINTS = eomdl.InterpolatingFlow(VALLEY_HEAVY_BALL, 0.2, 3)
STRIDED = eomdl.InterpolatingFlow(VALLEY_HEAVY_BALL, 0.2, 3, stride=2)


PULLS = normal(5, 12, scale=0.3)
PULLED = eomdl.InterpolatingFlow(eomdl.optimizer_step(pulled_loss, SGD), ETA, 2, stride=2)

# Past the edge of stability in three directions; the flat ones are slow.
EDGE = jnp.asarray(symmetric([0.02, 0.05, 0.1, 1.9, 2.0, 2.1], seed=4))
EDGE_ARGS = (EDGE, jnp.zeros(6))
EDGE_START = jnp.asarray(np.linalg.eigh(EDGE)[1] @ np.array([1.0, -1.0, 1.0, 0.1, 0.1, 0.1]))


# ------------------------------------------------------------------- field


@pytest.mark.parametrize("weights", [None, eomdl.flows.minimax_weights(6, 0.5)], ids=["taylor", "minimax"])
def test_field_on_a_quadratic_is_a_polynomial_of_the_hessian(weights):
    flow = eomdl.InterpolatingFlow(eomdl.optimizer_step(quadratic_loss, SGD), ETA, 6, weights=weights)
    velocity, _ = flow(0.0, flow.init(QUADRATIC.params, QUADRATIC.args), QUADRATIC.args)
    x, b = flat(QUADRATIC.params), np.asarray(QUADRATIC.args[1])
    multiplier = np.eye(5) - ETA * np.asarray(HESSIAN)
    used = taylor_weights(6) if weights is None else weights
    polynomial = sum(w * np.linalg.matrix_power(multiplier, i) for i, w in enumerate(used))
    np.testing.assert_allclose(flat(velocity), -polynomial @ (HESSIAN @ x - b), rtol=1e-12)


@pytest.mark.parametrize("flow", [THREE_POINTS, STRIDED], ids=["stride 1", "stride 2"])
def test_field_is_the_series_of_differences(flow):
    h, m = 0.2, flow.stride
    states = [flow.init(VALLEY, None)]
    for k in range(3 * m):
        states.append(VALLEY_HEAVY_BALL(states[-1], None, k))
    x = np.stack([flat(state) for state in states[::m]])
    expected = sum((-1) ** (j + 1) / j * np.diff(x, n=j, axis=0)[0] for j in (1, 2, 3)) / (m * h)
    np.testing.assert_allclose(flat(flow(0.0, states[0], None)), expected, rtol=1e-12)


def test_field_sees_the_real_step_number():
    flow = eomdl.InterpolatingFlow(lambda x, args, k: x + 0.1 * k, 0.1, 1)
    np.testing.assert_allclose(flow(0.25, jnp.zeros(()), None), 2.5, rtol=1e-14)


def test_fields_agree_with_the_equation_of_motion():
    rates, errors = [0.08, 0.04, 0.02, 0.01], []
    for eta in rates:
        flow = eomdl.InterpolatingFlow(eomdl.GradientFlow(valley_loss, eta).map, eta, 3)
        ours = flow(0.0, VALLEY, None)
        theirs = eomdl.EquationOfMotion(valley_loss, eta, 2)(0.0, VALLEY, None)
        errors.append(np.linalg.norm(flat(ours) - flat(theirs)))
    assert abs(eomdl.errors.observed_order(rates, errors) - 3) < 0.1


def test_euler_on_the_exponential():
    # y -> (1 + a h) y: the truncated series of log(1 + a h)
    a, h, points = -1.5, 0.3, 7
    flow = eomdl.InterpolatingFlow(lambda y, args, k: y + h * a * y, h, points)
    expected = sum((-1) ** (j + 1) / j * (a * h) ** j for j in range(1, points + 1)) * 0.7 / h
    np.testing.assert_allclose(flow(0.0, jnp.array(0.7), None), expected, rtol=1e-12)
    converged = eomdl.InterpolatingFlow(flow.step_map, h, 24)(0.0, jnp.array(0.7), None)
    np.testing.assert_allclose(converged, 0.7 * np.log1p(a * h) / h, rtol=1e-8)


# ------------------------------------------------------------------- order


def heavy_ball(eta):
    return optax.sgd(eta, momentum=0.5)


def test_order_with_momentum_after_the_warmup():
    result = eomdl.errors.convergence_study(
        lambda eta: eomdl.InterpolatingFlow(eomdl.optimizer_step(valley_loss, heavy_ball(eta)), 2 * eta, 2),
        valley_loss,
        VALLEY,
        [0.008, 0.004],
        optimizer=heavy_ball,
        warmup=0.64,
    )
    assert abs(result.order - 3) < 0.1


# ------------------------------------------------------------------ stride


def test_stride_goes_past_the_edge_of_stability():
    unit = optax.sgd(1.0)
    flow = eomdl.InterpolatingFlow(eomdl.optimizer_step(quadratic_loss, unit), 1.0, 10, stride=2)
    run = eomdl.solve(flow, EDGE_START, 21, args=EDGE_ARGS)
    real = eomdl.descend(quadratic_loss, EDGE_START, unit, 21, args=EDGE_ARGS)
    gradient_flow = eomdl.solve(eomdl.GradientFlow(quadratic_loss, 1.0), EDGE_START, 21, args=EDGE_ARGS)
    comparison = eomdl.compare(real, {"stride 2": run, "gradient flow": gradient_flow}).at_multiples_of(2)
    assert comparison.distance["stride 2"][-1] < 1e-5 * comparison.distance["gradient flow"][-1]
    for k in range(0, 21, 2):
        expected = run.at(k) - EDGE @ run.at(k)
        assert_close(run.at(k + 1), expected, rtol=1e-14)
    assert any("flow of stride 2" in note for note in comparison.notes)


def pair_of_steps(params, pair, k):
    for n in range(2):
        params = jax.tree.map(lambda x, g: x - ETA * g, params, jax.grad(pulled_loss)(params, pair[n]))
    return params


def test_stride_with_batches_is_the_composed_map_of_each_pair():
    options = {"estimate_error": False, "rtol": 1e-8, "atol": 1e-8}
    stacked = eomdl.solve(PULLED, VALLEY, 12, batches=PULLS, **options)
    listed = eomdl.solve(PULLED, VALLEY, 12, batches=list(PULLS), **options)
    assert_identical(listed.params, stacked.params)
    pairs = eomdl.InterpolatingFlow(pair_of_steps, 2 * ETA, 2)
    composed = eomdl.solve(pairs, VALLEY, 6, batches=PULLS.reshape(6, 2), **options)
    assert_close(jax.tree.map(lambda leaf: leaf[::2], stacked.params), composed.params, rtol=1e-7)
    gradient = jax.grad(pulled_loss)(stacked.at(10), PULLS[10])
    expected = jax.tree.map(lambda x, g: x - ETA * g, stacked.at(10), gradient)
    assert_close(stacked.at(11), expected, rtol=1e-13)


def test_wrong_batches_for_a_stride_are_named():
    with pytest.raises(ValueError, match=r"^batches: expected stacked arrays or a list"):
        eomdl.solve(PULLED, VALLEY, 12, batches=iter(PULLS))
    with pytest.raises(ValueError, match=r"^num_steps: expected a multiple of the flow's stride 2"):
        eomdl.solve(PULLED, VALLEY, 11, batches=list(PULLS[:11]))


# ------------------------------------------------------------------ resume


def test_resume_from_a_real_run_takes_its_state_over():
    real = eomdl.descend(valley_loss, VALLEY, HEAVY_BALL, 40)
    descended = eomdl.descend(valley_loss, VALLEY, HEAVY_BALL, 20)
    iterated = eomdl.iterate(VALLEY_HEAVY_BALL, VALLEY, 20)
    run = eomdl.solve(THREE_POINTS, VALLEY, 40, resume=descended)
    assert_close(eomdl.solve(THREE_POINTS, VALLEY, 40, resume=iterated).params, run.params, rtol=1e-13)
    comparison = eomdl.compare(real, {"flow": run})
    assert np.all(run.ode_error[:21] == 0)
    assert np.all(run.ode_error[21:] > 0)
    assert np.all(comparison.distance["flow"][:21] == 0)
    assert comparison.distance["flow"][-1] < 1e-4
    np.testing.assert_allclose(run.times, 0.2 * np.arange(41), rtol=1e-14)
    # Started afresh the momentum is zero, and the first step is another.
    afresh = eomdl.solve(THREE_POINTS, descended.at(20), 20)
    error = np.linalg.norm(flat(afresh.at(1)) - flat(real.at(21)))
    assert error > 100 * comparison.distance["flow"][21]


def test_stride_resumes_from_its_multiples_alone():
    real = eomdl.iterate(VALLEY_HEAVY_BALL, VALLEY, 7)
    with pytest.raises(
        ValueError, match=r"^resume: expected a real run of a multiple of the flow's stride 2"
    ):
        eomdl.solve(STRIDED, VALLEY, 16, resume=real)


def test_strided_run_resumes_between_its_multiples():
    options = {"rtol": 1e-10, "atol": 1e-10, "observe_state": {"last": STRIDED.last_difference}}
    whole, half = (eomdl.solve(STRIDED, VALLEY, n, **options) for n in (40, 17))
    resumed = eomdl.solve(STRIDED, VALLEY, 40, resume=half, **options)
    assert_close(resumed.params, whole.params, rtol=1e-8)
    assert whole.observables["last"].shape == (41,)
    np.testing.assert_allclose(resumed.observables["last"], whole.observables["last"], rtol=1e-5, atol=1e-8)


# -------------------------------------------------------------- diagnostics

SCALAR_ARGS = (jnp.array([[0.7]]), jnp.zeros(1))
SCALAR_SGD = eomdl.optimizer_step(quadratic_loss, SGD)


@pytest.mark.parametrize(("points", "stride"), [(1, 1), (2, 1), (4, 1), (3, 2)])
def test_last_difference_is_a_power_of_the_distance_to_the_identity(points, stride):
    flow = eomdl.InterpolatingFlow(SCALAR_SGD, ETA, points, stride)
    departure = 1 - (1 - ETA * 0.7) ** stride
    measured = flow.last_difference(0.0, flow.init(jnp.ones(1), SCALAR_ARGS), SCALAR_ARGS)
    np.testing.assert_allclose(measured, departure ** (max(points, 2) - 1), rtol=1e-10)


def test_last_difference_at_rest_is_zero():
    flow = eomdl.InterpolatingFlow(SCALAR_SGD, ETA, 3)
    assert flow.last_difference(0.0, flow.init(jnp.zeros(1), SCALAR_ARGS), SCALAR_ARGS) == 0


def test_divergent_series_is_warned_of():
    args = (jnp.array([[1.2 / ETA]]), jnp.zeros(1))
    flow = eomdl.InterpolatingFlow(SCALAR_SGD, ETA, 3)
    with pytest.warns(UserWarning, match=r"near the identity, got second differences 1\.20"):
        run = eomdl.solve(flow, jnp.ones(1), 4, args=args)
    (diagnostic,) = run.stats.diagnostics.values()
    np.testing.assert_allclose(diagnostic.value, 1.44, rtol=1e-8)
    real = eomdl.descend(quadratic_loss, jnp.ones(1), SGD, 4, args=args)
    with pytest.warns(UserWarning, match="the last difference over the first reached 1.44"):
        comparison = eomdl.compare(real, {"flow": run})
    assert any("choose_points" in note for note in comparison.notes)


def test_memory_does_not_grow_with_the_points():
    params = jnp.ones(100_000)
    step = eomdl.optimizer_step(lambda p, args: jnp.sum(jnp.cos(p)), SGD)

    def memory(points, stride):
        flow = eomdl.InterpolatingFlow(step, ETA, points, stride)
        state = flow.init(params, None)
        compiled = jax.jit(lambda x: flow(0.0, x, None)).lower(state).compile()
        return compiled.memory_analysis().temp_size_in_bytes / params.nbytes

    few, many, strided = memory(2, 1), memory(16, 1), memory(16, 3)
    assert many <= 1.1 * few
    assert strided <= 1.1 * few


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("points", {"points": 0}),
        ("stride", {"stride": 0}),
        ("weights", {"weights": np.ones(3)}),
        ("weights", {"weights": 1.0}),
        ("step_map", {"step_map": optax.sgd(0.1)}),
    ],
)
def test_wrong_arguments_are_named(name, options):
    right = {"step_map": VALLEY_SGD, "step_size": ETA, "points": 2}
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        eomdl.InterpolatingFlow(**right | options)


# ---------------------------------------------------- dtypes and transformations


def test_float32_stays():
    params = jax.tree.map(lambda x: x.astype(jnp.float32), VALLEY)
    run = eomdl.solve(THREE_POINTS, params, 12)
    assert {x.dtype for x in jax.tree.leaves((run.params, run.end.state))} == {np.dtype("float32")}
    real = eomdl.descend(valley_loss, params, HEAVY_BALL, 12)
    distance = eomdl.compare(real, {"flow": run}).relative_distance["flow"]
    assert distance[-1] < 0.05


def test_step_size_sets_the_clock_alone():
    state = VALLEY_SGD.init(VALLEY)

    def field(h):
        return eomdl.InterpolatingFlow(VALLEY_SGD, h, 3)(0.0, state, None)

    def path(h):
        flow = eomdl.InterpolatingFlow(VALLEY_SGD, h, 3)
        run = eomdl.solve(flow, VALLEY, 5)
        return run.times, run.params

    h = jnp.array([0.1, 0.4])
    fields = jax.jit(jax.vmap(field))(h)
    assert_close(jax.tree.map(lambda x: x[0], fields), jax.tree.map(lambda x: 4 * x[1], fields), rtol=1e-13)
    assert_close(jax.tree.map(lambda x: x[1], fields), field(0.4), rtol=1e-13)
    times, paths = jax.vmap(path)(h)
    np.testing.assert_allclose(times, np.outer(h, np.arange(6)), rtol=1e-13)
    assert_close(jax.tree.map(lambda x: x[0], paths), jax.tree.map(lambda x: x[1], paths), rtol=1e-12)


def test_a_function_of_the_parameters_goes_on_from_a_real_run():
    def halve(w, args, k):
        return w / 2

    start = eomdl.iterate(halve, jnp.arange(1.0, 4.0), 3)
    flow = eomdl.InterpolatingFlow(halve, 0.1, 4)
    path = eomdl.solve(flow, jnp.arange(1.0, 4.0), 6, resume=start)
    np.testing.assert_array_equal(path.steps, np.arange(7))
    new = eomdl.solve(flow, start.final_params, 3, rtol=path.stats.rtol, atol=path.stats.atol)
    np.testing.assert_allclose(path.final_params, new.final_params, rtol=1e-12)


# ------------------------------------------------------------- the iterate before


def _multiplied(z):
    """The map x -> z x: its logarithm is log z."""
    return lambda x, args, k: z * x


def _velocity(z, points, backward):
    return float(
        eomdl.InterpolatingFlow(_multiplied(z), 1.0, points, backward=backward)(0.0, jnp.ones(()), None)
    )


@pytest.mark.parametrize("points", [1, 2, 3, 5])
@pytest.mark.parametrize("z", [0.3, 0.9, 2.25])
def test_the_iterate_before_enters_as_the_relaxations_say(z, points):
    y = sum((1 - z) ** j for j in range(points + 1))
    for _ in range(3):
        y += 0.7 * (1 - z * y)
    j = np.arange(2, points + 2)
    # The differences of y, x, Psi(x), ... with y found only approximately.
    iterates = np.append(y, z ** np.arange(points + 1.0))
    differences = [np.diff(iterates, n)[0] for n in range(1, points + 2)]
    expected = differences[0] + sum((-1.0) ** n / (n * (n - 1)) * differences[n - 1] for n in j)
    np.testing.assert_allclose(_velocity(z, points, 3), expected, rtol=1e-11)


def test_each_relaxation_takes_a_fixed_part_of_the_first_term_left_out():
    z, points = 1.001, 2
    errors = [_velocity(z, points, n) - np.log(z) for n in (0, 1, 2)]
    np.testing.assert_allclose(np.divide(errors[1:], errors[:-1]), 0.3, rtol=0.02)


def test_past_one_plus_root_two_the_iterate_before_keeps_the_series_near():
    eta = 0.5  # eta * lambda = 2.5: the two-step map multiplies by 2.25, where Taylor's series diverges

    def step(x, args, k):
        return x - eta * 5.0 * x

    taylor = [eomdl.InterpolatingFlow(step, eta, k, stride=2)(0.0, jnp.ones(()), None) for k in (3, 6)]
    centred = eomdl.InterpolatingFlow(step, eta, 3, stride=2, backward=3)(0.0, jnp.ones(()), None)
    exact = np.log(2.25) / (2 * eta)
    assert abs(centred - exact) < 0.1 * exact
    assert min(abs(v - exact) for v in taylor) > 3 * abs(centred - exact)


def test_the_step_back_is_taken_at_its_own_time():
    # x(k) = k^2: the iterate before is known only to a map that is told its step.
    flow = eomdl.InterpolatingFlow(lambda x, args, k: x + 2 * k + 1, 1.0, 2, stride=2, backward=4)
    np.testing.assert_allclose(flow(3.0, jnp.asarray(9.0), None), 6.0, rtol=1e-12)


def test_weights_have_one_more_with_the_iterate_before():
    weights = eomdl.series.weights.centred_weights(2)
    plain = eomdl.InterpolatingFlow(VALLEY_SGD, ETA, 2, backward=2)
    given = eomdl.InterpolatingFlow(VALLEY_SGD, ETA, 2, weights=weights, backward=2)
    state = plain.init(VALLEY, None)
    assert_identical(plain(0.0, state, None), given(0.0, state, None))
    with pytest.raises(ValueError, match=r"weights: expected shape \(3,\)"):
        eomdl.InterpolatingFlow(VALLEY_SGD, ETA, 2, weights=weights[1:], backward=2)
