"""All flows in one list. A new flow is tested by being listed in `FLOWS`: `test_flow_laws.py` does the rest.

All laws of a flow run one after the other in one worker, whichever file they stand in: they share its programs.
"""

import dataclasses
import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import VALLEY, pulled_loss, pulled_losses

import eomdl
from eomdl.flows import (
    AdamFlow,
    CentralFlow,
    ComplexPrincipalFlow,
    DiscretizedLangevinFlow,
    EdgeFlow,
    LangevinFlow,
    ModifiedFlow,
    MomentumFlow,
    PrincipalFlow,
    ReshufflingFlow,
    RodFlow,
    SecondMoment,
    StochasticInterpolatingFlow,
    StochasticModifiedFlow,
    StochasticMomentumFlow,
    UnderdampedLangevinFlow,
    minimax_weights,
    rmsprop_flow,
)
from eomdl.losses import mean_loss


PULL = jnp.array(0.4, float)
PULLS = jnp.array([0.9, -0.5, 0.2])  # the minibatches of an epoch


@cache  # an optimizer is tried once for all rates
def unit_steps(loss: Callable, optimizer: Callable[[Any], optax.GradientTransformation]) -> eomdl.StepMap:
    return eomdl.optimizer_step(loss, optimizer(1.0))


class Steps(eomdl.StepMap):
    """The steps of an optimizer whose updates are its learning rate times those of rate 1: all rates share one program."""

    loss: Callable = eqx.field(static=True)
    optimizer: Callable[[Any], optax.GradientTransformation] = eqx.field(static=True)
    rate: jax.Array

    @property
    def unit(self) -> eomdl.StepMap:
        return unit_steps(self.loss, self.optimizer)

    def init(self, params):
        return self.unit.init(params)

    def params(self, state):
        return state[0]

    def __call__(self, state, args, k):
        return jax.tree.map(jnp.add, state, self.increment(state, args, k))

    def increment(self, state, args, k):
        updates, change = self.unit.increment(state, args, k)
        return jax.tree.map(lambda d: self.rate.astype(d.dtype) * d, updates), change


class MeanEpoch(eomdl.StepMap):
    """The mean of the parameters after an epoch over all orders of its minibatches."""

    loss: Callable = eqx.field(static=True)
    rate: jax.Array

    def __call__(self, state, args, k):
        del k

        def epoch(order):
            params = state
            for batch in order:
                gradient = jax.grad(self.loss)(params, batch)
                params = jax.tree.map(lambda x, g: x - self.rate * g, params, gradient)
            return params

        orders = jnp.stack([args[jnp.array(order)] for order in itertools.permutations(range(len(args)))])
        return jax.tree.map(lambda x: jnp.mean(x, axis=0), jax.vmap(epoch)(orders))


@dataclasses.dataclass(frozen=True, eq=False)  # one entry is one key of a cache
class Flow:
    """A flow, what it models, and how well.

    - `make`: (loss, learning rate) -> flow; `real`: (loss, learning rate) -> the step map that it models.
    - `order` p: the error at a fixed time is O(h^p), in one step O(h^(p + 1)).
    - `rates`: small enough for the order to show, large enough for the error to stand clear of rounding.
    - `transient`: time of the real run until the optimizer's memory has filled, where the flow begins to hold.
    - `args`: the data.
    - `variant`: the same code as another entry with other numbers; its runs are not tested again.

    Equal only to itself.
    """

    name: str
    make: Callable[[Any, Any], eomdl.AbstractFlow]
    real: Callable[[Any, Any], eomdl.StepMap]
    order: int
    rates: tuple[float, ...] = (0.04, 0.02, 0.01)
    transient: float = 0.0
    args: Any = dataclasses.field(default_factory=lambda: PULL)
    variant: bool = False

    @property
    def terms(self) -> int:
        """Counter terms, of the flows that have them."""
        return self.order - 1


def steps(optimizer: Callable[[Any], optax.GradientTransformation]) -> Callable[[Any, Any], eomdl.StepMap]:
    return lambda loss, rate: Steps(loss, optimizer, jnp.asarray(rate))


