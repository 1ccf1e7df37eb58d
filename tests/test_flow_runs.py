"""The laws of a flow's runs, over every kind of flow in the registry: jit and vmap, resume, minibatches."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from helpers import VALLEY, assert_close, flat
from registry import KINDS, TIGHT, Flow, find_start, make_flow

import eomdl


@KINDS
def test_jit_and_vmap_change_nothing(entry):
    start, begin = find_start(entry, entry.rates[0])
    flows = [make_flow(entry, rate) for rate in entry.rates[:2]]
    options = {"args": entry.args, "resume": start, "estimate_error": False, **TIGHT}

    def path(flow):
        run = eomdl.solve(flow, VALLEY, begin + 8, **options)
        return run.params, run.times

    arrays, rest = zip(*(eqx.partition(flow, eqx.is_array) for flow in flows), strict=True)
    stacked = eqx.combine(jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays), rest[0])
    params, times = eqx.filter_jit(eqx.filter_vmap(path))(stacked)
    for i, flow in enumerate(flows):
        # Two steps after the last saved one, as other laws save: on the host all of them share one program.
        alone = eomdl.solve(flow, VALLEY, begin + 10, save_steps=np.arange(begin, begin + 9), **options)
        assert_close(jax.tree.map(lambda x, i=i: x[i], params), alone.params, rtol=1e-9)
        np.testing.assert_allclose(times[i], alone.times, rtol=1e-14)


@KINDS
def test_a_resumed_run_is_the_whole_one_within_its_ode_error(entry):
    rate = entry.rates[0]
    start, begin = find_start(entry, rate)
    options = {"args": entry.args, "resume": start, "save_steps": [begin], "diagnose": False}
    options["solver"] = diffrax.Tsit5()  # a recommended solver may give no ODE error
    flow, end = make_flow(entry, rate), begin + 12
    whole = eomdl.solve(flow, VALLEY, end, **options | {"save_steps": [begin, end]})
    half = eomdl.solve(flow, VALLEY, begin + 5, **options)  # between two multiples of a stride of 2
    resumed = eomdl.solve(flow, VALLEY, end, **options | {"resume": half, "save_steps": [begin, end]})
    np.testing.assert_array_equal(resumed.steps, whole.steps)
    np.testing.assert_allclose(resumed.times, whole.times, rtol=1e-14)
    assert resumed.stats.rtol == whole.stats.rtol
    assert resumed.stats.atol == whole.stats.atol
    assert not [note for note in whole.notes if note.startswith("The ODE error reaches")]
    rounding = 1e-15 * np.linalg.norm(flat(VALLEY))
    # The estimate is the difference of two integrations, which may err to the same side.
    estimate = whole.ode_error[-1] + resumed.ode_error[-1]
    assert np.linalg.norm(flat(resumed.at(end)) - flat(whole.at(end))) <= 2 * estimate + rounding


def a_batch_for_each_step(entry: Flow, num_steps: int) -> jax.Array:
    """The entry's data, times another number for every step."""
    numbers = 1 + 0.5 * jnp.sin(jnp.arange(float(num_steps)))
    return jax.vmap(lambda a: a * entry.args)(numbers)


@KINDS
def test_minibatches_are_seen_each_in_its_own_step(entry):
    flow, num_steps = make_flow(entry), 8
    batches = a_batch_for_each_step(entry, num_steps)
    options = {"estimate_error": False, **TIGHT}

    def path(batches):
        return flat_rows(eomdl.solve(flow, VALLEY, num_steps, batches=batches, diagnose=False, **options))

    rows = path(batches)
    ahead = max(
        j for j, _ in flow.target.weights
    )  # what is predicted of step k may be a mean with the steps after it
    for k in (0, 3, 7):  # another batch in step k: another path from the end of its stride on, not before
        end = (k // flow.stride + 1) * flow.stride
        other = path(batches.at[k].multiply(-1))
        same = max(end - flow.stride + 1 - ahead, 0)
        np.testing.assert_array_equal(other[:same], rows[:same])
        assert np.all(np.linalg.norm(other[end:] - rows[end:], axis=1) > 1e-6)
    # The same batch in every step is no batches at all.
    constant = path(jnp.broadcast_to(entry.args, batches.shape))
    saved = {"save_steps": np.arange(num_steps + 1)}
    whole = flat_rows(eomdl.solve(flow, VALLEY, num_steps + 2, args=entry.args, **saved, **options))
    np.testing.assert_allclose(constant, whole, rtol=1e-9)


def flat_rows(run: eomdl.Trajectory) -> np.ndarray:
    return np.stack([run.params["x"], run.params["y"]], axis=1)
