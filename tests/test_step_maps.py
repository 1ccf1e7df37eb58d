"""Step maps: one step of any optimizer as a function of a floating-point state and a real time."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import NET, NET_BATCHES, VALLEY, assert_close, assert_identical, net_loss, valley_loss

import eomdl


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "heavy ball": optax.sgd(0.1, momentum=0.9),
    "nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "rmsprop": optax.rmsprop(0.01),
    "adam": optax.adam(0.01),
    "adamw": optax.adamw(0.01),
    "nadam": optax.nadam(0.01),
    "lion": optax.lion(0.01),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1, momentum=0.5)),
    "decayed": optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)),
    "cosine": optax.adam(optax.cosine_decay_schedule(0.05, 15)),
    "injected": optax.inject_hyperparams(optax.adam)(optax.cosine_decay_schedule(0.05, 15)),
    "masked": optax.masked(optax.adam(0.05), {"x": True, "y": False}),
    "partitioned": optax.partition({"a": optax.adam(0.05), "b": optax.sgd(0.1)}, {"x": "a", "y": "b"}),
}
ADAM = eomdl.optimizer_step(valley_loss, OPTIMIZERS["adam"])
COSINE = eomdl.optimizer_step(valley_loss, OPTIMIZERS["cosine"])
POLYAK = optax.polyak_sgd(0.3)


def value(params, args):
    return {"value": valley_loss(params, args)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_iterates_are_those_of_descend(name):
    step = eomdl.optimizer_step(valley_loss, OPTIMIZERS[name])
    ours = eomdl.iterate(step, VALLEY, 12)
    real = eomdl.descend(valley_loss, VALLEY, OPTIMIZERS[name], 12)
    assert_close(ours.params, real.params, rtol=1e-14)
    floats = [x for x in jax.tree.leaves(real.end.state) if jnp.issubdtype(x.dtype, jnp.inexact)]
    assert_close(jax.tree.leaves(ours.end.state), floats, rtol=1e-14)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_the_parameters_and_floats(name):
    step = eomdl.optimizer_step(valley_loss, OPTIMIZERS[name])
    params, floats = state = step.init(VALLEY)
    assert_identical(params, VALLEY)
    assert_identical(step.params(state), VALLEY)
    assert all(x.dtype == jnp.float64 and not x.weak_type for x in jax.tree.leaves(floats))


def test_python_floats_become_arrays():
    params, _ = ADAM.init({"x": 1.2, "y": -0.7})
    assert_identical(params, VALLEY)


# ---------------------------------------------------------- the step number


@pytest.mark.parametrize(("step", "name"), [(ADAM, "adam"), (COSINE, "cosine")], ids=["adam", "cosine"])
def test_step_number_is_an_explicit_time(step, name):
    # A step of optax from the same floats with its counters at 7 is the step at k = 7.
    optimizer = OPTIMIZERS[name]
    state = eomdl.iterate(step, VALLEY, 3).end.state
    full = optimizer.init(VALLEY)
    counted = jax.tree.map(lambda c: c + 7, eqx.filter(full, eqx.is_inexact_array, inverse=True))
    updates, _ = optimizer.update(jax.grad(valley_loss)(VALLEY, None), eqx.combine(state[1], counted), VALLEY)
    expected = optax.apply_updates(VALLEY, updates)
    assert_close(step((VALLEY, state[1]), None, 7)[0], expected, rtol=1e-14)


@pytest.mark.parametrize("step", [ADAM, COSINE], ids=["adam", "cosine"])
def test_step_number_is_real(step):
    state = step.init(VALLEY)
    moved = lambda k: step(state, None, k)[0]["x"]
    slope = jax.grad(moved)(2.5)
    assert np.isfinite(slope)
    assert slope != 0
    np.testing.assert_allclose(slope, (moved(2.5 + 1e-5) - moved(2.5 - 1e-5)) / 2e-5, rtol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "heavy ball", "adam", "partitioned"])
def test_increment_is_the_step_less_the_state(name):
    step = eomdl.optimizer_step(valley_loss, OPTIMIZERS[name])
    state = step.init(VALLEY)
    difference = jax.tree.map(jnp.subtract, step(state, None, 1.5), state)
    assert_close(step.increment(state, None, 1.5), difference, rtol=1e-13)


# ---------------------------------------------------------------- refusals


def test_missing_extra_arguments_are_named():
    with pytest.raises(ValueError, match=r"extra_args: .*'value'"):
        eomdl.iterate(eomdl.optimizer_step(valley_loss, POLYAK), VALLEY, 2)
    with pytest.raises(ValueError, match=r"extra_args: .*'value'"):
        eomdl.descend(valley_loss, VALLEY, POLYAK, 2)


def test_extra_arguments_reach_the_optimizer():
    ours = eomdl.iterate(eomdl.optimizer_step(valley_loss, POLYAK, value), VALLEY, 3)
    real = eomdl.descend(valley_loss, VALLEY, POLYAK, 3, extra_args=value)
    params, state = VALLEY, POLYAK.init(VALLEY)
    for _ in range(3):
        loss, gradient = jax.value_and_grad(valley_loss)(params, None)
        updates, state = POLYAK.update(gradient, state, params, value=loss)
        params = optax.apply_updates(params, updates)
    assert_close(ours.at(3), params, rtol=1e-13)
    assert_close(real.at(3), params, rtol=1e-13)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("loss", (3, optax.sgd(0.1))),
        ("optimizer", (valley_loss, valley_loss)),
        ("extra_args", (valley_loss, optax.sgd(0.1), {"value": 1})),
    ],
)
def test_wrong_arguments_are_named(name, arguments):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        eomdl.optimizer_step(*arguments)


# ------------------------------------------------------------- maps of one's own


class Rotation(eomdl.StepMap):
    """A rotation by `angle` of the pair (params, velocity)."""

    angle: float

    def init(self, params):
        return params, jnp.zeros_like(params)

    def params(self, state):
        return state[0]

    def __call__(self, state, args, k):
        x, v = state
        c, s = np.cos(self.angle), np.sin(self.angle)
        return c * x + s * v, c * v - s * x


def halved(state, args, k):
    return jax.tree.map(lambda x: 0.5 * x + k, state)


def test_own_map_by_function():
    run = eomdl.iterate(halved, {"x": jnp.array([1.0, 2.0])}, 3)
    np.testing.assert_allclose(run.params["x"], [[1, 2], [0.5, 1], [1.25, 1.5], [2.625, 2.75]], rtol=1e-15)
    assert_identical(run.end.state, run.at(3))


def test_own_map_by_subclass():
    step = Rotation(0.3)
    run = eomdl.iterate(step, jnp.ones(2), 5)
    np.testing.assert_allclose(run.params[:, 0], np.cos(0.3 * np.arange(6)), atol=1e-15)
    np.testing.assert_allclose(run.end.state[1], np.full(2, -np.sin(1.5)), atol=1e-15)
    state = step.init(jnp.ones(2))
    assert_identical(step.increment(state, None, 0), jax.tree.map(jnp.subtract, step(state, None, 0), state))


def test_step_map_is_abstract():
    with pytest.raises(TypeError, match=r"abstract.*StepMap"):
        eomdl.StepMap()


@pytest.mark.parametrize(
    "step_map",
    [
        lambda state, args, k: (state, state),
        lambda state, args, k: jnp.concatenate([state, state]),
        lambda state, args, k: state.astype(jnp.float32),
        lambda state: state,
        "sgd",
        optax.sgd(0.1),
    ],
    ids=["structure", "shape", "dtype", "signature", "not callable", "optimizer"],
)
def test_wrong_step_maps_are_refused(step_map):
    with pytest.raises(ValueError, match=r"^step_map"):
        eomdl.iterate(step_map, jnp.ones(2), 3)


# ---------------------------------------------------------------- runs and dtypes


def test_batches_and_resume():
    optimizer = OPTIMIZERS["heavy ball"]
    step = eomdl.optimizer_step(net_loss, optimizer)
    whole = eomdl.iterate(step, NET, 12, batches=NET_BATCHES)
    assert_close(
        whole.params, eomdl.descend(net_loss, NET, optimizer, 12, batches=NET_BATCHES).params, rtol=1e-14
    )
    one_by_one = [jax.tree.map(lambda leaf, k=k: leaf[k], NET_BATCHES) for k in range(12)]
    half = eomdl.iterate(step, NET, 5, batches=one_by_one[:5])
    resumed = eomdl.iterate(step, NET, 12, batches=one_by_one, resume=half)
    assert_close(resumed.params, whole.params, rtol=1e-14)


def test_resumed_run_goes_on_counting():
    resumed = eomdl.iterate(COSINE, VALLEY, 12, resume=eomdl.iterate(COSINE, VALLEY, 5))
    assert_identical(resumed.params, eomdl.iterate(COSINE, VALLEY, 12).params)


def test_float32_stays():
    params = jax.tree.map(lambda x: x.astype(jnp.float32), VALLEY)
    for step in (ADAM, COSINE):
        run = eomdl.iterate(step, params, 3)
        leaves = jax.tree.leaves((run.params, run.end.state, step.increment(step.init(params), None, 1.0)))
        assert {x.dtype for x in leaves} == {np.dtype("float32")}
