"""Branches: runs that go on from a checkpoint, or after a run, with something changed or nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    NET,
    NET_ARGS,
    NET_BATCHES,
    VALLEY,
    assert_identical,
    flat,
    net_loss,
    valley_loss,
)

import eomdl


ADAM = optax.adam(0.02)
SGD = optax.sgd(0.1)
OBSERVE = {"x": lambda params, args: params["x"]}


def run(checkpoints=None, num_steps=40, **options):
    return eomdl.descend(valley_loss, VALLEY, ADAM, num_steps, checkpoints=checkpoints, **options)


# ---------------------------------------------------------------------- branches


@pytest.mark.parametrize("save_steps", [1, 7])
@pytest.mark.parametrize("at", [0, 1, 20, 39, 40])
def test_branch_with_nothing_changed_is_its_parent_bit_for_bit(tmp_path, at, save_steps):
    store = eomdl.Checkpoints(tmp_path, [0, 1, 20, 39, 40])
    parent = run(store, save_steps=save_steps, observe=OBSERVE)
    branch = run(resume=store.at(at).end, save_steps=save_steps, observe=OBSERVE)
    shared = parent.steps >= at
    np.testing.assert_array_equal(branch.steps, parent.steps[shared])
    assert_identical(branch.params, jax.tree.map(lambda leaf: leaf[shared], parent.params))
    assert_identical(branch.observables, jax.tree.map(lambda leaf: leaf[shared], parent.observables))
    assert_identical(branch.end.state, parent.end.state)
    assert int(branch.stats.gradient_evaluations) == 40


def test_branches_with_batches(tmp_path):
    def train(batches=NET_BATCHES, **options):
        return eomdl.descend(net_loss, NET, ADAM, 12, batches=batches, args=NET_ARGS, **options)

    store = eomdl.Checkpoints(tmp_path, [5])
    parent = train(checkpoints=store)
    for batches in (NET_BATCHES, [jax.tree.map(lambda leaf, k=k: leaf[k], NET_BATCHES) for k in range(12)]):
        assert_identical(train(batches, resume=store.at(5).end).end.state, parent.end.state)
    # Another order of the batches from there on: the same until then, another end.
    order = np.array([0, 1, 2, 3, 4, 11, 10, 9, 8, 7, 6, 5])
    other = train(jax.tree.map(lambda leaf: leaf[order], NET_BATCHES), resume=store.at(5).end)
    comparison = eomdl.compare(parent, {"other order": other})
    np.testing.assert_array_equal(comparison.steps, np.arange(5, 13))
    assert comparison.distance["other order"][0] == 0 < comparison.distance["other order"][-1]


def test_branch_with_another_learning_rate_and_optimizer(tmp_path):
    store = eomdl.Checkpoints(tmp_path, [10])
    run(store)
    here = store.at(10)
    slower = eomdl.descend(valley_loss, VALLEY, optax.adam(0.01), 20, resume=here)
    assert not np.array_equal(slower.params["x"][-1], run(num_steps=20).params["x"][-1])
    with pytest.raises(ValueError, match=r"resume\.end\.state: .*without_state"):
        eomdl.descend(valley_loss, VALLEY, SGD, 20, resume=here)
    sgd = eomdl.descend(valley_loss, VALLEY, SGD, 20, resume=here.without_state())
    anew = eomdl.descend(valley_loss, here.at(10), SGD, 10)
    assert list(sgd.steps) == list(range(10, 21))
    assert_identical(sgd.params, anew.params)
    sgd.without_state().save(tmp_path / "ended.npz")
    loaded = eomdl.Trajectory.load(tmp_path / "ended.npz")
    assert_identical(
        eomdl.descend(valley_loss, VALLEY, ADAM, 25, resume=loaded).final_params,
        eomdl.descend(valley_loss, VALLEY, ADAM, 25, resume=sgd.without_state()).final_params,
    )


def test_flow_branches(tmp_path):
    """Nothing changed: the parent within its ODE error. A counter term switched off: a flow of lower order."""
    flow = eomdl.EquationOfMotion(valley_loss, 0.2, 2)
    store = eomdl.Checkpoints(tmp_path, [0, 8, 20])
    parent = eomdl.solve(flow, VALLEY, 20, checkpoints=store)
    same = eomdl.solve(flow, VALLEY, 20, resume=store.at(8).end)
    error = parent.ode_error[8:].max()
    for x, y in zip(jax.tree.leaves(same.params), jax.tree.leaves(parent.params), strict=True):
        np.testing.assert_allclose(x, y[8:], atol=error)
    assert float(same.stats.rtol) == float(parent.stats.rtol)
    without = eomdl.solve(eomdl.EquationOfMotion(valley_loss, 0.2, 1), VALLEY, 20, resume=store.at(8).end)
    assert flat(without.at(8)) == pytest.approx(flat(parent.at(8)), abs=0)
    assert np.abs(flat(without.at(20)) - flat(parent.at(20))).max() > 10 * error


def test_flow_from_a_checkpoint_of_a_real_run(tmp_path):
    store = eomdl.Checkpoints(tmp_path, [10])
    run(store)
    adam = eomdl.optimizer_step(valley_loss, ADAM)
    flow = eomdl.InterpolatingFlow(adam, 0.02, 1)
    path = eomdl.solve(flow, VALLEY, 14, resume=store.at(10).end, rtol=1e-8, atol=1e-8)
    real = run(num_steps=14)
    assert list(path.steps) == list(range(10, 15))
    assert np.abs(flat(path.at(14)) - flat(real.at(14))).max() < 1e-2


# ------------------------------------------------------------ runs that go on after a run


def test_a_flow_that_goes_on_keeps_its_numbers():
    flow = eomdl.GradientFlow(valley_loss, 0.1)
    first = eomdl.solve(flow, VALLEY, 5)
    whole = eomdl.solve(flow, VALLEY, 10, resume=eomdl.solve(flow, VALLEY, 7, resume=first))
    for name in ("stride", "flow", "rtol", "atol"):
        assert getattr(whole.stats, name) == getattr(first.stats, name)
    assert int(whole.stats.num_steps) > int(first.stats.num_steps)


def test_another_flow_has_tolerances_of_its_own(tmp_path):
    store = eomdl.Checkpoints(tmp_path, [5])
    coarse = eomdl.solve(eomdl.GradientFlow(valley_loss, 0.1), VALLEY, 6, checkpoints=store)
    fine = eomdl.solve(eomdl.EquationOfMotion(valley_loss, 0.1, 2), VALLEY, 6, resume=store.at(5).end)
    assert float(fine.stats.atol) < 0.1 * float(coarse.stats.atol)


def test_a_flow_from_a_real_run_without_its_state():
    real = run(num_steps=5)
    flow = eomdl.GradientFlow(valley_loss, 0.1)
    path = eomdl.solve(flow, VALLEY, 8, resume=real.without_state())
    assert list(path.steps) == list(range(9))
    assert np.all(path.ode_error[:6] == 0)
    np.testing.assert_allclose(path.times, 0.1 * np.arange(9))
    anew = eomdl.solve(flow, real.at(5), 3)
    assert_identical(path.at(8), anew.at(3))


def quartic(params, args):
    return jnp.sum(params**4)


def test_a_diverged_run_goes_on_from_its_last_good_row():
    broken = eomdl.descend(quartic, jnp.ones(1), optax.sgd(5.0), 20)
    last = int(broken.end.step)
    assert last == broken.steps[-1] > 0
    assert broken.result == eomdl.RESULTS.nonfinite
    np.testing.assert_array_equal(broken.final_params, broken.params[-1])
    np.testing.assert_array_equal(broken.end.state[0], broken.params[-1])
    assert int(broken.stats.gradient_evaluations) == last
    # Another rule without a state goes on from there: a fixed step against the sign of the gradient.
    w = broken.params[-1]
    tame = eomdl.descend(quartic, jnp.ones(1), optax.sign_sgd(float(abs(w[0]) / 64)), 20, resume=broken)
    np.testing.assert_array_equal(tame.steps, np.arange(21))
    np.testing.assert_array_equal(tame.params[: last + 1], broken.params)
    np.testing.assert_allclose(tame.params[last + 1 :, 0], w * (1 - np.arange(1, 21 - last) / 64), rtol=1e-12)


def test_a_single_saved_row_is_a_run_like_any_other():
    one = run(num_steps=10, save_steps=[10])
    assert list(run(num_steps=20, save_steps=[20], resume=one).steps) == [10, 20]


def test_a_mismatch_is_said_before_anything_is_computed():
    calls = []

    def watched(params, args):
        jax.debug.callback(lambda: calls.append(1))
        return params["x"]

    with pytest.raises(ValueError, match="resume: expected a run with the same save_params and observe"):
        run(num_steps=20, resume=run(num_steps=10), observe={"x": watched})
    jax.effects_barrier()
    assert not calls


def test_a_finished_run_is_left_as_it_is(tmp_path):
    listed = [jax.tree.map(lambda leaf, k=k: leaf[k], NET_BATCHES) for k in range(12)]
    store = eomdl.Checkpoints(tmp_path, 6)
    for _ in range(2):
        done = eomdl.descend(
            net_loss, NET, ADAM, 12, batches=listed, resume=store.latest, checkpoints=store, args=NET_ARGS
        )
        assert list(store.steps) == [0, 6, 12]
    assert_identical(done.final_params, store.at(12).at(12))
