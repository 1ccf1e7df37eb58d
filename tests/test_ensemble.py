"""Many seeds at once: each member is the run made alone, and one that diverges harms no other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    NET_ARGS,
    VALLEY,
    assert_close,
    assert_identical,
    assert_same_from_two_programs,
    counted,
    cubic_loss,
    net_loss,
    net_params,
    normal,
    quadratic_loss,
    valley_loss,
)

import eomdl
from eomdl.geometry import barriers
from eomdl.maps import Ensemble, each, members, stack


ADAM = eomdl.optimizer_step(net_loss, optax.adam(0.05))
HEAVY_BALL = eomdl.optimizer_step(valley_loss, optax.sgd(0.4, momentum=0.6))
CUBIC = eomdl.optimizer_step(cubic_loss, optax.sgd(0.5))
STARTS = [
    VALLEY,
    *({"x": jnp.array(x, float), "y": jnp.array(y, float)} for x, y in ((-0.3, 0.2), (0.9, 1.4))),
]
NETS = [net_params(seed) for seed in range(3)]
STEPS = 12
BATCHES = (normal(5, STEPS, 3, 2, 3), normal(6, STEPS, 3, 2, 2))  # 3 members, 2 examples each


# -------------------------------------------------------- as the runs made alone


def test_members_are_the_runs_made_alone():
    observe = {"loss": each(net_loss), "ensemble": lambda params, args: jnp.zeros(())}
    run = eomdl.iterate(Ensemble(ADAM), stack(NETS), STEPS, args=NET_ARGS, observe=observe, step_size=0.05)
    for start, member in zip(NETS, members(run), strict=True):
        alone = eomdl.iterate(ADAM, start, STEPS, args=NET_ARGS, observe={"loss": net_loss}, step_size=0.05)
        # To rounding: a product over a stack of matrices adds in its own order.
        for field in ("params", "observables"):
            assert_close(getattr(member, field), getattr(alone, field), rtol=1e-13)
        assert_close(member.end.state, alone.end.state, rtol=1e-13)
        for field in ("steps", "times"):
            np.testing.assert_array_equal(getattr(member, field), getattr(alone, field))
        assert member.end.step == alone.end.step
        assert member.message == ""


def test_members_without_products_are_the_same_bit_for_bit():
    run = eomdl.iterate(Ensemble(HEAVY_BALL), stack(STARTS), STEPS)
    for start, member in zip(STARTS, members(run), strict=True):
        alone = eomdl.iterate(HEAVY_BALL, start, STEPS)
        assert_same_from_two_programs((member.params, member.end.state), (alone.params, alone.end.state))


@pytest.mark.parametrize("axis", [0, (0, 0), (0, None)])
def test_each_member_sees_its_own_batches(axis):
    shared = BATCHES[1][:, 0]
    batches = (BATCHES[0], shared) if axis == (0, None) else BATCHES
    run = eomdl.iterate(Ensemble(ADAM, axis), stack(NETS), STEPS, batches=batches)
    for s, member in enumerate(members(run)):
        own = (BATCHES[0][:, s], shared if axis == (0, None) else BATCHES[1][:, s])
        alone = eomdl.iterate(ADAM, NETS[s], STEPS, batches=own)
        assert_close(member.params, alone.params, rtol=1e-13)


def test_members_share_a_batch():
    batches = jax.tree.map(lambda x: x[:, 0], BATCHES)
    run = eomdl.iterate(Ensemble(ADAM), stack(NETS), STEPS, batches=batches)
    alone = eomdl.iterate(ADAM, NETS[1], STEPS, batches=batches)
    assert_close(members(run)[1].params, alone.params, rtol=1e-13)


def test_observables_can_see_a_part_of_the_args_each():
    bs = normal(0, 3, 4)
    hessian = jnp.eye(4)
    observe = {"loss": each(quadratic_loss, (None, 0))}
    step = Ensemble(eomdl.optimizer_step(quadratic_loss, optax.sgd(0.5)), (None, 0))
    run = eomdl.iterate(step, jnp.zeros((3, 4)), 3, args=(hessian, bs), observe=observe)
    # x_k = (1 - 2^-k) b, so L = (w^2 - 1) |b|^2 / 2 with w = 2^-k
    decay = 0.5 ** np.arange(4)
    expected = (decay[:, None] ** 2 - 1) * np.sum(np.asarray(bs) ** 2, axis=1)[None] / 2
    np.testing.assert_allclose(run.observables["loss"], expected, rtol=1e-14)


def test_two_of_one_observable_compile_once():
    loss, calls = counted(valley_loss)
    total = []
    for _ in range(2):
        eomdl.iterate(Ensemble(HEAVY_BALL), stack(STARTS), 4, observe={"loss": each(loss)})
        total.append(len(calls))
    # The second run tries the observable on shapes, and traces it no more.
    assert total[1] - total[0] < total[0]


def test_a_run_resumes_and_survives_the_disk(tmp_path):
    whole = eomdl.iterate(Ensemble(HEAVY_BALL), stack(STARTS), STEPS)
    half = eomdl.iterate(Ensemble(HEAVY_BALL), stack(STARTS), 5)
    half.save(tmp_path / "half.npz")
    half = eomdl.Trajectory.load(tmp_path / "half.npz")
    rest = eomdl.iterate(Ensemble(HEAVY_BALL), stack(STARTS), STEPS, resume=half)
    assert_identical(rest.params, whole.params)
    # One member alone goes on from the ensemble's state.
    alone = eomdl.iterate(HEAVY_BALL, STARTS[2], STEPS, resume=members(half)[2])
    assert_same_from_two_programs(alone.params, members(whole)[2].params)


def test_checkpoints_on_disk_are_those_in_memory(tmp_path):
    starts = jnp.array([-0.4, 3.0, -1.5])  # the second diverges
    store = eomdl.Checkpoints(tmp_path, [0, 4, 20])
    eomdl.iterate(Ensemble(CUBIC), starts, 20, checkpoints=store, save_params=False)
    run = eomdl.iterate(Ensemble(CUBIC), starts, 20, save_steps=[0, 4, 20])
    on_disk = [barriers(cubic_loss, checkpoint, None, 5) for checkpoint in store]
    np.testing.assert_array_equal(np.concatenate(on_disk), barriers(cubic_loss, run, None, 5))
    assert np.isnan(on_disk[-1][0, 0, 1])
    assert np.isfinite(on_disk[1][0, 0, 1])
    # A branch from a checkpoint: one member goes on alone.
    alone = eomdl.iterate(CUBIC, starts[2], 20, resume=members(store.at(4))[2].end)
    np.testing.assert_array_equal(alone.params[-1], run.params[-1, 2])


def test_seeds_may_differ_in_the_learning_rate():
    def step(state, args, k):
        return state - args["rate"] * state

    rates = jnp.array([0.1, 0.5])
    run = eomdl.iterate(Ensemble(step, 0), jnp.ones(2), 6, args={"rate": rates})
    expected = (1 - np.asarray(rates)) ** np.arange(7)[:, None]
    np.testing.assert_allclose(run.params, expected, rtol=1e-14)


# ------------------------------------------------------------------ divergence


def test_a_member_that_diverges_stays_where_it_was_last_finite():
    starts = jnp.array([-0.4, 3.0, -1.5])  # y' = y^2: from 3.0 to infinity
    run = eomdl.iterate(Ensemble(CUBIC), starts, 20, observe={"loss": each(cubic_loss)})
    np.testing.assert_array_equal(run.end.state.alive, [1, 0, 1])
    assert run.message == ""
    assert np.all(np.isfinite(run.params))
    last, y = 0, 3.0
    while np.isfinite(y + 0.5 * y * y):
        last, y = last + 1, y + 0.5 * y * y
    np.testing.assert_array_equal(run.end.state.reached, [20, last, 20])
    np.testing.assert_allclose(np.asarray(run.params)[last:, 1], y, rtol=1e-12)
    good, frozen, _ = members(run)
    alone = eomdl.iterate(CUBIC, jnp.array(3.0), 20)
    assert_identical((frozen.steps, frozen.params), (alone.steps, alone.params))
    assert frozen.result == eomdl.RESULTS.nonfinite
    assert frozen.end.step == last
    assert frozen.message == alone.message
    assert f"after step {last}" in frozen.message
    assert good.result == eomdl.RESULTS.successful
    assert len(good.steps) == 21
    assert len(frozen.observables["loss"]) == last + 1


def test_a_member_that_diverges_leaves_the_others_bit_for_bit():
    bad = jnp.array([-0.4, 3.0, -1.5])
    good = jnp.array([-0.4, -0.7, -1.5])
    with_bad, without = (eomdl.iterate(Ensemble(CUBIC), s, 20, save_steps=5).params for s in (bad, good))
    np.testing.assert_array_equal(with_bad[:, [0, 2]], without[:, [0, 2]])
    assert not np.any(np.asarray(with_bad)[-1, 1] == np.asarray(without)[-1, 1])


def test_a_frozen_member_stays_frozen_on_resume():
    # A batch that is infinite once: the member does not come back when the batches are good again.
    batches = jnp.ones((6, 2)).at[2, 0].set(jnp.inf)
    step = Ensemble(lambda state, args, k: state - 0.1 * args, 0)
    run = eomdl.iterate(step, jnp.zeros(2), 6, batches=batches)
    half = eomdl.iterate(step, jnp.zeros(2), 4, batches=batches[:4])
    rest = eomdl.iterate(step, jnp.zeros(2), 6, batches=batches, resume=half)
    for r in (run, rest):
        np.testing.assert_allclose(r.params[-1], [-0.2, -0.6], rtol=1e-14)
        np.testing.assert_array_equal(r.end.state.reached, [2, 6])


def test_increment_is_the_difference_and_zero_for_the_frozen():
    ensemble = Ensemble(CUBIC)
    state = ensemble.init(jnp.array([-0.4, 1e200]))
    new, d = ensemble(state, None, 3.0), ensemble.increment(state, None, 3.0)
    for x, dx, y in zip(*map(jax.tree.leaves, (state, d, new)), strict=True):
        np.testing.assert_allclose(x + dx, y, rtol=1e-15)
    np.testing.assert_array_equal(d.members[0][1], 0)
    np.testing.assert_array_equal(new.alive, [1, 0])
    np.testing.assert_array_equal(new.reached, [4, 0])
    again = ensemble(new, None, 4.0)
    np.testing.assert_array_equal(again.reached, [5, 0])


# ------------------------------------------------------------------- arguments


def test_stack_adds_the_axis_of_members():
    stacked = stack(STARTS)
    assert_identical(stacked["x"], jnp.array([1.2, -0.3, 0.9]))
    for wrong in ([], [VALLEY, {"x": jnp.array(1.0)}], [jnp.ones(2), jnp.ones(3)]):
        with pytest.raises(ValueError, match=r"^params(\[1\])?: expected"):
            stack(wrong)


@pytest.mark.parametrize(
    "params",
    [{"a": jnp.ones(3), "b": jnp.ones(2)}, jnp.array(1.0), jnp.ones((0, 2)), jnp.array([1.0, jnp.nan])],
)
def test_wrong_params_are_named(params):
    with pytest.raises(ValueError, match=r"^params: expected"):
        eomdl.iterate(Ensemble(lambda state, args, k: state), params, 2)


def test_other_wrong_arguments_are_named():
    for axis in ("first", 1.5, True, (0, "x")):
        with pytest.raises(ValueError, match=r"^args_axis: expected"):
            Ensemble(CUBIC, axis)
    with pytest.raises(ValueError, match=r"^step_map: expected"):
        Ensemble(optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"^observable: expected"):
        each(3)
    with pytest.raises(ValueError, match=r"^trajectory: expected a run \(iterate\) of an eomdl.Ensemble"):
        members(eomdl.iterate(HEAVY_BALL, VALLEY, 2))


def test_single_precision_stays_single():
    starts = jnp.array([-0.4, 3.0], jnp.float32)
    run = eomdl.iterate(Ensemble(CUBIC), starts, 20)
    assert run.params.dtype == jnp.float32
    np.testing.assert_array_equal(run.end.state.alive, [1, 0])


def mean_of_members(params, args):
    return jax.tree.leaves(params)[0].mean(axis=0)


def test_observables_are_cut_by_what_they_are_and_not_by_their_shape(tmp_path):
    """As many members as parameters: the mean over the members has the shape of a value for each."""
    starts = jnp.array([[0.3, 0.4, 0.5], [0.1, 0.2, 0.3], [0.2, 0.3, 0.4]])
    norm = lambda params, args: jnp.sum(params**2)
    observe = {"mean": mean_of_members, "norm": each(norm), "batch norm": eomdl.on_batch(each(norm))}
    halve = Ensemble(lambda state, args, k: 0.5 * state)
    run = eomdl.iterate(halve, starts, 3, observe=observe)
    run.save(tmp_path / "run.npz")
    for whole in (run, eomdl.Trajectory.load(tmp_path / "run.npz", like=starts), run.rows(slice(2))):
        assert whole.per_member == ("norm", "batch norm")
    half = eomdl.iterate(halve, starts, 1, observe=observe)
    for whole in (run, eomdl.iterate(halve, starts, 3, observe=observe, resume=half)):
        for s, member in enumerate(members(whole)):
            assert set(member.observables) == {"norm", "batch norm"}
            alone = eomdl.iterate(lambda x, args, k: 0.5 * x, starts[s], 3, observe={"norm": norm})
            np.testing.assert_allclose(member.observables["norm"], alone.observables["norm"], rtol=1e-15)
