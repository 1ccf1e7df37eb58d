"""The central flow: closed forms, a brute-force integration, real gradient descent, and what it says where it fails."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_identical, flat
from test_complementarity import reference

import eomdl
from eomdl._target import SMOOTHED
from eomdl.flows import CentralFlow, SecondMoment
from eomdl.linalg.complementarity import symmetric_basis


ETA, DRIVE = 0.3, 0.01


def data(coupling=0.0, zeta=0.0, slope=(0.0,) * 6, held=(0.0,) * 3, rough=0.0) -> dict[str, Any]:
    """What `sharpening_loss` takes: a test is numbers, so that all of them share few programs."""
    numbers = {"coupling": coupling, "zeta": zeta, "slope": slope, "held": held, "rough": rough}
    return jax.tree.map(lambda x: jnp.array(x, float), numbers, is_leaf=lambda x: isinstance(x, tuple))


def sharpening_loss(w, data):
    """Three directions x_i of curvature y_i, each theory's minimal example: the slope sharpens it along y, until 2/eta.

    - `coupling`: they are critical one after the other, and mixed; `zeta`: of the minimal example.
    - `held`: curvatures instead of y, with no third derivative; `rough`: a kink at x = 0, where the curvature is infinite.
    """
    x, y = w[:3], w[3:]
    beyond = y - 2 / ETA
    mixed = x[0] * x[1] * beyond[2] + x[1] * x[2] * beyond[0]
    shared = 0.5 * jnp.sum((jnp.sum(beyond) - beyond) * x**2)
    curvature = jnp.where(jnp.any(data["held"] > 0), data["held"], y + data["zeta"] * x)
    kink = jnp.sum(jnp.abs(jnp.where(data["rough"] > 0, x, 1.0)) ** 1.5)
    return (
        0.5 * jnp.sum(curvature * x**2)
        + data["coupling"] * (mixed + shared)
        + data["rough"] * kink
        - data["slope"] @ w
    )


LOW = 1.0  # a curvature that is never critical
EDGE = jnp.array([0.0, 0.0, 0.0, 2 / ETA, LOW, LOW])  # the first direction alone
ALONE = (DRIVE, 0.0, 0.0, DRIVE, 0.0, 0.0)
TRIPLE = jnp.array([0.0, 0.0, 0.0, 6.64, 6.62, 6.6])
COUPLED = data(0.1, slope=tuple(DRIVE * np.array([1.0, 1.0, 1.0, 1.0, 0.8, 0.6])))
ONE, THREE = (CentralFlow(sharpening_loss, ETA, k) for k in (1, 3))
# What all runs of a flow are given: they share one program.
OF_ONE: dict[str, Any] = {
    "observe_state": {"variances": ONE.variances, "axes": ONE.axes},
    "save_steps": 25,
    "rtol": 1e-6,
    "atol": 1e-8,
    "estimate_error": False,
}
OF_THREE: dict[str, Any] = {
    "observe": {"loss": sharpening_loss},
    "observe_state": {"curvature": lambda t, s, a: s.curvature, "variances": THREE.variances},
}
SGD = optax.sgd(ETA)
QUICK = {"rtol": 1e-6, "atol": 1e-8, "estimate_error": False}


@eqx.filter_jit
def refresh(flow, w, args, moment=None):
    """Return the state at a place, with the moment given."""
    state = flow.init(w, args)
    return flow.refresh(0.0, state if moment is None else state._replace(moment=moment), args)


# ------------------------------------------------------------- closed forms


@pytest.mark.parametrize("zeta", [0.0, 0.7, -1.0])
def test_one_direction_of_gradient_descent_in_closed_form(zeta):
    args = data(zeta=zeta, slope=ALONE)
    state = refresh(ONE, EDGE, args)
    third = np.array([3 * zeta, 0.0, 0.0, 1.0, 0.0, 0.0])
    expected = max(0.0, 2 * (DRIVE * third.sum()) / (third @ third))
    np.testing.assert_allclose(ONE.variances(0.0, state, args), [expected], atol=1e-12)
    np.testing.assert_allclose(state.force, expected / 2 * third, atol=1e-12)
    np.testing.assert_allclose(state.curvature, [2.0], rtol=1e-12)
    # The curvature then stays: its rate is 0 where the direction oscillates.
    velocity = ONE(0.0, state, args).params
    assert abs(third @ np.asarray(velocity)) < 1e-12 or expected == 0


def test_predictions_of_averages():
    args = data(slope=ALONE)
    state = refresh(ONE, EDGE, args)
    loss, squared = sharpening_loss(EDGE, args), 2 * DRIVE**2
    np.testing.assert_allclose(ONE.mean_loss(0.0, state, args), loss + 2 * DRIVE / ETA, atol=1e-12)
    expected = squared + 4 * 2 * DRIVE / ETA**2
    np.testing.assert_allclose(ONE.mean_squared_gradient(0.0, state, args), expected, rtol=1e-12)
    # The loss averaged over a Gaussian of this variance, by quadrature.
    points, weights = np.polynomial.hermite_e.hermegauss(9)
    x = np.sqrt(2 * DRIVE) * points
    mean = np.sum(weights * jax.vmap(lambda x: sharpening_loss(EDGE.at[0].set(x), args))(x))
    np.testing.assert_allclose(ONE.mean_loss(0.0, state, args), mean / weights.sum(), atol=1e-12)


def test_scalar_rmsprop_in_closed_form():
    zeta, decay, moment = 0.4, 0.9, 0.01
    rate = 2 * np.sqrt(moment) / 5.0  # critical at sharpness 5: sqrt(nu)/eta = 5/2
    flow = CentralFlow(sharpening_loss, rate, 1, SecondMoment(decay, 0.0, scalar=True))
    args = data(zeta=zeta, slope=ALONE)
    state = refresh(flow, EDGE.at[3].set(5.0), args, jnp.asarray(moment))
    third, squared, c = np.array([3 * zeta, 0.0, 0.0, 1.0, 0.0, 0.0]), 2 * DRIVE**2, (1 - decay) / decay
    top = rate**2 * DRIVE * third.sum() + c * (moment - squared)
    expected = top / (rate**2 * third @ third / 2 + 4 * c * moment / rate**2)
    np.testing.assert_allclose(flow.variances(0.0, state, args), [expected], rtol=1e-10)
    velocity = flow(0.0, state, args)
    # The curvature over sqrt(nu)/eta stays at 2.
    drift = third @ np.asarray(velocity.params) / 5.0 - velocity.moment / (2 * moment)
    assert abs(drift) < 1e-10


def test_rmsprop_holds_its_own_curvature():
    """The largest eigenvalue of P^-1 H, dense, stands still along the field where it would rise without Sigma."""
    w, moment = (
        jnp.array([0.004, -0.002, 0.001, 3.0, 2.5, 2.0]),
        jnp.array([4.0, 3.0, 2.0, 5.0, 6.0, 4.0]) * 1e-4,
    )

    def top(w, moment, rate):
        root = jnp.sqrt(rate) / moment**0.25  # P^(-1/2)
        return jnp.linalg.eigvalsh(root[:, None] * jax.hessian(sharpening_loss)(w, COUPLED) * root[None])[-1]

    rate = 2 / top(w, moment, 1.0)
    flow = CentralFlow(sharpening_loss, rate, 2, SecondMoment(0.99, 0.0))
    state = refresh(flow, w, COUPLED, moment)
    free = state._replace(force=jnp.zeros(6), squares=jnp.zeros(6))
    rises = []
    rise = jax.jit(lambda w, nu, along: jax.jvp(lambda w, nu: top(w, nu, rate), (w, nu), along)[1])
    for start in (state, free):
        velocity = flow(0.0, start, COUPLED)
        along = (velocity.params, velocity.moment)
        rises.append(rise(w, moment, along))
    assert rises[1] > 0
    assert abs(rises[0]) < 1e-3 * rises[1]


def test_rmsprop_with_one_scale_is_scalar_rmsprop():
    """Both parameters with the same moment, and an oscillation that adds nothing: the fields agree."""
    moment, args, rate = 0.02, data(slope=(DRIVE,) * 6), jnp.array(0.01, float)
    velocities = []
    for k, scalar, start in ((2, False, jnp.full(6, moment, float)), (1, True, jnp.asarray(moment))):
        flow = CentralFlow(sharpening_loss, rate, k, SecondMoment(0.9, 0.0, scalar))
        state = refresh(flow, EDGE.at[3].set(1.0), args, start)
        velocities.append(flow(0.0, state, args).params)
        np.testing.assert_array_equal(state.variance, 0)
    assert_close(*velocities, rtol=1e-12)


def test_without_a_critical_direction_it_is_gradient_flow():
    flow, plain = CentralFlow(sharpening_loss, 0.1, 1), eomdl.GradientFlow(sharpening_loss, 0.1)
    args = data(zeta=0.2, slope=ALONE)
    for x, y in ((0.3, 2.0), (-0.1, 19.0)):
        w = EDGE.at[0].set(x).at[3].set(y)
        state = refresh(flow, w, args)
        assert_close(flow(0.0, state, args).params, plain(0.0, w, args), rtol=1e-15)
        np.testing.assert_array_equal(state.variance, 0)


# ------------------------------------------------------- along the path


def brute_force(w, args, num_steps, substeps=20):
    """Dense: all of the Hessian and of its derivative in NumPy, projected gradients, Euler in 1/20 of a step."""
    basis, ahead = symmetric_basis(3), 1 / substeps
    gradient = jax.jit(jax.grad(sharpening_loss))
    hessian = jax.jit(jax.hessian(sharpening_loss))
    third = jax.jit(jax.jacfwd(jax.hessian(sharpening_loss)))
    w = np.asarray(w)
    for _ in range(num_steps * substeps):
        g, h, t = (np.asarray(f(w, args)) for f in (gradient, hessian, third))
        u = np.linalg.eigh(h)[1][:, ::-1][:, :3]
        thirds = np.einsum("aij,mi,nj,mnp->ap", basis, u, u, t)
        constant = 2 * np.eye(3) - ETA * u.T @ h @ u
        constant = constant + ahead * ETA**2 * np.tensordot(thirds @ g, basis, 1)
        x = np.zeros((3, 3))
        if np.linalg.eigvalsh(constant)[0] < 0:
            x = reference(constant, ahead * ETA**2 / 2 * thirds @ thirds.T)
        w = w - ahead * ETA * (g + np.einsum("ij,aij,ap->p", x, basis, thirds) / 2)
    return w


@pytest.fixture(scope="module")
def path():
    return eomdl.solve(THREE, TRIPLE, 60, args=COUPLED, **OF_THREE)


def test_the_curvature_is_held_and_the_loss_falls(path):
    assert path.message == ""
    assert not any(note.is_fault for note in path.notes)
    curvature, variances = path.observables["curvature"][1:], path.observables["variances"][1:]
    critical = variances > 1e-12
    assert critical.all(axis=1).any()  # three at once
    held = np.abs(curvature[:, 0] / 2 - 1)[critical[:, 0]]
    assert held.max() < 1e-3
    assert np.diff(path.observables["loss"]).max() < 1e-12  # it comes to rest, but for rounding
    assert path.stats.target == SMOOTHED


def test_against_a_brute_force_integration(path):
    by_hand = brute_force(TRIPLE, COUPLED, 60, substeps=4)
    travelled = np.linalg.norm(by_hand - flat(TRIPLE))
    assert np.linalg.norm(flat(path.final_params) - by_hand) < 0.01 * travelled
    plain = eomdl.solve(eomdl.GradientFlow(sharpening_loss, ETA), TRIPLE, 60, args=COUPLED, **QUICK)
    assert np.linalg.norm(flat(plain.final_params) - by_hand) > 0.1 * travelled


def test_nothing_moves_when_the_tolerance_is_tightened(path):
    tight = eomdl.solve(
        THREE, TRIPLE, 60, args=COUPLED, rtol=1e-10, atol=1e-11, estimate_error=False, **OF_THREE
    )
    travelled = np.linalg.norm(flat(tight.final_params) - flat(TRIPLE))
    assert np.linalg.norm(flat(tight.final_params) - flat(path.final_params)) < 1e-4 * travelled


def test_a_resumed_run_is_the_whole_one(path):
    first = eomdl.solve(THREE, TRIPLE, 30, args=COUPLED, **OF_THREE)
    whole = eomdl.solve(THREE, TRIPLE, 60, args=COUPLED, resume=first, **OF_THREE)
    assert_close(whole.final_params, path.final_params, rtol=1e-6)


# -------------------------------------------------- directions that come later


RISE, FIRST, SECOND = 0.05, 6.6, 5.8


# Two minimal examples side by side: one is critical at once, the other one much later.
TWO, TWO_RISE = jnp.array([0.0, 0.0, 0.0, FIRST, SECOND, LOW]), data(slope=(0.0, 0.0, 0.0, RISE, RISE, 0.0))


def rising(start, steps):
    """The sharpness of one of them: up at a constant rate, and then held."""
    return np.minimum(start + ETA * RISE * np.asarray(steps), 2 / ETA)


def test_directions_are_added_as_they_come_near(tmp_path):
    run = eomdl.solve(THREE, TWO, 96, args=TWO_RISE, **OF_THREE, **QUICK)
    for i, start in enumerate((FIRST, SECOND)):
        assert_close(run.params[:, 3 + i], rising(start, run.steps), rtol=1e-3)
    np.testing.assert_allclose(run.observables["curvature"][80:, :2], 2, rtol=1e-3)
    # The second sharpness is within 10 % of the bound from step 13 on: the next look is at step 16.
    np.testing.assert_array_equal(run.end.state.flow.tracked.since, [0, 16, -1])
    curvature = run.observables["curvature"]
    assert curvature[16, 1] == 0 < curvature[17, 1]
    assert not any(note.is_fault for note in run.notes)
    (note,) = [n for n in run.notes if "tracked" in n]
    assert note.startswith("step from which 2 directions are tracked: 16. ")
    run.save(tmp_path / "run.npz")
    assert eomdl.Trajectory.load(tmp_path / "run.npz").notes == run.notes


def test_one_direction_of_two_is_not_enough():
    run = eomdl.solve(ONE, TWO, 100, args=TWO_RISE, **OF_ONE)
    assert run.params[-1, 4] > 1.05 * 2 / ETA
    assert any(n.startswith("curvature of the next direction") and n.is_fault for n in run.notes)


def turned_loss(w, args):
    """The same in coordinates that mix the two directions with ten of less curvature."""
    turn, rates = args
    curvature = jnp.concatenate([w["y"], jnp.linspace(-0.5, 5.5, 10)])
    return 0.5 * jnp.sum(curvature * (turn.T @ w["x"]) ** 2) - jnp.sum(rates * w["y"])


def test_variances_of_two_directions_that_do_not_couple():
    """Each is 2 of its rate, whatever the covariance of the two, of which the curvature knows nothing."""
    turn = jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=(12, 12)))[0])
    flow, args = CentralFlow(turned_loss, ETA, 2), (turn, jnp.array([0.05, 0.03]))
    state = flow.init({"x": jnp.zeros(12), "y": jnp.full(2, 2 / ETA - 0.07)}, args)

    @jax.jit
    def advance(state, k):  # by Euler: in balance it is exact
        state = flow.refresh(ETA * k, state, args)
        velocity = flow(0.0, state, args).params
        return state._replace(params=jax.tree.map(lambda x, v: x + ETA * v, state.params, velocity))

    for k in range(30):
        state = advance(state, k)
    np.testing.assert_allclose(flow.variances(0.0, state, args), [0.1, 0.06], rtol=2e-3)
    axes = np.abs(flow.axes(0.0, state, args)[:, :12] @ turn)
    np.testing.assert_allclose(axes[:, :2], np.eye(2), atol=0.03)


# -------------------------------------------- the oscillation of a real run


def test_the_variance_of_a_run_that_jumps_from_side_to_side():
    """At curvature 2/eta exactly GD multiplies by -1: the variance is the square of the start, along no other axis."""
    args = data(held=(2 / ETA, 0.0, 1.0))
    real = eomdl.descend(sharpening_loss, jnp.array([0.3, 1.0, 0.0, 0.0, 0.0, 0.0]), SGD, 12, args=args)
    half = np.sqrt(0.5)
    axes = np.zeros((2, 4, 6))
    axes[:, :, :3] = [[1.0, 0, 0], [0, 1, 0], [half, half, 0], [0, 0, 0]]
    found = eomdl.errors.variances_along(real, [6, 11], axes, window=4)
    np.testing.assert_allclose(found[0], [0.09, 0, 0.045, 0], atol=1e-15)
    assert np.isnan(found[1]).all()  # the steps after the end


def test_the_variance_that_it_predicts_is_that_of_the_real_run():
    """In balance x jumps by sqrt(2 eps) and y stays: what the flow says, and the real run does."""
    args = data(slope=ALONE)
    path = eomdl.solve(ONE, EDGE, 100, args=args, **OF_ONE)
    variances, axes = path.observables["variances"][1:], path.observables["axes"][1:]
    np.testing.assert_allclose(np.abs(axes[:, 0, 0]), 1, rtol=1e-3)

    def measured(x):
        real = eomdl.descend(sharpening_loss, EDGE.at[0].set(x), SGD, 120, args=args)
        return eomdl.errors.variances_along(real, path.steps[1:], axes, window=20)

    np.testing.assert_allclose(variances, 2 * DRIVE, rtol=1e-2)
    np.testing.assert_allclose(measured(np.sqrt(2 * DRIVE)), variances, rtol=5e-2)
    # A run that does not oscillate is told apart.
    assert np.max(measured(1e-4)[0]) < 0.1 * DRIVE


def test_axes_are_orthonormal_and_diagonalize_the_covariance(path):
    state = path.end.state.flow
    axes, variances = THREE.axes(0.0, state, COUPLED), THREE.variances(0.0, state, COUPLED)
    covariance = jnp.einsum("ij,ip,jq->pq", state.variance, state.tracked.vectors, state.tracked.vectors)
    np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=1e-9)
    np.testing.assert_allclose(axes @ covariance @ axes.T, np.diag(variances), atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": [6, 7]}, "axes: expected finite numbers, shape"),
        ({"steps": [11]}, "steps: expected a step about which 6 steps were saved"),
        ({"window": 0}, "window: expected an integer >= 1"),
    ],
)
def test_wrong_axes_steps_and_windows(change, message):
    real = eomdl.descend(sharpening_loss, EDGE, SGD, 12, args=data(slope=ALONE))
    valid = {"steps": [6], "axes": np.zeros((1, 2, 6)), "window": 4}
    with pytest.raises(ValueError, match=f"^{message}"):
        eomdl.errors.variances_along(real, **valid | change)


# -------------------------------------------------------------- what it says


def test_more_critical_directions_than_tracked():
    run = eomdl.solve(ONE, TRIPLE, 50, args=COUPLED, **OF_ONE)
    (warning,) = [n for n in run.notes if n.is_fault and n.startswith("curvature of the next direction")]
    assert "Raise `directions`" in warning


def test_a_quadratic_beyond_the_bound_cannot_be_held():
    flow = CentralFlow(sharpening_loss, 0.9, 1)
    run = eomdl.solve(flow, jnp.ones(6), 100, args=data(held=(3.0, 1.0, 0.0)), **OF_ONE)
    assert [n.split(" reached")[0] for n in run.notes if n.is_fault] == ["complementarity error"]


def test_curvature_that_is_not_finite_ends_the_run():
    run = eomdl.solve(ONE, jnp.zeros(6), 100, args=data(rough=1.0), diagnose=False, **OF_ONE)
    assert "became infinite or NaN" in run.message


def test_the_number_of_directions():
    states = [
        jax.eval_shape(CentralFlow(sharpening_loss, ETA, k).init, EDGE, COUPLED) for k in (None, 1, 3, 6)
    ]
    assert [state.tracked.since.shape for state in states] == [(4,), (1,), (3,), (6,)]
    with pytest.raises(ValueError, match=r"^directions: expected an integer >= 1 and <= 6, got 7"):
        eomdl.solve(CentralFlow(sharpening_loss, ETA, 7), EDGE, 5, args=COUPLED)


def test_rmsprop_begins_with_the_moment_of_a_real_run():
    optimizer = optax.rmsprop(0.01, 0.9)
    real = eomdl.descend(sharpening_loss, TRIPLE, optimizer, 5, args=COUPLED)
    flow = CentralFlow(sharpening_loss, 0.01, 1, SecondMoment(0.9))
    state = flow.begin(0.0, real.final_params, real.end.state, COUPLED)
    assert_identical(state.moment, optax.tree.get(real.end.state, "nu"))


@pytest.mark.parametrize(
    ("optimizer", "got"),
    [
        (optax.sgd(0.01), "got none"),
        (
            optax.partition({"a": optax.adam(0.01), "b": optax.rmsprop(0.01)}, {"x": "a", "y": "b"}),
            "got several",
        ),
        (optax.masked(optax.rmsprop(0.01), {"x": True, "y": False}), "in another form"),
    ],
)
def test_a_state_without_one_second_moment_names_the_way_out(optimizer, got):
    w = {"x": jnp.ones(2), "y": jnp.ones(2)}
    flow = CentralFlow(lambda w, args: jnp.sum(w["x"] ** 2), 0.01, 1, SecondMoment(0.9))
    with pytest.raises(ValueError, match=rf"resume: .*{got}.*without_state\(\)"):
        flow.begin(0.0, w, optimizer.init(w), None)
