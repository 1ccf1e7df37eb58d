"""Flows of a user's own, by the public names only: what `solve` and `compare` ask of them is in the interface."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import NET, NET_ARGS, NET_BATCHES, VALLEY, assert_close, flat, net_loss, valley_loss

import eomdl


SGD = optax.sgd(0.1)


class Held(eomdl.AbstractFlow):
    """The gradient is held from one step boundary to the next: gradient descent itself, as a flow."""

    loss: object
    step_size: jax.Array
    refreshes: bool = True

    def init(self, params, args):
        return params, jax.tree.map(jnp.zeros_like, params)

    def params(self, state):
        return state[0]

    def refresh(self, t, state, args):
        return state[0], jax.grad(self.loss)(state[0], args)

    def __call__(self, t, state, args):
        return jax.tree.map(lambda g: -g, state[1]), jax.tree.map(jnp.zeros_like, state[1])


@pytest.mark.parametrize("batches", [None, NET_BATCHES], ids=["full batch", "minibatches"])
@pytest.mark.parametrize("save_steps", [1, 5])
def test_what_is_carried_is_made_anew_at_every_step_boundary(batches, save_steps):
    options = {"args": NET_ARGS, "batches": batches, "save_steps": save_steps}
    real = eomdl.descend(net_loss, NET, SGD, 12, **options)
    path = eomdl.solve(Held(net_loss, jnp.asarray(0.1)), NET, 12, **options)
    assert_close(path.params, real.params, rtol=1e-13)
    resumed = eomdl.solve(
        Held(net_loss, jnp.asarray(0.1)),
        NET,
        12,
        **options | {"resume": eomdl.solve(Held(net_loss, jnp.asarray(0.1)), NET, 5, **_first(options, 5))},
    )
    assert_close(resumed.final_params, real.final_params, rtol=1e-13)


def _first(options, count):
    batches = options["batches"]
    return options | {"batches": None if batches is None else jax.tree.map(lambda x: x[:count], batches)}


def test_without_refresh_nothing_is_made_anew():
    path = eomdl.solve(Held(valley_loss, jnp.asarray(0.1), refreshes=False), VALLEY, 5)
    assert_close(path.final_params, VALLEY, rtol=0, atol=0.0)


class TwoSteps(eomdl.AbstractFlow):
    """The chord of two steps of a map, with the minibatch of each."""

    step_map: eomdl.StepMap
    step_size: float
    stride: int = 2

    def __call__(self, t, state, args):
        x = state
        for n in range(2):
            x = self.step_map(x, eomdl.flows.step_data(args, n), t / self.step_size + n)
        return jax.tree.map(lambda new, old: (new - old) / (2 * self.step_size), x, state)

    def step(self, t, state, args):
        return self.step_map(state, args, t / self.step_size)


class Descent(eomdl.StepMap):
    def __call__(self, state, args, k):
        return jax.tree.map(lambda x, g: x - 0.1 * g, state, jax.grad(net_loss)(state, args))


@pytest.mark.parametrize("batches", [None, NET_BATCHES], ids=["full batch", "minibatches"])
def test_a_strided_flow_needs_no_private_import(batches):
    options = {"args": NET_ARGS, "batches": batches, "rtol": 1e-10, "atol": 1e-10, "save_steps": [0, 5, 12]}
    own = eomdl.solve(TwoSteps(Descent(), 0.1), NET, 12, **options)
    ours = eomdl.solve(eomdl.InterpolatingFlow(Descent(), 0.1, points=1, stride=2), NET, 12, **options)
    assert_close(own.params, ours.params, rtol=1e-9)
    assert own.stats.stride == 2


@pytest.mark.parametrize("batches", [None, NET_BATCHES], ids=["full batch", "minibatches"])
def test_the_tolerances_of_a_strided_flow_are_those_of_its_local_error(batches):
    flow = eomdl.InterpolatingFlow(Descent(), 0.1, points=2, stride=2)
    path = eomdl.solve(flow, NET, 2, args=NET_ARGS, batches=_two(batches))
    exact = eomdl.solve(flow, NET, 2, args=NET_ARGS, batches=_two(batches), rtol=1e-12, atol=1e-14)
    truth = eomdl.iterate(Descent(), NET, 2, args=NET_ARGS, batches=_two(batches))
    error = np.linalg.norm(flat(exact.at(2)) - flat(truth.at(2)))
    assert float(path.stats.atol) == pytest.approx(5e-4 * error / np.sqrt(len(flat(NET))), rel=0.05)


def _two(batches):
    return jax.tree.map(lambda x: x[:2], batches)


class Doubtful(eomdl.AbstractFlow):
    """Gradient flow that doubts itself where a number reaches 3."""

    loss: object
    step_size: float
    doubt: float

    def __call__(self, t, state, args):
        return jax.tree.map(lambda g: -g, jax.grad(self.loss)(state, args))

    def diagnostics(self, t, state, args):
        return {"doubt": eomdl.flows.Diagnostic(self.doubt + t, limit=3.0, meaning="Believe it less.")}


def test_a_diagnostic_has_a_value_a_limit_and_a_meaning():
    real = eomdl.descend(valley_loss, VALLEY, SGD, 10)
    sure, doubtful = (eomdl.solve(Doubtful(valley_loss, 0.1, doubt), VALLEY, 10) for doubt in (1.9, 2.1))
    np.testing.assert_allclose(doubtful.stats.diagnostics["doubt"].value, [2.1, 3.1])  # start and end
    assert sure.warnings == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert eomdl.compare(real, {"flow": sure}).notes == ()
    with pytest.warns(UserWarning, match=r"^flow: doubt reached 3\.10 along the path\. Believe it less\."):
        comparison = eomdl.compare(real, {"flow": doubtful})
    assert comparison.notes == ("flow: doubt reached 3.10 along the path. Believe it less.",)


def test_diagnostics_can_be_switched_off_and_survive_the_disk(tmp_path):
    flow = Doubtful(valley_loss, 0.1, 2.1)
    assert eomdl.solve(flow, VALLEY, 10, diagnose=False).stats.diagnostics == {}
    path = eomdl.solve(flow, VALLEY, 10)
    path.save(tmp_path / "run.npz")
    assert eomdl.Trajectory.load(tmp_path / "run.npz").warnings == path.warnings != ()


def test_nan_is_not_within_a_limit():
    assert eomdl.flows.Diagnostic(jnp.array([0.1, jnp.nan]), 1.0, "").exceeded
    assert not eomdl.flows.Diagnostic(jnp.array([0.1, 0.2]), 1.0, "").exceeded
