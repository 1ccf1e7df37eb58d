"""Flows of a user's own, by the public names only: what `solve` and `compare` ask of them is in the interface."""

import warnings

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import NET, NET_ARGS, NET_BATCHES, VALLEY, assert_close, flat, net_loss, valley_loss

import eomdl


SGD = optax.sgd(0.1)


class Rotation(eomdl.AbstractFlow):
    """x' = J x about the origin, in a state that also holds the time: only what must be defined."""

    step_size: jax.Array

    def init(self, params, args):
        return params, jnp.zeros(())

    def params(self, state):
        return state[0]

    def __call__(self, t, state, args):
        (x, y), _ = state
        return jnp.stack([-y, x]), jnp.asarray(t)


def test_it_needs_a_step_size_and_a_field():
    run = eomdl.solve(Rotation(jnp.array(0.1)), jnp.array([1.0, 0.0]), 30, rtol=1e-10, atol=1e-10)
    angle = 0.1 * np.arange(31)
    np.testing.assert_allclose(run.params, np.stack([np.cos(angle), np.sin(angle)], axis=1), atol=1e-8)
    (_, half_t_squared), _ = run.end.state  # the flow sees the time that its step size implies
    np.testing.assert_allclose(half_t_squared, 3.0**2 / 2, rtol=1e-9)
    assert run.message == ""


def test_the_abstract_flow_cannot_be_made():
    with pytest.raises(TypeError, match=r"abstract.*AbstractFlow"):
        eomdl.AbstractFlow()


# ------------------------------------------------------- made anew at step boundaries


class Held(eomdl.AbstractFlow):
    """The gradient is held from one step boundary to the next: gradient descent itself, as a flow."""

    loss: object
    step_size: jax.Array

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


class Never(Held):
    refresh = None


def test_without_refresh_nothing_is_made_anew():
    path = eomdl.solve(Never(valley_loss, jnp.asarray(0.1)), VALLEY, 5)
    assert_close(path.final_params, VALLEY, rtol=0, atol=0.0)


class Frozen(eomdl.AbstractFlow):
    """x' = -f, with f = args x + t frozen at the start of every step: descent with its time, exactly."""

    step_size: jax.Array

    def init(self, params, args):
        return params, jnp.zeros_like(params)

    def params(self, state):
        return state[0]

    def refresh(self, t, state, args):
        x, _ = state
        return x, args * x + t

    def __call__(self, t, state, args):
        _, force = state
        return -force, jnp.zeros_like(force)


H, STEPS = 0.3, 12
FROZEN = Frozen(jnp.array(H))
START = jnp.array([1.0, -2.0])
RATES = 1 + jnp.sin(jnp.arange(float(STEPS)))


def frozen_path(rates):
    """x_{k+1} = x_k - h (a_k x_k + k h)."""
    rows = [np.asarray(START)]
    for k, rate in enumerate(np.asarray(rates)):
        rows.append(rows[-1] - H * (rate * rows[-1] + k * H))
    return np.stack(rows)


@pytest.mark.parametrize(
    ("data", "rates"),
    [({"batches": RATES}, RATES), ({"args": jnp.array(0.7)}, np.full(STEPS, 0.7))],
    ids=["batches", "args"],
)
def test_refresh_sees_the_time_and_the_data_of_its_step(data, rates):
    run = eomdl.solve(FROZEN, START, STEPS, **data)
    np.testing.assert_allclose(run.params, frozen_path(rates), rtol=1e-13)
    force = run.end.state.flow[1]  # as the last step began with it
    np.testing.assert_allclose(force, rates[-1] * run.at(STEPS - 1) + (STEPS - 1) * H, rtol=1e-13)
    np.testing.assert_allclose(run.ode_error, 0, atol=1e-13)
    half = eomdl.solve(FROZEN, START, 5, **data | {"batches": RATES[:5]} if "batches" in data else data)
    resumed = eomdl.solve(FROZEN, START, STEPS, resume=half, **data)
    np.testing.assert_allclose(resumed.params, run.params, rtol=1e-14)


def test_a_refreshed_run_goes_through_jit_and_grad():
    def end(start):
        run = eomdl.solve(FROZEN, start, 4, batches=RATES[:4], estimate_error=False)
        return run.final_params[0]

    x, gradient = jax.jit(jax.value_and_grad(end))(START)
    np.testing.assert_allclose(x, frozen_path(RATES[:4])[-1][0], rtol=1e-12)
    np.testing.assert_allclose(gradient, [np.prod(1 - H * np.asarray(RATES[:4])), 0], rtol=1e-12)


# -------------------------------------------------------------------------- strides


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

    @property
    def map(self):
        return self.step_map


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


