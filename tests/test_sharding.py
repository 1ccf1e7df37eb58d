"""The loop asks nothing of where arrays live: on 8 devices as on one, and the state stays where it is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def found():
    """`{case: name: what was measured}`, by a process with 8 devices."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    script = Path(__file__).with_name("sharded_runs.py")
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


RUNS = [
    "descend",
    "descend, resumed",
    "equation of motion",
    "equation of motion, resumed",
    "interpolating flow",
    "minibatches",
    "only observables",
]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("case", ["data", "parameters", "both"])
def test_eight_devices_give_the_result_of_one(found, case, name):
    run = found[f"{case}: {name}"]
    assert run["devices"] == 8
    assert run["message"] == ""
    assert run["apart"] <= 1e-12


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("case", ["parameters", "both"])
def test_the_state_stays_sharded_as_the_parameters_are(found, case, name):
    pairs = found[f"{case}: {name}"]["shardings"]
    assert len(pairs) >= 4  # two matrices in the state, two in the final parameters
    assert all(spec == expected for spec, expected in pairs)
    assert all("d" in spec for spec, _ in pairs)
