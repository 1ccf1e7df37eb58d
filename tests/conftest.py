"""The strict regime: float64, no silent rank promotion, every warning an error."""

import ctypes
import gc
import math
import os
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import pytest
import typechecker


# The CPU's older code generator compiles in three quarters of the time. Later versions have it no more, nor its flag.
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
# The results of every function of the package are checked against their types and shapes.
typechecker.install("eomdl")
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Small problems: compiling is what takes the time.
jax.config.update("jax_disable_most_optimizations", True)
# What one worker or one run has compiled, the next one reads.
jax.config.update(
    "jax_compilation_cache_dir",
    os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent / ".jax_cache")),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


# Tracing makes many small objects, and the collector visits all of them again and again: a tenth of all the time.
gc.set_threshold(200_000, 50, 1000)


MAX_RESIDENT_BYTES = 2**31  # of a process between two groups of tests


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "error")
    # Flows are taken beyond what they are valid for on purpose; `compare` says the same by a warning that is an error here.
    config.addinivalue_line("filterwarnings", "ignore::eomdl._warn.ModelWarning")
    # Another worker may still be writing the entry: JAX then compiles the program itself.
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache entry")


def group_of(item: pytest.Item) -> str:
    """Return the name of the tests that run together, in one worker."""
    return item.get_closest_marker("xdist_group").args[0]


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group the tests by file, but the laws of flows by flow; these small groups come last, so that no worker waits long."""
    order: dict[str, int] = {}
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
        order.setdefault(group_of(item), len(order))
    items.sort(key=lambda item: (group_of(item) != item.path.stem, order[group_of(item)]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    yield
    if nextitem is None or group_of(nextitem) != group_of(item):
        _bound_memory()


def _bound_memory() -> None:
    """Drop all compiled programs where the process has grown large: JAX drops none by itself.

    Not after every group, since most groups use the same small programs.
    """
    if _resident_bytes() < MAX_RESIDENT_BYTES:
        return
    eqx.clear_caches()
    jax.clear_caches()
    gc.collect()
    _give_back_memory()


def _resident_bytes() -> float:
    """Return the memory that this process holds; infinity where the system does not say (outside Linux)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return math.inf
    return pages * os.sysconf("SC_PAGE_SIZE")


def _give_back_memory() -> None:
    """Return freed memory to the system, where the C library can be asked to (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Yield Chromium, without a page."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright comes with eomdl[dev]")
    executable = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if executable is None:
        pytest.skip("needs Chromium, as of `apt install chromium`")
    with playwright.sync_playwright() as tool:
        chromium = tool.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield chromium
        chromium.close()
