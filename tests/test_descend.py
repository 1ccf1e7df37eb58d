"""Real runs: `descend` is the training loop that a user would write by hand."""

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
    net_loss,
    quadratic_loss,
    valley_loss,
)

import eomdl


SGD = optax.sgd(0.2)
ADAM = optax.adam(0.05)
OPTIMIZERS = {
    "sgd": SGD,
    "nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": ADAM,
    "adamw": optax.adamw(0.05, weight_decay=0.1),
    "schedule": optax.sgd(optax.cosine_decay_schedule(0.3, 20)),
    "weight decay": optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.2)),
    "clipping": optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.2)),
}


def hand_written_loop(loss, params, optimizer, num_steps, args=None, batches=None):
    """The parameters before and after every step."""

    @jax.jit
    def step(params, state, batch):
        updates, state = optimizer.update(jax.grad(loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    path = [params]
    for k in range(num_steps):
        batch = args if batches is None else jax.tree.map(lambda leaf, k=k: leaf[k], batches)
        params, state = step(params, state, batch)
        path.append(params)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *path)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_a_hand_written_loop(name):
    run = eomdl.descend(valley_loss, VALLEY, OPTIMIZERS[name], 25)
    # To the rounding that another program of the same loop may differ in.
    assert_close(run.params, hand_written_loop(valley_loss, VALLEY, OPTIMIZERS[name], 25), rtol=1e-14)
    np.testing.assert_array_equal(run.steps, np.arange(26))
    assert int(run.end.step) == 25
    assert int(run.stats.gradient_evaluations) == 25
    assert run.message == ""
    assert run.result == eomdl.RESULTS.successful
    assert run.ode_error is None


def test_network_on_minibatches_equals_a_hand_written_loop():
    run = eomdl.descend(net_loss, NET, ADAM, 12, batches=NET_BATCHES)
    assert_close(run.params, hand_written_loop(net_loss, NET, ADAM, 12, batches=NET_BATCHES), rtol=1e-14)


def test_quadratic_has_its_closed_form():
    # x_k = x* + (1 - eta H)^k (x_0 - x*)
    run = eomdl.descend(quadratic_loss, QUADRATIC.params, SGD, 30, args=QUADRATIC.args)
    hessian, b = (np.asarray(a) for a in QUADRATIC.args)
    x0, minimum = np.concatenate([[0.3, -1.1], [0.7], [1.9, -0.2]]), np.linalg.solve(hessian, b)
    expected = minimum + np.linalg.matrix_power(np.eye(5) - 0.2 * hessian, 30) @ (x0 - minimum)
    (a, a0), (b0,) = run.at(30)["a"], run.at(30)["b"]
    np.testing.assert_allclose([*a, a0, *b0[0]], expected, rtol=1e-12)


def test_times():
    clock = eomdl.descend(valley_loss, VALLEY, SGD, 4, step_size=0.2)
    np.testing.assert_allclose(clock.times, [0, 0.2, 0.4, 0.6, 0.8], rtol=1e-15)
    assert np.all(np.isnan(eomdl.descend(valley_loss, VALLEY, SGD, 4).times))


@pytest.mark.parametrize(
    ("save_steps", "expected"),
    [
        (1, range(26)),
        (10, [0, 10, 20, 25]),
        (25, [0, 25]),
        (100, [0, 25]),
        ([7, 3, 3, 20], [3, 7, 20]),
        (np.array([0]), [0]),
    ],
)
def test_save_steps(save_steps, expected):
    whole = eomdl.descend(valley_loss, VALLEY, SGD, 25)
    run = eomdl.descend(valley_loss, VALLEY, SGD, 25, save_steps=save_steps)
    np.testing.assert_array_equal(run.steps, list(expected))
    assert_identical(run.params, jax.tree.map(lambda leaf: leaf[list(expected)], whole.params))
    assert_identical(run.end.state, whole.end.state)


def test_observables_are_functions_of_the_saved_parameters():
    observe = {
        "sum": lambda p, args: p["x"] + args * p["y"],
        "vector": lambda p, args: jnp.stack([p["x"], p["y"]]),
    }
    run = eomdl.descend(valley_loss, VALLEY, SGD, 9, args=2.0, observe=observe, save_steps=3)
    np.testing.assert_allclose(run.observables["sum"], run.params["x"] + 2 * run.params["y"], rtol=1e-15)
    np.testing.assert_array_equal(
        run.observables["vector"], np.stack([run.params["x"], run.params["y"]], axis=1)
    )
    alone = eomdl.descend(
        valley_loss, VALLEY, SGD, 9, args=2.0, observe=observe, save_steps=3, save_params=False
    )
    assert alone.params is None
    assert_identical(alone.observables, run.observables)


def test_observables_see_args_where_the_loss_sees_batches():
    loss = {"loss": net_loss}
    run = eomdl.descend(net_loss, NET, SGD, 12, args=NET_ARGS, batches=NET_BATCHES, observe=loss)
    expected = [net_loss(run.at(k), NET_ARGS) for k in range(13)]
    np.testing.assert_allclose(run.observables["loss"], expected, rtol=1e-14)


# -------------------------------------------------------------------- batches


def batch_list():
    return [jax.tree.map(lambda leaf, k=k: leaf[k], NET_BATCHES) for k in range(12)]


def test_batches_stacked_listed_and_generated_are_one_run():
    stacked = eomdl.descend(net_loss, NET, ADAM, 12, batches=NET_BATCHES)
    listed = eomdl.descend(net_loss, NET, ADAM, 12, batches=batch_list())
    generated = eomdl.descend(net_loss, NET, ADAM, 12, batches=(batch for batch in batch_list()))
    assert_identical(listed.params, stacked.params)
    assert_identical(generated.params, stacked.params)
    assert_identical(generated.end.state, stacked.end.state)


def test_a_stack_that_is_a_list_of_arrays_needs_no_special_case():
    # A list is one batch a step, also where its elements are arrays.
    def loss(x, target):
        return jnp.sum((x - target) ** 2)

    targets = jnp.arange(6.0).reshape(3, 2)
    a = eomdl.descend(loss, jnp.zeros(2), SGD, 3, batches=targets)
    b = eomdl.descend(loss, jnp.zeros(2), SGD, 3, batches=list(targets))
    assert_identical(a.params, b.params)


def test_batches_that_end_early_keep_what_was_computed():
    whole = eomdl.descend(net_loss, NET, ADAM, 12, batches=NET_BATCHES)
    short = eomdl.descend(net_loss, NET, ADAM, 12, batches=iter(batch_list()[:7]))
    assert short.result == eomdl.RESULTS.batches_exhausted
    np.testing.assert_array_equal(short.steps, np.arange(8))
    assert int(short.end.step) == 7
    assert "step 7" in short.message
    assert "resume" in short.message
    resumed = eomdl.descend(net_loss, NET, ADAM, 12, batches=iter(batch_list()[7:]), resume=short)
    assert_identical(resumed.params, whole.params)
    assert resumed.message == ""


# --------------------------------------------------------------------- resume


@pytest.mark.parametrize("name", ["sgd", "adam", "schedule"])
@pytest.mark.parametrize("save_steps", [1, 5])
def test_resumed_run_equals_the_uninterrupted_one(name, save_steps, tmp_path):
    optimizer = OPTIMIZERS[name]
    observe = {"x": lambda p, args: p["x"]}
    whole = eomdl.descend(valley_loss, VALLEY, optimizer, 25, save_steps=save_steps, observe=observe)
    half = eomdl.descend(valley_loss, VALLEY, optimizer, 10, save_steps=save_steps, observe=observe)
    half.save(tmp_path / "half.npz")
    for start in (half, eomdl.Trajectory.load(tmp_path / "half.npz")):
        resumed = eomdl.descend(
            valley_loss, VALLEY, optimizer, 25, save_steps=save_steps, observe=observe, resume=start
        )
        np.testing.assert_array_equal(resumed.steps, whole.steps)
        assert_identical(resumed.params, whole.params)
        assert_identical(resumed.observables, whole.observables)
        assert_identical(resumed.end.state, whole.end.state)
        assert int(resumed.stats.gradient_evaluations) == 25


def test_resume_with_stacked_and_listed_batches():
    whole = eomdl.descend(net_loss, NET, ADAM, 12, batches=NET_BATCHES)
    first = eomdl.descend(net_loss, NET, ADAM, 5, batches=jax.tree.map(lambda leaf: leaf[:5], NET_BATCHES))
    for batches in (NET_BATCHES, batch_list()):
        assert_identical(
            eomdl.descend(net_loss, NET, ADAM, 12, batches=batches, resume=first).params, whole.params
        )


def test_resume_of_a_finished_run_adds_nothing():
    run = eomdl.descend(valley_loss, VALLEY, SGD, 10)
    again = eomdl.descend(valley_loss, VALLEY, SGD, 10, resume=run)
    np.testing.assert_array_equal(again.steps, run.steps)
    assert_identical(again.params, run.params)


# ------------------------------------------------------------------- bad runs


def target_loss(params, target):
    return 0.5 * jnp.sum((params - target) ** 2)


def test_ctrl_c_keeps_what_was_computed():
    targets = np.sin(np.arange(900.0))[:, None]

    def interrupted_at(step):
        yield from targets[:step]
        raise KeyboardInterrupt

    whole = eomdl.descend(target_loss, jnp.zeros(1), ADAM, 900, batches=targets)
    part = eomdl.descend(target_loss, jnp.zeros(1), ADAM, 900, batches=interrupted_at(700))
    assert part.result == eomdl.RESULTS.interrupted
    assert "resume" in part.message
    reached = int(part.end.step)
    assert reached == 700  # the batches there were are used
    np.testing.assert_array_equal(part.steps, np.arange(701))
    np.testing.assert_array_equal(part.params, whole.params[: len(part.steps)])
    resumed = eomdl.descend(
        target_loss, jnp.zeros(1), ADAM, 900, batches=iter(targets[reached:]), resume=part
    )
    assert_identical(resumed.params, whole.params)
    np.testing.assert_array_equal(resumed.steps, np.arange(901))
    assert resumed.message == ""


def quartic_loss(params, args):
    return 0.25 * params**4


@pytest.mark.parametrize("save_steps", [1, 4, [0, 2, 40]])
def test_divergence_returns_the_finite_part(save_steps):
    run = eomdl.descend(quartic_loss, jnp.array(4.0), SGD, 40, save_steps=save_steps)
    x, finite = 4.0, 0  # x - 0.2 x^3, by hand
    while np.isfinite(x):
        with np.errstate(over="ignore", invalid="ignore"):
            x, finite = x - np.float64(0.2) * np.float64(x) ** 3, finite + 1
    last = finite - 1  # the last step that was finite
    assert run.result == eomdl.RESULTS.nonfinite
    assert np.all(np.isfinite(run.params))
    assert run.steps[-1] == max(
        k for k in eomdl.descend(valley_loss, VALLEY, SGD, 40, save_steps=save_steps).steps if k <= last
    )
    assert f"step {run.steps[-1]}" in run.message
    assert "smaller learning rate" in run.message
    with pytest.raises(RuntimeError, match=f"step {run.steps[-1]}.*smaller learning rate"):
        eomdl.descend(quartic_loss, jnp.array(4.0), SGD, 40, save_steps=save_steps, throw=True)


def test_float_parameters_become_arrays():
    run = eomdl.descend(cubic, 0.5, SGD, 3)
    assert run.params.shape == (4,)


def cubic(y, args):
    return y**3 / 3


def test_progress_bar(capfd):
    eomdl.descend(valley_loss, VALLEY, SGD, 25, progress=True)
    assert "100" in capfd.readouterr().err
    eomdl.descend(valley_loss, VALLEY, SGD, 25)
    assert capfd.readouterr().err == ""


def test_batches_that_end_with_a_chunk_keep_the_run():
    """256 rows are one chunk: the iterator then has nothing at all for the next one."""

    def loss(params, batch):
        return jnp.sum((params - batch) ** 2)

    batches = (jnp.ones(2) * k for k in range(256))
    run = eomdl.descend(loss, jnp.zeros(2), optax.sgd(0.1), 400, batches=batches)
    assert run.steps[-1] == run.end.step == 256
    assert "`batches` ended" in run.message
    flow = eomdl.GradientFlow(loss, 0.1)
    batches = (jnp.ones(2) * k for k in range(256))
    run = eomdl.solve(flow, jnp.zeros(2), 400, batches=batches)
    assert run.steps[-1] == run.end.step == 256


def test_run_that_fails_before_its_first_saved_step_says_so():
    run = eomdl.descend(lambda p, args: -jnp.sum(p**4), jnp.ones(2), optax.sgd(0.5), 100, save_steps=[100])
    assert len(run.steps) == 0
    assert "Stopped after step 0" in run.message