sgd = steps(optax.sgd)
heavy_ball = steps(lambda rate: optax.sgd(rate, momentum=0.5))
nesterov = steps(lambda rate: optax.sgd(rate, momentum=0.5, nesterov=True))
adam = steps(lambda rate: optax.adam(rate, 0.4, 0.5, 0.1, 0.05))
adam_outside = steps(lambda rate: optax.adam(rate, 0.4, 0.5, 0.1))
rmsprop = steps(lambda rate: optax.rmsprop(rate, 0.5, 0.05))


def interpolating(
    real: Callable, points: int, stride: int = 1, weights: Any = None, backward: int = 0
) -> Callable:
    """(loss, learning rate) -> the flow of a map, on a clock that counts the learning rate."""
    return lambda loss, rate: eomdl.InterpolatingFlow(
        real(loss, rate), rate, points, stride, weights, backward
    )


def equation_of_motion(terms: int) -> Flow:
    return Flow(
        f"EoM {terms}",
        lambda loss, rate: eomdl.EquationOfMotion(loss, rate, terms),
        sgd,
        terms + 1,
        variant=terms != 2,
    )


@cache  # a field is known by identity: the same one compiles once
def descent_of(loss: Callable) -> Callable:
    return lambda params, args: jax.tree.map(jnp.negative, jax.grad(loss)(params, args))


EQUATIONS = [Flow("gradient flow", eomdl.GradientFlow, sgd, 1), *map(equation_of_motion, range(7))]


def up_to(terms: int) -> list[Flow]:
    """Gradient flow, and the equation of motion with 1 ... `terms` counter terms."""
    return [flow for flow in EQUATIONS if flow.terms <= terms and flow.name != "EoM 0"]


HIGH = [flow for flow in EQUATIONS if flow.terms in (3, 4)]  # slow to compile: how well they model only
SLOW = (0.004, 0.002, 0.001)  # 60 steps and more in a transient of 0.24: 0.5^60 is no memory

FLOWS = [
    *up_to(2),
    Flow("gradient descent, 3 points", interpolating(sgd, 3), sgd, 3),
    Flow("gradient descent, stride 2", interpolating(sgd, 3, 2), sgd, 3),
    Flow(
        "gradient descent, stride 2, one back",
        interpolating(sgd, 2, 2, backward=1),
        sgd,
        2,
        SLOW,
        variant=True,
    ),
    Flow(
        "gradient descent, minimax",
        interpolating(sgd, 4, 1, minimax_weights(4, 0.9)),
        sgd,
        2,
        SLOW,
        variant=True,
    ),
    Flow("heavy ball, 2 points", interpolating(heavy_ball, 2), heavy_ball, 2, SLOW, 0.24),
    Flow("heavy ball, stride 2", interpolating(heavy_ball, 2, 2), heavy_ball, 2, SLOW, 0.24, variant=True),
    Flow("Adam, 2 points", interpolating(adam, 2), adam, 2, SLOW, 0.24, variant=True),
    Flow("Adam, stride 2", interpolating(adam, 2, 2), adam, 2, SLOW, 0.24),
    Flow("MomentumFlow", lambda loss, rate: MomentumFlow(loss, rate, 0.5), heavy_ball, 2, SLOW, 0.24),
    Flow(
        "MomentumFlow, Nesterov",
        lambda loss, rate: MomentumFlow(loss, rate, 0.5, nesterov=True),
        nesterov,
        2,
        SLOW,
        0.24,
        variant=True,
    ),
    Flow("AdamFlow", lambda loss, rate: AdamFlow(loss, rate, 0.4, 0.5, 0.1, 0.05), adam, 2, SLOW, 0.24),
    Flow(
        "AdamFlow, eps outside the root",
        lambda loss, rate: AdamFlow(loss, rate, 0.4, 0.5, 0.1),
        adam_outside,
        2,
        SLOW,
        0.24,
        variant=True,
    ),
    Flow(
        "AdamFlow, order 0",
        lambda loss, rate: AdamFlow(loss, rate, 0.4, 0.5, 0.1, 0.05, order=0),
        adam,
        1,
        SLOW,
        0.24,
        variant=True,
    ),
    Flow("rmsprop_flow", lambda loss, rate: rmsprop_flow(loss, rate, 0.5, 0.05), rmsprop, 2, SLOW, 0.24),
    # Runs of the central flow, which are long to compile: test_central.py.
    Flow("CentralFlow", CentralFlow, sgd, 1, variant=True),
    Flow(
        "CentralFlow, RMSProp",
        lambda loss, rate: CentralFlow(loss, rate, 1, SecondMoment(0.5, 0.05)),
        rmsprop,
        1,
        (0.002, 0.001, 0.0005),
        0.24,
        variant=True,
    ),
    Flow("ModifiedFlow", lambda loss, rate: ModifiedFlow(descent_of(loss), rate, 1), sgd, 2),
    Flow("PrincipalFlow", PrincipalFlow, sgd, 2),
    # Two trees in its state, as in those of the flows with a momentum. In float32: test_edge_flows.py.
    Flow("ComplexPrincipalFlow", ComplexPrincipalFlow, sgd, 2, variant=True),
    Flow("EdgeFlow", EdgeFlow, sgd, 1),
    Flow("RodFlow", lambda loss, rate: RodFlow(sgd(loss, rate), rate), sgd, 2, (0.01, 0.005, 0.0025)),
    Flow("ReshufflingFlow", ReshufflingFlow, MeanEpoch, 2, (0.01, 0.005, 0.0025), args=PULLS),
]


