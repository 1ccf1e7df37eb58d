"""What one of several processes does: `process_runs.py PORT COUNT NUMBER FOLDER`. `test_processes.py` starts them.

Each prints what it has found as one line of JSON before the last one is killed while a checkpoint is written.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import eomdl
from eomdl import _processes, _shards


jax.config.update("jax_enable_x64", True)

STEPS = 6
ADAM = optax.adam(0.02)
RNG = np.random.default_rng(0)
DATA = RNG.normal(size=(32, 6)), RNG.normal(size=(32, 8))
WEIGHTS = {"first": RNG.normal(size=(6, 16)) / 3, "second": RNG.normal(size=(16, 8)) / 4}


def loss(params, args):
    x, y = args
    return jnp.mean((jnp.tanh(x @ params["first"]) @ params["second"] - y) ** 2)


CHUNKED = eomdl.losses.MeanOverChunks(loss, 16)


def flow(params, args):
    """A run of gradient flow with all that is measured on the host given."""
    quick = {"rtol": 1e-6, "atol": 1e-8, "estimate_error": False, "diagnose": False}
    return eomdl.solve(eomdl.GradientFlow(loss, 0.1), params, 3, args=args, observe={"loss": loss}, **quick)


def split():
    """Parameters and data, each spread over the devices of all processes."""
    mesh = jax.make_mesh((jax.device_count(),), ("d",), axis_types=(AxisType.Auto,))

    def put(x, *spec):
        place = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.make_array_from_callback(x.shape, place, lambda index: x[index])

    params = {"first": put(WEIGHTS["first"], None, "d"), "second": put(WEIGHTS["second"], "d")}
    return params, tuple(put(x, "d") for x in DATA)


def raised(function):
    """The error, in words."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def batches(number, args):
    """The last process cannot read the second."""
    yield args
    if number > 0:
        raise OSError("disk gone")
    yield args


def disagreements(number, params, args, store):
    """Calls that differ between the processes: `{what: error}`."""

    def run(num_steps=STEPS, **options):
        return eomdl.descend(loss, params, ADAM, num_steps, **{"args": args, **options})

    own = tuple(x + number for x in DATA)
    longer = tuple(x[: 30 + number] for x in DATA)
    found = {
        "steps": raised(lambda: run(STEPS + number)),
        "resume": raised(lambda: run(resume=store.at(3 * number).end)),
        "data": raised(lambda: run(args=own)),
        "shape": raised(lambda: run(args=longer)),
        "batches": raised(lambda: run(2, args=None, batches=batches(number, args))),
        "folder": raised(lambda: run(checkpoints=store)),
        "rows": raised(lambda: run(save_params=eomdl.runs.RowsOnDisk(store.folder.parent / "rows"))),
        "on host": raised(
            lambda: eomdl.descend(CHUNKED, params, ADAM, STEPS, args=eomdl.losses.OnHost(DATA))
        ),
    }
    _processes.TIMEOUT = 2.0
    time.sleep(4 * number)  # the last one comes too late
    found["alone"] = raised(run)
    _processes.TIMEOUT = 300.0
    return found


def main():
    port, count, number = map(int, sys.argv[1:4])
    folder = Path(sys.argv[4])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"localhost:{port}", count, number, heartbeat_timeout_seconds=10, shutdown_timeout_seconds=10
    )
    params, args = split()
    store = eomdl.Checkpoints(folder / "one file", 3)
    options = {"args": args, "observe": {"loss": loss}}
    run = eomdl.descend(loss, params, ADAM, STEPS, checkpoints=store, progress=True, **options)
    resumed = eomdl.descend(loss, params, ADAM, STEPS, resume=store.at(3).end, **options)
    path = flow(params, args)
    on_disk = eomdl.descend(
        loss, params, ADAM, STEPS, save_params=eomdl.runs.RowsOnDisk(folder / "rows"), **options
    )
    found = {
        "on disk": [*on_disk.observables["loss"], *on_disk.params["first"].ravel()],
        "descend": [*run.observables["loss"], *run.params["first"].ravel()],
        "resumed": [*resumed.observables["loss"], *resumed.params["first"].ravel()],
        "flow": [*path.observables["loss"], *path.params["first"].ravel()],
        "parts": [x.addressable_shards[0].data.size / x.size for x in jax.tree.leaves(run.end.params)],
        "wrong": disagreements(number, params, args, store),
    }
    print(json.dumps(found), flush=True)

    write, written = _shards.write, []

    def write_or_die(*arguments):
        written.append(arguments)
        if number > 0 and len(written) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        write(*arguments)

    _shards.write = write_or_die
    sharded = eomdl.Checkpoints(folder / "sharded", 2, sharded=True)
    try:
        eomdl.descend(loss, params, ADAM, STEPS, checkpoints=sharded, **options)
    except Exception as error:
        rows = error.trajectory.steps.tolist()
        print(json.dumps({"error": str(error), "notes": error.__notes__, "rows": rows}), flush=True)
    os._exit(0)  # no wait for the others at the end


if __name__ == "__main__":
    main()
