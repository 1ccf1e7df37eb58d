"""The loop asks nothing of where arrays live: on 8 devices as on one, and the state stays where it is."""

import itertools
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
        # Behind the code generator that tests/conftest.py chooses.
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        # Threads for several programs at a time: with one for each device, two programs may wait for each other.
        "NPROC": "32",
    }
    script = Path(__file__).with_name("device_runs.py")
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


RUNS = ["descend", "descend, resumed", "equation of motion", "equation of motion, resumed"]
REST = ["minibatches", "momentum flow", "interpolating flow", "only observables"]
SPREAD = [*(("parameters", name) for name in RUNS), *(("both", name) for name in RUNS + REST)]


@pytest.mark.parametrize(("case", "name"), [*(("data", name) for name in RUNS), *SPREAD])
def test_eight_devices_give_the_result_of_one(found, case, name):
    run = found[f"{case}: {name}"]
    assert run["devices"] == 8
    assert run["message"] == ""
    assert run["apart"] <= 1e-12


@pytest.mark.parametrize(("case", "name"), SPREAD)
def test_the_state_stays_spread_as_the_parameters_are(found, case, name):
    kept = found[f"{case}: {name}"]["kept"]
    assert len(kept) >= 4  # two matrices in the state, two in the final parameters
    assert kept == [[True, 8]] * len(kept)


def test_members_of_an_ensemble_are_split_over_devices(found):
    assert found["ensembles"]["apart"] <= 1e-12
    assert set(found["ensembles"]["spread"]) == {8}


@pytest.mark.parametrize("way", ["both to one device", "one device to parameters"])
def test_a_checkpoint_goes_on_where_the_parameters_are(found, way):
    run = found["topology"][way]
    assert run["apart"] <= 1e-12
    assert run["read"] == 0.0
    assert run["kept"] == [[True, 1 if "to one" in way else 8]] * 6


def test_memory_per_device_falls_with_their_number(found):
    state, field = ([found["bytes"][str(n)][what] for n in (1, 2, 4, 8)] for what in ("state", "field"))
    assert all(here / there > 1.9 for here, there in itertools.pairwise(state))
    assert all(here / there > 1.6 for here, there in itertools.pairwise(field))


def test_the_error_predicted_on_eight_devices_is_that_on_one(found):
    assert found["predicted"]["apart"] <= 1e-12
    assert found["predicted"]["kept"] == [[True, 8]] * 2


@pytest.mark.parametrize(("case", "devices"), [("data", 1), ("parameters", 8), ("both", 8)])
def test_telemetry_on_eight_devices_is_that_on_one(found, case, devices):
    seen = found["telemetry"][case]
    assert seen["apart"] <= 1e-10
    assert seen["kept"] == [[True, devices]] * 2
    assert seen["all-gather"] == 0  # inner products are of parameters where they are


def test_means_over_chunks_gather_no_data(found):
    """A chunk size that divides the examples, and is a multiple of the devices, sends sums only."""
    even, uneven = found["chunks"]["even"], found["chunks"]["uneven"]
    assert even["all-reduce"] > 0
    assert even["all-gather"] == 0
    assert uneven["all-gather"] > 0


def test_explicit_meshes(found):
    explicit = found["explicit"]
    assert explicit["apart"] <= 1e-12
    assert explicit["kept"] == [[True, 8]] * 6
    assert "out_sharding" in explicit["not named"]
    assert "AxisType.Auto" in explicit["not named"]
    assert explicit["solve"].startswith(
        "params['first']: expected an array on a mesh with AxisType.Auto, got one spread"
    )