# ------------------------------------------------------------ flows with noise: models of a law


@dataclasses.dataclass(frozen=True, eq=False)
class NoisyFlow:
    """A flow with noise, whose law is compared with that over all batches.

    - `make`: (losses, learning rate) -> flow.
    - `outcomes`: (flow, t, state) -> the states after a step, stacked, one for every outcome of the draw, and their probabilities.
    - `order` p: expectations at a fixed time are off by O(h^p), in one step by O(h^(p + 1)), where h is `step_size`.
    - `start`: learning rate -> the state from which the step is taken; None for the parameters only. `time`: when.
    - `args`, `rates`, `variant`: as of `Flow`.
    """

    name: str
    make: Callable[[Any, Any], eomdl.AbstractFlow]
    outcomes: Callable[[eomdl.AbstractFlow, Any, Any], tuple[Any, Any]]
    order: int
    rates: tuple[float, ...] = (0.02, 0.01)
    args: Any = dataclasses.field(default_factory=lambda: EXAMPLES)
    start: Callable[[Any], Any] | None = None
    time: float = 0.0
    variant: bool = False

    def state(self, flow: eomdl.AbstractFlow) -> Any:
        return flow.init(VALLEY, self.args) if self.start is None else self.start(flow)


EXAMPLES = jnp.array([0.9, -0.5, 0.2, 1.4, -1.1])
BATCH = 2
BATCHES = jnp.array(list(itertools.combinations(range(len(EXAMPLES)), BATCH)))


def sgd_outcomes(flow, t, state):
    del t

    def step(batch):
        gradient = jax.grad(lambda p: jnp.mean(pulled_losses(p, EXAMPLES[batch])))(state)
        return jax.tree.map(lambda x, g: x - flow.learning_rate * g, state, gradient)

    return jax.vmap(step)(BATCHES), jnp.full(len(BATCHES), 1 / len(BATCHES))


def stochastic_modified(order: int, noise_order: int) -> NoisyFlow:
    return NoisyFlow(
        f"StochasticModifiedFlow {order}, {noise_order}",
        lambda losses, rate: StochasticModifiedFlow(losses, rate, BATCH, order, noise_order),
        sgd_outcomes,
        order,
        variant=(order, noise_order) != (2, 2),
    )


