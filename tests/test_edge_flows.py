"""The flows of the edge of stability against closed forms: quadratics, a quartic, a full covariance, heavy ball."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, symmetric

import eomdl
from eomdl.flows import ComplexPrincipalFlow, EdgeFlow, EdgeState, PrincipalFlow, RodFlow, RodState


TIGHT = {"rtol": 1e-12, "atol": 1e-13, "estimate_error": False, "diagnose": False}
PLANE = (jnp.diag(jnp.array([1.0, 0.01])), jnp.zeros(2))
START = jnp.array([-0.35, -0.2])


def quadratic_loss(w, args):
    """1/2 w'Hw - b'w, without conjugates: for complex w too."""
    hessian, b = args
    return 0.5 * w @ (hessian @ w) - b @ w


def quartic_loss(w, args):
    """S/2 w^2 - Q/4 w^4 in the first coordinate, a slope in the second that the first does not see."""
    s, q = args
    return s / 2 * w[0] ** 2 - q / 4 * w[0] ** 4 + 0.1 * w[1]


def minimal_loss(w, args):
    """Progressive sharpening in two parameters: y is the sharpness of x."""
    del args
    return (w["y"] + w["x"]) * w["x"] ** 2 / 2 - 0.05 * (w["x"] + w["y"])


# ------------------------------------------------------------------ principal flow


@pytest.mark.parametrize("rate", [0.5, 0.9, 1.05])
def test_the_principal_flow_is_exact_on_a_quadratic(rate):
    real = eomdl.descend(quadratic_loss, START, optax.sgd(rate), 20, args=PLANE)
    options = {"args": PLANE, **TIGHT}
    paths = {
        "real": eomdl.solve(PrincipalFlow(quadratic_loss, rate), START, 20, **options),
        "complex": eomdl.solve(ComplexPrincipalFlow(quadratic_loss, rate), START, 20, **options),
        "gradient flow": eomdl.solve(eomdl.GradientFlow(quadratic_loss, rate), START, 20, **options),
    }
    found = eomdl.compare(real, paths)
    even = found.at_multiples_of(2)
    assert found.distance["complex"].max() < 1e-12
    assert even.distance["real"].max() < 1e-12
    assert even.distance["gradient flow"].max() > 0.03
    if rate < 1:
        assert found.distance["real"].max() < 1e-12
    else:  # the odd iterates are on the other side of the valley
        assert found.distance["real"][1] == pytest.approx(2 * 0.05 * 0.35, rel=1e-9)
    np.testing.assert_allclose(jax.tree.leaves(paths["complex"].end.state.flow.imaginary), 0, atol=1e-12)


def test_the_principal_flow_is_a_function_of_the_hessian():
    hessian = symmetric([-0.4, 0.1, 0.7, 1.3, 2.0])
    args, eta = (jnp.asarray(hessian), jnp.array([0.5, -0.3, 0.2, 0.1, 1.0])), 1.2
    w = jnp.arange(1.0, 6.0)
    values, vectors = np.linalg.eigh(hessian)
    rates = np.log(np.abs(1 - eta * values)) / (eta * values)
    gradient = hessian @ np.asarray(w) - np.asarray(args[1])
    velocity = PrincipalFlow(quadratic_loss, eta)(0.0, w, args)
    np.testing.assert_allclose(velocity, vectors @ (rates * (vectors.T @ gradient)), rtol=1e-12)


def test_where_the_krylov_space_ends_and_at_the_singularity():
    along_one = jnp.array([0.3, 0.0])
    for rate, expected in ((0.5, np.log(0.5) / 0.5), (1.0, np.log(np.finfo(float).eps))):
        velocity = PrincipalFlow(quadratic_loss, rate)(0.0, along_one, PLANE)
        np.testing.assert_allclose(velocity, [expected * 0.3, 0.0], rtol=1e-12)
    # One step takes the mode down to rounding, as gradient descent does to 0.
    path = eomdl.solve(PrincipalFlow(quadratic_loss, 1.0), START, 2, args=PLANE, **TIGHT)
    if (
        jax.default_backend() == "cpu"
    ):  # elsewhere it may stop at the start: at the singularity rounding decides
        np.testing.assert_allclose(path.final_params, [0.0, -0.2 * 0.99**2], atol=1e-12)
    else:
        assert path.message or abs(path.final_params[0]) < 1e-12


def test_too_few_products_are_told():
    hessian = symmetric(np.linspace(0.01, 0.9, 40))
    args, w = (jnp.asarray(hessian), jnp.zeros(40)), jnp.ones(40)
    remainders = [
        float(PrincipalFlow(quadratic_loss, 1.0, n).diagnostics(0.0, w, args)["Lanczos remainder"].value)
        for n in (2, 8, 40)
    ]
    assert remainders[0] > 0.02
    assert np.all(np.diff(remainders) < 0)
    assert remainders[-1] < 1e-10


def test_curvature_that_is_not_finite_is_not_hidden():
    loss = lambda w, args: jnp.sum(jnp.sqrt(jnp.abs(w)) ** 3)  # finite gradient, infinite curvature at 0
    velocity = PrincipalFlow(loss, 0.1)(0.0, jnp.array([0.0, 1.0]), None)
    assert not np.all(np.isfinite(velocity))


def test_the_complex_flow_stays_in_float32():
    flow = ComplexPrincipalFlow(quadratic_loss, 0.5)
    start, args = jax.tree.map(lambda x: x.astype(jnp.float32), (START, PLANE))
    state = flow.init(start, args)
    for other in (flow(0.0, state, args), flow.step(0.0, state, args)):
        assert jax.tree.map(jnp.shape, other) == jax.tree.map(jnp.shape, state)
        assert {leaf.dtype for leaf in jax.tree.leaves(other)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    "loss",
    [
        lambda w, args: jnp.sum(jnp.abs(w) ** 2),
        lambda w, args: jnp.sum(w.real**2),
        lambda w, args: jnp.sum(w * jnp.conj(w)) + 0j,
    ],
)
def test_a_loss_that_is_not_analytic_is_refused(loss):
    with pytest.raises(ValueError, match=r"^loss: expected a (function analytic|function \(params)"):
        eomdl.solve(ComplexPrincipalFlow(loss, 0.1), START, 2)


# ------------------------------------------------------------------ edge flow


def test_the_edge_flow_along_a_quadratic():
    """r' = r (lambda - 2/eta), c' = -H c, u is an eigenvector."""
    eta = 1.9
    flow = EdgeFlow(quadratic_loss, eta)
    state = flow.init(START, PLANE)
    np.testing.assert_allclose(np.abs(state.direction), [1, 0], atol=1e-8)
    assert float(jnp.exp(state.log_magnitude)) == pytest.approx(0.35, rel=1e-9)
    np.testing.assert_allclose(state.centre, [0, -0.2], atol=1e-9)
    velocity = flow(0.0, state, PLANE)
    np.testing.assert_allclose(velocity.centre, [0, 0.002], atol=1e-9)
    np.testing.assert_allclose(velocity.direction, 0, atol=1e-6)
    np.testing.assert_allclose(velocity.log_magnitude, 1 - 2 / eta, rtol=1e-6)


def test_the_edge_flow_turns_towards_the_top_eigenvector():
    tilted = jnp.array([0.6, 0.8])
    flow = EdgeFlow(quadratic_loss, 1.9, direction=3.0 * tilted, magnitude=0.1)
    state = flow.init(START, PLANE)
    assert_close(state, EdgeState(START, tilted, jnp.log(0.1)), rtol=1e-12)
    turn = flow(0.0, state, PLANE).direction
    np.testing.assert_allclose(turn, np.array([0.8, -0.6]) * (0.6 * 0.8 * 0.99), rtol=1e-9)


def test_below_one_the_edge_flow_is_gradient_flow():
    flow = EdgeFlow(quadratic_loss, 0.5)
    state = flow.init(START, PLANE)
    assert_close(state, EdgeState(START, jnp.zeros(2), jnp.zeros(())), rtol=0)
    assert_close(flow(0.0, state, PLANE).centre, eomdl.GradientFlow(quadratic_loss, 0.5)(0.0, START, PLANE))


def test_both_flows_rest_on_the_orbit_of_period_two():
    r"""eta (S - Q w^2) = 2: gradient descent jumps between w and -w. Sigma* = S/Q - 2/(eta Q)."""
    s, q, eta = 3.0, 0.5, 0.75
    extent = s / q - 2 / (eta * q)
    ends = jnp.array([[np.sqrt(extent), 0.0], [-np.sqrt(extent), 0.0]])
    step = eomdl.optimizer_step(quartic_loss, optax.sgd(eta))
    moved = step(step.init(ends[0]), (s, q), 0.0)[0]
    np.testing.assert_allclose(moved[0], ends[1][0], rtol=1e-12)
    u = jnp.array([1.0, 0.0])
    edge = EdgeFlow(quartic_loss, eta)(0.0, EdgeState(jnp.zeros(2), u, 0.5 * jnp.log(extent)), (s, q))
    np.testing.assert_allclose(edge.log_magnitude, 0, atol=1e-10)
    np.testing.assert_allclose(edge.centre, [0, -0.1], atol=1e-12)
    flow = RodFlow(step, eta)
    centre = step.init(jnp.zeros(2))
    frame = jax.tree.map(lambda x: u[None], centre)
    rod = flow(0.0, RodState(centre, frame, jnp.ones((1, 1)), 0.5 * jnp.log(extent)), (s, q))
    np.testing.assert_allclose(rod.log_length, 0, atol=1e-10)
    longer = flow(0.0, RodState(centre, frame, jnp.ones((1, 1)), 0.5 * jnp.log(1.1 * extent)), (s, q))
    assert float(longer.log_length) < -1e-2  # it comes back


def test_what_is_wrong_for_the_edge_flow_is_named():
    with pytest.raises(ValueError, match=r"^direction: expected the shape in params"):
        eomdl.solve(EdgeFlow(quadratic_loss, 0.5, direction=jnp.ones(3)), START, 2, args=PLANE)


def test_a_second_critical_direction_is_told():
    args = (jnp.diag(jnp.array([1.2, 1.1])), jnp.zeros(2))
    flow = EdgeFlow(quadratic_loss, 1.9)
    state = flow.init(START, args)
    (found,) = flow.diagnostics(0.0, state, args).values()
    assert float(found.value) == pytest.approx(1.9 * 1.1, rel=1e-3)
    assert found.exceeded
    (found,) = EdgeFlow(quadratic_loss, 1.7).diagnostics(0.0, state, args).values()
    assert not found.exceeded


# ------------------------------------------------------------------ rod flow


def covariance(state):
    frame = np.asarray(jax.tree.leaves(state.frame)[0])
    return frame.T @ np.asarray(state.extent) @ frame


@pytest.mark.parametrize("rods", [1, 2])
def test_rods_are_those_of_the_whole_covariance_on_a_quadratic(rods):
    r"""Sigma' = eta^2/2 H Sigma H - 2 Sigma where the drift is left out; with one number (eta^2 S^2/2 - 2) Sigma."""
    eta, hessian = 1.0, symmetric([0.1, 1.6, 1.9])
    args = (jnp.asarray(hessian), jnp.zeros(3))
    step = eomdl.optimizer_step(quadratic_loss, optax.sgd(eta))
    flow = RodFlow(step, eta, rods)
    state = flow.init(jnp.array([0.3, -0.2, 0.5]), args)
    velocity = flow(0.0, state, args)
    _, moved = jax.jvp(lambda x: jnp.exp(2 * x.log_length) * _combined(x), (state,), (velocity,))
    _, vectors = np.linalg.eigh(hessian)
    top = vectors[:, ::-1][:, :rods]
    inside = top @ top.T
    sigma = covariance(state)
    expected = 0.5 * hessian @ sigma @ hessian - 2 * sigma
    np.testing.assert_allclose(sigma, inside @ sigma @ inside, atol=1e-12)
    np.testing.assert_allclose(moved, expected, atol=1e-9)
    if rods == 1:
        np.testing.assert_allclose(velocity.log_length, (1.9**2 / 2 - 2) / 2, rtol=1e-8)


