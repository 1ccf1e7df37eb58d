"""`python -m benchmarks.large CASE`: one run of a large network in float32, its cost and memory, as JSON on the last line.

A process of its own, since the peak of a process never falls. CASE is a `Case` as JSON.
"""

import dataclasses
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax

import eomdl
from benchmarks import transformer
from benchmarks.aliases import Args, Loss, Params
from benchmarks.memory import peak_rss
from benchmarks.scale import CLASSES, ETA_LAMBDA, PIXELS
from paper_repro import networks


@dataclasses.dataclass(frozen=True)
class Case:
    """What to run, on what.

    - `network`: a name in `NETWORKS`; `what`: one in `RUNS`; `solver`: one of diffrax.
    - `sizes`: the hidden layers of the MLP; width and layers of the transformer.
    - `eta_lambda`: the learning rate times the sharpness at the start.
    """

    network: str
    what: str
    sizes: Sequence[int]
    num_examples: int
    num_steps: int
    solver: str = "Tsit5"
    eta_lambda: float = ETA_LAMBDA


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def mlp(sizes: Sequence[int], num_examples: int) -> tuple[Loss, Params, Args]:
    """A tanh network on random images."""
    rng = np.random.default_rng(0)
    pixels = jnp.asarray(rng.uniform(size=(num_examples, PIXELS)), jnp.float32)
    params = _float32(networks.zero_bias_init((PIXELS, *sizes, CLASSES)))
    return networks.mlp_loss, params, (pixels, jnp.asarray(rng.integers(0, CLASSES, num_examples)))


CONTEXT = 32


def language_model(sizes: Sequence[int], num_examples: int) -> tuple[Loss, Params, Args]:
    """A transformer on text; an example is a piece of 32 characters."""
    inputs, following, letters = transformer.text(CONTEXT, num_examples)
    width, layers = sizes
    params = transformer.init(jax.random.key(0), letters, CONTEXT, width, layers)
    return transformer.loss, params, (inputs, following)


NETWORKS: dict[str, Callable] = {"MLP": mlp, "transformer": language_model}
Verb = Callable[..., eomdl.Trajectory]


def descend(loss: Loss, params: Params, eta: float, num_steps: int, args: Args, **_: Any) -> eomdl.Trajectory:
    """Gradient descent."""
    return eomdl.descend(loss, params, _sgd(eta), num_steps, args=args, save_steps=[num_steps])


_OPTIMIZERS: dict[float, optax.GradientTransformation] = {}


def _sgd(eta: float) -> optax.GradientTransformation:
    return _OPTIMIZERS.setdefault(eta, optax.sgd(eta))  # the same object compiles once


def modified(order: int) -> Verb:
    """The equation of motion."""

    def run(loss: Loss, params: Params, eta: float, num_steps: int, args: Args, **options: Any) -> Any:
        flow = eomdl.EquationOfMotion(loss, eta, order)
        return eomdl.solve(flow, params, num_steps, args=args, save_steps=[num_steps], **options)

    return run


def interpolating(points: int) -> Verb:
    """The flow of the step map."""

    def run(loss: Loss, params: Params, eta: float, num_steps: int, args: Args, **options: Any) -> Any:
        flow = eomdl.InterpolatingFlow(eomdl.optimizer_step(loss, _sgd(eta)), eta, points=points)
        return eomdl.solve(flow, params, num_steps, args=args, save_steps=[num_steps], **options)

    return run


RUNS: dict[str, Verb] = {
    "descend": descend,
    "EquationOfMotion, order 1": modified(1),
    "EquationOfMotion, order 2": modified(2),
    "InterpolatingFlow, 2 points": interpolating(2),
    "InterpolatingFlow, 4 points": interpolating(4),
}


def by_hand(loss: Loss, eta: float, num_steps: int) -> Callable[[Params, Args], Params]:
    """Gradient descent in a scan."""

    @jax.jit
    def run(params: Params, args: Args) -> Params:
        def step(p: Params, _: None) -> tuple[Params, None]:
            return jax.tree.map(lambda x, g: x - eta * g, p, jax.grad(loss)(p, args)), None

        return jax.lax.scan(step, params, None, length=num_steps)[0]

    return run


def copies(num_bytes: int) -> dict[str, float]:
    """The largest program alive, in copies of the parameters: arguments, results and temporaries."""
    programs = jax.devices()[0].client.live_executables()
    stats = [program.get_compiled_memory_stats() for program in programs]
    totals = [
        s.argument_size_in_bytes + s.output_size_in_bytes + s.temp_size_in_bytes - s.alias_size_in_bytes
        for s in stats
    ]
    return {"copies": max(totals) / num_bytes}


def measured(case: Case) -> dict[str, Any]:
    """The run's row."""
    loss, params, args = NETWORKS[case.network](case.sizes, case.num_examples)
    num_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
    measure = jax.jit(eomdl.sharpness(loss, rtol=0.05))
    sharpness = float(measure(params, args))
    eta = case.eta_lambda / sharpness
    reference = by_hand(loss, eta, case.num_steps)
    jax.block_until_ready(reference(params, args))
    raw, sharpness_seconds = np.inf, np.inf
    options: dict[str, Any] = {"estimate_error": False, "diagnose": False}
    if case.what != "descend":
        options["solver"] = getattr(diffrax, case.solver)()
    jax.clear_caches()
    gc.collect()
    before = peak_rss()
    run = RUNS[case.what](loss, params, eta, case.num_steps, args, **options)
    memory = copies(num_bytes)
    grown = (peak_rss() - before) * 2**20 / num_bytes
    seconds = np.inf
    jax.block_until_ready((reference(params, args), measure(params, args)))
    for _ in range(3):  # interleaved; the shortest of each
        start = time.perf_counter()
        jax.block_until_ready(reference(params, args))
        first = time.perf_counter()
        run = RUNS[case.what](loss, params, eta, case.num_steps, args, **options)
        second = time.perf_counter()
        jax.block_until_ready(measure(params, args))
        raw, seconds = min(raw, first - start), min(seconds, second - first)
        sharpness_seconds = min(sharpness_seconds, time.perf_counter() - second)
    if run.message:
        raise RuntimeError(run.message)
    step = raw / case.num_steps
    return {
        "network": f"{case.network} {'-'.join(map(str, case.sizes))}",
        "num_params": sum(x.size for x in jax.tree.leaves(params)),
        "num_examples": case.num_examples,
        "what": case.what,
        "solver": case.solver if case.what != "descend" else "-",
        "eta_lambda_max": eta * sharpness,
        "num_steps": case.num_steps,
        "ode_steps": int(run.stats.num_steps),
        "steps_per_step": seconds / raw,
        "sharpness_steps": sharpness_seconds / step,
        **memory,
        "rss_copies": grown,
        "raw_step_s": step,
        "device": jax.devices()[0].device_kind,
    }


if __name__ == "__main__":
    print(json.dumps(measured(Case(**json.loads(sys.argv[1])))))
