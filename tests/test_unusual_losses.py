"""Losses that are not what the theory assumes: derivatives that JAX is told, kinks, and values that change between calls."""

import gc
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse
from helpers import assert_close, linear_loss, normal

import eomdl
from eomdl import _blocks
from eomdl._reads import _checksum, _of_jax_arrays, changed_since_first_seen
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


# ------------------------------------------------------------------------------------------- kinks


def l1_loss(w, goal):
    return jnp.sum(jnp.abs(w - goal))


def hinge_loss(w, args):
    x, label = args
    return jnp.mean(jax.nn.relu(1 - label * (x @ w)))


def test_a_flow_on_a_piecewise_linear_loss_slides_along_the_kink():
    start, goal = jnp.array([1.0, -2.0]), jnp.array([0.31, 0.2])
    run = eomdl.solve(eomdl.GradientFlow(l1_loss, ETA), start, 40, args=goal)
    start, goal = np.asarray(start), np.asarray(goal)
    left = np.maximum(
        np.abs(start - goal) - run.times[:, None], 0
    )  # each coordinate moves at the rate 1, then stays
    assert run.message == ""
    np.testing.assert_allclose(np.abs(run.params - goal), left, atol=0.1 * ETA)
    assert run.ode_error.max() < ETA
    (note,) = run.notes
    assert "slides along a kink" in note
    assert not note.is_fault


def test_a_hinge_loss_is_integrated_to_its_end():
    x, _, y = TD
    args = (x, jnp.sign(y))
    run = eomdl.solve(eomdl.GradientFlow(hinge_loss, ETA), W, 100, args=args)
    assert run.message == ""
    real = eomdl.descend(hinge_loss, W, optax.sgd(ETA), 100, args=args)
    assert eomdl.compare(real, {"flow": run}).distance["flow"][-1] < ETA


def test_an_interpolating_flow_of_a_piecewise_linear_loss_has_a_tolerance_that_can_be_met():
    step = eomdl.optimizer_step(l1_loss, optax.sgd(ETA))
    goal = jnp.array([0.31, 0.2])
    flow, start = eomdl.InterpolatingFlow(step, ETA, points=2), jnp.array([1.0, -2.0])
    run = eomdl.solve(flow, start, 8, args=goal, estimate_error=False)
    assert run.message == ""
    assert run.stats.atol == pytest.approx(1e-3 * ETA, rel=1e-6)


def lasso_loss(w, goal):
    return jnp.sum((w - goal) ** 2) / 2 + jnp.sum(jnp.abs(w)) / 2


def test_a_run_that_gets_no_further_along_a_kink_gives_the_tolerance_that_can_be_met():
    flow, goal = eomdl.EquationOfMotion(lasso_loss, ETA, 1), jnp.array([2.0, 0.1])  # the second one ends at 0
    options = {"args": goal, "estimate_error": False}
    stopped = eomdl.solve(flow, W, 60, max_steps=300, **options)
    (note,) = (note for note in stopped.notes if "comes to a kink" in note)
    atol = float(re.search(r"`atol=([0-9.e-]+)`", note)[1])
    run = eomdl.solve(flow, W, 60, atol=atol, **options)
    assert run.message == ""
    np.testing.assert_allclose(run.final_params, [1.5, 0], atol=0.1 * ETA)


def test_nothing_is_said_of_a_linear_loss():
    run = eomdl.solve(eomdl.GradientFlow(linear_loss, ETA), W, 2, args=W)
    assert run.notes == ()


# ------------------------------------------------------------- derivatives that JAX has backwards only


@jax.custom_vjp
def adjoint_sin(x):
    """As in `odeint`, the rule calls the function itself, so that no forward derivative is left."""
    return jnp.sin(x)


adjoint_sin.defvjp(lambda x: (adjoint_sin(x), x), lambda x, g: (g * jnp.cos(x),))


@jax.custom_vjp
def sin_once(x):
    """As `diffrax.diffeqsolve` by default: the derivative has a loop that cannot be reversed."""
    return jnp.sin(x)


