"""Losses that are not what the theory assumes: derivatives that JAX is told, kinks, and values that change between calls."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import normal

import eomdl
from eomdl.runs.tolerances import MAX_MISMATCH, derivative_mismatch


ETA = 0.1
W = jnp.array([0.5, -0.3])


# ------------------------------------------------------ derivatives that are not those of the gradient


def td_loss(w, args):
    """TD(0) with linear values: the gradient of the squared error, the target held."""
    x, following, reward = args
    target = reward + 0.9 * jax.lax.stop_gradient(following @ w)
    return jnp.mean((target - x @ w) ** 2) / 2


TD = (normal(0, 9, 2), normal(0, 9, 2) @ jnp.array([[0.3, 0.8], [-0.9, 0.5]]), normal(2, 9))


def straight_through_loss(w, args):
    """A quantized network: the derivative of rounding is told to be 1."""
    q = w + jax.lax.stop_gradient(jnp.round(4 * w) / 4 - w)
    return td_loss(q, args)


@jax.custom_jvp
def flattened(x):
    return jnp.tanh(x)


@flattened.defjvp
def _(primals, tangents):  # right, but not to be differentiated again
    (x,), (v,) = primals, tangents
    return jnp.tanh(x), v * jax.lax.stop_gradient(1 - jnp.tanh(x) ** 2)


def wrong_rule_loss(w, args):
    x, _, y = args
    return jnp.mean((flattened(x @ w) - y) ** 2) / 2


def smooth_loss(w, args):
    x, _, y = args
    return jnp.mean((jnp.tanh(x @ w) - y) ** 2) / 2


def mismatch(flow, dtype=float) -> float:
    w, args = jax.tree.map(lambda x: x.astype(dtype), (W, TD))
    return float(derivative_mismatch(flow.differentiated(w), args))


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_a_stopped_gradient_is_measured(dtype):
    x, following, _ = (np.asarray(part) for part in TD)
    taken, true = x.T @ x / 9, x.T @ (x - 0.9 * following) / 9  # the derivatives of the semi-gradient
    u = np.asarray(jax.grad(td_loss)(W, TD))
    expected = np.linalg.norm((true - taken) @ u) / max(np.linalg.norm(true @ u), np.linalg.norm(taken @ u))
    assert expected > 0.1
    found = mismatch(eomdl.EquationOfMotion(td_loss, ETA), dtype)
    assert found == pytest.approx(expected, rel=1e-6 if dtype == jnp.float64 else 1e-2)


@pytest.mark.parametrize("loss", [straight_through_loss, wrong_rule_loss])
def test_a_rule_that_is_wrong_is_found(loss):
    assert mismatch(eomdl.EquationOfMotion(loss, ETA)) > 2 * MAX_MISMATCH


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_nothing_is_found_in_a_smooth_loss(dtype):
    assert mismatch(eomdl.EquationOfMotion(smooth_loss, ETA), dtype) == 0


def test_every_flow_says_what_it_differentiates():
    def semi_gradient(w, args):
        return -jax.grad(td_loss)(w, args)

    expected = mismatch(eomdl.EquationOfMotion(td_loss, ETA))
    assert mismatch(eomdl.flows.MomentumFlow(td_loss, ETA)) == expected
    assert mismatch(eomdl.flows.ModifiedFlow(semi_gradient, ETA)) == pytest.approx(expected)
    step = eomdl.optimizer_step(td_loss, optax.sgd(ETA))
    for flow in (eomdl.GradientFlow(td_loss, ETA), eomdl.InterpolatingFlow(step, ETA, points=2)):
        assert flow.differentiated(W) is None


def test_a_run_says_so_and_names_the_flow_that_is_right():
    run = eomdl.solve(eomdl.EquationOfMotion(td_loss, ETA), W, 2, args=TD, estimate_error=False)
    (note,) = run.notes
    assert note.is_fault
    assert "stop_gradient" in note
    assert "InterpolatingFlow" in note
