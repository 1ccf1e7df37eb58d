"""Larger than one device: memory and time of means over chunks of data.

`--data FOLDER` takes the images from IDX files (MNIST); by default they are random.
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eomdl
from benchmarks import scale
from benchmarks.aliases import Args, Loss, Params
from benchmarks.conftest import Record, Size
from benchmarks.measure import compiled, time_ratio
from benchmarks.scale import CLASSES, PIXELS, Case
from eomdl.losses import MeanOverChunks, OnHost
from paper_repro import networks


# ------------------------------------------------------- data that does not fit


@dataclasses.dataclass(frozen=True)
class Chunks:
    """The sizes of this part."""

    widths: tuple[int, ...]
    num_examples: tuple[int, ...]
    chunk_size: int
    num_steps: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """The network's layers."""
        return (PIXELS, *self.widths, CLASSES)


FULL = Chunks((256, 256), (2_000, 6_000, 20_000, 60_000), 1_000, 3)
SMOKE = Chunks((32,), (400, 6_400), 200, 2)
MEMORY_LIMIT = 2048  # MiB, of a process with the whole of MNIST
TIME_LIMIT = 1.3  # of the plain mean, for one gradient


@pytest.fixture
def chunks(size: Size) -> Chunks:
    """The sizes asked for on the command line."""
    return SMOKE if size.smoke else FULL


def _counterterms(order: int) -> Callable[[Loss], Callable]:
    def of(loss: Loss) -> Callable:
        return lambda params, args: eomdl.counterterms(loss, params, order, args=args)

    return of


DERIVATIVES: dict[str, Callable[[Loss], Callable]] = {
    "gradient": jax.grad,
    "xi_0": _counterterms(1),
    "xi_0, xi_1": _counterterms(2),
}


def _float32(chunks: Chunks) -> Params:
    params = networks.zero_bias_init(chunks.sizes)
    return jax.tree.map(lambda x: x.astype(jnp.float32), params)


def _shapes(count: int) -> Args:
    return (
        jax.ShapeDtypeStruct((count, PIXELS), jnp.float32),
        jax.ShapeDtypeStruct((count, CLASSES), jnp.float32),
    )


LOSS = networks.loss(networks.mlp, networks.soft_cross_entropy)


def _memory_row(chunks: Chunks, derivative: str, count: int) -> dict[str, Any]:
    """Compiled for the shapes only: no data is made."""
    of, params = DERIVATIVES[derivative], _float32(chunks)

    def temporaries(loss: Loss, count: int) -> float:
        analysis = jax.jit(of(loss)).lower(params, _shapes(count)).compile().memory_analysis()
        assert analysis is not None  # where a backend does not tell
        return analysis.temp_size_in_bytes / 2**20

    chunked = MeanOverChunks(LOSS, chunks.chunk_size)
    return {
        "network": "-".join(map(str, chunks.sizes)),
        "derivative": derivative,
        "num_examples": count,
        "plain_MiB": temporaries(LOSS, count),
        "chunked_MiB": temporaries(chunked, count),
        "uneven_MiB": temporaries(chunked, count - 1),
    }


@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_memory_of_means_over_chunks(record: Record, chunks: Chunks, derivative: str) -> None:
    """The memory of the plain mean grows with the examples, that of the mean over chunks does not."""
    counts = chunks.num_examples
    rows = record("chunk memory", lambda: [_memory_row(chunks, derivative, count) for count in counts])
    first, last = rows[0], rows[-1]
    assert last["chunked_MiB"] <= 1.01 * first["chunked_MiB"]
    # A GPU has some work space whatever the number of examples.
    most = 0.8 * counts[-1] / counts[0] if jax.default_backend() == "cpu" else 5
    assert last["plain_MiB"] >= most * first["plain_MiB"]
    assert last["chunked_MiB"] < last["plain_MiB"]


def _time_rows(
    chunks: Chunks, derivative: str, count: int, rounds: int, folder: Path
) -> list[dict[str, Any]]:
    of, params = DERIVATIVES[derivative], _float32(chunks)
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(count, PIXELS)).astype(np.float32)
    y = np.eye(CLASSES, dtype=np.float32)[rng.integers(0, CLASSES, count)]
    np.save(folder / "x.npy", x)
    host = OnHost((np.load(folder / "x.npy", mmap_mode="r"), y))
    device = jax.tree.map(jnp.asarray, (x, y))
    plain, plain_cost = compiled(of(LOSS), params, device)

    def row(chunk_size: int) -> dict[str, Any]:
        chunked = MeanOverChunks(LOSS, chunk_size)
        over, _ = compiled(of(chunked), params, device)
        streamed, _ = compiled(of(chunked), params, host)
        # Of one chunk: XLA counts the body of a loop once on a CPU, and every time on a GPU.
        _, one = compiled(of(chunked), params, jax.tree.map(lambda leaf: leaf[:chunk_size], device))
        return {
            "derivative": derivative,
            "num_examples": count,
            "chunk_size": chunk_size,
            "flops_ratio": one["flops"] * (count // chunk_size) / plain_cost["flops"],
            "time_ratio": time_ratio(over, plain, (params, device), rounds),
            "host_time_ratio": time_ratio(
                lambda p: streamed(p, host), lambda p: plain(p, device), (params,), rounds
            ),
        }

    return [row(size) for size in (chunks.chunk_size, 5 * chunks.chunk_size)]


@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_time_of_means_over_chunks(
    record: Record, size: Size, chunks: Chunks, derivative: str, tmp_path: Path
) -> None:
    """A gradient over chunks takes at most 1.3 times as long as the plain one, where that fits.

    In the better of two sizes: a GPU wants larger chunks. From a file this holds for a CPU only.
    """
    rounds = 3 if size.smoke else 8
    count = chunks.num_examples[-1] // 4
    rows = record("chunk time", _time_rows, chunks, derivative, count, rounds, tmp_path)
    if derivative == "gradient" and not size.smoke:
        assert min(row["time_ratio"] for row in rows) <= TIME_LIMIT
        if jax.default_backend() == "cpu":
            assert min(row["host_time_ratio"] for row in rows) <= TIME_LIMIT


def _run(case: Case) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.scale", json.dumps(dataclasses.asdict(case))]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


KINDS = [("on the device", True), ("in a file", True), ("on the device", False)]


@pytest.mark.parametrize(("place", "in_chunks"), KINDS, ids=["device", "file", "plain"])
@pytest.mark.parametrize("what", scale.RUNS)
def test_full_batch_runs(
    record: Record, size: Size, chunks: Chunks, what: str, place: str, in_chunks: bool
) -> None:
    """A run over chunks of 60,000 images fits into 2 GiB."""
    if size.smoke and (what, place) != ("EquationOfMotion, order 1", "in a file"):
        pytest.skip("not in the smoke size")
    case = Case(
        what=what,
        place=place,
        chunk_size=chunks.chunk_size if in_chunks else 0,
        num_examples=chunks.num_examples[-1],
        num_steps=chunks.num_steps,
        sizes=chunks.sizes,
        folder=size.data,
    )
    row = record("chunk runs", _run, case)
    if in_chunks:
        assert row["peak_rss_MiB"] <= MEMORY_LIMIT