def _combined(state):
    frame = jax.tree.leaves(state.frame)[0]
    return frame.T @ state.shape @ frame


def test_the_rod_flow_of_heavy_ball_grows_at_its_threshold():
    """In the space of parameters and momenta a mode turns over at eta lambda = 2 + 2 beta."""
    beta = 0.5
    rates = []
    for product in (2 + 2 * beta - 0.05, 2 + 2 * beta, 2 + 2 * beta + 0.05):
        step = eomdl.optimizer_step(quadratic_loss, optax.sgd(product, momentum=beta))
        flow = RodFlow(step, product / (1 - beta))
        state = flow.init(jnp.array([0.1, 0.2]), PLANE)
        multiplier = min(np.roots([1, -(1 + beta - product), beta]).real)
        rate = flow.step_size * flow(0.0, state, PLANE).log_length
        np.testing.assert_allclose(rate, (0.5 * (1 - multiplier) ** 2 - 2) / 2, atol=1e-6)
        rates.append(float(rate))
    assert rates[0] < -1e-3 < abs(rates[1]) + 1e-3 < rates[2]


def test_more_rods_than_numbers_are_refused():
    step = eomdl.optimizer_step(quadratic_loss, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"^rods: expected at most the 2 numbers of the state, got 3"):
        eomdl.solve(RodFlow(step, 0.1, 3), START, 2, args=PLANE)


