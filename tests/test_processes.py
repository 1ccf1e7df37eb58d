"""Two processes of `jax.distributed`, for real: the numbers of one, errors on both, and one killed while it writes."""

import json
import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import process_runs
import pytest
from process_runs import ADAM

import eomdl


TIMEOUT = 240  # seconds, on a machine with much else to do


ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "larger-than-one-device.md"


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def started(commands):
    """Processes at once, each given as (arguments, environment): (standard output, standard error, exit status) of each."""
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env=ENVIRONMENT | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arguments, environment in commands
    ]
    try:
        outputs = [process.communicate(timeout=TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(*output, process.returncode) for output, process in zip(outputs, processes, strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def two(folder):
    """What the two processes printed: (lines of JSON, standard error, exit status) of each."""
    script = Path(__file__).with_name("process_runs.py")
    port = free_port()
    results = started([((script, port, 2, number, folder), {}) for number in range(2)])
    lines = [[json.loads(x) for x in out.splitlines() if x.startswith("{")] for out, _, _ in results]
    assert all(lines), [error[-3000:] for _, error, _ in results]
    return [(found, error, code) for found, (_, error, code) in zip(lines, results, strict=True)]


def on_one(**options):
    params = jax.tree.map(jax.numpy.asarray, process_runs.WEIGHTS)
    options = {"args": process_runs.DATA, "observe": {"loss": process_runs.loss}, **options}
    return eomdl.descend(process_runs.loss, params, ADAM, process_runs.STEPS, **options)


def numbers(run):
    return [*run.observables["loss"], *run.params["first"].ravel()]


def test_two_processes_give_the_numbers_of_one(two):
    whole = on_one()
    flow = process_runs.flow(jax.tree.map(jax.numpy.asarray, process_runs.WEIGHTS), process_runs.DATA)
    for lines, _, _ in two:
        found = lines[0]
        np.testing.assert_allclose(found["descend"], numbers(whole), rtol=0, atol=1e-12)
        assert found["on disk"] == found["descend"]
        np.testing.assert_allclose(found["resumed"], numbers(whole.rows(slice(3, None))), rtol=0, atol=1e-12)
        np.testing.assert_allclose(found["flow"], numbers(flow), rtol=0, atol=1e-12)
        assert found["parts"] == [0.5, 0.5]


def test_only_the_first_shows_progress(two):
    assert "100.00%" in two[0][1]
    assert "%|" not in two[1][1]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("steps", "descend: expected the same on all processes, got '{} steps from step 0'"),
        ("resume", "'6 steps from step 3'"),
        ("data", "args[0]: float64[32, 6] #"),
        ("shape", "args[0]: float64[31, 6] #"),
        ("batches", "OSError('disk gone')"),
        ("folder", "expected a folder without checkpoints after step 0"),
        ("rows", "expected a folder without rows"),
        ("on host", "args: expected arrays of all processes, got eomdl.losses.OnHost in one of 2"),
    ],
)
def test_processes_that_differ_are_all_stopped(two, what, said):
    for number, (lines, _, _) in enumerate(two):
        assert said.format(process_runs.STEPS + number) in lines[0]["wrong"][what]


def test_nobody_waits_for_one_that_does_not_come(two):
    for lines, _, _ in two:
        assert "descend: expected all 2 processes within 2 s" in lines[0]["wrong"]["alone"]


def test_one_killed_while_it_writes(two, folder):
    (lines, _, code), (_, _, killed) = two
    assert (code, killed) == (0, -9)
    stopped = lines[1]
    assert any("Start all of them again, with `resume=store.latest`" in note for note in stopped["notes"])
    assert stopped["rows"] == [0, 1, 2, 3, 4, 5]
    # Steps 0 and 2 are whole; what there is of step 4 is no checkpoint. One process with one device goes on.
    store = eomdl.Checkpoints(folder / "sharded", 2, sharded=True)
    assert list(store.steps) == [0, 2]
    run = on_one(resume=store.latest, checkpoints=store)
    np.testing.assert_allclose(numbers(run), numbers(on_one().rows(slice(2, None))), rtol=0, atol=1e-12)
    assert list(store.steps) == [0, 2, 4, 6]
    other = {"first": jax.numpy.ones((6, 15)), "second": jax.numpy.ones((15, 8))}
    shapes = r"resume\.end\.params\['first'\]: expected shape \(6, 15\), got \(6, 16\)"
    with pytest.raises(ValueError, match=shapes):
        eomdl.descend(process_runs.loss, other, ADAM, 9, args=process_runs.DATA, resume=store.latest)


# A process that does not come to the second of two sums, for longer than the other waits.
LATE = """
import os, sys, time, jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
number = int(sys.argv[2])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, number)
place = NamedSharding(jax.make_mesh((2,), ("d",)), P("d"))
x = jax.make_array_from_callback((8,), place, lambda index: jnp.arange(8.0)[index])
total = jax.jit(jnp.sum, out_shardings=NamedSharding(place.mesh, P()))
print(total(x), flush=True)
time.sleep(9 * number)
if number == 0:
    try:
        total(x).block_until_ready()
    except Exception as error:
        print(error, flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def scripts(folder):
    """What four processes print, run at once: the guide's script on two, and two of which one is late."""
    (code,) = re.findall(r'session="processes"\n(.*?)```', GUIDE.read_text(), re.DOTALL)
    script, late = folder / "script.py", folder / "late.py"
    script.write_text(code)
    late.write_text(LATE)
    two, port = {"COUNT": "2", "ADDRESS": f"localhost:{free_port()}"}, free_port()
    bounded = {"XLA_FLAGS": "--xla_cpu_collective_timeout_seconds=4"}
    return started(
        [
            *(((script,), {**two, "NUMBER": str(n)}) for n in range(2)),
            *(((late, port, n), bounded) for n in range(2)),
        ]
    )


def test_the_wait_in_a_collective_can_be_bounded(scripts):
    first, second = scripts[2:]
    assert "28.0\n" in first[0], first[1][-2000:]
    assert "28.0\n" in second[0], second[1][-2000:]
    assert "Timed out waiting 4000ms" in first[0]


def test_the_script_of_the_guide(scripts, folder, capfd):
    """The same number from two processes as from one (this one), printed by the first."""
    runpy.run_path(str(folder / "script.py"))
    runs = [(*capfd.readouterr(), 0), *scripts[:2]]
    alone, first, second = (
        [line for line in out.splitlines() if line.startswith("distance")] for out, _, _ in runs
    )
    assert [code for _, _, code in runs] == [0, 0, 0], [error[-2000:] for _, error, _ in runs]
    assert len(alone) == 1
    assert first == alone
    assert second == []
    assert [("100.00%" in error) for _, error, _ in runs] == [True, True, False]
