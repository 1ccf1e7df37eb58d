"""`solve`: the ODE is solved as well as it says, and bad runs say what happened."""

import gc
import traceback

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    NET,
    NET_ARGS,
    NET_BATCHES,
    QUADRATIC,
    VALLEY,
    assert_close,
    assert_identical,
    flat,
    net_loss,
    quadratic_loss,
    valley_loss,
)
from jax.flatten_util import ravel_pytree
from registry import EQUATIONS, sgd, up_to

import eomdl


SGD = optax.sgd(0.1)
EOM = eomdl.EquationOfMotion(valley_loss, 0.1, order=2)


def distances(a, b):
    """|a_k - b_k| for every saved step k."""
    return np.sqrt(
        sum(
            np.sum((np.asarray(x) - np.asarray(y)).reshape(len(x), -1) ** 2, axis=1)
            for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True)
        )
    )


# ------------------------------------------------------------------- accuracy


# The fields of all orders: test_counterterms.py. EoM 0 is gradient flow.
@pytest.mark.parametrize("flow", [EQUATIONS[i] for i in (0, 2, 3, 5, 7)], ids=lambda f: f.name)
def test_quadratic_has_its_exact_solution(flow):
    # theta(t) = theta* + exp(t M)(theta_0 - theta*), M = -sum_j eta^j H^(j+1)/(j+1)
    eta, num_steps = 0.2, 8
    hessian, b = (np.asarray(a) for a in QUADRATIC.args)
    eigenvalues, q = np.linalg.eigh(hessian)
    rates = -sum(eta**j * eigenvalues ** (j + 1) / (j + 1) for j in range(flow.terms + 1))
    x0, _ = ravel_pytree(QUADRATIC.params)  # as one array: it compiles faster
    minimum = np.linalg.solve(hessian, b)
    run = eomdl.solve(
        flow.make(quadratic_loss, eta),
        x0,
        num_steps,
        args=QUADRATIC.args,
        rtol=1e-11,
        atol=1e-11,
        diagnose=False,
    )
    np.testing.assert_allclose(run.times, eta * np.arange(num_steps + 1), rtol=1e-14)
    for k in range(num_steps + 1):
        exact = minimum + q @ (np.exp(rates * k * eta) * (q.T @ (x0 - minimum)))
        np.testing.assert_allclose(run.at(k), exact, atol=1e-9)
    assert_close(run.end.state[0], run.at(num_steps), rtol=1e-9)


@pytest.mark.parametrize("flow", up_to(2), ids=lambda f: f.name)
def test_ode_error_is_estimated_and_below_one_percent_of_the_model_error(flow):
    eta, num_steps = 0.1, 20
    made = flow.make(net_loss, eta)
    run = eomdl.solve(made, NET, num_steps, args=NET_ARGS)
    exact = eomdl.solve(made, NET, num_steps, args=NET_ARGS, rtol=1e-13, atol=1e-15)
    real = eomdl.descend(net_loss, NET, SGD, num_steps, args=NET_ARGS)
    true_error, model_error = distances(run, exact), distances(exact, real)
    rounding = 1e-14 * np.linalg.norm(flat(NET))
    assert run.ode_error.shape == (num_steps + 1,)
    # Both runs try the same first ODE step, of one optimizer step: the estimate begins after it.
    assert np.all(true_error[2:] <= run.ode_error[2:] + rounding)
    assert np.max(true_error) <= 0.01 * np.max(model_error) + rounding
    assert np.max(run.ode_error) <= 0.1 * np.max(model_error) + rounding  # the estimate tells them apart
    assert run.stats.num_steps == run.stats.num_accepted_steps + run.stats.num_rejected_steps
    assert run.stats.num_steps > 0
    assert run.message == ""


def test_given_tolerances_are_used():
    exact = eomdl.solve(EOM, VALLEY, 20, rtol=1e-13, atol=1e-13)
    errors = []
    for tol in (1e-4, 1e-7, 1e-10):
        run = eomdl.solve(EOM, VALLEY, 20, rtol=tol, atol=tol)
        assert (float(run.stats.rtol), float(run.stats.atol)) == (tol, tol)
        errors.append(distances(run, exact).max())
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


