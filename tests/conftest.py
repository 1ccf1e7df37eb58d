"""The strict regime: float64, no silent rank promotion, every warning an error."""

import ctypes
import gc
import os
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jaxtyping
import pytest


# The CPU's older code generator compiles in three quarters of the time. Later versions have it no more, nor its flag.
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
# Every function of the package is held to the types and shapes of its results.
jaxtyping.install_import_hook("eomdl", "typechecker.results")
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


# Tracing makes many small objects, and the collector looks at all of them again and again: a tenth of all the time.
gc.set_threshold(200_000, 50, 1000)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "error")
    # Another worker may still be writing the entry: JAX then compiles the program itself.
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache entry")


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs_of_one_file_only() -> Iterator[None]:
    """JAX drops no compiled program by itself: memory would grow with every file."""
    yield
    eqx.clear_caches()
    jax.clear_caches()
    gc.collect()
    _give_back_memory()


def _give_back_memory() -> None:
    """What was freed goes back to the system, where the C library can be asked to (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, without a page."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright comes with eomdl[dev]")
    executable = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if executable is None:
        pytest.skip("needs Chromium, as of `apt install chromium`")
    with playwright.sync_playwright() as tool:
        opened = tool.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield opened
        opened.close()