def _slow_cos(x):
    return jax.lax.while_loop(lambda c: c[0] < 1, lambda c: (c[0] + 1, jnp.cos(x)), (0, x))[1]


sin_once.defvjp(lambda x: (sin_once(x), x), lambda x, g: (g * _slow_cos(x),))


def adjoint_loss(w, args):
    return jnp.sum(adjoint_sin(w * args) ** 2)


def plain_loss(w, args):
    return jnp.sum(jnp.sin(w * args) ** 2)


def once_loss(w, args):
    return jnp.sum(sin_once(w * args) ** 2)


def test_a_loss_with_a_reverse_rule_only_is_differentiated_backwards_twice():
    goal = jnp.array([0.7, 1.1])
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda w: jax.grad(adjoint_loss)(w, goal), (W,), (W,))
    assert_close(*(eomdl.counterterms(loss, W, 1, goal) for loss in (adjoint_loss, plain_loss)))
    found, expected = (eomdl.curvature.eigenpairs(loss, W, goal, 2) for loss in (adjoint_loss, plain_loss))
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-10)


def test_a_loss_without_a_second_derivative_names_the_way_out():
    for loss, order in ((once_loss, 1), (adjoint_loss, 2)):
        with pytest.raises(ValueError, match=r"DirectAdjoint.*custom_jvp.*InterpolatingFlow"):
            eomdl.counterterms(loss, W, order, W)


# -------------------------------------------------------------------- values that change between calls


class Penalized:
    """A loss as people write it in a class."""

    def __init__(self):
        self.strength, self.color = 0.1, "red"

    def loss(self, w, args):
        return self.strength * jnp.sum(w**2)


def test_a_loss_that_reads_another_value_than_before_is_refused():
    strength = 0.1

    def term(w):
        return strength * jnp.sum(w**2)

    def loss(w, args):
        return term(w)

    eomdl.sharpness(loss)(W, None)
    eomdl.sharpness(loss)(W, None)  # nothing has changed
    eomdl.counterterms(loss, W, 1)
    strength = 10.0
    for call in (
        lambda: eomdl.descend(loss, W, optax.sgd(ETA), 2),
        lambda: eomdl.solve(eomdl.GradientFlow(loss, ETA), W, 2),
        lambda: eomdl.iterate(eomdl.optimizer_step(loss, optax.sgd(ETA)), W, 2),
        lambda: eomdl.counterterms(eomdl.WeightDecay(loss, 0.1), W, 1),
    ):
        with pytest.raises(ValueError, match=r"strength` = 10.0 after 0.1.*args"):
            call()


def test_an_attribute_of_a_bound_method_is_read_too():
    problem = Penalized()
    eomdl.counterterms(problem.loss, W, 1)
    problem.color = "blue"  # not read
    eomdl.counterterms(problem.loss, W, 1)
    eomdl.counterterms(Penalized().loss, W, 1)  # another object
    problem.strength = 2.0
    with pytest.raises(ValueError, match=r"self.strength` = 2.0 after 0.1"):
        eomdl.counterterms(problem.loss, W, 1)


def test_a_counter_and_an_array_made_again_are_no_change():
    calls, scale = 0, jnp.array([1.0, 2.0])

    def loss(w, args):
        nonlocal calls
        calls += 1
        return jnp.sum(scale * w**2)

    eomdl.counterterms(loss, W, 1)
    calls, scale = 7, jnp.array([1.0, 2.0])
    eomdl.counterterms(loss, W, 1)
    scale = jnp.array([1.0, 3.0])
    with pytest.raises(ValueError, match="scale"):
        eomdl.counterterms(loss, W, 1)


