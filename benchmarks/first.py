"""The first answer of a process, in one process: `python -m benchmarks.first WHAT ORDER LEAVES`, JSON on the last line.

WHAT is `hand` (a hand-written call of diffrax), `bare` (solve without error estimate and diagnoses), `full` (solve as it is),
`gradient`, `descend` or `scan` (a hand-written training loop). LEAVES is 0 for the benchmarks' MLP, or the number of arrays
that a residual network of small layers is made of.
"""

import json
import sys
import time
from typing import Any, cast

import diffrax
import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

import eomdl
from benchmarks.aliases import Args, Loss, Params
from benchmarks.measure import problem


jax.config.update("jax_enable_x64", True)
STEPS = 20


class Compiled:
    """Seconds that XLA took to compile, and of how many programs."""

    seconds, count = 0.0, 0

    @classmethod
    def record(cls, event: str, duration_secs: float, **details: str | int) -> None:
        """Count an event of JAX if it is a compilation."""
        del details
        if event == "/jax/core/compile/backend_compile_duration":
            cls.seconds += duration_secs
            cls.count += 1


def layers(leaves: int) -> tuple[Loss, Params, Args]:
    """A residual network of 4 units a layer: `(loss, params, args)`, with as many arrays."""
    keys = jax.random.split(jax.random.key(0), leaves // 2)
    params = [{"w": jax.random.normal(key, (4, 4)) / 2, "b": jnp.zeros(4)} for key in keys]
    args = (jax.random.normal(keys[0], (32, 4)), jax.random.normal(keys[1], (32, 4)))

    def loss(params: Params, args: Args) -> jax.Array:
        x, y = args
        for layer in params:
            x = x + 0.1 * jnp.tanh(x @ layer["w"] + layer["b"][None])
        return jnp.mean((x - y) ** 2)

    return loss, params, args


def hand_written(loss: Loss, params: Params, args: Args, flow: eomdl.AbstractFlow) -> Params:
    """The same path by a direct call of diffrax, all steps saved."""

    def field(s: ArrayLike, y: Params, args: Args) -> Params:
        return jax.tree.map(lambda v: flow.step_size * v, flow(s, y, args))

    @jax.jit
    def run(ts: jax.Array, params: Params, args: Args) -> Params:
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Tsit5(),
            ts[0],
            ts[-1],
            1.0,
            params,
            args,
            saveat=diffrax.SaveAt(ts=ts),
            stepsize_controller=diffrax.PIDController(rtol=1e-7, atol=1e-7),
            throw=False,
        ).ys

    return run(jnp.arange(STEPS + 1.0), params, args)


def scanned(loss: Loss, params: Params, args: Args, optimizer: optax.GradientTransformation) -> Any:
    """The same run by a training loop in `lax.scan` that saves nothing."""

    @jax.jit
    def run(params: Params, args: Args) -> Any:
        def step(carry: Any, _: None) -> tuple[Any, None]:
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, args), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), length=STEPS)[0]

    return run(params, args)


def answer(what: str, order: int, loss: Loss, params: Params, args: Args) -> Any:
    """What is timed: the result of one of the ways named in the module's docstring."""
    flow, optimizer = eomdl.EquationOfMotion(loss, 0.05, order), optax.sgd(0.05)
    quick: dict[str, Any] = {"estimate_error": False, "diagnose": False}
    return {
        "gradient": lambda: jax.jit(jax.grad(loss))(params, args),
        "hand": lambda: hand_written(loss, params, args, flow),
        "bare": lambda: eomdl.solve(flow, params, STEPS, args=args, **quick).params,
        "full": lambda: eomdl.solve(flow, params, STEPS, args=args).params,
        "descend": lambda: eomdl.descend(loss, params, optimizer, STEPS, args=args).params,
        "scan": lambda: scanned(loss, params, args, optimizer),
    }[what]()


def main() -> None:
    """Time the first answer and a second one, and print the first as JSON."""
    what, order, leaves = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if leaves:
        loss, params, args = layers(leaves)
    else:
        case = problem("main")
        loss, params, args = case.loss, case.params, case.args
    jax.block_until_ready((params, args))
    jax.monitoring.register_event_duration_secs_listener(cast(Any, Compiled.record))
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        jax.block_until_ready(answer(what, order, loss, params, args))
        seconds.append(time.perf_counter() - start)
        if len(seconds) == 1:
            compiled = {"compile_s": Compiled.seconds, "programs": Compiled.count}
    print(json.dumps({"what": what, "order": order, "leaves": leaves, "first_s": seconds[0]} | compiled))


if __name__ == "__main__":
    main()
