"""Checkpoints on disk: schedules, events, branches, and what a killed process leaves."""

import os
import signal
import subprocess
import sys
import textwrap
import time

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
    assert_close,
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


# ------------------------------------------------------------------- schedules


def test_logarithmic_steps():
    steps = eomdl.runs.logarithmic_steps(1000, per_decade=3)
    assert list(steps) == [0, 1, 2, 5, 10, 22, 46, 100, 215, 464, 1000]
    assert list(eomdl.runs.logarithmic_steps(1)) == [0, 1]


@pytest.mark.parametrize(
    ("schedule", "expected"), [(15, [0, 15, 30, 40]), ([3, 17], [3, 17]), (np.array([40, 0]), [0, 40])]
)
def test_schedule(tmp_path, schedule, expected):
    store = eomdl.Checkpoints(tmp_path / "run", schedule)
    whole = run(observe=OBSERVE)
    with_store = run(store, observe=OBSERVE, save_params=False)
    assert_identical(with_store.observables, whole.observables)
    assert with_store.params is None
    assert list(store.steps) == expected and len(store) == len(expected)
    for checkpoint in store:
        k = int(checkpoint.end.step)
        assert_identical(checkpoint.at(k), jax.tree.map(np.asarray, whole.at(k)))
        np.testing.assert_array_equal(checkpoint.observables["x"], whole.observables["x"][[k]])
        assert int(checkpoint.stats.gradient_evaluations) == k


def test_final_params_are_those_of_the_last_step():
    whole = run()
    assert_identical(run(save_params=False).final_params, whole.at(40))
    assert_identical(run(save_params=False, save_steps=[7]).final_params, whole.at(40))
    flow = eomdl.InterpolatingFlow(eomdl.optimizer_step(valley_loss, SGD), 0.1, 2, stride=2)
    odd = eomdl.solve(flow, VALLEY, 7, rtol=1e-6, atol=1e-6)
    # By a program of its own, so to rounding.
    assert_close(odd.final_params, odd.at(7), rtol=1e-14)


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


# ------------------------------------------------------------------------- events


def test_events_are_found_inside_chunks(tmp_path):
    whole = run(observe=OBSERVE, num_steps=60)
    x = whole.observables["x"]
    levels = {"first": 1.0, "second": 0.7}
    expected = {name: int(np.flatnonzero(x <= level)[0]) for name, level in levels.items()}
    assert 1 < expected["first"] < expected["second"] < 60
    events = {name: eomdl.runs.Crossing("x", level, rising=False) for name, level in levels.items()}
    store = eomdl.Checkpoints(tmp_path, [0], events=events)
    again = run(store, observe=OBSERVE, num_steps=60)
    assert_identical(again.params, whole.params)
    assert {name: list(steps) for name, steps in store.events.items()} == {
        name: [k] for name, k in expected.items()
    }
    for k in expected.values():
        assert_identical(store.at(k).at(k), jax.tree.map(np.asarray, whole.at(k)))
        assert int(store.at(k).stats.gradient_evaluations) == k
        assert_identical(run(resume=store.at(k).end, num_steps=60).end.state, whole.end.state)


def test_crossing_by_hand():
    values = np.array([0.0, 1.0, 2.0, 1.0, 2.0, 3.0])
    assert list(np.flatnonzero(eomdl.runs.Crossing("o", 1.5)(values)) + 1) == [2, 4]
    assert list(np.flatnonzero(eomdl.runs.Crossing("o", 1.5, rising=False)(values)) + 1) == [3]


