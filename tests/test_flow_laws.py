"""The laws of a flow, each over every flow in the registry, and the broken flows that they reject.

Here: what a flow is, and how well it models. `test_flow_runs.py`: how it is run. `test_flow_arguments.py`:
wrong arguments, documents.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import COMPILED, VALLEY, VALLEY_REST, assert_identical, flat, pulled_loss
from registry import ALL, KINDS, TIGHT, WITH_HIGH, Flow, find_start, make_flow, sgd

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
        """Return the model's error in one step, and at a fixed time."""
        return differences_at_saved_steps(self.real, self.model, self.epoch)


def differences_at_saved_steps(a: eomdl.Trajectory, b: eomdl.Trajectory, epoch: int = 1) -> np.ndarray:
    return np.array([difference(a.at(step // epoch), b.at(step)) for step in b.steps[1:]])


class Probe(NamedTuple):
    """Where a flow is compared with its real run, from the end of the transient on.

    - `start`, `begin`: the real run there, and its number of steps.
    - `saved`: steps of the real map, counted from there.
    - `epoch`: steps of the model in one of the real map.
    """

    start: Any
    begin: int
    saved: np.ndarray
    epoch: int


def make_probe(entry: Flow, rate: float) -> Probe:
    flow = make_flow(entry, rate)
    # Steps of the optimizer in a step of the map.
    epoch = 1 if flow.map is None else flow.map.num_steps(entry.args)
    start, begin = find_start(entry, rate)
    count = round(TIME / (float(flow.step_size) * epoch))
    assert count % flow.stride == 0
    return Probe(start, begin, np.array([0, flow.stride, count]), epoch)


def solve(entry: Flow, rate: float, tight: bool, diagnose: bool = False) -> eomdl.Trajectory:
    start, begin, saved, epoch = make_probe(entry, rate)
    steps = begin + epoch * saved
    options = {"args": entry.args, "resume": start, "save_steps": steps, "diagnose": diagnose}
    # Default tolerances are those of an adaptive solver, also of a flow that recommends another.
    options |= {**TIGHT, "estimate_error": False} if tight else {"solver": diffrax.Tsit5()}
    return eomdl.solve(make_flow(entry, rate), VALLEY, steps[-1], **options)


@functools.cache
def run_both(entry: Flow, rate: float, tight: bool = True) -> Runs:
    """Return the real run and its flow: the same runs for all laws."""
    flow = make_flow(entry, rate)
    start, begin, saved, epoch = make_probe(entry, rate)
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
    model = solve(entry, rate, tight)
    assert real.message == model.message == ""
    assert {leaf.dtype for leaf in jax.tree.leaves((model.params, model.end.state.flow))} == {
        jnp.dtype(float)
    }
    return Runs(real, model, epoch)


@eqx.filter_jit
def move(flow: eomdl.AbstractFlow, t: Any, params: Any, args: Any) -> tuple[Any, Any, Any]:
    """Return the state at these parameters, its velocity, and the state after a step, by one program."""
    state = flow.init(params, args)
    return state, flow(t, state, args), flow.map(state, args, t / flow.step_size)


@eqx.filter_jit
def take_stride(flow: eomdl.AbstractFlow, begin: Any, start: Any, args: Any) -> Any:
    """Return the state of a flow after a stride of the real map's steps, from where `find_start` says."""
    state = flow.init(VALLEY, args)
    if start is not None:
        state = flow.begin(begin * flow.step_size, *start, args)
    for n in range(flow.stride):
        state = flow.map(state, args, jnp.asarray(begin + n, float))
    return state


# --------------------------------------------------------------- what a flow is


@ALL
def test_it_rests_where_the_gradient_is_zero(entry):
    flow = make_flow(entry)
    t = 5 * flow.step_size
    rest, velocity, stepped = move(flow, t, VALLEY_REST, entry.args)
    assert_identical(velocity, jax.tree.map(np.zeros_like, rest))
    assert_identical(stepped, rest)
    _, moving, _ = move(flow, t, VALLEY, entry.args)
    assert np.linalg.norm(flat(flow.params(moving))) > 0.1


NESTED = {"a": (np.ones(2), [np.ones((1, 3))]), "b": np.array(0.5)}


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
        refreshed = state if flow.refresh is None else flow.refresh(0.0, state, args)
        for other in (flow(0.0, state, args), flow.map(state, args, 0.0), refreshed):
            assert described(other) == described(state)
        if dtype == jnp.float64:  # runs in float64: `run_both`
            return state
        run = eomdl.solve(flow, params, 4, args=args)
        assert described(run.end.state.flow) == described(state)
        for other in (run.final_params, flow.params(state), jax.tree.map(lambda x: x[0], run.params)):
            assert described(other) == described(params)
        return run.params

    jax.eval_shape(everything, params)  # traced, not compiled


@ALL
def test_the_learning_rate_is_a_leaf(entry):
    one, two = make_flow(entry, 0.01), make_flow(entry, 0.02)
    leaves = [
        [float(x) for x in jax.tree.leaves(eqx.filter(f, eqx.is_array)) if x.ndim == 0] for f in (one, two)
    ]
    assert 0.01 in leaves[0]
    assert [2 * x if x == 0.01 else x for x in leaves[0]] == leaves[1]
    assert jax.tree.structure(one) == jax.tree.structure(make_flow(entry, 1))  # an int is welcome
    np.testing.assert_allclose(two.step_size, 2 * one.step_size, rtol=1e-15)


@KINDS
def test_a_second_learning_rate_compiles_nothing(entry):
    first, second, third = entry.rates
    for rate in (first, second):  # small eager operations compile once for ever
        solve(entry, rate, tight=False, diagnose=True)
    find_start(entry, third)
    compiled = len(COMPILED)
    solve(entry, third, tight=False, diagnose=True)
    assert len(COMPILED) == compiled


def test_the_counter_of_compilations_counts():
    x = jnp.ones(3).block_until_ready()
    before = len(COMPILED)
    jax.jit(lambda x: x + 1)(x)
    assert len(COMPILED) == before + 1


# ---------------------------------------------------------------- how well it models


def law_of_local_error(entry):
    errors = [run_both(entry, rate).errors()[0] for rate in entry.rates]
    assert abs(eomdl.errors.observed_order(entry.rates, errors) - (entry.order + 1)) < 0.1


def law_of_error_at_a_fixed_time(entry):
    errors = [run_both(entry, rate).errors()[1] for rate in entry.rates]
    assert abs(eomdl.errors.observed_order(entry.rates, errors) - entry.order) < 0.1


def law_of_the_discrete_step(entry):
    """`map` is the optimizer's step, as far as the flow's own error tells: what `solve` measures tolerances by."""
    rate = entry.rates[0]
    flow = make_flow(entry, rate)
    start, begin = find_start(entry, rate)
    there = None if start is None else (start.params, start.state)
    assert flow.map is not None
    state = take_stride(flow, np.asarray(begin), there, entry.args)
    both = run_both(entry, rate)
    by_step = difference(both.model.at(both.model.steps[1]), flow.params(state))
    assert 0.5 < by_step / both.errors()[0] < 2


def law_of_default_tolerances(entry):
    """The ODE error, by a run with tolerances of 1e-12, is under 1 % of the model's against the real run."""
    exact, default = run_both(entry, entry.rates[0]), run_both(entry, entry.rates[0], tight=False)
    assert differences_at_saved_steps(exact.model, default.model).max() < 0.01 * exact.errors().max()


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

    @property
    def map(self):
        return self.flow.map


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

    @property
    def map(self):
        return DoubleStep(self.flow.map)


class DoubleStep(eomdl.StepMap):
    """Twice the step of a map."""

    step_map: eomdl.StepMap

    def __call__(self, state, args, k):
        return jax.tree.map(lambda x, y: 2 * y - x, state, self.step_map(state, args, k))


def broken(wrap: type, terms: int) -> Flow:
    return Flow(
        wrap.__name__, lambda loss, rate: wrap(eomdl.EquationOfMotion(loss, rate, terms)), sgd, terms + 1
    )


FAST, UNMEASURED, WRONG_STEP = broken(Fast, 1), broken(Unmeasured, 3), broken(WrongStep, 3)
RESTLESS, DOUBLE = broken(Restless, 1), broken(Double, 1)
BAKED = dataclasses.replace(FAST, name="Baked", make=lambda loss, rate: eomdl.EquationOfMotion(loss, 0.03, 1))


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
