"""The flows of the edge of stability against closed forms: quadratics, a quartic, a full covariance, heavy ball."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, symmetric
from jax.flatten_util import ravel_pytree
from registry import heavy_ball, sgd

import eomdl
from eomdl._target import SMOOTHED
from eomdl.flows import ComplexPrincipalFlow, EdgeFlow, PrincipalFlow, RodFlow
from eomdl.flows.edge import EdgeState
from eomdl.flows.rod import RodState


TIGHT = {"rtol": 1e-12, "atol": 1e-13, "estimate_error": False, "diagnose": False}
QUARTER = {
    "solver": diffrax.Euler(),
    "stepsize_controller": diffrax.ConstantStepSize(),
    "dt0": 0.25,
    "estimate_error": False,
    "diagnose": False,
}
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
    real = eomdl.iterate(sgd(quadratic_loss, rate), START, 20, args=PLANE, step_size=rate)
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
    for other in (flow(0.0, state, args), flow.map(state, args, 0.0)):
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
    along = jax.tree.map(lambda x: u, centre)
    rod = flow(0.0, RodState(centre, along, 0.5 * jnp.log(extent)), (s, q))
    np.testing.assert_allclose(rod.log_length, 0, atol=1e-10)
    longer = flow(0.0, RodState(centre, along, 0.5 * jnp.log(1.1 * extent)), (s, q))
    assert float(longer.log_length) < -1e-2  # it comes back


def test_what_is_wrong_for_the_edge_flow_is_named():
    with pytest.raises(ValueError, match=r"^direction: expected the shape in params"):
        eomdl.solve(EdgeFlow(quadratic_loss, 0.5, direction=jnp.ones(3)), START, 2, args=PLANE)


def test_one_vector_follows_two_modes_past_the_edge():
    """d' = (H - 2/eta) d: every mode grows at its own rate, and both are those of gradient descent at the start."""
    eta, steps, curvatures = 1.0, 12, np.array([2.1, 2.05, 0.3])
    args, start = (jnp.diag(jnp.asarray(curvatures)), jnp.zeros(3)), jnp.array([0.02, -0.03, 0.5])
    flow = EdgeFlow(quadratic_loss, eta)
    path = eomdl.solve(flow, start, steps, args=args, observe_state={"d": oscillation}, **TIGHT)
    k, first = path.steps[:, None], np.asarray(start)
    expected = np.where([1, 1, 0], np.exp(k * (eta * curvatures - 2)) * first, 0)
    np.testing.assert_allclose(path.observables["d"], expected, atol=1e-9)
    np.testing.assert_allclose(
        path.params, np.where([1, 1, 0], 0, np.exp(-k * eta * curvatures) * first), atol=1e-9
    )


def oscillation(t, state, args):
    u = state.direction
    return jnp.exp(state.log_magnitude) * u / jnp.linalg.norm(u)


def test_a_critical_mode_beside_the_oscillation_is_told():
    args = (jnp.diag(jnp.array([1.2, 1.1])), jnp.zeros(2))
    for start, rate, told in (
        (START, 1.9, False),
        (along_one := jnp.array([0.3, 0.0]), 1.9, True),
        (along_one, 1.7, False),
    ):
        flow = EdgeFlow(quadratic_loss, rate)
        (found,) = flow.diagnostics(0.0, flow.init(start, args), args).values()
        assert found.exceeded == told
    assert float(found.value) == pytest.approx(1.7 * 1.1, rel=1e-3)


# ------------------------------------------------------------------ rod flow


def velocity_of_rod(flow, state, args):
    velocity = flow(0.0, state, args)
    return jax.jvp(
        lambda u, l: jax.tree.map(lambda x: jnp.exp(l) * x, u),
        (state.direction, state.log_length),
        (velocity.direction, velocity.log_length),
    )[1]


def test_the_rod_on_a_quadratic():
    """At the start half a step along the modes that alternate; then d' = (H - b) d + (b^2/4 - 1) d, b = u'Hu."""
    eta, hessian = 1.0, symmetric([0.1, 1.8, 1.9])
    args, start = (jnp.asarray(hessian), jnp.zeros(3)), np.array([0.3, -0.2, 0.5])
    step = eomdl.optimizer_step(quadratic_loss, optax.sgd(eta))
    flow = RodFlow(step, eta)
    state = flow.init(jnp.asarray(start), args)
    values, vectors = np.linalg.eigh(hessian)
    half = vectors @ (np.where(values > 1, values / 2, 0) * (vectors.T @ start))
    rod = jax.tree.leaves(rod_of_tree(state))[0]
    np.testing.assert_allclose(rod, half, atol=1e-12)
    u = rod / np.linalg.norm(rod)
    b = u @ hessian @ u
    (velocity,) = jax.tree.leaves(velocity_of_rod(flow, state, args))
    np.testing.assert_allclose(velocity, hessian @ rod - b * rod + (b**2 / 4 - 1) * rod, atol=1e-8)
    along = state._replace(direction=jax.tree.map(lambda x: jnp.asarray(vectors[:, 2]), state.direction))
    np.testing.assert_allclose(flow(0.0, along, args).log_length, (1.9**2 / 2 - 2) / 2, rtol=1e-7)


def rod_of_tree(state):
    return jax.tree.map(lambda x: jnp.exp(state.log_length) * x, state.direction)