def test_event_between_saved_steps_is_at_the_next_one(tmp_path):
    """-x^4/4 under gradient descent: its curvature 3 x^2 climbs through the level."""

    def climbing(params, args):
        return -0.25 * params**4

    sharp = {"curvature": lambda p, a: 3 * p**2}
    store = eomdl.Checkpoints(tmp_path, [0], events={"edge": eomdl.runs.Crossing("curvature", 2.0)})
    whole = eomdl.descend(climbing, jnp.array(0.5), SGD, 300, observe=sharp, save_steps=2, checkpoints=store)
    (at,) = store.events["edge"][:1]
    curvature = dict(zip(whole.steps, whole.observables["curvature"], strict=True))
    assert curvature[at - 2] < 2.0 <= curvature[at]


def test_an_observable_that_is_nan_for_a_while():
    nan = np.nan
    rising = eomdl.runs.Crossing("o", 2.0)
    assert list(rising(np.array([1.0, nan, 1.0, 1.0]))) == [False] * 3
    assert list(rising(np.array([1.0, nan, 3.0, 1.0]))) == [False, True, False]
    assert list(rising(np.array([nan, 3.0, nan, 3.0, 1.0, nan, 2.0]))) == [False] * 5 + [True]


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
    assert list(path.steps) == list(range(9)) and np.all(path.ode_error[:6] == 0)
    np.testing.assert_allclose(path.times, 0.1 * np.arange(9))
    anew = eomdl.solve(flow, real.at(5), 3)
    assert_identical(path.at(8), anew.at(3))


def quartic(params, args):
    return jnp.sum(params**4)


def test_a_diverged_run_goes_on_from_its_last_good_row():
    broken = eomdl.descend(quartic, jnp.ones(1), optax.sgd(5.0), 20)
    last = int(broken.end.step)
    assert last == broken.steps[-1] > 0 and broken.result == eomdl.RESULTS.nonfinite
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


# ----------------------------------------------------------------- whole-run studies


def test_observables_of_all_checkpoints(tmp_path):
    store = eomdl.Checkpoints(tmp_path, 10)
    whole = run(store)
    study = store.observe({"loss": valley_loss, "y": lambda p, a: p["y"]})
    np.testing.assert_array_equal(study.steps, [0, 10, 20, 30, 40])
    np.testing.assert_allclose(study.observables["y"], whole.params["y"][::10], rtol=1e-15)
    np.testing.assert_allclose(study.observables["loss"][2], valley_loss(whole.at(20), None), rtol=1e-14)
    assert eomdl.Checkpoints(tmp_path / "none").latest is None
    with pytest.raises(ValueError, match="folder: expected checkpoints"):
        eomdl.Checkpoints(tmp_path / "none").observe({"loss": valley_loss})


# --------------------------------------------------------------------- bad folders


def test_nothing_is_overwritten(tmp_path):
    store = eomdl.Checkpoints(tmp_path, 10)
    run(store)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"checkpoints: .*nothing was overwritten"):
        run(store)
    with pytest.raises(ValueError, match=r"after step 20.*folder of its own"):
        run(store, resume=store.at(20).end)
    with pytest.raises(ValueError, match=r"of other parameters or another optimizer"):
        eomdl.descend(net_loss, NET, ADAM, 50, args=NET_ARGS, checkpoints=store, resume=_at_40())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    longer = run(store, 50, resume=store.latest)
    assert list(store.steps) == [0, 10, 20, 30, 40, 50]
    assert_identical(longer.end.state, run(num_steps=50).end.state)


def _at_40():
    return eomdl.descend(net_loss, NET, ADAM, 40, args=NET_ARGS)


def test_damaged_and_missing_files(tmp_path):
    store = eomdl.Checkpoints(tmp_path, 20)
    run(store)
    path = tmp_path / "step-0000000020.npz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="whole file"):
        store.at(20)
    assert int(store.at(40).end.step) == 40
    with pytest.raises(ValueError, match=r"step: expected one of the checkpoints \[ *0 20 40\].*got 7"):
        store.at(7)