def test_an_array_of_jax_is_read_once_and_one_of_numpy_in_every_call(monkeypatch):
    lengths, whole = [], zlib.crc32
    monkeypatch.setattr(zlib, "crc32", lambda data: lengths.append(len(data)) or whole(data))
    fixed, changing = jnp.arange(3.0), np.arange(5.0)

    def loss(w, args):
        return jnp.sum(fixed) * jnp.sum(changing) * jnp.sum(w**2)

    assert changed_since_first_seen(loss) is None
    assert changed_since_first_seen(loss) is None
    assert sorted(lengths) == [24, 40, 40]
    changing[[0, 4]] = changing[[4, 0]]  # shuffled in place
    name, _, _ = changed_since_first_seen(loss)
    assert name == "changing"
    known = len(_of_jax_arrays)
    del loss
    fixed = None
    gc.collect()
    assert len(_of_jax_arrays) < known


def test_arrays_of_every_kind_have_a_checksum():
    for array in (
        *(np.empty(shape) for shape in ((0,), (2, 0))),
        np.arange(6.0).reshape(2, 3).T,
        np.array(["a", "bc"]),
        np.array([{}, None], object),
        jnp.ones(3, jnp.bfloat16),
        jnp.array(1 + 2j),
    ):
        assert _checksum(array) == _checksum(array)
        assert "#" in _checksum(array)
    assert _checksum(np.array([1.0, 2.0])) != _checksum(np.array([2.0, 1.0]))
    assert _checksum(jnp.array(3)) == 3.0


# ------------------------------------------------------------------------------- data as people have them


def test_a_list_of_batches_is_one_batch_after_the_other():
    x, _, y = TD
    batches = [(x[:3], y[:3]), (x[3:6], y[3:6])]
    whole = (jnp.stack([x[:3], x[3:6]]), jnp.stack([y[:3], y[3:6]]))

    def loss(w, args):
        return jnp.mean((args[0] @ w - args[1]) ** 2)

    found, expected = (eomdl.curvature.eigenvalues_over_batches(loss, W, b).values for b in (batches, whole))
    assert found.shape == (2, 1)
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="drop_last"):
        eomdl.curvature.eigenvalues_over_batches(loss, W, [batches[0], (x[:2], y[:2])])
    with pytest.raises(ValueError, match="drop_last"):
        eomdl.descend(loss, W, optax.sgd(ETA), 2, batches=[batches[0], (x[:2], y[:2])])
    run = eomdl.descend(loss, W, optax.sgd(ETA), 2, batches=batches)
    errors = [
        eomdl.errors.local_error(eomdl.GradientFlow(loss, ETA), run, batches=b)[1] for b in (batches, whole)
    ]
    np.testing.assert_array_equal(*errors)


def test_a_matrix_of_another_package_names_what_to_make_of_it():
    matrix = scipy.sparse.csr_matrix(np.eye(2))
    with pytest.raises(ValueError, match=r"args\['x'\].*csr_matrix.*from_scipy_sparse"):
        eomdl.descend(lambda w, args: jnp.sum(args["x"] @ w), W, optax.sgd(ETA), 2, args={"x": matrix})


def test_leaves_whose_names_would_be_the_same_are_all_there():
    params = {"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)}

    def loss(p, args):
        return jnp.sum(p["a"]["b"] ** 2) + 2 * jnp.sum(p["a.b"] ** 2)

    found = eomdl.curvature.eigenpairs_by_block(loss, params, None)
    values = {name: float(pairs.values[0]) for name, pairs in found.items()}
    assert values == pytest.approx({"['a']['b']": 2.0, "['a.b']": 4.0})
    assert _blocks.select(params, "a") is params["a"]["b"]
    with pytest.raises(ValueError, match="nearest"):
        _blocks.select(params, "c")


def test_a_trace_under_jit_is_the_same_number():
    def loss(w, args):
        return jnp.sum(args * jnp.cosh(w))

    goal = jnp.array([1.0, 2.0])
    outside = eomdl.curvature.trace(loss, W, goal, num_samples=4)
    inside = jax.jit(
        lambda w: jnp.stack([(e := eomdl.curvature.trace(loss, w, goal, 4)).value, e.standard_error])
    )(W)
    np.testing.assert_allclose(inside, [outside.value, outside.standard_error], rtol=1e-12, atol=1e-14)
