"""The laws of a flow, each over every flow in the registry, and the broken flows that they reject."""

import dataclasses
import functools
import inspect
import re
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import COMPILED, VALLEY, VALLEY_REST, assert_close, assert_identical, flat, pulled_loss
from registry import FLOWS, Flow, sgd

import eomdl


ALL = pytest.mark.parametrize("entry", FLOWS, ids=lambda entry: entry.name)
TIGHT = {"rtol": 1e-12, "atol": 1e-13}
TIME = 0.24  # a whole number of strides and epochs at every learning rate of the registry


def made(entry: Flow, rate: Any = None) -> eomdl.AbstractFlow:
    return entry.make(pulled_loss, entry.rates[0] if rate is None else rate)


def difference(a: Any, b: Any) -> float:
    return float(np.linalg.norm(flat(a) - flat(b)))


# ------------------------------------------- a real run, and the flow from its transient on


class Runs(NamedTuple):
    """A real run and its flow, saved at the end of the transient, one stride (epoch) later and `TIME` later."""

    real: eomdl.Trajectory
    model: eomdl.Trajectory

    def errors(self) -> np.ndarray:
        """The model's error in one step, and at a fixed time."""
        return row_differences(self.real, self.model)


def row_differences(a: eomdl.Trajectory, b: eomdl.Trajectory) -> np.ndarray:
    pairs = ([flat(jax.tree.map(lambda x, i=i: x[i], run.params)) for run in (a, b)] for i in (1, 2))
    return np.array([np.linalg.norm(x - y) for x, y in pairs])


def begun(entry: Flow, rate: float) -> tuple[Any, int]:
    """Where the real run is after its transient, and after how many steps."""
    begin = round(entry.transient / float(made(entry, rate).step_size))
    if begin == 0:
        return None, 0
    step_map = entry.real(pulled_loss, rate)
    return eomdl.iterate(step_map, VALLEY, begin, args=entry.args, save_steps=[begin]).end, begin


@functools.cache
def runs(entry_id: int, rate: float, tight: bool) -> Runs:
    entry = REGISTERED[entry_id]
    flow = made(entry, rate)
    epoch = flow.step_span(entry.args)  # steps of the optimizer in a step of the map
    start, begin = begun(entry, rate)
    count = round(TIME / (float(flow.step_size) * epoch))
    assert count % flow.stride == 0
    saved = np.array([0, flow.stride, count])
    real = eomdl.iterate(
        entry.real(pulled_loss, rate),
        VALLEY,
        begin + count,
        args=entry.args,
        resume=start,
        save_steps=begin + saved,
    )
    model = eomdl.solve(
        flow,
        VALLEY,
        begin + epoch * count,
        args=entry.args,
        resume=start,
        save_steps=begin + epoch * saved,
        **(TIGHT if tight else {}),
    )
    assert real.message == model.message == ""
    return Runs(real, model)


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


@ALL
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_it_keeps_structure_shapes_and_dtype(entry, dtype):
    params, args = jax.tree.map(lambda x: x.astype(dtype), (NESTED, entry.args))
    flow = entry.make(nested_loss, entry.rates[0])

    def everything(params):
        state = flow.init(params, args)
        run = eomdl.solve(flow, params, 4, args=args)
        again = flow(0.0, state, args), flow.step(0.0, state, args), flow.refresh(0.0, state, args)
        end = run.final_params, flow.params(state), jax.tree.map(lambda x: x[0], run.params)
        return state, (*again, run.end.state.flow), end

    state, states, ends = jax.eval_shape(everything, params)  # traced, not compiled
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(dtype)}
    described = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))
    for other in states:
        assert described(other) == described(state)
    for other in ends:
        assert described(other) == described(params)


