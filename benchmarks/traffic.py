"""`python -m benchmarks.traffic`: what devices send one another in a step, and what memory each needs, as a table.

Counted in the compiled program, on 8 devices that the processor plays: the number of bytes does not depend on what plays
them. In copies of the parameters of an MLP, which is what scales to another model. A collective in the body of a loop counts once.
"""

import math
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple


# Before JAX starts. More threads than devices, or two programs may wait for each other.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("NPROC", "32")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
import pandas as pd  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec  # noqa: E402

import eomdl  # noqa: E402


DEVICES = 8
WIDTHS = (512, 1024, 1024, 512)
EXAMPLES = 256
ADAM = optax.adam(1e-3)
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_COLLECTIVE = re.compile(
    r"= (?P<shapes>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


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


def counted(compiled: Any, devices: int = DEVICES) -> Counted:
    """The collectives in the text of a compiled program, and its memory."""
    ring = (devices - 1) / devices
    # Of what a collective results in: a part is 1/n of what is scattered.
    factor = {
        "all-reduce": 2 * ring,
        "all-gather": ring,
        "reduce-scatter": devices - 1,
        "all-to-all": ring,
        "collective-permute": 1.0,
    }
    found = [m.groupdict() for m in _COLLECTIVE.finditer(compiled.as_text())]
    sent = sum(factor[m["kind"]] * size(m["shapes"]) for m in found)
    memory = compiled.memory_analysis()
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return Counted(sent, len(found), used)


def loss(params: list[jax.Array], args: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Mean squares of an MLP."""
    x, y = args
    for w in params[:-1]:
        x = jnp.tanh(x @ w)
    return jnp.mean((x @ params[-1] - y) ** 2)


def layouts() -> dict[str, tuple[Any, Any]]:
    """`{name: (params, args)}`, shapes and shardings only."""
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))

    def shape(*lengths: int, spec: tuple = ()) -> jax.ShapeDtypeStruct:
        place = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(lengths, jnp.float32, sharding=place)

    pairs = list(zip(WIDTHS[:-1], WIDTHS[1:], strict=True))
    whole = [shape(a, b) for a, b in pairs]
    rows = [shape(a, b, spec=("d",)) for a, b in pairs]
    # Columns, rows, columns, ...: between two layers nothing is to be gathered.
    in_turn = [shape(a, b, spec=("d",) if i % 2 else (None, "d")) for i, (a, b) in enumerate(pairs)]
    data = {spec: tuple(shape(EXAMPLES, n, spec=spec) for n in (WIDTHS[0], WIDTHS[-1])) for spec in ((), ("d",))}
    return {
        "data": (whole, data["d",]),
        "parameters": (in_turn, data[()]),
        "both": (rows, data["d",]),
    }


def step(params: Any, state: Any, args: Any) -> tuple[Any, Any]:
    """One of `descend`."""
    updates, state = ADAM.update(jax.grad(loss)(params, args), state, params)
    return optax.apply_updates(params, updates), state


def programs() -> dict[str, Callable[[Any, Any], Any]]:
    """`{name: function (params, args) -> like params}` of what is done in a step."""
    flows = {f"field, order {n}": eomdl.EquationOfMotion(loss, 1e-2, n) for n in (0, 1, 2)}
    return {name: lambda p, a, flow=flow: flow(0.0, p, a) for name, flow in flows.items()}


def table() -> pd.DataFrame:
    """One row per layout and program, in copies of the parameters."""
    rows = []
    copy = sum(4 * a * b for a, b in zip(WIDTHS[:-1], WIDTHS[1:], strict=True))
    for layout, (params, args) in layouts().items():
        places = jax.tree.map(lambda x: x.sharding, params)
        moments = jax.eval_shape(ADAM.init, params)
        moments = optax.tree.map_params(ADAM, lambda m, p: p, moments, params)
        compiled = {
            "descend, Adam": jax.jit(step, out_shardings=(places, None)).lower(params, moments, args).compile()
        }
        for name, field in programs().items():
            compiled[name] = jax.jit(field, out_shardings=places).lower(params, args).compile()
        for name, program in compiled.items():
            found = counted(program)
            rows.append(
                {
                    "layout": layout,
                    "program": name,
                    "sent by a device": found.sent / copy,
                    "collectives": found.collectives,
                    "memory of a device": found.memory / copy,
                }
            )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    print(table().to_string(index=False, float_format="{:.2f}".format))
