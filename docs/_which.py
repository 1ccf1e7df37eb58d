"""The table of all flows on one problem: every number in it is measured when the page is built."""

import inspect
import itertools
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import optax

import eomdl
from eomdl import flows


jax.config.update("jax_enable_x64", True)
STEPS, STAGES = 100, 6  # of every run; evaluations in an ODE step of Tsit5
SMALL, LARGE = (
    0.1,
    0.4,
)  # learning rates: eta * lambda_max is below 0.5, and far above 1
EPOCH = 0.02  # that of minibatches
# One solver for all flows, whatever they recommend: the table counts its evaluations.
QUICK = {"solver": diffrax.Tsit5(), "estimate_error": False, "diagnose": False}


def loss(w, data):
    x, y = data
    return jnp.mean((jnp.tanh(x @ w["in"]) @ w["out"] - y) ** 2)


X = jax.random.normal(jax.random.key(0), (50, 3))
W = {"in": jax.random.normal(jax.random.key(1), (3, 8)), "out": jnp.full(8, 0.2)}
DATA = (X, jnp.sin(X[:, 0]))
PARTS = jax.tree.map(lambda leaf: leaf.reshape(5, 10, *leaf.shape[1:]), DATA)


class Row(NamedTuple):
    """A flow, the optimizer that it models, and what is known of it.

    `begin`: steps of the real run before the flow begins, for the optimizer's memory to fill.
    """

    name: str
    flow: eomdl.AbstractFlow
    optimizer: optax.GradientTransformation | None
    models: str
    order: int
    valid: str
    begin: int = 0


FAR_BELOW, BELOW = r"$\eta\lambda_{\max} \ll 1$", r"$\eta\lambda_{\max} < 1$"
FILLED = r"memory filled; $\epsilon$ not tiny"


def descent() -> list[Row]:
    """Flows of gradient descent."""
    sgd = optax.sgd(SMALL)
    step = eomdl.optimizer_step(loss, sgd)
    weights = flows.minimax_weights(6, 0.6)
    minimax = eomdl.InterpolatingFlow(step, SMALL, 6, weights=weights)
    name, bound = "`InterpolatingFlow`", r"$\eta\lambda_{\max}$ below the bound given"
    rows = [
        Row("`GradientFlow`", eomdl.GradientFlow(loss, SMALL), sgd, "GD", 1, FAR_BELOW)
    ]
    for n in (1, 2, 3):
        flow = eomdl.EquationOfMotion(loss, SMALL, n)
        rows.append(
            Row(f"`EquationOfMotion`, order {n}", flow, sgd, "GD", n + 1, BELOW)
        )
    for n in (2, 4):
        flow = eomdl.InterpolatingFlow(step, SMALL, n)
        rows.append(Row(f"{name}, {n} points", flow, sgd, "any; here GD", n, BELOW))
    rows.append(
        Row(
            f"{name}, 6 points, `minimax_weights`",
            minimax,
            sgd,
            "any; here GD",
            3,
            bound,
        )
    )
    return rows


def past_one() -> list[Row]:
    """At a learning rate so large that the iterates alternate."""
    sgd, at = optax.sgd(LARGE), rf", $\eta = {LARGE}$"
    step = eomdl.optimizer_step(loss, sgd)
    strided = eomdl.InterpolatingFlow(step, LARGE, 4, stride=2)
    name, models = (
        f"`InterpolatingFlow`, 4 points, `stride=2`{at}",
        "any, every 2nd step; here GD",
    )
    plain = eomdl.GradientFlow(loss, LARGE)
    return [
        Row(f"`GradientFlow`{at}", plain, sgd, "GD", 1, FAR_BELOW),
        Row(name, strided, sgd, models, 4, r"$\eta\lambda_{\max} < 1 + \sqrt 2$"),
        *for_the_edge(sgd, at),
    ]


