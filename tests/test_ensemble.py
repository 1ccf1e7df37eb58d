"""Many seeds at once: each member is the run made alone, and one that diverges harms no other."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    COMPILED,
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
from eomdl import Ensemble
from eomdl.geometry import barriers
from eomdl.runs import each, members, stack


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
    run = eomdl.iterate(
        eomdl.Ensemble(ADAM), stack(NETS), STEPS, args=NET_ARGS, observe=observe, step_size=0.05
    )
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
    run = eomdl.iterate(eomdl.Ensemble(HEAVY_BALL), stack(STARTS), STEPS)
    for start, member in zip(STARTS, members(run), strict=True):
        alone = eomdl.iterate(HEAVY_BALL, start, STEPS)
        assert_same_from_two_programs((member.params, member.end.state), (alone.params, alone.end.state))


@pytest.mark.parametrize("axis", [0, (0, 0), (0, None)])
def test_each_member_sees_its_own_batches(axis):
    shared = BATCHES[1][:, 0]
    batches = (BATCHES[0], shared) if axis == (0, None) else BATCHES
    run = eomdl.iterate(eomdl.Ensemble(ADAM, axis), stack(NETS), STEPS, batches=batches)
    for s, member in enumerate(members(run)):
        own = (BATCHES[0][:, s], shared if axis == (0, None) else BATCHES[1][:, s])
        alone = eomdl.iterate(ADAM, NETS[s], STEPS, batches=own)
        assert_close(member.params, alone.params, rtol=1e-13)


def test_members_share_a_batch():
    batches = jax.tree.map(lambda x: x[:, 0], BATCHES)
    run = eomdl.iterate(eomdl.Ensemble(ADAM), stack(NETS), STEPS, batches=batches)
    alone = eomdl.iterate(ADAM, NETS[1], STEPS, batches=batches)
    assert_close(members(run)[1].params, alone.params, rtol=1e-13)


def test_observables_can_see_a_part_of_the_args_each():
    bs = normal(0, 3, 4)
    hessian = jnp.eye(4)
    observe = {"loss": each(quadratic_loss, (None, 0))}
    step = eomdl.Ensemble(eomdl.optimizer_step(quadratic_loss, optax.sgd(0.5)), (None, 0))
    run = eomdl.iterate(step, jnp.zeros((3, 4)), 3, args=(hessian, bs), observe=observe)
    # x_k = (1 - 2^-k) b, so L = (w^2 - 1) |b|^2 / 2 with w = 2^-k
    decay = 0.5 ** np.arange(4)
    expected = (decay[:, None] ** 2 - 1) * np.sum(np.asarray(bs) ** 2, axis=1)[None] / 2
    np.testing.assert_allclose(run.observables["loss"], expected, rtol=1e-14)


def test_two_of_one_observable_compile_once():
    loss, calls = counted(valley_loss)
    total = []
    for _ in range(2):
        eomdl.iterate(eomdl.Ensemble(HEAVY_BALL), stack(STARTS), 4, observe={"loss": each(loss)})
        total.append(len(calls))
    # The second run tries the observable on shapes, and traces it no more.
    assert total[1] - total[0] < total[0]


def test_a_run_resumes_and_survives_the_disk(tmp_path):
    whole = eomdl.iterate(eomdl.Ensemble(HEAVY_BALL), stack(STARTS), STEPS)
    half = eomdl.iterate(eomdl.Ensemble(HEAVY_BALL), stack(STARTS), 5)
    half.save(tmp_path / "half.npz")
    half = eomdl.Trajectory.load(tmp_path / "half.npz")
    rest = eomdl.iterate(eomdl.Ensemble(HEAVY_BALL), stack(STARTS), STEPS, resume=half)
    assert_identical(rest.params, whole.params)
    # One member alone goes on from the ensemble's state.
    alone = eomdl.iterate(HEAVY_BALL, STARTS[2], STEPS, resume=members(half)[2])
    assert_same_from_two_programs(alone.params, members(whole)[2].params)


def test_checkpoints_on_disk_are_those_in_memory(tmp_path):
    starts = jnp.array([-0.4, 3.0, -1.5])  # the second diverges
    store = eomdl.Checkpoints(tmp_path, [0, 4, 20])
    eomdl.iterate(eomdl.Ensemble(CUBIC), starts, 20, checkpoints=store, save_params=False)
    run = eomdl.iterate(eomdl.Ensemble(CUBIC), starts, 20, save_steps=[0, 4, 20])
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
    run = eomdl.iterate(eomdl.Ensemble(step, 0), jnp.ones(2), 6, args={"rate": rates})
    expected = (1 - np.asarray(rates)) ** np.arange(7)[:, None]
    np.testing.assert_allclose(run.params, expected, rtol=1e-14)


# ------------------------------------------------------------------ divergence


def test_a_member_that_diverges_stays_where_it_was_last_finite():
    starts = jnp.array([-0.4, 3.0, -1.5])  # y' = y^2: from 3.0 to infinity
    run = eomdl.iterate(eomdl.Ensemble(CUBIC), starts, 20, observe={"loss": each(cubic_loss)})
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
    with_bad, without = (
        eomdl.iterate(eomdl.Ensemble(CUBIC), s, 20, save_steps=5).params for s in (bad, good)
    )
    np.testing.assert_array_equal(with_bad[:, [0, 2]], without[:, [0, 2]])
    assert not np.any(np.asarray(with_bad)[-1, 1] == np.asarray(without)[-1, 1])


def test_a_frozen_member_stays_frozen_on_resume():
    # A batch that is infinite once: the member does not come back when the batches are good again.
    batches = jnp.ones((6, 2)).at[2, 0].set(jnp.inf)
    step = eomdl.Ensemble(lambda state, args, k: state - 0.1 * args, 0)
    run = eomdl.iterate(step, jnp.zeros(2), 6, batches=batches)
    half = eomdl.iterate(step, jnp.zeros(2), 4, batches=batches[:4])
    rest = eomdl.iterate(step, jnp.zeros(2), 6, batches=batches, resume=half)
    for r in (run, rest):
        np.testing.assert_allclose(r.params[-1], [-0.2, -0.6], rtol=1e-14)
        np.testing.assert_array_equal(r.end.state.reached, [2, 6])


def test_a_member_that_is_never_finite_stays_at_its_start():
    run = eomdl.iterate(Ensemble(CUBIC), jnp.array([-0.4, 1e200]), 5)
    np.testing.assert_array_equal(run.end.state.alive, [1, 0])
    np.testing.assert_array_equal(run.end.state.reached, [5, 0])
    np.testing.assert_array_equal(run.params[:, 1], 1e200)


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
        eomdl.iterate(eomdl.Ensemble(lambda state, args, k: state), params, 2)


def test_other_wrong_arguments_are_named():
    for axis in ("first", 1.5, True, (0, "x")):
        with pytest.raises(ValueError, match=r"^args_axis: expected"):
            Ensemble(CUBIC, axis)
    with pytest.raises(ValueError, match=r"^member: expected"):
        Ensemble(optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"^step_map: expected"):
        eomdl.iterate(Ensemble(eomdl.GradientFlow(cubic_loss, 0.1)), jnp.ones(2), 2)
    with pytest.raises(ValueError, match=r"^flow: expected"):
        eomdl.solve(Ensemble(CUBIC), jnp.ones(2), 2)
    with pytest.raises(ValueError, match=r"^observable: expected"):
        each(3)
    with pytest.raises(
        ValueError, match=r"^trajectory: expected a run \(iterate or solve\) of an eomdl.Ensemble"
    ):
        members(eomdl.iterate(HEAVY_BALL, VALLEY, 2))


def test_single_precision_stays_single():
    starts = jnp.array([-0.4, 3.0], jnp.float32)
    run = eomdl.iterate(eomdl.Ensemble(CUBIC), starts, 20)
    assert run.params.dtype == jnp.float32
    np.testing.assert_array_equal(run.end.state.alive, [1, 0])


def mean_of_members(params, args):
    return jax.tree.leaves(params)[0].mean(axis=0)


def test_observables_are_cut_by_what_they_are_and_not_by_their_shape(tmp_path):
    """As many members as parameters: the mean over the members has the shape of a value for each."""
    starts = jnp.array([[0.3, 0.4, 0.5], [0.1, 0.2, 0.3], [0.2, 0.3, 0.4]])
    norm = lambda params, args: jnp.sum(params**2)
    observe = {"mean": mean_of_members, "norm": each(norm), "batch norm": eomdl.on_batch(each(norm))}
    halve = eomdl.Ensemble(lambda state, args, k: 0.5 * state)
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


# ------------------------------------------------------------------ flows

FLOW = eomdl.EquationOfMotion(valley_loss, 0.05, order=1)
MOMENTUM = eomdl.InterpolatingFlow(HEAVY_BALL, 0.4, points=2)
TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def test_members_of_a_flow_are_its_runs_made_alone():
    flow = MOMENTUM
    observe, observe_state = {"loss": each(valley_loss)}, {"time": lambda t, state, args: t}
    run = eomdl.solve(
        Ensemble(flow), stack(STARTS), STEPS, observe=observe, observe_state=observe_state, **TIGHT
    )
    for start, member in zip(STARTS, members(run), strict=True):
        alone = eomdl.solve(flow, start, STEPS, observe={"loss": valley_loss}, **TIGHT)
        assert_close(member.params, alone.params, rtol=1e-8)
        assert_close(member.observables["loss"], alone.observables["loss"], rtol=1e-8)
        np.testing.assert_allclose(member.observables["time"], alone.times, rtol=1e-12)
        np.testing.assert_array_equal(member.steps, alone.steps)
    # One member goes on alone, from the ensemble's state.
    further = eomdl.solve(flow, STARTS[2], STEPS + 3, resume=members(run)[2].end, **TIGHT)
    whole = eomdl.solve(flow, STARTS[2], STEPS + 3, **TIGHT)
    assert_close(further.final_params, whole.final_params, rtol=1e-7)


def test_tolerances_of_members_are_those_of_the_one_that_needs_the_smallest():
    run = eomdl.solve(Ensemble(FLOW), stack(STARTS), STEPS)
    alone = [eomdl.solve(FLOW, start, STEPS) for start in STARTS]
    np.testing.assert_allclose(run.stats.atol, min(float(a.stats.atol) for a in alone), rtol=1e-6)
    for a, member in zip(alone, members(run), strict=True):
        assert np.all(eomdl.compare(a, {"member": member}).distance["member"] <= 2 * a.ode_error.max())
    # The error of the ensemble is the distance over the parameters of all members.
    assert 0 < run.ode_error.max() < 2 * np.linalg.norm([a.ode_error.max() for a in alone])


def test_members_of_a_flow_see_their_own_batches():
    flow, batches = eomdl.GradientFlow(net_loss, 0.05), eomdl.runs.stacked(BATCHES)
    run = eomdl.solve(Ensemble(flow, 0), stack(NETS), STEPS, batches=batches, **TIGHT)
    own = jax.tree.map(lambda x: x[:, 1], BATCHES)
    alone = eomdl.solve(flow, NETS[1], STEPS, batches=own, **TIGHT)
    assert_close(members(run)[1].params, alone.params, rtol=1e-7)


def test_a_member_of_a_flow_that_diverges_harms_no_other():
    # y' = y^2, in steps of 1/2: y = y0/(1 - y0 t), from 0.3 to infinity at step 6.7.
    flow, starts = eomdl.GradientFlow(cubic_loss, 0.5), np.array([-0.4, 0.3, -1.5])
    options = {"observe": {"loss": each(cubic_loss)}, **TIGHT}
    run = eomdl.solve(Ensemble(flow), jnp.asarray(starts), 20, **options)
    np.testing.assert_array_equal(run.end.state.alive, [1, 0, 1])
    assert run.message == ""
    assert np.all(np.isfinite(run.params))
    for y, member in zip(starts, members(run), strict=True):
        np.testing.assert_allclose(member.params, y / (1 - y * member.times), rtol=1e-6)
        assert len(member.observables["loss"]) == len(member.steps)
        assert member.end.step == member.steps[-1]
        assert_identical(member.final_params, member.params[-1])
    frozen = members(run)[1]
    assert frozen.result == eomdl.RESULTS.nonfinite
    assert frozen.end.step in (5, 6)
    np.testing.assert_array_equal(run.params[int(frozen.end.step) :, 1], frozen.params[-1])
    # It stays frozen, and the others go on.
    rest = eomdl.solve(Ensemble(flow), jnp.asarray(starts), 24, resume=run, **options)
    np.testing.assert_array_equal(rest.end.state.alive, [1, 0, 1])
    np.testing.assert_array_equal(rest.params[-1, 1], frozen.params[-1])
    np.testing.assert_allclose(rest.params[-1, [0, 2]], starts[[0, 2]] / (1 - 12 * starts[[0, 2]]), rtol=1e-6)


def test_a_member_has_its_own_diagnostics_and_an_ensemble_is_compared_with_its_own_kind():
    starts, steep = (
        [VALLEY, {"x": jnp.array(0.1), "y": jnp.array(0.1)}],
        eomdl.EquationOfMotion(valley_loss, 0.4, 1),
    )
    run = eomdl.solve(Ensemble(steep), stack(starts), 2, **TIGHT)
    alone = [eomdl.solve(steep, start, 2, **TIGHT) for start in starts]
    for member, own in zip(members(run), alone, strict=True):
        name = "eta*lambda_max"
        values = (run.stats.diagnostics[name].value for run in (member, own))
        np.testing.assert_allclose(*values, rtol=1e-3)
        assert member.notes == own.notes
    assert len(alone[0].notes) != len(alone[1].notes)
    real = eomdl.iterate(Ensemble(eomdl.optimizer_step(valley_loss, optax.sgd(0.4))), stack(starts), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not any("another run" in note for note in eomdl.compare(real, {"flow": run}).notes)


def test_a_member_of_a_flow_of_a_stride_says_so():
    step_map = eomdl.optimizer_step(valley_loss, optax.sgd(0.05))
    flow = eomdl.InterpolatingFlow(step_map, 0.05, points=2, stride=2)
    run = eomdl.solve(Ensemble(flow), stack(STARTS), 4, estimate_error=False, diagnose=False)
    assert members(run)[0].notes == run.notes
    assert "stride of 2" in run.notes[0] or "stride 2" in run.notes[0]


def test_a_member_says_why_it_stopped():
    run = eomdl.solve(Ensemble(FLOW), stack(STARTS), STEPS, max_steps=2, **TIGHT)
    assert all(member.result == eomdl.RESULTS.max_steps_reached for member in members(run))
    assert any(note.startswith("members that stopped: 3.") for note in run.notes)
    well = eomdl.solve(Ensemble(FLOW), stack(STARTS), 2)
    assert not well.notes


def test_a_second_learning_rate_compiles_no_other_ensemble():
    starts = stack(STARTS)
    for rate in (0.05, 0.06):
        eomdl.solve(Ensemble(eomdl.EquationOfMotion(valley_loss, rate, order=1)), starts, 4)
    compiled = len(COMPILED)
    eomdl.solve(Ensemble(eomdl.EquationOfMotion(valley_loss, 0.07, order=1)), starts, 4, diagnose=False)
    assert len(COMPILED) == compiled


def test_tolerances_of_float32_members_may_be_given():
    starts = jax.tree.map(lambda x: x.astype(jnp.float32), stack(STARTS))
    run = eomdl.solve(Ensemble(FLOW), starts, 4, rtol=1e-5, atol=1e-6)
    assert {leaf.dtype for leaf in jax.tree.leaves(run.params)} == {jnp.dtype(jnp.float32)}
    final = jax.jit(lambda x: eomdl.solve(Ensemble(FLOW), x, 4).final_params)(starts)
    for a, b in zip(jax.tree.leaves(final), jax.tree.leaves(run.final_params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3)


def test_an_ensemble_that_begins_without_a_state_begins_at_its_step():
    first = eomdl.iterate(Ensemble(HEAVY_BALL), stack(STARTS), 5)
    rest = eomdl.iterate(Ensemble(HEAVY_BALL), stack(STARTS), 5, resume=first.without_state())
    np.testing.assert_array_equal(rest.end.state.reached, 5)
    assert [len(member.steps) for member in members(rest)] == [6, 6, 6]


def test_a_monitor_sees_the_memories_of_all_members():
    seen = []

    class Monitor(eomdl.runs.AbstractMonitor):
        def is_due(self, step):
            return step == 2

        def measure(self, step, params, state, args):
            seen.append((params, state))

    eomdl.iterate(Ensemble(HEAVY_BALL), stack(STARTS), 4, monitors=[Monitor()])
    eomdl.solve(Ensemble(MOMENTUM), stack(STARTS), 4, monitors=[Monitor()], **TIGHT)
    one = HEAVY_BALL.init(VALLEY)
    assert jax.tree.structure(seen[0][1]) == jax.tree.structure(HEAVY_BALL.memory(one))
    assert jax.tree.structure(seen[1][1]) == jax.tree.structure(one)


def test_a_flow_goes_on_where_a_real_ensemble_ended(tmp_path):
    real = eomdl.iterate(Ensemble(HEAVY_BALL), stack(STARTS), 6)
    path = eomdl.solve(Ensemble(MOMENTUM), stack(STARTS), STEPS, resume=real, **TIGHT)
    path.save(tmp_path / "path.npz")
    alone = eomdl.solve(MOMENTUM, STARTS[1], STEPS, resume=eomdl.iterate(HEAVY_BALL, STARTS[1], 6), **TIGHT)
    for loaded in (path, eomdl.Trajectory.load(tmp_path / "path.npz")):
        assert_close(members(loaded)[1].params, alone.params, rtol=1e-7)
    with pytest.raises(ValueError, match=r"^resume.end.params\['x'\]: expected shape \(\), got \(3,\)"):
        eomdl.solve(MOMENTUM, VALLEY, STEPS, resume=real.end)