def test_the_rod_flow_of_heavy_ball_grows_at_its_threshold():
    """In the space of parameters and momenta a mode turns over at eta lambda = 2 + 2 beta."""
    beta = 0.5  # that of `heavy_ball`
    rates = []
    for product in (2 + 2 * beta - 0.05, 2 + 2 * beta, 2 + 2 * beta + 0.05):
        flow = RodFlow(heavy_ball(quadratic_loss, product), product / (1 - beta))
        state = flow.init(jnp.array([0.1, 0.2]), PLANE)
        multiplier = min(np.roots([1, -(1 + beta - product), beta]).real)
        rate = flow.step_size * flow(0.0, state, PLANE).log_length
        np.testing.assert_allclose(rate, (0.5 * (1 - multiplier) ** 2 - 2) / 2, atol=1e-6)
        rates.append(float(rate))
    assert rates[0] < -1e-3 < abs(rates[1]) + 1e-3 < rates[2]


def test_the_rod_turns_in_the_plane_of_a_complex_pair():
    """Shortly before the edge of heavy ball: up to its length d is that of d' = -f' d."""
    beta, product = 0.5, 2.88
    step = heavy_ball(quadratic_loss, product)
    flow, start = RodFlow(step, product / (1 - beta)), jnp.array([0.1, 0.0])
    observe = {"d": lambda t, state, args: ravel_pytree(state.direction)[0]}
    path = eomdl.solve(flow, start, 10, args=PLANE, observe_state=observe, **TIGHT)
    flat, unflatten = ravel_pytree(step.init(start))
    matrix = jax.jacobian(lambda x: ravel_pytree(step.increment(unflatten(x), PLANE, 0.0))[0])(flat)
    found = path.observables["d"] / np.linalg.norm(path.observables["d"], axis=1, keepdims=True)
    for k in (1, 5, 10):
        expected = jax.scipy.linalg.expm(-k * matrix) @ found[0]
        np.testing.assert_allclose(found[k], expected / np.linalg.norm(expected), atol=1e-8)
    assert abs(found[0] @ found[10]) < 0.99


def test_the_rod_begins_at_the_step_of_the_real_run():
    """The centre is the midpoint of the next step, which with Adam's bias correction is another at step 0."""
    optimizer = optax.adam(0.1, 0.5, 0.9)
    end = eomdl.descend(quadratic_loss, START, optimizer, 3, args=PLANE).end
    real = eomdl.descend(quadratic_loss, START, optimizer, 4, args=PLANE, resume=end)
    flow = RodFlow(eomdl.optimizer_step(quadratic_loss, optimizer), 0.1)
    state = flow.begin(0.3, end.params, end.state, args=PLANE)
    middle = 0.5 * (real.at(3) + real.at(4))
    np.testing.assert_allclose(flow.params(state), middle, rtol=1e-6)  # optax corrects the bias in float32
    wrong = flow.begin(0.0, end.params, end.state, args=PLANE)
    assert np.max(np.abs(flow.params(wrong) - middle)) > 1e-4


def test_the_rod_flow_of_a_map_that_changes_with_time():
    """x_{k+1} = x_k + k has the midpoints x_0 + k^2/2."""
    flow = RodFlow(lambda state, args, k: state + jnp.asarray(k, state.dtype), 0.5)
    path = eomdl.solve(flow, jnp.zeros(2), 6, **TIGHT)
    np.testing.assert_allclose(path.params[:, 0], path.steps**2 / 2, atol=1e-10)


def test_a_growing_mode_beside_the_rod_is_told():
    args = (jnp.diag(jnp.array([1.2, 1.1])), jnp.zeros(2))
    for start, rate, told in (
        (START, 1.9, False),
        (jnp.array([0.3, 0.0]), 1.9, True),
        (jnp.array([0.3, 0.0]), 1.7, False),
    ):
        flow = RodFlow(sgd(quadratic_loss, rate), rate)
        (found,) = flow.diagnostics(0.0, flow.init(start, args), args).values()
        assert found.exceeded == told
    assert float(found.value) == pytest.approx(1.7 * 1.1, rel=1e-6)


# ------------------------------------------------------------------ through the edge


def test_both_flows_follow_the_middle_of_the_valley_through_the_edge():
    eta, start = 0.3, {"x": jnp.array(0.02, float), "y": jnp.array(6.3, float)}
    real = eomdl.descend(minimal_loss, start, optax.sgd(eta), 101)
    step = eomdl.optimizer_step(minimal_loss, optax.sgd(eta))
    paths = {
        "edge": eomdl.solve(EdgeFlow(minimal_loss, eta), start, 100, **QUARTER),
        "rod": eomdl.solve(RodFlow(step, eta), start, 100, **QUARTER),
    }
    plain = eomdl.solve(eomdl.GradientFlow(minimal_loss, eta), start, 100, **QUARTER)
    target = real.averaged(SMOOTHED)
    apart = eomdl.compare(target, {"gradient flow": plain}).distance["gradient flow"]
    for name, path in paths.items():
        found = eomdl.compare(real, {name: path}).distance[name]
        assert found[-1] < 0.3 * apart[-1], (name, found[-1], apart[-1])


def test_the_rod_flow_goes_through_the_edge_of_adam():
    optimizer, start = (
        optax.adam(0.1, 0.5, 0.999, 0.1),
        {"x": jnp.array(0.02, float), "y": jnp.array(4.0, float)},
    )
    end = eomdl.descend(minimal_loss, start, optimizer, 30).end
    real = eomdl.descend(minimal_loss, start, optimizer, 181, resume=end)
    step = eomdl.optimizer_step(minimal_loss, optimizer)
    path = eomdl.solve(RodFlow(step, 0.1), start, 180, resume=end, **QUARTER)
    (apart,) = eomdl.compare(real, {"rod": path}).distance.values()
    assert apart[49] < 1e-4  # before the edge
    assert np.abs(np.diff(real.params["x"], 2)).max() > 0.2
    assert apart[-1] < 2e-3  # 2e-2 without the rod
