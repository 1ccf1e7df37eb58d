"""Private names of other packages do, in the versions that are installed, what `eomdl` takes them for."""

import os
import signal
import subprocess
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eomdl
from eomdl import _processes, _upstream


def checked(x):
    return eqx.error_if(2 * x, x > 1.0, "x is too large")


def program(x):
    """The text of a function that is another each time: what equinox is to do is no part of what JAX knows a trace by."""
    return jax.jit(lambda x: checked(x)).lower(x).as_text()


@pytest.fixture(autouse=True)
def _no_environment_variable(monkeypatch):
    monkeypatch.delenv("EQX_ON_ERROR", raising=False)


def test_a_check_is_traced_without_a_callback_and_makes_its_value_nan():
    x = jnp.array(2.0)
    with _upstream.no_callbacks():
        text = program(x)
        value = jax.jit(lambda x: checked(x))(x)
        fine = jax.jit(lambda x: checked(x))(x / 4)
    assert "callback" not in text
    assert np.isnan(value)
    assert fine == 1.0
    # Afterwards as before, for the same check on the same shapes; and the other way round.
    assert "callback" in program(x)
    with _upstream.no_callbacks():
        assert "callback" not in program(x)


def test_checks_that_need_no_array_are_made_while_tracing():
    with _upstream.no_callbacks(), pytest.warns(UserWarning, match="at trace time"):
        assert np.isnan(eqx.error_if(jnp.array(2.0), True, "no")).all()
    with pytest.raises(RuntimeError, match="no"):
        eqx.error_if(jnp.array(2.0), True, "no")


def test_what_equinox_does_on_errors_is_restored_after_an_exception():
    def fail():
        with _upstream.no_callbacks():
            raise RuntimeError("while tracing")

    x = jnp.array(2.0)
    with pytest.raises(RuntimeError, match="while tracing"):
        fail()
    assert "callback" in program(x)
    with _upstream.no_callbacks():
        with _upstream.no_callbacks():
            pass
        assert "callback" not in program(x)  # the outer one still holds
    assert "callback" in program(x)


def test_what_the_user_has_set_holds(monkeypatch):
    monkeypatch.setenv("EQX_ON_ERROR", "raise")
    with _upstream.no_callbacks():
        assert "callback" in program(jnp.array(2.0))


SCRIPT = """
import socket, jax
import eomdl
from eomdl import _processes, _upstream
assert _upstream.coordination_client() is None
with socket.socket() as listener:
    listener.bind(("localhost", 0))
    port = listener.getsockname()[1]
jax.distributed.initialize(f"localhost:{port}", 1, 0)
client = _upstream.coordination_client()
client.key_value_set("key", "text")
client.wait_at_barrier("barrier", 10_000)
print(client.blocking_key_value_get("key", 10_000))
client.key_value_delete("key")
try:
    client.blocking_key_value_get("key", 100)
except jax.errors.JaxRuntimeError as error:
    print("no key")
"""


def test_the_coordinator_keeps_strings_and_has_barriers_and_time_limits():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["text", "no key"]


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_run_in_a_forked_process_is_refused_before_it_hangs():
    jnp.ones(1).block_until_ready()
    assert _upstream.backends_are_initialized()
    assert _processes._forks == []
    child = os.fork()
    if child == 0:  # it has none of JAX's threads: nothing but this may be called in it
        code = 1
        try:
            eomdl.iterate(lambda w, args, k: w, np.ones(2), 3)
        except RuntimeError as error:
            code = 0 if "spawn" in str(error) else 2
        finally:
            os._exit(code)
    for _ in range(200):
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0
    assert eomdl.iterate(lambda w, args, k: w, jnp.ones(2), 3).end.step == 3  # the parent goes on


def test_a_fork_before_jax_is_used_is_none(monkeypatch):
    monkeypatch.setattr(_upstream, "backends_are_initialized", lambda: False)
    _processes._note_fork()
    _processes.require_own_threads()