def test_a_strided_flow_on_a_linear_loss_is_the_whole_path():
    # Every chord is straight, so all rows are exact: also those between, by the minibatch of each step.
    def descent(x, pull, k):
        return x - 0.1 * pull

    chord = TwoSteps(eomdl.InterpolatingFlow(descent, 0.1, 1).step_map, 0.1)
    pulls = jnp.stack([jnp.cos(jnp.arange(10.0)), jnp.sin(3 * jnp.arange(10.0))], axis=1)
    run = eomdl.solve(chord, START, 10, batches=pulls)
    exact = np.asarray(START) - 0.1 * np.concatenate([np.zeros((1, 2)), np.cumsum(pulls, axis=0)])
    np.testing.assert_allclose(run.params, exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("batches", [None, NET_BATCHES], ids=["full batch", "minibatches"])
def test_the_tolerances_of_a_strided_flow_are_those_of_its_local_error(batches):
    flow = eomdl.InterpolatingFlow(Descent(), 0.1, points=2, stride=2)
    path = eomdl.solve(flow, NET, 2, args=NET_ARGS, batches=_two(batches))
    exact = eomdl.solve(flow, NET, 2, args=NET_ARGS, batches=_two(batches), rtol=1e-12, atol=1e-14)
    truth = eomdl.iterate(Descent(), NET, 2, args=NET_ARGS, batches=_two(batches))
    error = np.linalg.norm(flat(exact.at(2)) - flat(truth.at(2)))
    assert float(path.stats.atol) == pytest.approx(5e-4 * error / np.sqrt(len(flat(NET))), rel=0.05)


def _two(batches):
    """Two batches of inputs and outputs: a tuple of two with two steps in each says which it is."""
    return None if batches is None else eomdl.runs.stacked(jax.tree.map(lambda x: x[:2], batches))


# ---------------------------------------------------------------------- diagnostics


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
    assert not any(note.is_fault for note in sure.notes)
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
    loaded = eomdl.Trajectory.load(tmp_path / "run.npz")
    assert loaded.notes == path.notes != ()
    assert [note.is_fault for note in loaded.notes] == [True]


def test_nan_is_not_within_a_limit():
    assert eomdl.flows.Diagnostic(jnp.array([0.1, jnp.nan]), 1.0, "").exceeded
    assert not eomdl.flows.Diagnostic(jnp.array([0.1, 0.2]), 1.0, "").exceeded


# ------------------------------------------------------ what a flow says of itself


class Spiral(eomdl.AbstractFlow):
    """x' = -args x, to be integrated by Euler with two steps for each of the optimizer."""

    step_size: float

    def __call__(self, t, state, args):
        return -args * state

    @property
    def recommended_solver(self):
        return diffrax.Euler(), diffrax.ConstantStepSize(), 0.5


def test_the_recommended_solver_is_taken_where_none_is_chosen():
    rate = jnp.array(0.7)
    path = eomdl.solve(Spiral(0.1), START, 10, args=rate)
    euler = np.outer((1 - 0.05 * 0.7) ** (2.0 * np.arange(11)), START)
    np.testing.assert_allclose(path.params, euler, rtol=1e-12)
    assert path.ode_error is None
    exact = np.outer(np.exp(-0.07 * np.arange(11)), START)
    for choice in ({"solver": diffrax.Tsit5(), "rtol": 1e-10, "atol": 1e-12}, {"rtol": 1e-10, "atol": 1e-12}):
        chosen = eomdl.solve(Spiral(0.1), START, 10, args=rate, **choice)
        np.testing.assert_allclose(chosen.params, exact, rtol=1e-8)
    halved = eomdl.solve(
        Spiral(0.1), START, 10, args=rate, dt0=0.25
    )  # a choice too: adaptive, by the default solver
    assert halved.ode_error is not None


class Known(eomdl.AbstractFlow):
    """Gradient flow that knows its leading error, e' = -H e + h H g / 2."""

    loss: object
    step_size: float

    @property
    def map(self):
        return eomdl.maps.GradientDescentStep(self.loss, self.step_size)

    def __call__(self, t, state, args):
        return jax.tree.map(lambda g: -g, jax.grad(self.loss)(state, args))

    def leading_error(self, t, params, error, args):
        velocity = self(t, params, args)
        half = jax.tree.map(lambda e, v: e + self.step_size / 2 * v, error, velocity)
        return velocity, jax.jvp(lambda p: self(t, p, args), (params,), (half,))[1]


def test_the_leading_error_of_an_own_flow_is_predicted():
    mine, library = (
        eomdl.errors.predict_error(flow, VALLEY, 20, check=False, diagnose=False)
        for flow in (Known(valley_loss, 0.02), eomdl.GradientFlow(valley_loss, 0.02))
    )
    assert_close(mine.vector, library.vector, rtol=1e-6)
    assert mine.norm[-1] > 0


def test_a_map_of_a_flow_s_own_state_cannot_start_at_parameters():
    flow = eomdl.flows.EdgeFlow(valley_loss, 0.1)
    with pytest.raises(ValueError, match="step_map: expected one that starts at parameters"):
        eomdl.iterate(flow.map, VALLEY, 2)
