"""`python -m benchmarks.memory STEPS SAVE_PARAMS ORDER`: peak memory of one long run, as JSON.

A process of its own, since the peak of a process never falls. On a CPU the device's memory
is the host's: the resident set holds both; the live JAX arrays are the device's share.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from typing_extensions import override

import eomdl
from benchmarks.problems import LOSS
from paper_repro import networks


class LiveBytes(diffrax.AbstractProgressMeter):
    """A progress meter that notes the bytes in live JAX arrays."""

    seen: list = eqx.field(default_factory=list)

    @override
    def init(self) -> None:
        """Begin with no state."""
        return None

    @override
    def step(self, state: None, progress: ArrayLike) -> None:
        """Note the bytes that are live now."""
        del progress
        self.seen.append(sum(x.nbytes for x in jax.live_arrays()))
        return state

    @override
    def close(self, state: None) -> None:
        """Keep what was noted."""
        pass


def peak_rss() -> float:
    """Largest resident set of this process so far, in MiB.

    From /proc where there is one: Linux hands `ru_maxrss` on from the parent process.
    """
    try:
        (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    except OSError:
        unit = 2**20 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main(num_steps: int, save_params: bool, order: int) -> dict:
    """Run `solve` once to compile, then once measured: memory, seconds and ODE steps."""
    params = networks.zero_bias_init((8, 8, 8, 10))
    rows = jax.random.normal(jax.random.key(0), (16, 8), jnp.float64)
    data = (rows, jax.nn.one_hot(jnp.arange(16) % 10, 10, dtype=jnp.float64))
    flow = eomdl.EquationOfMotion(LOSS, 0.05, order)
    meter = LiveBytes()
    observe = {"norm": lambda p, _: jnp.sqrt(sum(jnp.vdot(x, x) for x in jax.tree.leaves(p)))}
    options: dict[str, Any] = {
        "args": data,
        "observe": observe,
        "estimate_error": False,
        "save_params": save_params,
    }
    eomdl.solve(flow, params, 600, **options)  # compiles and settles the allocator
    before = peak_rss()
    start = time.perf_counter()
    run = eomdl.solve(flow, params, num_steps, progress=meter, **options)
    seconds = time.perf_counter() - start
    after = peak_rss()
    return {
        "num_params": sum(x.size for x in jax.tree.leaves(params)),
        "num_steps": num_steps,
        "steps_done": int(run.end.step),
        "save_params": save_params,
        "order": order,
        "peak_rss_MiB": after,
        "peak_rss_growth_MiB": after - before,
        "peak_live_arrays_MiB": max(meter.seen) / 2**20,
        "microseconds_per_step": 1e6 * seconds / num_steps,
        "ode_steps_per_step": float(run.stats.num_steps) / num_steps,
    }


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), sys.argv[2] == "True", int(sys.argv[3]))))
