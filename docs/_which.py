"""The table of all flows on one problem: every number in it is measured when the page is built."""

import inspect
import itertools
from typing import Any, NamedTuple

import eomdl
import jax
import jax.numpy as jnp
import optax
from eomdl.flows import (
    AdamFlow,
    MomentumFlow,
    ReshufflingFlow,
    minimax_weights,
    rmsprop_flow,
)


jax.config.update("jax_enable_x64", True)
STEPS, STAGES = 100, 6  # of every run; evaluations in an ODE step of Tsit5


def loss(w, data):
    x, y = data
    return jnp.mean((jnp.tanh(x @ w["in"]) @ w["out"] - y) ** 2)


X = jax.random.normal(jax.random.key(0), (50, 3))
W = {"in": jax.random.normal(jax.random.key(1), (3, 8)), "out": jnp.full(8, 0.2)}
DATA = (X, jnp.sin(X[:, 0]))
PARTS = jax.tree.map(
    lambda leaf: leaf.reshape(5, 10, *leaf.shape[1:]), DATA
)  # five minibatches
SMALL, LARGE = (
    0.1,
    0.4,
)  # learning rates: eta * lambda_max is below 0.5, and far above 1
QUICK = {"estimate_error": False, "diagnose": False}


class Row(NamedTuple):
    """A flow, the optimizer that it models, and what is known of it.

    `begin`: steps of the real run before the flow begins, for the optimizer's memory to fill.
    """

    name: str
    flow: eomdl.AbstractFlow
    optimizer: optax.GradientTransformation
    models: str
    order: str
    valid: str
    begin: int = 0


def rows() -> list[Row]:
    """All flows of the library."""
    sgd = optax.sgd(SMALL)
    step = eomdl.optimizer_step(loss, sgd)
    heavy, adam, rmsprop = (
        optax.sgd(0.01, momentum=0.9),
        optax.adam(2e-3, 0.9, 0.95, 1e-8, 1e-2),
        optax.rmsprop(2e-3, 0.9, 1e-2),
    )
    below, fast = (
        "$\\eta\\lambda_{\\max} < 1$",
        eomdl.optimizer_step(loss, optax.sgd(LARGE)),
    )
    terms = [
        Row(
            f"`EquationOfMotion`, order {n}",
            eomdl.EquationOfMotion(loss, SMALL, n),
            sgd,
            "GD",
            f"{n + 1}",
            below,
        )
        for n in (1, 2, 3)
    ]
    points = [
        Row(
            f"`InterpolatingFlow`, {n} points",
            eomdl.InterpolatingFlow(step, SMALL, n),
            sgd,
            "any; here GD",
            f"{n}",
            below,
        )
        for n in (2, 4)
    ]
    return [
        Row(
            "`GradientFlow`",
            eomdl.GradientFlow(loss, SMALL),
            sgd,
            "GD",
            "1",
            "$\\eta\\lambda_{\\max} \\ll 1$",
        ),
        *terms,
        *points,
        Row(
            "`InterpolatingFlow`, 6 points, `minimax_weights`",
            eomdl.InterpolatingFlow(step, SMALL, 6, weights=minimax_weights(6, 0.6)),
            sgd,
            "any; here GD",
            "3",
            "$\\eta\\lambda_{\\max}$ below the bound given",
        ),
        Row(
            "`GradientFlow`, $\\eta = 0.4$",
            eomdl.GradientFlow(loss, LARGE),
            optax.sgd(LARGE),
            "GD",
            "1",
            "$\\eta\\lambda_{\\max} \\ll 1$",
        ),
        Row(
            "`InterpolatingFlow`, 4 points, `stride=2`, $\\eta = 0.4$",
            eomdl.InterpolatingFlow(fast, LARGE, 4, stride=2),
            optax.sgd(LARGE),
            "any, every second step; here GD",
            "4",
            "$\\eta\\lambda_{\\max} < 1 + \\sqrt 2$",
        ),
        Row(
            "`MomentumFlow`",
            MomentumFlow(loss, 0.01, 0.9),
            heavy,
            "heavy ball, Nesterov",
            "2",
            "memory filled",
            100,
        ),
        Row(
            "`InterpolatingFlow`, 3 points",
            eomdl.InterpolatingFlow(eomdl.optimizer_step(loss, heavy), 0.1, 3),
            heavy,
            "any; here heavy ball",
            "3",
            "memory filled",
            100,
        ),
        Row(
            "`AdamFlow`",
            AdamFlow(loss, 2e-3, 0.9, 0.95, 1e-8, 1e-2),
            adam,
            "Adam",
            "2",
            "memory filled; $\\epsilon$ not tiny",
            200,
        ),
        Row(
            "`InterpolatingFlow`, 3 points",
            eomdl.InterpolatingFlow(eomdl.optimizer_step(loss, adam), 2e-3, 3),
            adam,
            "any; here Adam",
            "3",
            "memory filled",
            200,
        ),
        Row(
            "`rmsprop_flow`",
            rmsprop_flow(loss, 2e-3, 0.9, 1e-2),
            rmsprop,
            "RMSProp",
            "2",
            "memory filled; $\\epsilon$ not tiny",
            100,
        ),
        Row(
            "`ReshufflingFlow`",
            ReshufflingFlow(loss, 0.02),
            None,
            "SGD, mean over all orders of an epoch",
            "2",
            "$m\\eta\\lambda_{\\max} \\ll 1$ for $m$ minibatches",
        ),
    ]


