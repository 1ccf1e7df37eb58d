"""The laws of a flow, each over every flow in the registry, and the broken flows that they reject.

Here: what a flow is, and how well it models. `test_flow_runs.py`: how it is run. `test_flow_arguments.py`:
wrong arguments, documents.
"""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import COMPILED, VALLEY, VALLEY_REST, assert_identical, flat, pulled_loss
from registry import ALL, FLOWS, HIGH, KINDS, TIGHT, WITH_HIGH, Flow, begun, made, sgd

import eomdl


TIME = 0.24  # a whole number of strides and epochs at every learning rate of the registry


def difference(a: Any, b: Any) -> float:
    return float(np.linalg.norm(flat(a) - flat(b)))


# ------------------------------------------- a real run, and the flow from its transient on


class Runs(NamedTuple):
    """A real run and its flow, saved at the end of the transient, one stride (epoch) later and `TIME` later."""

    real: eomdl.Trajectory
    model: eomdl.Trajectory
    epoch: int  # steps of the model in one of the real map

    def errors(self) -> np.ndarray:
        """The model's error in one step, and at a fixed time."""
        return row_differences(self.real, self.model, self.epoch)


def row_differences(a: eomdl.Trajectory, b: eomdl.Trajectory, epoch: int = 1) -> np.ndarray:
    return np.array([difference(a.at(step // epoch), b.at(step)) for step in b.steps[1:]])


class Stretch(NamedTuple):
    """From the end of the transient on: the steps saved of the real map, relative to the first one."""

    start: Any
    begin: int
    saved: np.ndarray
    epoch: int


def stretch(entry: Flow, rate: float) -> Stretch:
    flow = made(entry, rate)
    epoch = flow.step_span(entry.args)  # steps of the optimizer in a step of the map
    start, begin = begun(entry, rate)
    count = round(TIME / (float(flow.step_size) * epoch))
    assert count % flow.stride == 0
    return Stretch(start, begin, np.array([0, flow.stride, count]), epoch)


def solved(entry: Flow, rate: float, tight: bool, diagnose: bool = False) -> eomdl.Trajectory:
    start, begin, saved, epoch = stretch(entry, rate)
    steps = begin + epoch * saved
    options = {"args": entry.args, "resume": start, "save_steps": steps, "diagnose": diagnose}
    options |= {**TIGHT, "estimate_error": False} if tight else {}
    return eomdl.solve(made(entry, rate), VALLEY, steps[-1], **options)


@functools.cache
def runs(entry_id: int, rate: float, tight: bool) -> Runs:
    entry = REGISTERED[entry_id]
    flow = made(entry, rate)
    start, begin, saved, epoch = stretch(entry, rate)
    neighbours = [j for j, _ in flow.target.weights]
    needed = np.unique(begin + np.add.outer(saved, neighbours))
    real = eomdl.iterate(
        entry.real(pulled_loss, rate),
        VALLEY,
        max(needed),
        args=entry.args,
        resume=start,
        save_steps=needed[needed >= begin],
    ).averaged(flow.target)
    model = solved(entry, rate, tight)
    assert real.message == model.message == ""
    assert {leaf.dtype for leaf in jax.tree.leaves((model.params, model.end.state.flow))} == {
        jnp.dtype(float)
    }
    return Runs(real, model, epoch)


def measured(entry: Flow, rate: float, tight: bool = True) -> Runs:
    """The same runs for all laws. (An entry holds arrays, which no cache can take.)"""
    return runs(REGISTERED.index(entry), rate, tight)


@pytest.fixture(scope="module", autouse=True)
def _runs_of_this_file_only():
    yield
    runs.cache_clear()


# --------------------------------------------------------------- what a flow is


@ALL
def test_it_rests_where_the_gradient_is_zero(entry):
    flow = made(entry)
    rest = flow.init(VALLEY_REST, entry.args)
    t = 5 * flow.step_size
    assert_identical(flow(t, rest, entry.args), jax.tree.map(jnp.zeros_like, rest))
    assert_identical(flow.step(t, rest, entry.args), rest)
    moving = flow(t, flow.init(VALLEY, entry.args), entry.args)
    assert np.linalg.norm(flat(flow.params(moving))) > 0.1


NESTED = {"a": (jnp.ones(2), [jnp.ones((1, 3))]), "b": jnp.array(0.5)}


def nested_loss(params, pull):
    return pull * sum(jnp.sum(jnp.cos(leaf)) for leaf in jax.tree.leaves(params))


@KINDS
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_it_keeps_structure_shapes_and_dtype(entry, dtype):
    params, args = jax.tree.map(lambda x: x.astype(dtype), (NESTED, entry.args))
    flow = entry.make(nested_loss, entry.rates[0])

    described = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))

    def everything(params):
        state = flow.init(params, args)
        assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(dtype)}
        for other in (flow(0.0, state, args), flow.step(0.0, state, args), flow.refresh(0.0, state, args)):
            assert described(other) == described(state)
        if dtype == jnp.float64:  # runs in float64: `runs`
            return state
        run = eomdl.solve(flow, params, 4, args=args)
        assert described(run.end.state.flow) == described(state)
        for other in (run.final_params, flow.params(state), jax.tree.map(lambda x: x[0], run.params)):
            assert described(other) == described(params)
        return run.params

    jax.eval_shape(everything, params)  # traced, not compiled


@ALL
def test_the_learning_rate_is_a_leaf(entry):
    one, two = made(entry, 0.01), made(entry, 0.02)
    leaves = [
        [float(x) for x in jax.tree.leaves(eqx.filter(f, eqx.is_array)) if x.ndim == 0] for f in (one, two)
    ]
    assert 0.01 in leaves[0]
    assert [2 * x if x == 0.01 else x for x in leaves[0]] == leaves[1]
    assert jax.tree.structure(one) == jax.tree.structure(made(entry, 1))  # an int is welcome
    np.testing.assert_allclose(two.step_size, 2 * one.step_size, rtol=1e-15)


@KINDS
def test_a_second_learning_rate_compiles_nothing(entry):
    first, second, third = entry.rates
    for rate in (first, second):  # small eager operations compile once for ever
        solved(entry, rate, tight=False, diagnose=True)
    begun(entry, third)
    compiled = len(COMPILED)
    solved(entry, third, tight=False, diagnose=True)
    assert len(COMPILED) == compiled


def test_the_counter_of_compilations_counts():
    x = jnp.ones(3).block_until_ready()
    before = len(COMPILED)
    jax.jit(lambda x: x + 1)(x)
    assert len(COMPILED) == before + 1


# ---------------------------------------------------------------- how well it models


def law_of_local_error(entry):
    errors = [measured(entry, rate).errors()[0] for rate in entry.rates]
    assert abs(eomdl.errors.observed_order(entry.rates, errors) - (entry.order + 1)) < 0.1


def law_of_error_at_a_fixed_time(entry):
    errors = [measured(entry, rate).errors()[1] for rate in entry.rates]
    assert abs(eomdl.errors.observed_order(entry.rates, errors) - entry.order) < 0.1


def law_of_the_discrete_step(entry):
    """`step` is the optimizer's, as far as the flow's own error tells: what `solve` measures tolerances by."""
    rate = entry.rates[0]
    flow = made(entry, rate)
    start, begin = begun(entry, rate)
    state = flow.init(VALLEY, entry.args)
    if start is not None:
        state = flow.begin(begin * flow.step_size, start.params, start.state, entry.args)
    for n in range(flow.stride):
        state = flow.step((begin + n) * flow.step_size, state, entry.args)
        assert state is not None
    both = measured(entry, rate)
    by_step = difference(both.model.at(both.model.steps[1]), flow.params(state))
    assert 0.5 < by_step / both.errors()[0] < 2


def law_of_default_tolerances(entry):
    """The ODE error, by a run with tolerances of 1e-12, is under 1 % of the model's against the real run."""
    exact, default = (measured(entry, entry.rates[0], tight) for tight in (True, False))
    assert row_differences(exact.model, default.model).max() < 0.01 * exact.errors().max()


LAWS = [
    law_of_local_error,
    law_of_error_at_a_fixed_time,
    law_of_the_discrete_step,
    law_of_default_tolerances,
]


@WITH_HIGH
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test(law, entry):
    law(entry)


class Fast(eomdl.AbstractFlow):
    """Broken: a flow at 1.05 times its speed."""

    flow: eomdl.EquationOfMotion

    @property
    def step_size(self):
        return self.flow.step_size

    def __call__(self, t, state, args):
        return jax.tree.map(lambda v: 1.05 * v, self.flow(t, state, args))

    def step(self, t, state, args):
        return self.flow.step(t, state, args)


class Restless(Fast):
    """Broken: it never rests."""

    def __call__(self, t, state, args):
        return jax.tree.map(lambda v: v + 1e-6, self.flow(t, state, args))


class Double(Fast):
    """Broken: float64 whatever it is given."""

    def __call__(self, t, state, args):
        return jax.tree.map(lambda v: v.astype(jnp.float64), self.flow(t, state, args))


class Unmeasured(eomdl.AbstractFlow):
    """Broken: a good flow that does not say which step it models, so that tolerances are not measured."""

    flow: eomdl.EquationOfMotion

    @property
    def step_size(self):
        return self.flow.step_size

    def __call__(self, t, state, args):
        return self.flow(t, state, args)


class WrongStep(Unmeasured):
    """Broken: the step it names is twice that which it models."""

    def step(self, t, state, args):
        return jax.tree.map(lambda x, y: 2 * y - x, state, self.flow.step(t, state, args))


def broken(wrap: type, terms: int) -> Flow:
    return Flow(
        wrap.__name__, lambda loss, rate: wrap(eomdl.EquationOfMotion(loss, rate, terms)), sgd, terms + 1
    )


FAST, UNMEASURED, WRONG_STEP = broken(Fast, 1), broken(Unmeasured, 4), broken(WrongStep, 4)
RESTLESS, DOUBLE = broken(Restless, 1), broken(Double, 1)
BAKED = FAST._replace(name="Baked", make=lambda loss, rate: eomdl.EquationOfMotion(loss, 0.03, 1))
REGISTERED = [*FLOWS, *HIGH, FAST, UNMEASURED, WRONG_STEP]


@pytest.mark.parametrize(
    ("law", "entry"),
    [
        (test_it_rests_where_the_gradient_is_zero, RESTLESS),
        (functools.partial(test_it_keeps_structure_shapes_and_dtype, dtype=jnp.float32), DOUBLE),
        (test_the_learning_rate_is_a_leaf, BAKED),
        (law_of_local_error, FAST),
        (law_of_error_at_a_fixed_time, FAST),
        (law_of_the_discrete_step, UNMEASURED),
        (law_of_the_discrete_step, WRONG_STEP),
        (law_of_default_tolerances, UNMEASURED),
        (law_of_default_tolerances, WRONG_STEP),
    ],
    ids=lambda x: x.name if isinstance(x, Flow) else getattr(x, "__name__", "law of structure"),
)
def test_a_broken_flow_is_rejected(law, entry):
    with pytest.raises(AssertionError):
        law(entry)
