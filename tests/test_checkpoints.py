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
    VALLEY,
    assert_close,
    assert_identical,
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
    assert list(store.steps) == expected
    assert len(store) == len(expected)
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
    assert 20 <= len(steps) < 5001
    assert list(steps) == list(range(len(steps)))
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