def test_killed_while_writing(tmp_path):
    """SIGKILL in the middle of a run that writes all the time: what is there is whole, and goes on."""
    script = textwrap.dedent(
        f"""
        import jax, jax.numpy as jnp, optax, eomdl
        jax.config.update("jax_enable_x64", True)
        store = eomdl.Checkpoints({str(tmp_path)!r}, 1)
        eomdl.descend(lambda p, a: 0.5 * jnp.sum(p**2), jnp.ones(20_000), optax.sgd(0.01), 5_000, checkpoints=store,
                      save_params=False)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("step-*.npz"))) < 20 and time.monotonic() < deadline:
            time.sleep(0.005)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    store = eomdl.Checkpoints(tmp_path, 1)
    steps = store.steps
    assert 20 <= len(steps) < 5001 and list(steps) == list(range(len(steps)))
    for checkpoint in store:
        np.testing.assert_allclose(checkpoint.params[0], 0.99 ** int(checkpoint.end.step), rtol=1e-10)
    k = int(steps[-1])
    end = eomdl.descend(
        lambda p, a: 0.5 * jnp.sum(p**2),
        jnp.ones(20_000),
        optax.sgd(0.01),
        k + 3,
        checkpoints=store,
        resume=store.latest,
        save_params=False,
    )
    np.testing.assert_allclose(end.final_params, 0.99 ** (k + 3), rtol=1e-10)
    assert list(store.steps)[-4:] == [k, k + 1, k + 2, k + 3]


def test_other_pytrees_need_a_like(tmp_path):
    from typing import NamedTuple

    class Pair(NamedTuple):
        x: jax.Array
        y: jax.Array

    start = Pair(jnp.array(1.2), jnp.array(-0.7))

    def loss(p, args):
        return valley_loss({"x": p.x, "y": p.y}, args)

    store = eomdl.Checkpoints(tmp_path, [5], like=start)
    parent = eomdl.descend(loss, start, SGD, 9, checkpoints=store)
    assert isinstance(store.at(5).at(5), Pair)
    assert_identical(eomdl.descend(loss, start, SGD, 9, resume=store.at(5).end).end.state, parent.end.state)


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="schedule: expected an integer >= 1"):
        eomdl.Checkpoints(tmp_path, 0)
    with pytest.raises(ValueError, match="events: expected a dict"):
        eomdl.Checkpoints(tmp_path, 5, events=[1])
    with pytest.raises(ValueError, match=r"schedule: expected .*from 0 to num_steps = 40"):
        run(eomdl.Checkpoints(tmp_path, [50]))
    crossing = eomdl.Checkpoints(tmp_path, [0], events={"edge": eomdl.runs.Crossing("sharpness", 2.0)})
    with pytest.raises(
        ValueError, match=r"events: .*name of an observable in observe, \['x'\], got 'sharpness'"
    ):
        run(crossing, observe=OBSERVE)
    with pytest.raises(ValueError, match=r"events\['edge'\]: expected a scalar observable"):
        run(
            eomdl.Checkpoints(tmp_path, [0], events={"edge": eomdl.runs.Crossing("x", 2.0)}),
            observe={"x": lambda p, a: jnp.stack([p["x"], p["y"]])},
        )
    with pytest.raises(ValueError, match="observable: expected the name"):
        eomdl.runs.Crossing(3, 2.0)
    with pytest.raises(ValueError, match="level: expected a finite number"):
        eomdl.runs.Crossing("x", np.inf)
    with pytest.raises(ValueError, match="per_decade: expected an integer >= 1"):
        eomdl.runs.logarithmic_steps(10, 0)
    with pytest.raises(ValueError, match=r"checkpoints: expected an eomdl\.Checkpoints"):
        run("folder")
    store = eomdl.Checkpoints(tmp_path / "traced", 5)

    def end(x):
        start = {"x": x, "y": x}
        return eomdl.descend(valley_loss, start, SGD, 5, checkpoints=store).final_params["x"]

    with pytest.raises(ValueError, match="outside jit"):
        jax.vmap(end)(jnp.ones(2))