def test_estimate_can_be_left_out():
    with_estimate = eomdl.solve(EOM, VALLEY, 20)
    without = eomdl.solve(EOM, VALLEY, 20, estimate_error=False)
    assert without.ode_error is None
    assert_identical(without.params, with_estimate.params)
    assert without.stats.num_steps < with_estimate.stats.num_steps


# ----------------------------------------------------------------- what is saved


@pytest.mark.parametrize(
    ("save_steps", "expected"), [(10, [0, 10, 20, 25]), (100, [0, 25]), ([7, 3, 3, 20], [3, 7, 20])]
)
def test_save_steps(save_steps, expected):
    whole = eomdl.solve(EOM, VALLEY, 25, rtol=1e-11, atol=1e-11)
    run = eomdl.solve(EOM, VALLEY, 25, rtol=1e-11, atol=1e-11, save_steps=save_steps)
    np.testing.assert_array_equal(run.steps, expected)
    assert_close(run.params, jax.tree.map(lambda leaf: leaf[expected], whole.params), rtol=1e-9)
    assert_close(run.end.state, whole.end.state, rtol=1e-9)
    assert run.ode_error.shape == (len(expected),)


def test_observables_alone():
    observe = {"x": lambda p, args: p["x"], "loss": valley_loss}
    whole = eomdl.solve(EOM, VALLEY, 25, observe=observe)
    alone = eomdl.solve(EOM, VALLEY, 25, observe=observe, save_params=False)
    assert alone.params is None
    assert_identical(alone.observables, whole.observables)
    assert_identical(whole.observables["x"], whole.params["x"])
    np.testing.assert_allclose(
        whole.observables["loss"], [valley_loss(whole.at(k), None) for k in range(26)], rtol=1e-13
    )


class LiveBytes(diffrax.AbstractProgressMeter):
    """A progress meter that notes how much device memory is held between chunks."""

    seen: list = eqx.field(static=True)

    def init(self):
        return None

    def step(self, state, progress):
        self.seen.append((float(progress), sum(x.nbytes for x in jax.live_arrays())))

    def close(self, state):
        pass


FEW = {"observe": {"x": lambda p, args: p["x"]}, "save_params": False, "save_steps": 1000}
SHORT_STEPS = eomdl.EquationOfMotion(valley_loss, 1e-3, order=1)


@pytest.mark.parametrize("keep", [FEW, {}], ids=["observables alone", "every step"])
@pytest.mark.parametrize(
    "run",
    [
        lambda n, **keep: eomdl.descend(valley_loss, VALLEY, SGD, n, **keep),
        lambda n, **keep: eomdl.solve(SHORT_STEPS, VALLEY, n, **keep),
    ],
    ids=["descend", "solve"],
)
def test_device_memory_is_flat_in_the_number_of_steps(run, keep):
    peaks = []
    run(1000, **keep)  # what compiling leaves behind is there once
    for num_steps in (1000, 20_000):
        meter = LiveBytes([])
        gc.collect()
        trajectory = run(num_steps, progress=meter, **keep)
        assert trajectory.message == ""
        assert meter.seen[-1][0] == 1.0
        assert len(meter.seen) >= num_steps // 1024
        peaks.append(max(size for _, size in meter.seen))
    assert peaks[1] < peaks[0] + 10_000  # 19,000 steps of two parameters would be 304,000 bytes


# --------------------------------------------------------------------- batches


def test_flow_follows_each_batch_for_the_time_of_its_step():
    flow = eomdl.EquationOfMotion(net_loss, 0.1, order=1)
    tight = {"rtol": 1e-11, "atol": 1e-11}
    run = eomdl.solve(flow, NET, 12, batches=NET_BATCHES, **tight)
    params = NET
    for k in range(12):
        batch = jax.tree.map(lambda leaf, k=k: leaf[k], NET_BATCHES)
        params = eomdl.solve(flow, params, 1, args=batch, **tight).at(1)
        assert_close(run.at(k + 1), params, rtol=1e-9)


def test_batches_stacked_listed_and_generated_are_one_run():
    flow = eomdl.EquationOfMotion(net_loss, 0.1, order=1)
    batches = [jax.tree.map(lambda leaf, k=k: leaf[k], NET_BATCHES) for k in range(12)]
    stacked = eomdl.solve(flow, NET, 12, batches=NET_BATCHES)
    assert_identical(eomdl.solve(flow, NET, 12, batches=batches).params, stacked.params)
    assert_identical(eomdl.solve(flow, NET, 12, batches=(b for b in batches)).params, stacked.params)


