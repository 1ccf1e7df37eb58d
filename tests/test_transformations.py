"""jit, vmap and grad go through, and a second learning rate compiles nothing."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import COMPILED, VALLEY, assert_close, assert_identical, counted, valley_loss
from registry import up_to

import eomdl


TIGHT = {"rtol": 1e-10, "atol": 1e-10}
SGD = optax.sgd(0.1)


def end(eta, params=VALLEY, order=1, num_steps=5):
    return eomdl.solve(eomdl.EquationOfMotion(valley_loss, eta, order), params, num_steps, **TIGHT)


@pytest.mark.parametrize("flow", up_to(2), ids=lambda f: f.name)
def test_second_learning_rate_compiles_nothing(flow):
    loss, calls = counted(valley_loss)

    def run(eta):
        trajectory = eomdl.solve(flow.make(loss, eta), VALLEY, 5, observe={"loss": loss})
        return trajectory.params["x"][-1]

    first = run(0.1)
    run(0.2)  # small eager operations compile once for ever; the loss is looked at eagerly a few times
    compiled, looked = len(COMPILED), len(calls)
    third = run(0.3)
    assert len(COMPILED) == compiled
    once = len(calls) - looked
    run(0.05)
    assert len(COMPILED) == compiled
    assert len(calls) - looked == 2 * once  # the same few eager looks, no new trace
    assert first != third


def test_second_weight_decay_compiles_nothing():
    def run(decay, eta):
        loss = eomdl.WeightDecay(valley_loss, decay)
        flow = eomdl.solve(eomdl.EquationOfMotion(loss, eta), VALLEY, 5).params["x"][-1]
        return flow, eomdl.descend(loss, VALLEY, SGD, 5).params["x"][-1]

    first = run(0.1, 0.1)
    run(0.3, 0.2)
    compiled = len(COMPILED)
    second = run(0.2, 0.05)
    assert len(COMPILED) == compiled
    assert first[0] != second[0]
    assert first[1] != second[1]


def test_second_data_set_and_start_compile_nothing():
    def loss(params, args):
        return valley_loss(params, None) + 0.5 * (params["x"] - args) ** 2

    def run(x, args):
        params = VALLEY | {"x": jnp.array(x)}
        flow = eomdl.EquationOfMotion(loss, 0.1)
        return eomdl.solve(flow, params, 5, args=args), eomdl.descend(loss, params, SGD, 5, args=args)

    run(0.1, jnp.array(0.5))
    run(0.2, jnp.array(0.6))
    compiled = len(COMPILED)
    run(0.3, jnp.array(0.7))
    assert len(COMPILED) == compiled


def test_same_run_twice_compiles_nothing():
    end(0.1)
    compiled = len(COMPILED)
    end(0.1)
    assert len(COMPILED) == compiled


def test_jit_is_traced_once_for_all_learning_rates():
    traces = []

    @jax.jit
    def final(eta):
        traces.append(1)
        return end(eta).end.state.flow

    for eta in (0.1, 0.2, 0.3):
        assert_close(final(eta), end(eta).end.state.flow, rtol=1e-7)
    assert len(traces) == 1


def test_whole_trajectory_comes_out_of_jit():
    run = jax.jit(lambda eta: end(eta))(0.1)
    eager = end(0.1)
    assert_close(run.params, eager.params, rtol=1e-8)
    np.testing.assert_array_equal(run.steps, eager.steps)
    np.testing.assert_allclose(run.times, eager.times)
    assert run.message == ""
    assert run.result == eomdl.RESULTS.successful


def test_a_flow_goes_into_jit_as_an_argument():
    traces = []

    @eqx.filter_jit
    def field(flow):
        traces.append(1)
        return flow(0.0, VALLEY, None)

    for eta in (0.1, 0.2):
        flow = eomdl.EquationOfMotion(valley_loss, eta, 2)
        assert_close(field(flow), flow(0.0, VALLEY, None), rtol=1e-13)
    assert len(traces) == 1


def test_vmap_over_initial_points():
    starts = {"x": jnp.array([0.3, 1.2]), "y": jnp.array([0.5, -0.7])}
    runs = jax.vmap(lambda params: end(0.1, params))(starts)
    for i in range(2):
        start = jax.tree.map(lambda leaf, i=i: leaf[i], starts)
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], runs.params), end(0.1, start).params, rtol=1e-8)


def test_vmap_of_descend():
    starts = {"x": jnp.array([0.3, 1.2]), "y": jnp.array([0.5, -0.7])}
    runs = jax.vmap(lambda params: eomdl.descend(valley_loss, params, SGD, 5))(starts)
    assert runs.message == ""
    for i in range(2):
        start = jax.tree.map(lambda leaf, i=i: leaf[i], starts)
        assert_close(
            jax.tree.map(lambda leaf, i=i: leaf[i], runs.params),
            eomdl.descend(valley_loss, start, SGD, 5).params,
            rtol=1e-14,
        )


def test_gradient_with_respect_to_the_initial_point():
    def x_at_the_end(params):
        return end(0.1, params).end.state[0]["x"]

    gradient = jax.grad(x_at_the_end)(VALLEY)
    h = 1e-4
    for name in VALLEY:
        up, down = (VALLEY | {name: VALLEY[name] + s * h} for s in (1, -1))
        by_difference = (x_at_the_end(up) - x_at_the_end(down)) / (2 * h)
        np.testing.assert_allclose(gradient[name], by_difference, rtol=1e-5)


def test_gradient_of_path_and_observables_with_respect_to_the_learning_rate():
    def area(eta):
        flow = eomdl.EquationOfMotion(valley_loss, eta)
        run = eomdl.solve(flow, VALLEY, 5, observe={"loss": valley_loss}, **TIGHT)
        return jnp.sum(run.observables["loss"]) + jnp.sum(run.params["y"]) + run.end.state[0]["x"]

    h = 1e-4
    by_difference = (area(0.1 + h) - area(0.1 - h)) / (2 * h)
    np.testing.assert_allclose(jax.grad(area)(0.1), by_difference, rtol=1e-5)


def test_gradient_through_descend():
    def x_at_the_end(params):
        return eomdl.descend(valley_loss, params, SGD, 5).end.state[0]["x"]

    def by_hand(params):
        for _ in range(5):
            gradient = jax.grad(valley_loss)(params, None)
            params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
        return params["x"]

    assert_close(jax.grad(x_at_the_end)(VALLEY), jax.grad(by_hand)(VALLEY), rtol=1e-12)


def test_gradient_through_minibatches():
    def loss(params, args):
        return valley_loss(params, None) + 0.5 * (params["x"] - args) ** 2

    def x_at_the_end(eta):
        flow = eomdl.EquationOfMotion(loss, eta)
        return eomdl.solve(flow, VALLEY, 4, batches=jnp.arange(4.0), **TIGHT).end.state[0]["x"]

    h = 1e-4
    by_difference = (x_at_the_end(0.1 + h) - x_at_the_end(0.1 - h)) / (2 * h)
    np.testing.assert_allclose(jax.grad(x_at_the_end)(0.1), by_difference, rtol=1e-5)


def test_counterterms_under_jit_and_vmap():
    points = {"x": jnp.array([0.3, 1.2]), "y": jnp.array([0.5, -0.7])}
    xi = jax.jit(jax.vmap(lambda p: eomdl.counterterms(valley_loss, p, 2)))(points)
    for i in range(2):
        point = jax.tree.map(lambda leaf, i=i: leaf[i], points)
        one = eomdl.counterterms(valley_loss, point, 2)
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], xi), one, rtol=1e-12)


def test_a_failure_inside_jit_is_told_in_the_result():
    def cubic(y, args):
        return -(y**4) / 4  # blows up

    run = jax.jit(
        lambda y: eomdl.solve(eomdl.GradientFlow(cubic, 0.1), y, 20, max_steps=200, **TIGHT).result
    )(jnp.array(1.0))
    assert run != eomdl.RESULTS.successful
    diverged = jax.jit(lambda y: eomdl.descend(cubic, y, optax.sgd(1.0), 20).result)(jnp.array(2.0))
    assert diverged == eomdl.RESULTS.nonfinite


def test_runs_are_deterministic():
    assert_identical(end(0.1).params, end(0.1).params)