@ALL
def test_the_learning_rate_is_a_leaf(entry):
    one, two = made(entry, 0.01), made(entry, 0.02)
    leaves = [
        [float(x) for x in jax.tree.leaves(eqx.filter(f, eqx.is_array)) if x.ndim == 0] for f in (one, two)
    ]
    assert 0.01 in leaves[0] and [2 * x if x == 0.01 else x for x in leaves[0]] == leaves[1]
    assert jax.tree.structure(one) == jax.tree.structure(made(entry, 1))  # an int is welcome
    np.testing.assert_allclose(two.step_size, 2 * one.step_size, rtol=1e-15)


@ALL
def test_a_second_learning_rate_compiles_nothing(entry):
    start, begin = begun(entry, entry.rates[0])

    def path(rate):
        eomdl.solve(made(entry, rate), VALLEY, begin + 12, args=entry.args, resume=start)

    first, second, third = entry.rates
    path(first), path(second)  # small eager operations compile once for ever
    compiled = len(COMPILED)
    path(third)
    assert len(COMPILED) == compiled


def test_the_counter_of_compilations_counts():
    x = jnp.ones(3).block_until_ready()
    before = len(COMPILED)
    jax.jit(lambda x: x + 1)(x)
    assert len(COMPILED) == before + 1


@ALL
def test_jit_and_vmap_change_nothing(entry):
    start, begin = begun(entry, entry.rates[0])
    flows = [made(entry, rate) for rate in entry.rates[:2]]
    num_steps = begin + 2 * flows[0].stride

    def path(flow):
        run = eomdl.solve(
            flow, VALLEY, num_steps, args=entry.args, resume=start, estimate_error=False, **TIGHT
        )
        return run.params, run.times

    arrays, rest = zip(*(eqx.partition(flow, eqx.is_array) for flow in flows), strict=True)
    stacked = eqx.combine(jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays), rest[0])
    params, times = eqx.filter_jit(eqx.filter_vmap(path))(stacked)
    for i, flow in enumerate(flows):
        alone, clock = path(flow)
        assert_close(jax.tree.map(lambda x, i=i: x[i], params), alone, rtol=1e-9)
        np.testing.assert_allclose(times[i], clock, rtol=1e-14)


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
        state = flow.begin(start.params, start.state, entry.args)
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


@ALL
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
REGISTERED = [*FLOWS, FAST, UNMEASURED, WRONG_STEP]


@pytest.mark.parametrize(
    "law, entry",
    [
        (law_of_local_error, FAST),
        (law_of_error_at_a_fixed_time, FAST),
        (law_of_the_discrete_step, UNMEASURED),
        (law_of_the_discrete_step, WRONG_STEP),
        (law_of_default_tolerances, UNMEASURED),
        (law_of_default_tolerances, WRONG_STEP),
    ],
    ids=lambda x: x.name if isinstance(x, Flow) else x.__name__,
)
def test_a_broken_flow_is_rejected(law, entry):
    with pytest.raises(AssertionError):
        law(entry)


# ------------------------------------------------------------------- how it is run


@ALL
def test_a_resumed_run_is_the_whole_one_within_its_ode_error(entry):
    rate = entry.rates[0]
    start, begin = begun(entry, rate)
    options = {"args": entry.args, "resume": start, "save_steps": [begin]}
    flow, end = made(entry, rate), begin + 12
    whole = eomdl.solve(flow, VALLEY, end, **options | {"save_steps": [begin, end]})
    half = eomdl.solve(flow, VALLEY, begin + 5, **options)  # between two multiples of a stride of 2
    resumed = eomdl.solve(flow, VALLEY, end, args=entry.args, resume=half, save_steps=[begin, end])
    np.testing.assert_array_equal(resumed.steps, whole.steps)
    np.testing.assert_allclose(resumed.times, whole.times, rtol=1e-14)
    assert resumed.stats.rtol == whole.stats.rtol and resumed.stats.atol == whole.stats.atol
    rounding = 1e-15 * np.linalg.norm(flat(VALLEY))
    # The estimate is the difference of two integrations, which may err to the same side.
    estimate = whole.ode_error[-1] + resumed.ode_error[-1]
    assert difference(resumed.at(end), whole.at(end)) <= 2 * estimate + rounding


