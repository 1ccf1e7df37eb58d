"""The ODE error is estimated from above, and small against the model's: full batch, minibatches, short runs, strides."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import normal

import eomdl


PARAMS = {"w": 0.4 * normal(1, 8, 16), "v": 0.3 * normal(2, 16, 3)}
INPUTS = normal(3, 64, 8)
DATA = (INPUTS, jnp.sin(0.3 * INPUTS @ jnp.ones((8, 3))))
BATCHES = jax.tree.map(lambda x: x[np.random.default_rng(0).integers(0, 64, (24, 16))], DATA)
ADAM = optax.adam(1e-2)


def loss(params, args):
    inputs, targets = args
    return jnp.mean((jnp.tanh(inputs @ params["w"]) @ params["v"] - targets) ** 2)


def quartic_loss(params, args):
    return jnp.sum(jnp.array([6.0, 1.0]) * params**2 + params**4)


def interpolating(optimizer, rate, stride):
    return eomdl.InterpolatingFlow(eomdl.optimizer_step(loss, optimizer), rate, 2, stride)


@functools.cache
def after_adam():
    return eomdl.descend(loss, PARAMS, ADAM, 20, args=DATA)


CASES = {
    "full batch": (lambda: eomdl.EquationOfMotion(loss, 0.5, 1), 24, {"args": DATA}),
    "minibatches, gradient flow": (lambda: eomdl.GradientFlow(loss, 0.1), 24, {"batches": BATCHES}),
    "minibatches, order 1": (lambda: eomdl.EquationOfMotion(loss, 0.1, 1), 24, {"batches": BATCHES}),
    "minibatches, large rate": (lambda: eomdl.EquationOfMotion(loss, 0.5, 1), 24, {"batches": BATCHES}),
    "one step": (lambda: eomdl.EquationOfMotion(loss, 0.5, 1), 1, {"args": DATA}),
    "one step after a real run": (
        lambda: interpolating(ADAM, 1e-2, 1),
        21,
        {"args": DATA, "resume": after_adam},
    ),
    "stride 2, minibatches": (lambda: interpolating(optax.sgd(0.5), 0.5, 2), 24, {"batches": BATCHES}),
}


def norms(tree):
    return np.sqrt(sum(np.sum(np.reshape(x, (len(x), -1)) ** 2, axis=1) for x in jax.tree.leaves(tree)))


def distances(a, b):
    return norms(jax.tree.map(np.subtract, a.params, b.params))


@pytest.mark.parametrize("name", CASES)
def test_the_estimate_is_from_above(name):
    make, num_steps, options = CASES[name]
    options = {key: value() if callable(value) else value for key, value in options.items()}
    path = eomdl.solve(make(), PARAMS, num_steps, diagnose=False, **options)
    exact = eomdl.solve(
        make(), PARAMS, num_steps, rtol=1e-13, atol=1e-15, estimate_error=False, diagnose=False, **options
    )
    error = distances(path, exact)
    assert np.all(error <= path.ode_error + 1e-13)
    assert error.max() > 0
    assert path.ode_error.max() < 200 * error.max()  # and no empty promise


@pytest.mark.parametrize("product", [1.0, 3.0, 5.0])
def test_gradient_flow_where_gradient_descent_diverges(product):
    """The model's error has no size there: the ODE error is held against the way."""
    eigenvalues = product * jnp.geomspace(1e-3, 1.0, 20)
    path = eomdl.solve(
        eomdl.GradientFlow(lambda p, a: 0.5 * jnp.sum(a * p**2), 1.0), jnp.ones(20), 60, args=eigenvalues
    )
    exact = np.exp(-np.arange(61)[:, None] * np.asarray(eigenvalues))
    error, way = (np.linalg.norm(path.params - x, axis=1) for x in (exact, np.ones(20)))
    assert np.all(error[1:] < 0.01 * way[1:])


def test_given_first_steps_are_kept_by_a_constant_controller():
    import diffrax

    flow = eomdl.GradientFlow(quartic_loss, 0.01)
    runs = [
        eomdl.solve(flow, jnp.ones(2), 4, dt0=dt0, stepsize_controller=diffrax.ConstantStepSize())
        for dt0 in (1.0, 0.25)
    ]
    assert [int(run.stats.num_steps) for run in runs] == [4, 16]