# ------------------------------------------------------------------ through the edge


def test_both_flows_follow_the_middle_of_the_valley_through_the_edge():
    eta, start = 0.3, {"x": jnp.array(0.02, float), "y": jnp.array(6.3, float)}
    real = eomdl.descend(minimal_loss, start, optax.sgd(eta), 101)
    step = eomdl.optimizer_step(minimal_loss, optax.sgd(eta))
    quarter = {
        "solver": diffrax.Euler(),
        "stepsize_controller": diffrax.ConstantStepSize(),
        "dt0": 0.25,
        "estimate_error": False,
        "diagnose": False,
    }
    paths = {
        "edge": eomdl.solve(EdgeFlow(minimal_loss, eta), start, 100, **quarter),
        "rod": eomdl.solve(RodFlow(step, eta), start, 100, **quarter),
    }
    plain = eomdl.solve(eomdl.GradientFlow(minimal_loss, eta), start, 100, **quarter)
    target = real.averaged(eomdl.flows.SMOOTHED)
    apart = eomdl.compare(target, {"gradient flow": plain}).distance["gradient flow"]
    for name, path in paths.items():
        found = eomdl.compare(real, {name: path}).distance[name]
        assert found[-1] < 0.3 * apart[-1], (name, found[-1], apart[-1])