def target_loss(params, args):
    """Another smooth function of two parameters for every batch."""
    return valley_loss(params, None) + 0.5 * (params["x"] - args) ** 2


@pytest.mark.parametrize("flow", up_to(2), ids=lambda f: f.name)
def test_stochastic_descent_is_followed_step_by_step(flow):
    # The same order n + 1 at fixed time for SGD, the same sequence of batches at both learning rates.
    errors = []
    rates = [0.04, 0.02]
    for eta in rates:
        num_steps = round(0.4 / eta)
        batches = jnp.sin(np.repeat(np.arange(10.0), num_steps // 10))
        real = eomdl.iterate(sgd(target_loss, eta), VALLEY, num_steps, batches=batches)
        model = eomdl.solve(flow.make(target_loss, eta), VALLEY, num_steps, batches=batches)
        errors.append(distances(real, model).max())
    assert eomdl.errors.observed_order(rates, errors) == pytest.approx(flow.terms + 1, abs=0.1)


# ---------------------------------------------------------------------- resume


@pytest.mark.parametrize("save_steps", [1, 5])
def test_resumed_run_equals_the_uninterrupted_one(save_steps, tmp_path):
    keep = {"rtol": 1e-11, "atol": 1e-11, "save_steps": save_steps}
    whole = eomdl.solve(EOM, VALLEY, 25, **keep)
    half = eomdl.solve(EOM, VALLEY, 10, **keep)
    half.save(tmp_path / "half.npz")
    for start in (half, eomdl.Trajectory.load(tmp_path / "half.npz")):
        resumed = eomdl.solve(EOM, VALLEY, 25, resume=start, **keep)
        np.testing.assert_array_equal(resumed.steps, whole.steps)
        np.testing.assert_allclose(resumed.times, whole.times, rtol=1e-14)
        assert_close(resumed.params, whole.params, rtol=1e-9)
        assert resumed.ode_error.shape == whole.ode_error.shape
        assert int(resumed.end.step) == 25


def test_resume_with_batches_leaves_no_trace():
    # Every step is a solve of its own, so where the run was cut leaves no trace.
    keep = {"rtol": 1e-8, "atol": 1e-8}
    flow, batches = eomdl.EquationOfMotion(target_loss, 0.1, 1), jnp.sin(jnp.arange(12.0))
    whole = eomdl.solve(flow, VALLEY, 12, batches=batches, **keep)
    first = eomdl.solve(flow, VALLEY, 5, batches=batches[:5], **keep)
    resumed = eomdl.solve(flow, VALLEY, 12, batches=batches, resume=first, **keep)
    assert_close(resumed.params, whole.params, rtol=1e-14)


# --------------------------------------------------------- for those who know diffrax


def test_euler_with_one_ode_step_a_step_is_gradient_descent():
    run = eomdl.solve(
        eomdl.GradientFlow(valley_loss, 0.1),
        VALLEY,
        20,
        solver=diffrax.Euler(),
        stepsize_controller=diffrax.ConstantStepSize(),
    )
    real = eomdl.descend(valley_loss, VALLEY, SGD, 20)
    assert_close(run.params, real.params, rtol=1e-13)
    assert run.ode_error is None
    assert run.stats.rtol is None
    assert int(run.stats.num_steps) == 20


@pytest.mark.parametrize("solver", [diffrax.Dopri8(), diffrax.Kvaerno5()], ids=lambda s: type(s).__name__)
def test_other_solvers_agree(solver):
    tight = {"rtol": 1e-10, "atol": 1e-10}
    flow = eomdl.GradientFlow(valley_loss, 0.1)
    usual = eomdl.solve(flow, VALLEY, 10, **tight)
    assert_close(eomdl.solve(flow, VALLEY, 10, solver=solver, **tight).params, usual.params, rtol=1e-6)


def test_adjoint_can_be_given():
    # Forward mode goes through `ForwardMode` and not through the default, which is for reverse mode.
    def end(eta, adjoint):
        flow = eomdl.GradientFlow(valley_loss, eta)
        return eomdl.solve(flow, VALLEY, 5, rtol=1e-10, atol=1e-10, adjoint=adjoint).end.state[0]["x"]

    forward = jax.jvp(lambda eta: end(eta, diffrax.ForwardMode()), (0.1,), (1.0,))[1]
    reverse = jax.grad(lambda eta: end(eta, diffrax.DirectAdjoint()))(0.1)
    np.testing.assert_allclose(forward, reverse, rtol=1e-6)


# -------------------------------------------------------------------- bad runs


def fourth_power_loss(params, args):
    """-y^4/4: gradient flow y' = y^3 blows up at t = 1/(2 y_0^2)."""
    del args
    return -(params**4) / 4


def test_step_limit_returns_the_part_computed():
    flow = eomdl.GradientFlow(valley_loss, 0.5)
    options = {"rtol": 1e-10, "atol": 1e-10, "max_steps": 30}
    run = eomdl.solve(flow, VALLEY, 100, **options)
    whole = eomdl.solve(flow, VALLEY, 100, rtol=1e-10, atol=1e-10)
    assert run.result == eomdl.RESULTS.max_steps_reached
    assert 1 <= len(run.steps) < 101
    assert_close(run.params, jax.tree.map(lambda x: x[: len(run.steps)], whole.params), rtol=1e-7)
    assert f"step {run.steps[-1]}" in run.message
    assert "`max_steps`" in run.message
    assert "Raise" in run.message
    with pytest.raises(RuntimeError, match=f"step {run.steps[-1]}.*`max_steps`"):
        eomdl.solve(flow, VALLEY, 100, throw=True, **options)


@pytest.mark.parametrize("batches", [None, jnp.zeros(40)], ids=["full batch", "batches"])
def test_blow_up_returns_the_finite_part(batches):
    eta, y0 = 0.05, 1.0  # at t = 1/2, step 10
    flow = eomdl.GradientFlow(fourth_power_loss, eta)
    run = eomdl.solve(flow, jnp.array(y0), 40, rtol=1e-8, atol=1e-8, max_steps=1000, batches=batches)
    assert run.message != ""
    assert np.all(np.isfinite(run.params))
    assert 5 <= run.steps[-1] <= 10
    np.testing.assert_allclose(run.params[:6], 1 / np.sqrt(1 - 2 * eta * np.arange(6)), rtol=1e-5)
    assert f"step {run.steps[-1]}" in run.message


def cliff_loss(params, args):
    """Finite up to y = 1, NaN beyond; descent moves at unit speed."""
    del args
    return jnp.where(params < 1, -params, jnp.nan) + 0.0 * jnp.sqrt(1 - params)


def test_nonfinite_field_returns_the_part_computed():
    run = eomdl.solve(eomdl.GradientFlow(cliff_loss, 0.1), jnp.array(0.0), 40, max_steps=500)
    assert run.message != ""
    assert np.all(np.isfinite(run.params))
    assert 1 <= run.steps[-1] <= 10
    np.testing.assert_allclose(run.params, 0.1 * run.steps, rtol=1e-6, atol=1e-9)


def test_a_path_that_the_solver_does_not_resolve_says_so():
    flow = eomdl.GradientFlow(lambda y, args: 10 * jnp.sum(jnp.cos(5 * y)), 0.1)
    coarse = eomdl.solve(flow, jnp.array([0.3]), 20, rtol=3.0, atol=3.0)
    assert any(note.is_fault and note.startswith("The ODE error reaches") for note in coarse.notes)
    fine = eomdl.solve(flow, jnp.array([0.3]), 20, rtol=1e-6, atol=1e-6)
    assert fine.notes == ()


class Ascent(eomdl.GradientFlow):
    """A model that is wrong: it climbs where gradient descent falls."""

    def __call__(self, t, state, args):
        return jax.tree.map(jnp.negative, super().__call__(t, state, args))


def test_a_model_that_is_off_by_a_whole_step_says_so():
    flow = Ascent(lambda y, args: 0.5 * jnp.sum(y**2), 0.1)
    path = eomdl.solve(flow, jnp.array([1.0]), 4)
    ((name, found),) = path.stats.diagnostics.items()
    assert name == "error in the first step / that step"
    np.testing.assert_allclose(found.value, [(np.exp(0.1) - 0.9) / 0.1], rtol=1e-4)
    assert [note.is_fault for note in path.notes] == [True]


def test_gradients_of_a_flow_are_counted():
    def counted(order, **options):
        flow = eomdl.EquationOfMotion(valley_loss, 0.1, order)
        return eomdl.solve(flow, VALLEY, 20, rtol=1e-6, atol=1e-6, **options).stats

    # Six evaluations in a step of Tsit5, and the first of each of the two integrations.
    stats = counted(0)
    assert stats.gradient_evaluations == 6 * stats.num_steps + 2
    one = counted(0, estimate_error=False)
    assert one.gradient_evaluations == 6 * one.num_steps + 1
    first = counted(1)
    np.testing.assert_allclose(first.gradient_evaluations, 2.7 * (6 * first.num_steps + 2), rtol=1e-12)
    heun = counted(0, solver=diffrax.Heun())
    assert heun.gradient_evaluations == 2 * heun.num_steps
    batches = jnp.zeros((20, 1))
    steps = counted(0, batches=batches, estimate_error=False)
    assert steps.gradient_evaluations == 6 * steps.num_steps + 20
    assert np.isnan(counted(0, solver=diffrax.Kvaerno3()).gradient_evaluations)


def test_float32_that_cannot_carry_the_order_warns():
    params = jax.tree.map(lambda x: x.astype(jnp.float32), VALLEY)
    flow = eomdl.EquationOfMotion(valley_loss, jnp.float32(1e-3), 2)
    with pytest.warns(UserWarning, match=r"^float32 .* one-step error .*\de.*noise .*\de-\d\d.*float64"):
        run = eomdl.solve(flow, params, 5)
    assert {leaf.dtype for leaf in jax.tree.leaves(run.params)} == {np.dtype("float32")}
    eomdl.solve(flow, VALLEY, 5)  # float64 does not warn


def test_float32_that_can_does_not_warn():
    params = jax.tree.map(lambda x: x.astype(jnp.float32), VALLEY)
    flow = eomdl.EquationOfMotion(valley_loss, 0.3, 1)
    single, double = eomdl.solve(flow, params, 10), eomdl.solve(flow, VALLEY, 10)
    assert_close(single.params, double.params, rtol=1e-4)


# -------------------------------------------------------------------- progress


def test_progress_bar(capfd):
    eomdl.solve(EOM, VALLEY, 25, progress=True)
    assert "100" in capfd.readouterr().err
    eomdl.solve(EOM, VALLEY, 25)
    assert capfd.readouterr().err == ""


def test_progress_meter_of_ones_own():
    meter = LiveBytes([])
    eomdl.solve(EOM, VALLEY, 2000, save_steps=100, progress=meter)
    progress = [p for p, _ in meter.seen]
    assert progress == sorted(progress)
    assert progress[-1] == 1.0
    assert len(progress) > 1


@pytest.mark.parametrize("estimated", [(True, False), (False, True)], ids=["dropped", "begun"])
def test_the_ode_error_of_a_run_that_goes_on_without_or_with_an_estimate(estimated):
    flow = eomdl.GradientFlow(valley_loss, 0.1)
    first = eomdl.solve(flow, VALLEY, 3, estimate_error=estimated[0])
    both = eomdl.solve(flow, VALLEY, 6, estimate_error=estimated[1], resume=first)
    if estimated[1]:
        assert np.all(np.isnan(both.ode_error[:4]))
        assert np.all(both.ode_error[4:] > 0)
    else:
        assert both.ode_error is None


def test_at_most_six_frames_lead_from_solve_to_the_solver(monkeypatch):
    class Reached(Exception):
        pass

    def reach(*arguments, **options):
        raise Reached

    monkeypatch.setattr(diffrax, "diffeqsolve", reach)
    # A loss of its own: what is compiled already does not call the solver.
    flow = eomdl.GradientFlow(lambda params, args: valley_loss(params, args), 0.1)
    with pytest.raises(Reached) as caught:
        eomdl.solve(flow, VALLEY, 3, rtol=1e-6, atol=1e-8)
    frames = [frame.f_code for frame, _ in traceback.walk_tb(caught.value.__traceback__)]
    ours = [code.co_qualname for code in frames if "/eomdl/" in code.co_filename]
    assert len(ours[ours.index("solve") :]) <= 6, ours
