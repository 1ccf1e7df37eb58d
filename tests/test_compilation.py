"""What is compiled, counted: a first run compiles each of its programs once, a second of its kind nothing."""

import os
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import NET_ARGS, net_loss, net_params, normal

import eomdl


@pytest.fixture
def programs():
    """Names of the programs that XLA compiles, in order."""
    names = []

    def record(event, duration, fun_name="", **rest):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name.removeprefix("jit(").removesuffix(")"))

    jax.monitoring.register_event_duration_secs_listener(record)
    # What the disk has would not be compiled.
    cache = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield names
    jax.config.update("jax_enable_compilation_cache", cache)
    jax.monitoring.unregister_event_duration_listener(record)


# A net of its own, so that no other test has compiled anything for it.
NET = net_params(3, sizes=(3, 5, 2))
SGD = optax.sgd(0.1)
LARGE = {"integrate_at_once", "evaluate_records", "diagnostics_at", "_map_params", "_iterate"}


def solved(rate=0.1, num_steps=20, args=NET_ARGS, order=1, **options):
    return eomdl.solve(eomdl.EquationOfMotion(net_loss, rate, order), NET, num_steps, args=args, **options)


def large(names):
    return sorted(name for name in names if name in LARGE)


def test_a_first_solve_compiles_each_program_once(programs):
    jax.clear_caches()
    solved()
    assert large(programs) == ["_map_params", "diagnostics_at", "evaluate_records", "integrate_at_once"]
    # Beside them the loss, two distances and what JAX makes of numbers.
    assert len(programs) <= 24, programs


def test_a_second_flow_of_a_kind_compiles_nothing(programs):
    solved(), solved(np.float64(0.2), 33), solved(np.float32(0.2))  # small conversions compile once for ever
    solved(2), solved(jnp.asarray(0.1, jnp.float32))
    rates = (0.05, np.float64(0.07), jnp.asarray(0.03), np.float32(0.06), jnp.asarray(0.04, jnp.float32), 1)
    other_data = (normal(8, 6, 3), normal(9, 6, 2))
    programs.clear()
    for rate in rates:
        solved(rate)
    for num_steps in (20, 33, 300, 700):
        solved(num_steps=num_steps)
    for last in (7, 19, 300):
        solved(num_steps=last, save_steps=np.arange(0, last + 1))
    solved(args=other_data)
    assert programs == []


def test_the_last_step_only_compiles_nothing_for_another_number_of_steps(programs):
    solved(num_steps=30, save_steps=[30])
    programs.clear()
    for last in (40, 200, 900):
        solved(num_steps=last, save_steps=[last])
    assert programs == []


def test_a_second_descent_compiles_nothing(programs):
    jax.clear_caches()
    options = {"args": NET_ARGS, "observe": {"loss": net_loss}}
    eomdl.descend(net_loss, NET, SGD, 20, **options)
    assert large(programs) == ["_iterate", "evaluate_records"]
    programs.clear()
    for num_steps in (33, 300, 700, 1500):
        eomdl.descend(net_loss, NET, SGD, num_steps, **options)
    assert programs == []


def test_an_observable_made_anew_shares_its_program(programs):
    def made():
        return {
            "sharpness": eomdl.sharpness(net_loss, 4),
            "norm": eomdl.observe.block_norm("layer0.w"),
            "shift": eomdl.observe.shift_component("layer1.w"),
            "velocity": eomdl.observe.lie_derivative(net_loss, eomdl.GradientFlow(net_loss, 0.1)),
            "curvature": eomdl.geometry.flow_curvature(eomdl.GradientFlow(net_loss, 0.1)),
            "torsion": eomdl.geometry.flow_torsion(eomdl.GradientFlow(net_loss, 0.1)),
            "batch": eomdl.on_batch(net_loss),
        }

    eomdl.descend(net_loss, NET, SGD, 10, args=NET_ARGS, observe=made())
    programs.clear()
    eomdl.descend(net_loss, NET, SGD, 10, args=NET_ARGS, observe=made())
    assert programs == []


def test_the_integrator_calls_nothing_on_the_host(monkeypatch):
    from eomdl.runs import integrator

    lowered = []

    def spy(*arguments):
        lowered.append(eqx.filter_jit(integrate.__wrapped__).lower(*arguments).as_text())
        return integrate(*arguments)

    integrate = integrator.integrate_at_once
    monkeypatch.setattr(integrator, "integrate_at_once", spy)
    solved(num_steps=2, estimate_error=False, diagnose=False, rtol=1e-6, atol=1e-6)
    assert lowered
    assert all("stablehlo.while" in text for text in lowered)
    assert not any("callback" in text for text in lowered)


def test_a_check_in_the_loss_that_fails_ends_the_run_with_a_word():
    def checked(params, args):
        x = eqx.error_if(params["x"], params["x"] > 1.5, "x is too large")
        return -(x**2)

    path = eomdl.solve(eomdl.GradientFlow(checked, 0.1), {"x": jnp.array(1.0)}, 20, rtol=1e-6, atol=1e-6)
    assert path.message != ""
    assert np.all(np.isfinite(path.params["x"]))
    assert path.params["x"].max() <= 1.5


SCRIPT = """
import jax, jax.numpy as jnp
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
import eomdl
counts = {"/jax/compilation_cache/cache_hits": 0, "/jax/compilation_cache/cache_misses": 0}
def count(event, **rest):
    if event in counts: counts[event] += 1
jax.monitoring.register_event_listener(count)
def loss(params, args): return jnp.sum(jnp.cosh(params))
eomdl.solve(eomdl.EquationOfMotion(loss, 0.1), jnp.ones(2), 5)
print(*counts.values())
"""


def test_a_second_process_finds_everything_in_the_persistent_cache(tmp_path):
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}

    def hits_and_misses():
        done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return tuple(map(int, done.stdout.split()))

    first_hits, first_misses = hits_and_misses()
    assert first_misses >= 5  # integrate_at_once, evaluate_records, _map_params, diagnostics_at, the loss
    hits, misses = hits_and_misses()
    assert misses == 0
    assert hits == first_misses + first_hits
