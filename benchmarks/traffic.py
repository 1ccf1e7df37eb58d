"""`python -m benchmarks.traffic [DEVICES]`: what devices send one another in a step, and what memory each needs, as a table.

Counted in the compiled program, on devices that the processor plays: the number of bytes does not depend on what plays
them, and nothing is run. With 8 devices (the default) an MLP of 2 million parameters; with 64 one of 10^9. In copies of the
parameters (float32). A collective in the body of a loop counts once.
"""

import argparse
import itertools
import math
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pandas as pd
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import eomdl


ADAM = optax.adam(1e-3)
_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_COLLECTIVE = re.compile(rf"= (?P<shapes>.*?) (?P<kind>{_KINDS})(-start)?\((?P<rest>.*)")
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\})")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


class Problem(NamedTuple):
    """An MLP, its data, and how many devices they are spread over."""

    devices: int
    widths: tuple[int, ...]
    examples: int


def problem(devices: int) -> Problem:
    """Of 2 million parameters, and from 64 devices on of 10^9."""
    if devices < 64:
        return Problem(devices, (512, 1024, 1024, 512), 256)
    return Problem(devices, (8192,) * 17, 65_536)


class Counted(NamedTuple):
    """Of one compiled program.

    - `sent`: bytes that one device sends, by the ring algorithm: of n devices it sends (n - 1)/n of what it gathers or
        scatters, and twice that of what it reduces.
    - `collectives`: how many there are.
    - `memory`: bytes on one device, arguments, results and temporaries.
    """

    sent: float
    collectives: int
    memory: int


def size(shapes: str) -> int:
    """Bytes of the arrays named in a piece of a program's text."""
    return sum(
        _BYTES[kind] * math.prod(int(n) for n in lengths.split(",") if n)
        for kind, lengths in _SHAPE.findall(shapes)
        if kind in _BYTES
    )


def counted(compiled: Any, devices: int) -> Counted:
    """The collectives in the text of a compiled program for so many devices, and its memory."""
    found = [m.groupdict() for m in _COLLECTIVE.finditer(compiled.as_text())]
    sent = sum(_share(m["kind"], _group(m["rest"], devices)) * size(m["shapes"]) for m in found)
    memory = compiled.memory_analysis()
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return Counted(sent, len(found), used)


def _group(rest: str, devices: int) -> int:
    """How many devices a collective is among: all where its text names none."""
    found = _GROUPS.search(rest)
    if found is None:
        return devices
    return int(found[1]) if found[1] else len(found[2].split(","))


def _share(kind: str, devices: int) -> float:
    """What a device sends, in units of what it holds afterwards."""
    ring = (devices - 1) / devices
    shares = {"all-reduce": 2 * ring, "all-gather": ring, "all-to-all": ring, "reduce-scatter": devices - 1.0}
    return shares.get(kind, 1.0)


def loss(params: list[jax.Array], args: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Mean squares of an MLP."""
    x, y = args
    for w in params[:-1]:
        x = jnp.tanh(x @ w)
    return jnp.mean((x @ params[-1] - y) ** 2)


def layouts(problem: Problem) -> dict[str, tuple[Any, Any]]:
    """`{name: (params, args)}`, shapes and shardings only."""
    devices, widths, examples = problem
    line = jax.make_mesh((devices,), ("d",), axis_types=(AxisType.Auto,))
    side = math.isqrt(devices)
    square = jax.make_mesh((devices // side, side), ("d", "m"), axis_types=(AxisType.Auto,) * 2)
    pairs = list(itertools.pairwise(widths))

    def shapes(mesh: Any, weights: Callable[[int], tuple], data: tuple) -> tuple[Any, Any]:
        def shape(lengths: tuple, spec: tuple) -> jax.ShapeDtypeStruct:
            place = NamedSharding(mesh, PartitionSpec(*spec))
            return jax.ShapeDtypeStruct(lengths, jnp.float32, sharding=place)

        params = [shape(pair, weights(i)) for i, pair in enumerate(pairs)]
        return params, tuple(shape((examples, n), data) for n in (widths[0], widths[-1]))

    return {
        "data": shapes(line, lambda i: (), ("d",)),
        # By columns and by rows in turn: between two layers nothing is to be gathered.
        "parameters": shapes(line, lambda i: ("d",) if i % 2 else (None, "d"), ()),
        "both, one axis": shapes(line, lambda i: ("d",), ("d",)),
        "both, two axes": shapes(square, lambda i: ("m", "d") if i % 2 else ("d", "m"), ("d",)),
    }


def step(params: Any, state: Any, args: Any) -> tuple[Any, Any]:
    """One of `descend`."""
    updates, state = ADAM.update(jax.grad(loss)(params, args), state, params)
    return optax.apply_updates(params, updates), state


def programs(params: Any, args: Any) -> dict[str, Any]:
    """`{name: compiled program}` of a step of `descend`, of the fields, and of `solve` (whose loop makes an ODE step)."""
    places = jax.tree.map(lambda x: x.sharding, params)
    moments = optax.tree.map_params(ADAM, lambda m, p: p, jax.eval_shape(ADAM.init, params), params)
    found = {"descend, Adam": jax.jit(step, out_shardings=(places, None)).lower(params, moments, args)}
    for n in (0, 1, 2):
        flow = eomdl.EquationOfMotion(loss, 1e-2, n)
        field = jax.jit(lambda p, a, flow=flow: flow(0.0, p, a), out_shardings=places)
        run = jax.jit(lambda p, a, flow=flow: _solved(flow, p, a), out_shardings=places)
        found |= {
            f"field, order {n}": field.lower(params, args),
            f"solve, order {n}": run.lower(params, args),
        }
    return {name: program.compile() for name, program in found.items()}


def _solved(flow: eomdl.AbstractFlow, params: Any, args: Any) -> Any:
    return eomdl.solve(flow, params, 8, args=args, save_params=False, save_steps=[8]).final_params


def table(problem: Problem) -> pd.DataFrame:
    """One row per layout and program, in copies of the parameters."""
    copy = sum(4 * a * b for a, b in itertools.pairwise(problem.widths))
    rows = []
    for layout, (params, args) in layouts(problem).items():
        for name, program in programs(params, args).items():
            found = counted(program, problem.devices)
            sent, memory = found.sent / copy, found.memory / copy
            rows.append(
                {
                    "layout": layout,
                    "program": name,
                    "sent": sent,
                    "collectives": found.collectives,
                    "memory": memory,
                }
            )
    return pd.DataFrame(rows)


def main() -> None:
    """Play the devices and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("devices", nargs="?", type=int, default=8)
    devices = parser.parse_args().devices
    # More threads than devices, or two programs may wait for each other; read when the devices are made.
    os.environ.setdefault("NPROC", str(4 * devices))
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    print(table(problem(devices)).to_string(index=False, float_format="{:.2f}".format))


if __name__ == "__main__":
    main()