def a_batch_for_each_step(entry: Flow, num_steps: int) -> jax.Array:
    """The entry's data, times another number for every step."""
    numbers = 1 + 0.5 * jnp.sin(jnp.arange(float(num_steps)))
    return jax.vmap(lambda a: a * entry.args)(numbers)


@ALL
def test_minibatches_are_seen_each_in_its_own_step(entry):
    flow, num_steps = made(entry), 8
    batches = a_batch_for_each_step(entry, num_steps)
    options = {"estimate_error": False, "diagnose": False, **TIGHT}

    def path(batches):
        return flat_rows(eomdl.solve(flow, VALLEY, num_steps, batches=batches, **options))

    rows = path(batches)
    for k in (0, 3, 7):  # another batch in step k: another path from the end of its stride on, not before
        end = (k // flow.stride + 1) * flow.stride
        other = path(batches.at[k].multiply(-1))
        np.testing.assert_array_equal(other[: end - flow.stride + 1], rows[: end - flow.stride + 1])
        assert np.all(np.linalg.norm(other[end:] - rows[end:], axis=1) > 1e-6)
    # The same batch in every step is no batches at all.
    constant = path(jnp.broadcast_to(entry.args, batches.shape))
    whole = flat_rows(eomdl.solve(flow, VALLEY, num_steps, args=entry.args, **options))
    np.testing.assert_allclose(constant, whole, rtol=1e-9)


def flat_rows(run: eomdl.Trajectory) -> np.ndarray:
    return np.stack([run.params["x"], run.params["y"]], axis=1)


# ---------------------------------------------------------- arguments and documents

NO_NUMBER = ["0.1", 1j, True, np.ones((2, 5))]


@ALL
def test_a_wrong_argument_is_named(entry):
    flow = made(entry)
    numbers = 0
    for field in dataclasses.fields(flow):
        value = getattr(flow, field.name)
        if eqx.is_array(value) and value.ndim == 0:
            wrong = [np.nan, np.inf, -np.inf, -0.1, *NO_NUMBER]
        elif isinstance(value, int) and not isinstance(value, bool):
            wrong = [-1, 1.5, "2", None, True]
        else:
            continue
        numbers += 1
        for bad in wrong:
            with pytest.raises(ValueError, match=rf"^{field.name}: expected .*got "):
                dataclasses.replace(flow, **{field.name: bad})
    assert numbers > 0


@ALL
def test_what_steps_cannot_be_taken_on_is_named(entry):
    for loss in (lambda p, args: p["x"] * jnp.ones(2), lambda p, args: {"x": p["x"]}):
        with pytest.raises(ValueError, match=r"^(loss|step_map|step_map\(state, args, k\)): expected"):
            eomdl.solve(entry.make(loss, 0.1), VALLEY, 4, args=entry.args)


SOURCE = re.compile(r"[A-Z]\w+(,| &| et al\.)?.* (19|20)\d\d|arXiv \d{4}\.\d{4,5}|derived here")
PUBLIC = [
    x
    for name in eomdl.flows.__all__
    if inspect.isclass(x := getattr(eomdl.flows, name)) or name.endswith("flow")
]
PUBLIC_FLOWS = [
    x
    for x in PUBLIC
    if not inspect.isclass(x) or (issubclass(x, eomdl.AbstractFlow) and not inspect.isabstract(x))
]


@pytest.mark.parametrize("flow", PUBLIC_FLOWS, ids=lambda flow: flow.__name__)
def test_every_flow_names_its_source_and_is_listed(flow):
    assert SOURCE.search(inspect.getdoc(flow))
    # A class by its type, a function that makes one by its name.
    listed = {type(made(entry)) for entry in FLOWS} | {entry.name for entry in FLOWS}
    assert (flow if inspect.isclass(flow) else flow.__name__) in listed
