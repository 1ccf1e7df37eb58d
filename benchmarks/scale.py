"""`python -m benchmarks.scale CASE`: one full-batch run on images, its peak memory and seconds, as JSON on the last line.

A process of its own, since the peak of a process never falls. CASE is a `Case` as JSON. float32.
"""

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import eomdl
from benchmarks.aliases import Args, Loss, Params
from benchmarks.memory import peak_rss
from eomdl.losses import MeanOverChunks, OnHost
from paper_repro import data, networks


PIXELS, CLASSES = 784, 10
ETA_LAMBDA = 0.3


@dataclasses.dataclass(frozen=True)
class Case:
    """What to run, on what.

    - `what`: a name in `RUNS`; `place`: a name in `PLACES`.
    - `chunk_size`: 0 for the plain mean.
    - `folder`: of IDX files; None for random images.
    """

    what: str
    place: str
    chunk_size: int
    num_examples: int
    num_steps: int
    sizes: Sequence[int]
    folder: str | None


def images(folder: str | None, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images as bytes, (n, pixels), and labels."""
    if folder is not None:
        pixels, labels = data.read_folder(folder)
        return pixels[:count], labels[:count].astype(np.int32)
    rng = np.random.default_rng(0)
    return (
        rng.integers(0, 256, (count, PIXELS), dtype=np.uint8),
        rng.integers(0, CLASSES, count, dtype=np.int32),
    )


def loss(params: Params, args: Args) -> jax.Array:
    """Mean cross entropy of a tanh network on images of bytes."""
    pixels, labels = args
    return networks.mlp_loss(params, (pixels.astype(params[0]["w"].dtype) / 255, labels))


def on_device(arrays: tuple, folder: Path) -> Args:
    """The data as JAX arrays."""
    del folder
    return jax.tree.map(jnp.asarray, arrays)


def in_file(arrays: tuple, folder: Path) -> Args:
    """The images in a file that is mapped into memory."""
    pixels, labels = arrays
    np.save(folder / "images.npy", pixels)
    return OnHost((np.load(folder / "images.npy", mmap_mode="r"), labels))


def descend(loss: Loss, params: Params, eta: float, num_steps: int, args: Args) -> eomdl.Trajectory:
    """Gradient descent."""
    return eomdl.descend(loss, params, optax.sgd(eta), num_steps, args=args, save_steps=[num_steps])


def first_order(loss: Loss, params: Params, eta: float, num_steps: int, args: Args) -> eomdl.Trajectory:
    """The equation of motion of order 1."""
    flow = eomdl.EquationOfMotion(loss, eta, order=1)
    return eomdl.solve(flow, params, num_steps, args=args, save_steps=[num_steps], **BARE)


def four_points(loss: Loss, params: Params, eta: float, num_steps: int, args: Args) -> eomdl.Trajectory:
    """The interpolating flow of 4 points."""
    flow = eomdl.InterpolatingFlow(eomdl.optimizer_step(loss, optax.sgd(eta)), eta, points=4)
    return eomdl.solve(flow, params, num_steps, args=args, save_steps=[num_steps], **BARE)


# The flow, and nothing beside it: measuring tolerances takes longer than a run of so few steps.
BARE: dict[str, Any] = {"estimate_error": False, "diagnose": False, "rtol": 1e-4, "atol": 1e-6}
RUNS: dict[str, Callable[..., eomdl.Trajectory]] = {
    "descend": descend,
    "EquationOfMotion, order 1": first_order,
    "InterpolatingFlow, 4 points": four_points,
}
PLACES: dict[str, Callable[[tuple, Path], Args]] = {"on the device": on_device, "in a file": in_file}


def measured(case: Case, folder: Path) -> dict[str, Any]:
    """The run's row."""
    arrays = images(case.folder, case.num_examples)
    args = PLACES[case.place](arrays, folder)
    few = jax.tree.map(lambda x: jnp.asarray(x[:1000]), arrays)
    del arrays
    params = networks.zero_bias_init(case.sizes)
    mean = MeanOverChunks(loss, case.chunk_size) if case.chunk_size else loss
    sharpness = float(jax.jit(eomdl.sharpness(loss))(params, few))
    eta = ETA_LAMBDA / sharpness
    start = time.perf_counter()
    run = RUNS[case.what](mean, params, eta, case.num_steps, args)
    seconds = time.perf_counter() - start
    if run.message:
        raise RuntimeError(run.message)
    return {
        "what": case.what,
        "mean": f"chunks of {case.chunk_size}" if case.chunk_size else "plain mean",
        "place": case.place,
        "images": Path(case.folder).name if case.folder else "random",
        "num_examples": case.num_examples,
        "num_steps": case.num_steps,
        "num_params": sum(x.size for x in jax.tree.leaves(params)),
        "eta_lambda_max": eta * sharpness,
        "peak_rss_MiB": peak_rss(),
        "seconds_per_step": seconds / case.num_steps,
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(json.dumps(measured(Case(**json.loads(sys.argv[1])), Path(place))))
