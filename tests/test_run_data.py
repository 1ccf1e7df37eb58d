"""What a run takes and hands out: batches that say what they are, monitors, observables of any pytree, any state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import VALLEY, assert_identical, pulled_loss, valley_loss

import eomdl
from eomdl.runs import AbstractMonitor, stacked, stream


SGD = optax.sgd(0.05)
STEPS = 6
PULLS = jnp.linspace(-1.0, 1.0, STEPS)


def descend(**options):
    return eomdl.descend(pulled_loss, VALLEY, SGD, STEPS, **options)


# ------------------------------------------------------------------ batches


@pytest.mark.parametrize(
    "batches",
    [
        PULLS,
        stacked(PULLS),
        list(PULLS),
        stream(list(PULLS)),
        stream(tuple(PULLS)),
        stream(PULLS),
        stream(x for x in PULLS),
    ],
    ids=["array", "stacked", "list", "stream list", "stream tuple", "stream array", "stream generator"],
)
def test_batches_are_what_they_say(batches):
    expected = VALLEY
    for pull in PULLS:
        gradient = jax.grad(pulled_loss)(expected, pull)
        expected = jax.tree.map(lambda x, g: x - 0.05 * g, expected, gradient)
    run = descend(batches=batches)
    for name, x in expected.items():
        np.testing.assert_allclose(run.final_params[name], x, rtol=1e-14)


def test_a_constructor_says_it_again_where_a_run_is_repeated():
    batches = stacked(PULLS)
    assert_identical(descend(batches=batches).params, descend(batches=batches).params)


@pytest.mark.parametrize(("reading", "seen"), [(stacked, [0, 1]), (stream, [0, 2])])
def test_a_tuple_that_reads_both_ways_is_refused_until_it_says_which(reading, seen):
    both = (jnp.array([0.0, 1.0]), jnp.array([2.0, 3.0]))  # two steps: two arrays, or two batches
    with pytest.raises(ValueError, match=r"^batches: expected one reading, got a tuple of num_steps = 2"):
        eomdl.descend(pulled_loss, VALLEY, SGD, 2, batches=both)
    first = lambda params, batch: (
        jnp.sum(params**2) * jnp.sum(jnp.stack(jax.tree.leaves(batch)).reshape(-1)[0])
    )
    observe = {"seen": eomdl.on_batch(lambda params, batch: jax.tree.leaves(batch)[0].reshape(-1)[0])}
    run = eomdl.descend(first, jnp.ones(1), SGD, 2, batches=reading(both), observe=observe)
    np.testing.assert_array_equal(run.observables["seen"][:2], seen)


def test_wrong_batches_are_named_by_the_run():
    for wrong in (stacked(PULLS[1:]), stream(list(PULLS[1:])), stream([])):
        with pytest.raises(ValueError, match=r"^batches: expected"):
            descend(batches=wrong)
    flow = eomdl.InterpolatingFlow(eomdl.optimizer_step(pulled_loss, SGD), 0.05, points=2, stride=2)
    with pytest.raises(ValueError, match=r"^batches: expected stacked arrays or a list for a flow of stride"):
        eomdl.solve(flow, VALLEY, STEPS, batches=stream(iter(PULLS)))


# ----------------------------------------------------------------- monitors


class Logger(AbstractMonitor):
    def __init__(self, *due):
        self.due, self.seen = due, {}

    def is_due(self, step):
        return step in self.due

    def measure(self, step, params, state, args):
        self.seen[step] = params, state, args


def test_a_monitor_sees_parameters_state_and_data_of_its_steps_and_changes_nothing():
    one, two = Logger(0, 3), Logger(3, 4, STEPS)
    adam = optax.adam(0.1)
    options = {"batches": PULLS, "observe": {"loss": eomdl.on_batch(pulled_loss)}}
    run = eomdl.descend(pulled_loss, VALLEY, adam, STEPS, monitors=[one, two], **options)
    alone = eomdl.descend(pulled_loss, VALLEY, adam, STEPS, **options)
    assert_identical(
        (run.params, run.observables, run.end.state), (alone.params, alone.observables, alone.end.state)
    )
    assert list(one.seen) == [0, 3]
    assert list(two.seen) == [3, 4]  # before a step: there is none after the last
    params, state, batch = two.seen[4]
    assert_identical(params, run.at(4))
    assert batch == PULLS[4]
    until = eomdl.descend(pulled_loss, VALLEY, adam, 4, batches=PULLS[:4])
    assert_identical(state, until.end.state[1])
    assert jax.tree.structure(state) == jax.tree.structure(adam.init(VALLEY))


def test_monitors_of_iterate_and_solve():
    flow = eomdl.InterpolatingFlow(eomdl.optimizer_step(pulled_loss, optax.sgd(0.05, 0.5)), 0.05, points=2)
    path, real = Logger(2), Logger(2)
    run = eomdl.iterate(flow.step_map, VALLEY, 4, args=0.3, monitors=[real])
    assert_identical(real.seen[2][0], run.at(2))
    solved = eomdl.solve(flow, VALLEY, 4, args=0.3, monitors=[path], rtol=1e-9, atol=1e-11)
    for name, x in path.seen[2][0].items():
        np.testing.assert_allclose(x, solved.at(2)[name], rtol=1e-7)
    assert jax.tree.structure(path.seen[2][1]) == jax.tree.structure(flow.init(VALLEY, 0.3))
    assert path.seen[2][2] == real.seen[2][2] == 0.3


def test_what_a_monitor_raises_hands_over_the_run():
    class Fails(Logger):
        def measure(self, step, params, state, args):
            raise RuntimeError("the disk of the logger")

    with pytest.raises(RuntimeError, match="the disk of the logger") as caught:
        descend(batches=PULLS, monitors=[Fails(4)])
    part = caught.value.trajectory
    assert part.end.step == 4
    assert_identical(descend(batches=PULLS, resume=part).params, descend(batches=PULLS).params)


def test_wrong_monitors_are_named():
    for wrong in (3, "wrong", [3], Logger(1)):
        with pytest.raises(ValueError, match=r"^monitors: expected"):
            descend(args=0.1, monitors=wrong)
    with pytest.raises(ValueError, match=r"^monitors: expected a run outside jit"):
        jax.jit(lambda x: descend(args=x, monitors=[Logger(1)]).final_params)(0.1)


# ------------------------------------------------- observables of any pytree


def parts(params, args):
    return {"gradient": jax.grad(pulled_loss)(params, args), "both": (pulled_loss(params, args), jnp.ones(3))}


def test_an_observable_may_be_any_pytree(tmp_path):
    observe = {"parts": parts, "loss": pulled_loss}
    run = descend(args=0.3, observe=observe)
    whole = run.observables["parts"]
    np.testing.assert_array_equal(whole["both"][0], run.observables["loss"])
    assert whole["both"][1].shape == (STEPS + 1, 3)
    for k in (0, 4):
        for name, g in jax.grad(pulled_loss)(run.at(k), 0.3).items():
            np.testing.assert_allclose(whole["gradient"][name][k], g, rtol=1e-12)
    run.save(tmp_path / "run.npz")
    loaded = eomdl.Trajectory.load(tmp_path / "run.npz")
    assert_identical(loaded.observables, run.observables)
    assert_identical(
        descend(args=0.3, observe=observe, resume=descend_half(observe)).observables, run.observables
    )
    smoothed = run.smoothed(2).observables["parts"]["both"][0]
    np.testing.assert_allclose(smoothed, (run.observables["loss"][1:] + run.observables["loss"][:-1]) / 2)


def descend_half(observe):
    return eomdl.descend(pulled_loss, VALLEY, SGD, 3, args=0.3, observe=observe)


def test_models_are_compared_in_every_leaf_of_an_observable():
    real = descend(args=0.3, observe={"parts": parts})
    path = eomdl.solve(
        eomdl.GradientFlow(pulled_loss, 0.05), VALLEY, STEPS, args=0.3, observe={"parts": parts}
    )
    found = eomdl.compare(real, {"flow": path}).differences["flow"]
    expected = path.observables["parts"]["both"][0] - real.observables["parts"]["both"][0]
    np.testing.assert_array_equal(found["parts['both'][0]"], expected)
    assert set(found) == {
        "parts['both'][0]",
        "parts['both'][1]",
        "parts['gradient']['x']",
        "parts['gradient']['y']",
    }


@pytest.mark.parametrize("wrong", [lambda p, a: "text", lambda p, a: (), lambda p, a: {"a": None}, 3])
def test_what_is_no_pytree_of_arrays_is_named(wrong):
    with pytest.raises(ValueError, match=r"^observe\['wrong'\]: expected"):
        descend(args=0.3, observe={"wrong": wrong})
    with pytest.raises(ValueError, match=r"^observe_state\['wrong'\]: expected"):
        eomdl.solve(eomdl.GradientFlow(valley_loss, 0.1), VALLEY, 2, observe_state={"wrong": wrong})


def test_a_flows_state_is_recorded_as_any_pytree():
    flow = eomdl.GradientFlow(valley_loss, 0.1)
    path = eomdl.solve(
        flow, VALLEY, 5, observe_state={"state": lambda t, state, args: {"t": t, "state": state}}
    )
    assert_identical(path.observables["state"]["state"], path.params)
    np.testing.assert_allclose(path.observables["state"]["t"], path.times, rtol=1e-14)


# -------------------------------------------------------- keys and counters in a state


class Noisy(eomdl.AbstractFlow):
    """Gradient flow that is pushed by a constant of its own in every step, drawn from a key; it counts the steps."""

    step_size: jax.Array

    def init(self, params, args):
        return {
            "params": params,
            "key": jax.random.key(3),
            "count": jnp.zeros((), int),
            "push": jnp.zeros(()),
        }

    def params(self, state):
        return state["params"]

    @property
    def refresh(self):
        return self._draw

    def _draw(self, t, state, args):
        key, own = jax.random.split(state["key"])
        return {**state, "key": key, "count": state["count"] + 1, "push": jax.random.normal(own)}

    def __call__(self, t, state, args):
        # At the leaves that are no numbers of the path, a velocity may hold anything.
        return {**state, "params": jnp.full_like(state["params"], state["push"]), "push": jnp.zeros(())}


def test_a_flows_state_may_hold_keys_and_counters(tmp_path):
    flow, start = Noisy(jnp.asarray(0.5)), jnp.zeros(2)
    key, total = jax.random.key(3), [0.0]
    for _ in range(8):
        key, own = jax.random.split(key)
        total.append(total[-1] + 0.5 * float(jax.random.normal(own)))
    path = eomdl.solve(flow, start, 8, observe_state={"count": lambda t, state, args: state["count"]})
    np.testing.assert_allclose(path.params, np.stack([total, total], axis=1), rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(path.observables["count"], np.arange(9))
    assert path.ode_error.max() < 1e-12
    half = eomdl.solve(flow, start, 3)
    half.save(tmp_path / "half.npz")
    for resume in (half, eomdl.Trajectory.load(tmp_path / "half.npz")):
        rest = eomdl.solve(flow, start, 8, resume=resume)
        np.testing.assert_allclose(rest.params, path.params, rtol=1e-12, atol=1e-14)
    members = eomdl.runs.members(eomdl.solve(eomdl.Ensemble(flow), jnp.zeros((3, 2)), 8))
    np.testing.assert_allclose(members[2].params, path.params, rtol=1e-12, atol=1e-14)