TEMPERATURE, FRICTION = 0.3, 1.1
# Gauss-Hermite quadrature over two normal numbers: exact for polynomials of degree 11.
POINTS, WEIGHTS = np.polynomial.hermite_e.hermegauss(6)
NORMALS = jnp.array(list(itertools.product(POINTS, POINTS)))
PROBABILITIES = jnp.array([a * b for a, b in itertools.product(WEIGHTS, WEIGHTS)]) / (2 * np.pi)


def langevin_outcomes(flow, t, state):
    """x - h grad U + sqrt(2 T h) z, over the normal numbers."""
    del t
    h, gradient = flow.step_size, jax.grad(flow.loss)(state, EXAMPLES)
    kick = jnp.sqrt(2 * TEMPERATURE * h) * NORMALS
    after = {name: state[name] - h * gradient[name] + kick[:, i] for i, name in enumerate(("x", "y"))}
    return after, PROBABILITIES


def baoab_outcomes(flow, t, state):
    """Half a kick, half a drift, friction and noise exactly, half a drift, half a kick (Leimkuhler & Matthews)."""
    del t
    h, decay = flow.step_size, jnp.exp(-FRICTION * flow.step_size)

    def step(z):
        x, v = state
        force = lambda x: jax.grad(flow.loss)(x, EXAMPLES)
        move = lambda a, b, c: jax.tree.map(lambda p, q: p + c * q, a, b)
        v = move(v, force(x), -h / 2)
        x = move(x, v, h / 2)
        heat = jnp.sqrt(TEMPERATURE * (1 - decay**2))
        v = {"x": decay * v["x"] + heat * z[0], "y": decay * v["y"] + heat * z[1]}
        x = move(x, v, h / 2)
        return x, move(v, force(x), -h / 2)

    return jax.vmap(step)(NORMALS), PROBABILITIES


class AdaptiveStep(eomdl.StepMap):
    r"""RMSProp and Adam whose $1 - \beta = c \eta$ falls with the rate, which is a leaf: all rates share one program."""

    loss: Callable = eqx.field(static=True)
    rate: jax.Array
    adam: bool = eqx.field(default=False, static=True)

    def init(self, params):
        averages = jax.tree.map(jnp.zeros_like, params)
        return (params, averages, averages) if self.adam else (params, averages)

    def params(self, state):
        return state[0]

    def __call__(self, state, args, k):
        x, *m, v = state
        g = jax.grad(self.loss)(x, args)
        update = lambda c: lambda a, b: (a + c * self.rate.astype(a.dtype) * (b - a)).astype(a.dtype)
        v = jax.tree.map(update(2.0), v, jax.tree.map(jnp.square, g))
        m = [jax.tree.map(update(3.0), *m, g)] if self.adam else []
        corrections = [1 - (1 - c * self.rate) ** (k + 1) if self.adam else 1.0 for c in (3.0, 2.0)]
        step = lambda p, a, b: (
            p - self.rate * (a / corrections[0]) / (jnp.sqrt(b / corrections[1]) + 0.5)
        ).astype(p.dtype)
        return jax.tree.map(step, x, *(m or [g]), v), *m, v


def on_a_line(params, pulls):
    """One parameter, where only x is given."""
    return pulled_losses({"y": jnp.asarray(-0.7, params["x"].dtype), **params}, pulls)


def step_outcomes(flow, t, state):
    step = lambda batch: flow.step_map(state, batch, t / flow.step_size)
    return jax.vmap(step)(EXAMPLES), jnp.full(len(EXAMPLES), 1 / len(EXAMPLES))


def averages(*values):
    return tuple({"x": jnp.array(value, float)} for value in values)


def of_steps(
    name: str, step_map: Callable[[Any, Any], eomdl.StepMap], points: int, **options: Any
) -> NoisyFlow:
    return NoisyFlow(
        f"StochasticInterpolatingFlow, {name}",
        lambda losses, rate: StochasticInterpolatingFlow(step_map(losses, jnp.asarray(rate)), rate, points),
        step_outcomes,
        points,
        variant=name != "SGD",
        **options,
    )