def for_the_edge(sgd: optax.GradientTransformation, at: str) -> list[Row]:
    """Flows that model the oscillation, or need none."""
    step = eomdl.optimizer_step(loss, sgd)
    whole, edge = "a quadratic loss", "something alternates at the start"
    even = "GD; every 2nd step past 1"
    return [
        Row(
            f"`PrincipalFlow`{at}",
            flows.PrincipalFlow(loss, LARGE),
            sgd,
            even,
            2,
            whole,
        ),
        Row(
            f"`ComplexPrincipalFlow`{at}",
            flows.ComplexPrincipalFlow(loss, LARGE),
            sgd,
            "GD",
            2,
            whole,
        ),
        Row(
            f"`EdgeFlow`{at}",
            flows.EdgeFlow(loss, LARGE),
            sgd,
            "GD, smoothed path",
            1,
            edge,
        ),
        Row(
            f"`RodFlow`{at}",
            flows.RodFlow(step, LARGE),
            sgd,
            "any, midpoints; here GD",
            2,
            edge,
        ),
    ]


def at_the_edge() -> Row:
    """The smoothed path of gradient descent; here nothing is critical, and it is gradient flow."""
    flow = flows.CentralFlow(loss, SMALL)
    models = "GD and RMSProp, smoothed"
    valid = r"small oscillations, past $\eta\lambda_{\max} = 2$ too"
    return Row("`CentralFlow`", flow, optax.sgd(SMALL), models, 1, valid)


def any_field() -> Row:
    """The equation of motion as the modified equation of a field; here the loss's own."""

    def descent(w, data):
        return jax.tree.map(jnp.negative, jax.grad(loss)(w, data))

    flow = flows.ModifiedFlow(descent, SMALL, 1)
    models = "explicit Euler, Runge-Kutta, on any field; here GD"
    return Row("`ModifiedFlow`, order 1", flow, optax.sgd(SMALL), models, 2, BELOW)


def memory() -> list[Row]:
    """Flows of optimizers with a memory, in closed form and from points."""
    heavy = optax.sgd(0.01, momentum=0.9)
    adam = optax.adam(2e-3, 0.9, 0.95, 1e-8, 1e-2)
    rmsprop = optax.rmsprop(2e-3, 0.9, 1e-2)
    of_heavy = flows.MomentumFlow(loss, 0.01, 0.9)
    of_adam = flows.AdamFlow(loss, 2e-3, 0.9, 0.95, 1e-8, 1e-2)
    of_rmsprop = flows.rmsprop_flow(loss, 2e-3, 0.9, 1e-2)
    name, filled = "`InterpolatingFlow`, 3 points", "memory filled"

    def points(optimizer, step_size):
        return eomdl.InterpolatingFlow(
            eomdl.optimizer_step(loss, optimizer), step_size, 3
        )

    return [
        Row("`MomentumFlow`", of_heavy, heavy, "heavy ball, Nesterov", 2, filled, 100),
        Row(name, points(heavy, 0.1), heavy, "any; here heavy ball", 3, filled, 100),
        Row("`AdamFlow`", of_adam, adam, "Adam", 2, FILLED, 200),
        Row(name, points(adam, 2e-3), adam, "any; here Adam", 3, filled, 200),
        Row("`rmsprop_flow`", of_rmsprop, rmsprop, "RMSProp", 2, FILLED, 100),
    ]


def reshuffling() -> Row:
    """The mean of SGD, which is no single run of an optimizer."""
    valid = r"$m\eta\lambda_{\max} \ll 1$, $m$ minibatches"
    flow = flows.ReshufflingFlow(loss, EPOCH)
    return Row(
        "`ReshufflingFlow`",
        flow,
        None,
        "SGD, mean over the orders of an epoch",
        2,
        valid,
    )


