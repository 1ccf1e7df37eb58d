"""Optimizers whose memory is empty at first: the real steps that come before their flow."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import NET, NET_ARGS, NET_BATCHES, VALLEY, assert_close, assert_identical, net_loss, valley_loss
from registry import FLOWS, make_flow

import eomdl


RATE = 0.01
ADAM = eomdl.optimizer_step(net_loss, optax.adam(RATE))
FLOW = eomdl.InterpolatingFlow(ADAM, RATE, 2)
STEPS = 12


def solve(flow=FLOW, params=NET, num_steps=STEPS, **options):
    return eomdl.solve(flow, params, num_steps, **{"args": NET_ARGS} | options)


@pytest.fixture(scope="module")
def real():
    return eomdl.iterate(ADAM, NET, STEPS, args=NET_ARGS, step_size=RATE)


@pytest.fixture(scope="module")
def path():
    return solve()


def test_the_first_steps_are_those_of_the_real_run(path, real):
    assert path.stats.warmup == 4  # 2 K
    assert_identical(path.rows(slice(0, 5)).params, real.rows(slice(0, 5)).params)
    np.testing.assert_array_equal(path.steps, real.steps)
    np.testing.assert_allclose(path.times, real.times, rtol=1e-15)
    np.testing.assert_array_equal(path.ode_error[:5], 0)
    assert np.all(path.ode_error[6:] > 0)
    comparison = eomdl.compare(real, {"flow": path})
    assert comparison.relative_distance["flow"][-1] < 0.01
    assert [note for note in comparison.notes if "first 4 steps are real steps" in note]
    # 4 real steps, and 2 gradients for every evaluation of the field.
    evaluations = (path.stats.gradient_evaluations - 4) / 2
    assert evaluations > path.stats.num_steps * 6
    assert evaluations == int(evaluations)


def test_any_number_of_steps_or_none(path, real):
    assert_identical(solve(warmup=7).rows(slice(0, 8)).params, real.rows(slice(0, 8)).params)
    at_once = solve(warmup=0)
    assert at_once.stats.warmup == 0
    assert at_once.notes == ()
    # The flow from the empty memory is farther from the real run at once.
    first, later = (eomdl.compare(real, {"flow": run}).distance["flow"][5] for run in (at_once, path))
    assert first > 3 * later


def test_the_readme_row():
    """Stopped at step 0 before: a negative second moment."""

    def loss(w, data):
        x, y = data
        return jnp.mean((jnp.tanh(x @ w["in"]) @ w["out"] - y) ** 2)

    x = jax.random.normal(jax.random.key(0), (50, 3))
    w = {"in": jax.random.normal(jax.random.key(1), (3, 8)), "out": jnp.full(8, 0.2)}
    data, step = (x, jnp.sin(x[:, 0])), eomdl.optimizer_step(loss, optax.adam(1e-2))
    path = eomdl.solve(eomdl.InterpolatingFlow(step, 1e-2, points=2), w, 60, args=data)
    assert path.result == eomdl.RESULTS.successful
    real = eomdl.iterate(step, w, 60, args=data)
    assert eomdl.compare(real, {"flow": path}).relative_distance["flow"][-1] < 0.005


def test_batches_continue_where_the_real_steps_ended(path):
    def stream():
        for i in range(STEPS):
            yield jax.tree.map(lambda x, i=i: x[i], NET_BATCHES)

    stacked, streamed = solve(batches=NET_BATCHES), solve(batches=stream())
    real = eomdl.iterate(ADAM, NET, STEPS, batches=NET_BATCHES)
    for run in (stacked, streamed):
        assert run.stats.warmup == 4
        assert_identical(run.rows(slice(0, 5)).params, real.rows(slice(0, 5)).params)
        assert eomdl.compare(real, {"flow": run}).relative_distance["flow"][-1] < 0.02
    assert_close(streamed.final_params, stacked.final_params, rtol=1e-4)


def test_what_is_saved_is_what_was_asked_for(path):
    few = solve(save_steps=[0, 3, 8, 12], observe={"loss": net_loss})
    np.testing.assert_array_equal(few.steps, [0, 3, 8, 12])
    assert few.observables["loss"].shape == (4,)
    without = solve(save_params=False, observe={"loss": net_loss})
    assert without.params is None
    assert len(without.observables["loss"]) == STEPS + 1
    states = solve(observe_state={"second": lambda t, state, args: state[1][0].nu})
    np.testing.assert_array_equal(states.steps, np.arange(4, STEPS + 1))


def test_a_run_that_continues_has_its_memory(path, real):
    half = solve(num_steps=8)
    whole = solve(resume=half)
    assert whole.stats.warmup == 4
    assert_close(whole.final_params, path.final_params, rtol=1e-4)
    begun = eomdl.iterate(ADAM, NET, 1, args=NET_ARGS)
    assert solve(resume=begun.end).stats.warmup == 0


def test_an_ensemble_warms_up_as_its_members_do(path):
    starts = eomdl.runs.stack([NET, jax.tree.map(lambda x: 1.1 * x, NET)])
    runs = eomdl.runs.members(solve(eomdl.Ensemble(FLOW), starts))
    assert_close(runs[0].at(4), path.at(4), rtol=1e-12)
    assert_close(runs[0].final_params, path.final_params, rtol=1e-4)


COLD = {
    "clipped AdamW with a schedule": optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.warmup_cosine_decay_schedule(0.0, RATE, 5, 40))
    ),
    "RMSProp": optax.rmsprop(RATE),
    "Nadam": optax.nadam(RATE),
    "AMSGrad": optax.amsgrad(RATE),
}
WARM = {
    "gradient descent": optax.sgd(0.05),
    "heavy ball": optax.sgd(0.05, momentum=0.9),
    "Nesterov, decayed, with a schedule": optax.chain(
        optax.add_decayed_weights(1e-2),
        optax.sgd(optax.cosine_decay_schedule(0.05, 40), momentum=0.9, nesterov=True),
    ),
    "clipped gradient descent": optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(0.05)),
    "Adam with an eps larger than its gradients": optax.adam(RATE, eps=1e3),
}


@pytest.mark.parametrize("name", COLD | WARM)
def test_which_optimizers_start_cold(name):
    step = eomdl.optimizer_step(valley_loss, (COLD | WARM)[name])
    assert bool(jax.jit(step.starts_cold)(VALLEY, None)) == (name in COLD)


def test_no_real_steps_where_a_flow_knows_only_a_model_of_them():
    models = (
        "MomentumFlow",
        "AdamFlow",
        "rmsprop",
        "Central",
        "ComplexPrincipal",
        "Edge",
        "Rod",
        "Reshuffling",
    )
    for entry in FLOWS:
        flow = make_flow(entry)
        assert flow.map.is_model == entry.name.startswith(models), entry.name
        if flow.map.is_model:
            with pytest.raises(
                ValueError, match=r"^warmup: .* does not know the optimizer's own step, got 2"
            ):
                eomdl.solve(flow, VALLEY, 4, args=entry.args, warmup=2)


def test_nothing_is_measured_inside_jit():
    def end(rate):
        flow = eomdl.InterpolatingFlow(eomdl.optimizer_step(valley_loss, optax.adam(0.02)), rate, 1)
        return eomdl.solve(flow, VALLEY, 4).final_params["x"]

    assert np.isfinite(jax.jit(end)(0.02))