def heavy_ball_outcomes(flow, t, state):
    del t

    def step(batch):
        x, v = state
        gradient = jax.grad(lambda p: jnp.mean(pulled_losses(p, EXAMPLES[batch])))(x)
        h = flow.step_size
        v = jax.tree.map(lambda v, g: flow.momentum * v - h * g, v, gradient)
        return jax.tree.map(lambda x, v: x + h * v, x, v), v

    return jax.vmap(step)(BATCHES), jnp.full(len(BATCHES), 1 / len(BATCHES))


def stochastic_momentum(order: int) -> NoisyFlow:
    """The rate is the time of a step, the root of the learning rate; the friction is 1.5."""
    return NoisyFlow(
        f"StochasticMomentumFlow {order}",
        lambda losses, rate: StochasticMomentumFlow(losses, rate**2, 1 - 1.5 * rate, BATCH, order),
        heavy_ball_outcomes,
        order,
        start=lambda flow: (VALLEY, {"x": jnp.array(0.3, float), "y": jnp.array(-0.5, float)}),
        variant=order == 1,
    )


NOISY_FLOWS = [
    stochastic_momentum(2),
    stochastic_momentum(1),
    of_steps("SGD", eomdl.maps.GradientDescentStep, 2),
    of_steps("SGD, 1 point", eomdl.maps.GradientDescentStep, 1),
    of_steps(
        "RMSProp",
        lambda losses, rate: AdaptiveStep(on_a_line, rate),
        2,
        start=lambda flow: averages(1.2, 0.7),
    ),
    of_steps(
        "Adam",
        lambda losses, rate: AdaptiveStep(on_a_line, rate, adam=True),
        2,
        start=lambda flow: averages(1.2, 0.3, 0.7),
        time=0.6,
    ),
    stochastic_modified(2, 2),
    stochastic_modified(2, 1),
    stochastic_modified(1, 1),
    NoisyFlow(
        "LangevinFlow",
        lambda losses, rate: LangevinFlow(mean_loss(losses), TEMPERATURE, rate),
        langevin_outcomes,
        1,
    ),
    NoisyFlow(
        "DiscretizedLangevinFlow",
        lambda losses, rate: DiscretizedLangevinFlow(mean_loss(losses), TEMPERATURE, rate),
        langevin_outcomes,
        2,
    ),
    NoisyFlow(
        "UnderdampedLangevinFlow",
        lambda losses, rate: UnderdampedLangevinFlow(mean_loss(losses), TEMPERATURE, FRICTION, rate),
        baoab_outcomes,
        2,
        start=lambda flow: (VALLEY, {"x": jnp.array(0.3, float), "y": jnp.array(-0.5, float)}),
    ),
]


# ------------------------------------------------------------ what the laws share


def for_each(entries: list[Any]) -> pytest.MarkDecorator:
    """Parametrize a law by entries; `conftest.py` runs the tests of one entry together."""
    params = [
        pytest.param(entry, id=entry.name, marks=pytest.mark.xdist_group(f"flow: {entry.name}"))
        for entry in entries
    ]
    return pytest.mark.parametrize("entry", params)


NOISY = for_each(NOISY_FLOWS)
ALL = for_each(FLOWS)
KINDS = for_each([entry for entry in FLOWS if not entry.variant])
WITH_HIGH = for_each([*FLOWS, *HIGH])
TIGHT = {"rtol": 1e-12, "atol": 1e-13}


def make_flow(entry: Flow, rate: Any = None) -> eomdl.AbstractFlow:
    return entry.make(pulled_loss, entry.rates[0] if rate is None else rate)


@cache
def find_start(entry: Flow, rate: float) -> tuple[Any, int]:
    """Return where the real run is after its transient (None without one), and after how many steps."""
    begin = round(entry.transient / float(make_flow(entry, rate).step_size))
    if begin == 0:
        return None, 0
    step_map = entry.real(pulled_loss, rate)
    return eomdl.iterate(step_map, VALLEY, begin, args=entry.args, save_steps=[begin]).end, begin