def flops(function: Any, *inputs: Any) -> float:
    return jax.jit(function).lower(*inputs).compile().cost_analysis()["flops"]


GRADIENT = flops(jax.grad(loss), W, DATA)


def evaluation(flow: eomdl.AbstractFlow) -> float:
    """Cost of one evaluation in gradients: XLA's count, but for the flows with a loop, whose body XLA counts once."""
    if isinstance(flow, eomdl.InterpolatingFlow):
        return flow.points * flow.stride
    if isinstance(flow, ReshufflingFlow):
        return (
            5
            * flops(
                lambda w, part: MomentumFlow(loss, 0.02, 0.0)(0.0, w, part),
                W,
                jax.tree.map(lambda leaf: leaf[0], PARTS),
            )
            / GRADIENT
        )
    return flops(lambda w, data: flow(0.0, w, data), W, DATA) / GRADIENT


def epochs() -> eomdl.Trajectory:
    """The mean over all orders of the minibatches, epoch by epoch."""

    def epoch(w, parts, k):
        def one(order):
            def step(w, i):
                gradient = jax.grad(loss)(w, jax.tree.map(lambda leaf: leaf[i], parts))
                return jax.tree.map(lambda p, g: p - 0.02 * g, w, gradient), None

            return jax.lax.scan(step, w, order)[0]

        orders = jnp.array(list(itertools.permutations(range(5))))
        return jax.tree.map(lambda leaf: leaf.mean(0), jax.vmap(one)(orders))

    return eomdl.iterate(epoch, W, STEPS // 5, args=PARTS)


def measured(row: Row) -> tuple[float, float]:
    """Gradients per step of the optimizer; the largest error over the distance travelled."""
    if row.optimizer is None:
        path = eomdl.solve(row.flow, W, STEPS, args=PARTS, save_steps=5, **QUICK)
        real = epochs()
        real = eomdl.Trajectory(
            path.steps, path.times, real.params, {}, None, real.result, real.end
        )
    else:
        end = STEPS + row.begin
        start = (
            eomdl.descend(loss, W, row.optimizer, row.begin, args=DATA)
            if row.begin
            else None
        )
        after = None if start is None else start.end
        real = eomdl.descend(loss, W, row.optimizer, end, args=DATA, resume=after)
        path = eomdl.solve(row.flow, W, end, args=DATA, resume=after, **QUICK)
    found = eomdl.compare(real, {"flow": path}).at_multiples_of(row.flow.stride)

    return path.stats.num_steps * STAGES * evaluation(row.flow) / STEPS, found.distance[
        "flow"
    ].max() / found.travelled.max()


def table() -> str:
    """One row per flow, as Markdown."""
    listed = rows()
    kinds = {
        thing
        for thing in map(eomdl.flows.__dict__.get, eomdl.flows.__all__)
        if inspect.isclass(thing)
    }
    flows = {kind for kind in kinds if issubclass(kind, eomdl.AbstractFlow)} - {
        eomdl.AbstractFlow
    }
    missing = flows - {type(row.flow) for row in listed}
    if missing:
        raise ValueError(
            f"rows: expected every flow of eomdl.flows, {missing} are missing"
        )
    lines = [
        "| flow | optimizer | order | valid while | gradients per evaluation | gradients per step | error / distance travelled |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in listed:
        cost, error = measured(row)
        lines.append(
            f"| {row.name} | {row.models} | {row.order} | {row.valid} | {evaluation(row.flow):.2g} | {cost:.2g} | {error:.1e} |"
        )
    return "\n".join(lines)