def rows() -> list[Row]:
    """Return all flows of the library that have no noise."""
    found = [
        *descent(),
        any_field(),
        *past_one(),
        at_the_edge(),
        *memory(),
        reshuffling(),
    ]
    things = [
        getattr(space, name) for space in (eomdl, flows) for name in space.__all__
    ]
    kinds = {
        t for t in things if inspect.isclass(t) and issubclass(t, eomdl.AbstractFlow)
    }
    kinds = {
        t for t in kinds if t.noise is eomdl.AbstractFlow.noise
    }  # a law is no path: guide Noise
    missing = kinds - {eomdl.AbstractFlow} - {type(row.flow) for row in found}
    if missing:
        raise ValueError(
            f"rows: expected every flow of the library, {missing} are missing"
        )
    return found


def flops(function: Any, *inputs: Any) -> float:
    return jax.jit(function).lower(*inputs).compile().cost_analysis()["flops"]


GRADIENT = flops(jax.grad(loss), W, DATA)


def evaluation(flow: eomdl.AbstractFlow) -> float:
    """Cost of one evaluation in gradients of the whole data, as XLA counts it.

    XLA counts the body of a loop once: of flows with a loop the body is counted, times its length.
    """
    if isinstance(flow, eomdl.InterpolatingFlow):
        return flow.points * flow.stride
    if isinstance(flow, flows.PrincipalFlow | flows.ComplexPrincipalFlow):
        return flow.gradient_cost
    if isinstance(flow, flows.ReshufflingFlow):
        body = flows.MomentumFlow(loss, EPOCH, 0.0)  # a penalty on the gradient, too
        part = jax.tree.map(lambda leaf: leaf[0], PARTS)
        return 5 * flops(lambda w, part: body(0.0, w, part), W, part) / GRADIENT
    field, state = (lambda x, data: flow(0.0, x, data)), flow.init(W, DATA)
    return flops(field, state, DATA) / GRADIENT


def mean_epoch(w, parts, k):
    """The mean over all orders of the minibatches of one epoch."""

    def epoch(order):
        def step(w, i):
            gradient = jax.grad(loss)(w, jax.tree.map(lambda leaf: leaf[i], parts))
            return jax.tree.map(lambda p, g: p - EPOCH * g, w, gradient), None

        return jax.lax.scan(step, w, order)[0]

    orders = jnp.array(list(itertools.permutations(range(5))))
    return jax.tree.map(lambda leaf: leaf.mean(0), jax.vmap(epoch)(orders))


def runs(row: Row) -> tuple[eomdl.Trajectory, eomdl.Trajectory]:
    """The real run and the flow."""
    if row.optimizer is None:
        path = eomdl.solve(row.flow, W, STEPS, args=PARTS, save_steps=5, **QUICK)
        real = eomdl.iterate(mean_epoch, W, STEPS // 5, args=PARTS)
        columns = (
            path.steps,
            path.times,
            real.params,
            {},
            None,
        )  # an epoch is five steps
        return eomdl.Trajectory(*columns, real.result, real.end), path
    after, end = None, STEPS + row.begin
    if row.begin:
        after = eomdl.descend(loss, W, row.optimizer, row.begin, args=DATA).end
    real = eomdl.descend(loss, W, row.optimizer, end, args=DATA, resume=after)
    return real, eomdl.solve(row.flow, W, end, args=DATA, resume=after, **QUICK)


def table() -> str:
    """One row per flow, as Markdown."""
    lines = [
        "| flow | optimizer | order | valid while | gradients per evaluation "
        "| gradients per step | error / distance travelled |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows():
        real, path = runs(row)
        found = eomdl.compare(real, {"flow": path}).at_multiples_of(row.flow.stride)
        error = found.distance["flow"].max() / found.travelled.max()
        one = evaluation(row.flow)
        per_step = path.stats.num_steps * STAGES * one / STEPS
        cells = (row.name, row.models, row.order, row.valid)
        numbers = (f"{one:.2g}", f"{per_step:.2g}", f"{error:.1e}")
        lines.append(f"| {' | '.join(map(str, (*cells, *numbers)))} |")
    return "\n".join(lines)
