"""Fingerprints: one for each model, the same in another process and another Python, and what runs do with them."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import fingerprint_runs
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fingerprint_runs import INDEXED, data, models, parameters
from helpers import VALLEY, valley_loss

import eomdl
from eomdl import _fingerprint
from eomdl._fingerprint import fingerprint
from eomdl.runs.tolerances import DERIVATIVE_TEST


TESTS = Path(__file__).parent
TIMEOUT = 240  # seconds, on a machine with much else to do
NEEDED = ("jax", "diffrax", "equinox", "optax", "jaxtyping", "scipy", "filelock", "rich", "tqdm")


def of_loss(loss, params=VALLEY, args=None):
    return fingerprint(eomdl.GradientFlow(loss, 0.1), params, args)


# ------------------------------------------------------- what counts, and what does not


def test_models_that_differ_in_loss_order_rate_or_optimizer_have_different_fingerprints():
    found = {name: fingerprint(model, parameters(), data()) for name, model in models().items()}
    assert len(set(found.values())) == len(found)
    again = {name: fingerprint(model, parameters(), data()) for name, model in models().items()}
    assert again == found
    assert found["order 2"].startswith("EquationOfMotion#")


def scaled(c):
    return lambda params, args: c * valley_loss(params, args)


def test_numbers_and_arrays_that_a_function_closes_over_count():
    constants = [2.0, 3.0, jnp.array(3.0, jnp.float32), np.float64(4.0), jax.random.key(0), jax.random.key(1)]
    constants += [{"a": 1.0}, {"a": 2.0}, {"b": 1.0}, [1.0, {"a": 1.0}], [1.0, {"a": 2.0}]]
    constants += [jax.tree_util.Partial(valley_loss, c) for c in (1.0, 2.0)]
    assert len({of_loss(scaled(c)) for c in constants}) == len(constants)
    for c in constants:
        assert of_loss(scaled(c)) == of_loss(scaled(c))
    arrays = [np.arange(1000.0), np.arange(1000.0) + (np.arange(1000) == 999)]
    assert len({of_loss(lambda p, a, x=x: valley_loss(p, a) * x.sum()) for x in arrays}) == 2
    assert of_loss(scaled(2)) == of_loss(scaled(jnp.array(2.0)))  # the same program


def test_how_a_function_is_written_does_not_count():
    def plain(params, args):
        unused = jnp.exp(args)
        del unused
        return jnp.sum(params * args) + jnp.sum(params**2)

    def other(theta, batch):
        square = jnp.sum(theta**2)
        return jnp.sum(theta * batch) + square

    same = [plain, other, jax.jit(other), jax.checkpoint(other), eqx.filter_jit(plain)]
    same += [lambda p, a: jnp.sum(p * a) + jnp.sum(p**2), jax.tree_util.Partial(other)]
    x = jnp.ones(3)
    assert len({of_loss(loss, x, x) for loss in same}) == 1
    assert of_loss(lambda p, a: jnp.sum(p * a) - jnp.sum(p**2), x, x) != of_loss(plain, x, x)
    assert of_loss(lambda p, a: jnp.sum(p * p) + jnp.sum(a**2), x, x) != of_loss(plain, x, x)


def test_two_rules_for_a_derivative_are_two_losses():
    def rounded(slope):
        @jax.custom_jvp
        def f(x):
            return jnp.round(x)

        f.defjvp(lambda x, dx: (jnp.round(x[0]), slope * dx[0]))
        return lambda params, args: jnp.sum(f(params) ** 2)

    def clipped(bound):
        @jax.custom_vjp
        def f(x, n):
            return x

        f.defvjp(lambda x, n: (x, None), lambda _, g: (jnp.clip(g, -bound, bound), None))
        return lambda params, args: jnp.sum(f(params, 1) ** 2)

    x = jnp.ones(3)
    losses = [rounded(1.0), rounded(2.0), clipped(1.0), clipped(2.0), lambda p, a: jnp.sum(jnp.round(p) ** 2)]
    assert len({of_loss(loss, x) for loss in losses}) == 5
    assert of_loss(rounded(1.0), x) == of_loss(rounded(1.0), x)
    assert of_loss(clipped(1.0), x) == of_loss(clipped(1.0), x)

    @jax.custom_jvp
    def without_a_rule(x):
        return jnp.round(x)

    assert of_loss(lambda p, a: jnp.sum(without_a_rule(p)), x).startswith("GradientFlow#")


def loops(count, unroll=1):
    def loss(params, args):
        end, ys = jax.lax.scan(lambda c, y: (jnp.sin(c + y), c * y), params, None, count, unroll=unroll)
        return jnp.sum(end) + jnp.sum(ys)

    return loss


def test_programs_within_programs_count():
    x = jnp.ones(3)

    def branches(*functions):
        return lambda p, a: jax.lax.switch(1, functions, p).sum()

    def steps(bound):
        return lambda p, a: jax.lax.while_loop(
            lambda c: c[0] < bound, lambda c: (c[0] + 1, 2 * c[1]), (0, p)
        )[1].sum()

    losses = [branches(jnp.sin, jnp.cos), branches(jnp.cos, jnp.sin), branches(jnp.sin, jnp.tanh), steps(2)]
    losses += [
        steps(3),
        lambda p, a: p.reshape(3, 1).sum(0).sum(),
        lambda p, a: p[::-1][0],
        lambda p, a: p[1],
    ]
    assert len({of_loss(loss, x) for loss in losses}) == len(losses)


class Power(eqx.Module):
    exponent: int = eqx.field(static=True)
    scale: jax.Array
    shift: Callable = eqx.field(static=True, default=lambda x: x)

    def __call__(self, params, args):
        return self.scale * jnp.sum(self.shift(params) ** self.exponent)


class Descent(eomdl.AbstractFlow):
    loss: Callable
    step_size: jax.Array

    def __call__(self, t, state, args):
        return jax.tree.map(lambda g: -g, jax.grad(self.loss)(state, args))


def test_modules_of_users_count_by_their_numbers_and_functions():
    x, one = jnp.ones(3), jnp.array(1.0)
    losses = [Power(2, one), Power(3, one), Power(2, 2 * one), Power(2, one, jnp.sin)]
    assert len({of_loss(loss, x) for loss in losses}) == 4
    assert of_loss(Power(2, one), x) == of_loss(lambda p, a: one * jnp.sum(p**2), x)
    flows = [Descent(Power(2, one), one), Descent(Power(3, one), one), Descent(Power(2, one), 2 * one)]
    assert len({fingerprint(flow, x, None) for flow in flows}) == 3


def test_data_are_no_part_of_the_fingerprint_but_their_shape_is():
    def loss(params, args):
        return args["scale"] * jnp.sum(params * args["x"])

    def found(scale, x):
        return of_loss(loss, jnp.ones(2), {"scale": scale, "x": x, "name": "data"})

    assert found(0.3, np.ones(2)) == found(0.4, np.zeros(2))
    assert found(0.3, np.ones(1)) != found(0.3, np.ones(2))


def test_a_function_that_does_not_trace_counts_by_what_is_in_it():
    def untraceable(power):
        return lambda params, args: valley_loss(params, args) ** power if args["missing"] else 0.0

    found = {of_loss(untraceable(2)), of_loss(untraceable(3)), of_loss(lambda p, a: a["missing"] + 2)}
    found |= {of_loss(lambda p, a: a["missing"] + 3), of_loss(lambda p, a: a["missing"].max() + 3)}
    assert len(found) == 5
    assert of_loss(untraceable(2)) == of_loss(untraceable(2))

    def before_it_is_defined():
        early = of_loss(lambda params, args: later(params, args))
        later = valley_loss
        return early, of_loss(lambda params, args: later(params, args))

    early, late = before_it_is_defined()
    assert early != late
    assert late == of_loss(valley_loss)


@pytest.mark.parametrize(
    "make",
    [optax.polyak_sgd, optax.lbfgs, lambda x: optax.inject_hyperparams(optax.adam)(x), optax.sgd, optax.lion],
)
def test_optimizers_are_told_apart_by_their_numbers_even_where_they_need_more_than_a_gradient(make):
    a, b, c = (fingerprint(eomdl.optimizer_step(valley_loss, make(x)), VALLEY, None) for x in (0.1, 0.1, 0.2))
    assert a == b
    assert a != c


def test_the_derivatives_of_a_flow_are_not_traced():
    calls = []

    def loss(params, args):
        calls.append(None)
        return valley_loss(params, args)

    fingerprint(eomdl.EquationOfMotion(loss, 0.1, 4), VALLEY, None)
    assert len(calls) == 1
    fingerprint(eomdl.EquationOfMotion(loss, 0.1, 3), VALLEY, None)  # JAX has the trace
    assert len(calls) == 1


def test_checksums_are_numbers_of_31_bits():
    found = {_fingerprint.checksum(*parts) for parts in ([b"ab"], [b"a", b"b"], [b"", b"ab"], [])}
    assert len(found) == 4
    assert all(0 < number < 2**31 for number in found)


# ------------------------------------------------ another process, another Python


def other_python():
    """A Python of another version with all that eomdl needs: in `EOMDL_OTHER_PYTHON`, or an environment beside this one."""
    check = f"import sys, importlib.util as u; print(sys.version_info[:2], all(map(u.find_spec, {NEEDED})))"
    given = os.environ.get("EOMDL_OTHER_PYTHON")
    beside = sorted(Path(sys.prefix).parent.glob("*/bin/python"))
    for python in [given] if given else beside:
        done = subprocess.run([python, "-c", check], capture_output=True, text=True, check=False)
        if done.stdout.endswith("True\n") and not done.stdout.startswith(f"{sys.version_info[:2]}"):
            return str(python)
    return None


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """What `fingerprint_runs.py` gives in a second process, and in one of another Python (None if there is none)."""
    environment = os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)  # the other version of jaxlib may not know them
    folder = tmp_path_factory.mktemp("fingerprints")
    pythons = {"same": sys.executable, "other": other_python()}
    processes = {
        name: subprocess.Popen(
            [python, TESTS / "fingerprint_runs.py", folder / name],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, python in pythons.items()
        if python is not None
    }
    found = {}
    for name, process in processes.items():
        output, errors = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0, errors
        found[name] = json.loads(output) | {"folder": folder / name}
    return found


@pytest.mark.parametrize("python", ["same", "other"])
def test_fingerprints_are_the_same_in_another_process_and_another_python(elsewhere, python):
    if python not in elsewhere:
        pytest.skip("no other version of Python with eomdl's dependencies")
    here = {name: fingerprint(model, parameters(), data()) for name, model in models().items()}
    there = elsewhere[python]["fingerprints"]
    indexed = here.pop(INDEXED), there.pop(INDEXED)
    assert there == here
    versions = [jax.__version__, elsewhere[python]["jax"]]
    old = [version.startswith("0.9.") for version in versions]
    assert (indexed[0] == indexed[1]) == (old[0] == old[1]), versions


@pytest.mark.parametrize("python", ["same", "other"])
def test_a_run_that_another_python_wrote_keeps_tolerances_and_diagnostics(elsewhere, python):
    if python not in elsewhere:
        pytest.skip("no other version of Python with eomdl's dependencies")
    written = elsewhere[python]
    store = eomdl.Checkpoints(written["folder"])
    before = store.at(4).stats.diagnostics
    run = fingerprint_runs.solve(written["folder"], 8, resume=store.latest)
    assert float(run.stats.atol) == written["atol"]
    assert run.stats.flow == written["flow"]
    assert store.steps.tolist() == [4, 8]
    assert before
    for name, diagnostic in before.items():
        n = len(diagnostic.value)
        assert len(run.stats.diagnostics[name].value) == n + (
            name != DERIVATIVE_TEST
        )  # measured at the start only
        np.testing.assert_array_equal(run.stats.diagnostics[name].value[:n], diagnostic.value)


def test_a_run_with_a_fingerprint_of_before_goes_on_and_measures_again(tmp_path):
    old = "EquationOfMotion(loss=fingerprint_runs.valley#0123456789ab(None), step_size=0.1, order=1)"
    run = fingerprint_runs.solve(tmp_path, 4)
    end = eomdl.Checkpoints(tmp_path).latest
    end = dataclasses.replace(end, stats=dataclasses.replace(end.stats, flow=old, atol=jnp.array(1e-3)))
    longer = fingerprint_runs.solve(tmp_path, 8, resume=end)
    assert longer.stats.flow == run.stats.flow
    assert float(longer.stats.atol) < 1e-5
    for name, diagnostic in run.stats.diagnostics.items():
        assert len(diagnostic.value) == (1 if name == DERIVATIVE_TEST else 2)
        assert len(longer.stats.diagnostics[name].value) == 1  # at the new end
