"""Wrong arguments raise a `ValueError`: which argument, what was expected, what was got."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import NET, NET_ARGS, NET_BATCHES, VALLEY, net_loss, valley_loss

import eomdl


SGD = optax.sgd(0.1)
GF = eomdl.GradientFlow(valley_loss, 0.1)


def raises(start: str, got: str):
    """A `ValueError` "argument: expected ..., got ..."."""
    return pytest.raises(ValueError, match=rf"^{re.escape(start)}.*: expected .*got .*{re.escape(got)}")


def descend(loss=valley_loss, params=VALLEY, optimizer=SGD, num_steps=3, **options):
    return eomdl.descend(loss, params, optimizer, num_steps, **options)


def solve(loss=valley_loss, params=VALLEY, num_steps=3, **options):
    return eomdl.solve(eomdl.EquationOfMotion(loss, 0.1), params, num_steps, **options)


def counterterms(loss=valley_loss, params=VALLEY, **options):
    return eomdl.counterterms(loss, params, 1, **options)


RUNS = pytest.mark.parametrize("run", [descend, solve])
ALL = pytest.mark.parametrize("run", [descend, solve, counterterms])
NOT_A_REAL_SCALAR = ["0.1", None, 1j, True, np.ones(2)]


# --------------------------------------------------------------------- scalars


@pytest.mark.parametrize("value", [-1e-3, np.nan, np.inf, *NOT_A_REAL_SCALAR], ids=repr)
def test_weight_decay(value):
    with raises("weight_decay", repr(value)):
        eomdl.WeightDecay(valley_loss, value)


@pytest.mark.parametrize("value", [-1, 1.5, 2.0, "2", None, True], ids=repr)
def test_order(value):
    with raises("order", repr(value)):
        eomdl.counterterms(valley_loss, VALLEY, value)


@RUNS
@pytest.mark.parametrize("value", [0, -3, 2.5, "3", None, True], ids=repr)
def test_num_steps(run, value):
    with raises("num_steps", repr(value)):
        run(num_steps=value)


@pytest.mark.parametrize("name", ["rtol", "atol"])
@pytest.mark.parametrize("value", [0.0, -1e-3, np.nan, "tight"], ids=repr)
def test_tolerances(name, value):
    with raises(name, repr(value)):
        solve(**{name: value})


def test_other_numbers():
    with raises("max_steps", "0"):
        solve(max_steps=0)
    with raises("step_size", "-1.0"):
        descend(step_size=-1.0)
    with raises("num_matvecs", "0"):
        eomdl.sharpness(valley_loss, 0)
    with raises("order", "2"):
        eomdl.symmetry.scale_norm_rate(1.0, 1.0, 0.1, 0.1, 2)
    with raises("learning_rate", "0"):
        eomdl.observe.decay_rate([1.0, 0.5], 0)
    with raises("weight_decay", "-1"):
        eomdl.symmetry.translation_decay_rate(0.1, -1, 0)


@RUNS
@pytest.mark.parametrize("value", [0, -1, [], [4], [-1, 2], [0.5], [[0, 1]]], ids=repr)
def test_save_steps(run, value):
    with raises("save_steps", repr(value)):
        run(save_steps=value)


# ------------------------------------------------------------------------ loss


@ALL
def test_loss(run):
    with raises("loss", "(2,)"):
        run(loss=lambda p, args: jnp.stack([p["x"], p["y"]]))
    with raises("loss", "complex"):
        run(loss=lambda p, args: p["x"] * 1j)
    with raises("loss", "int"):
        run(loss=lambda p, args: jnp.array(1))
    with raises("loss", "nan"):
        run(loss=lambda p, args: p["x"] * jnp.nan)
    with raises("loss", "inf"):
        run(loss=lambda p, args: p["x"] / 0.0)
    with raises("loss", "x"):
        run(loss=lambda p, args: {"x": p["x"]})
    with raises("loss", "3"):
        run(loss=3)


def test_loss_of_weight_decay():
    with raises("loss", "None"):
        eomdl.WeightDecay(None, 0.1)


def test_loss_is_looked_at_on_the_first_batch():
    batches = (NET_BATCHES[0], NET_BATCHES[1].at[0].set(jnp.nan))
    with raises("loss", "nan"):
        eomdl.descend(net_loss, NET, SGD, 12, batches=batches)


# ---------------------------------------------------------------------- params


@ALL
def test_params(run):
    for empty in ({}, None, ()):
        with raises("params", f"no leaves in {empty!r}"):
            run(params=empty)
    with raises("params['y']", "int"):
        run(params={"x": jnp.ones(()), "y": jnp.array(1)})
    with raises("params['y']", "int"):
        run(params={"x": jnp.ones(()), "y": 1})
    with raises("params['y']", "complex"):
        run(params={"x": jnp.ones(()), "y": jnp.array(1j)})
    with raises("params['y']", "bool"):
        run(params={"x": jnp.ones(()), "y": jnp.array(True)})
    with raises("params['y']", "str"):
        run(params={"x": jnp.ones(()), "y": "weights"})
    with raises("params['y']", "equinox.partition"):
        run(params={"x": jnp.ones(()), "y": jnp.tanh})


# --------------------------------------------------------------------- batches


@pytest.mark.parametrize("run", [descend, solve])
def test_batches(run):
    def loss(params, batch):
        return valley_loss(params, None) + jnp.sum(batch)

    with raises("batches", "4"):
        run(loss=loss, batches=jnp.zeros(4))
    with raises("batches", "[(2,), (3,)]"):
        run(loss=loss, batches=(jnp.zeros(3), jnp.zeros(2)))
    with raises("batches", "2"):
        run(loss=loss, batches=[jnp.zeros(1)] * 2)
    with raises("batches", "4"):
        run(loss=loss, batches=[jnp.zeros(1)] * 4)
    with raises("batches", "empty"):
        run(loss=loss, batches=iter([]))
    with raises("batches", "()"):
        run(loss=loss, batches=jnp.zeros(()))
    with raises("batches", "differ"):
        run(loss=loss, batches=[jnp.zeros(1), jnp.zeros(2), jnp.zeros(1)])


# ----------------------------------------------------------------- observables


def _raising(params, args):
    raise KeyError("no such block")


@RUNS
def test_observe(run):
    with pytest.raises(ValueError, match=r"^observe\['norm'\]: expected .*raised KeyError: 'no such block'"):
        run(observe={"norm": _raising})
    with raises("observe['norm']", "3"):
        run(observe={"norm": 3})
    with raises("observe['norm']", "x"):
        run(observe={"norm": lambda p, args: {"x": None}})
    with raises("observe", "function"):
        run(observe=valley_loss)
    with pytest.raises(ValueError, match=r"^observe\['norm'\]: expected .*raised Concretization"):
        run(observe={"norm": lambda p, args: jnp.ones(int(p["x"]))})  # a shape that depends on values


# ------------------------------------------------------------ flows and optimizers


def test_flow_and_optimizer():
    with raises("flow", "function"):
        eomdl.solve(valley_loss, VALLEY, 3)
    with raises("optimizer", "0.1"):
        descend(optimizer=0.1)


# ---------------------------------------------------------------------- resume


@RUNS
def test_resume(run):
    before = run(num_steps=3)
    with raises("resume", "3"):
        run(num_steps=2, resume=before)
    with raises("resume", "save_params=True"):
        run(num_steps=5, resume=before, save_params=False)
    with raises("resume", "observe=[]"):
        run(num_steps=5, resume=before, observe={"loss": valley_loss})
    other = run(loss=net_loss, params=NET, args=NET_ARGS)
    with raises("resume", "children ['layer0', 'layer1'] in place of ['x', 'y']"):
        run(num_steps=5, resume=other)


@RUNS
def test_an_option_that_there_is_not(run):
    with pytest.raises(TypeError, match=rf"^{run.__name__}\(\) got an unexpected keyword argument 'step'"):
        run(step=1)


def test_resume_with_another_optimizer():
    before = descend(optimizer=optax.adam(0.1))
    with raises("resume.end.state", "a ScaleByAdamState in place of a EmptyState"):
        descend(num_steps=5, resume=before)


# --------------------------------------------------------------------- compare


def test_compare():
    real = descend()
    with raises("reference", "dict"):
        eomdl.compare(dict(VALLEY), {"real": real})
    for wrong in ({}, None, [real]):
        with raises("trajectories", ""):
            eomdl.compare(real, wrong)
    with raises("trajectories['gf']", "GradientFlow"):
        eomdl.compare(real, {"gf": GF})
    late = descend(save_steps=[2])
    with raises("trajectories", "reference"):
        eomdl.compare(late, {"early": descend(save_steps=[1])})


def test_compare_observables_of_other_shapes():
    scalar = descend(observe={"o": lambda p, args: p["x"]})
    with raises("trajectories['model'].observables['o']", "(2,)"):
        eomdl.compare(scalar, {"model": descend(observe={"o": lambda p, args: jnp.ones(2)})})


def test_compare_runs_of_other_parameters():
    def loss(params, args):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    a = descend(loss, {"w": jnp.ones(2), "b": jnp.ones(())})
    with raises("trajectories['b'].params", "'c'"):
        eomdl.compare(a, {"b": descend(loss, {"w": jnp.ones(2), "c": jnp.ones(())})})
    with raises("trajectories['b'].params['w']", "(3,)"):
        eomdl.compare(a, {"b": descend(loss, {"w": jnp.ones(3), "b": jnp.ones(())})})


def test_orders_and_defects():
    with raises("time", "0.25 with 0.1"):
        eomdl.errors.convergence_study(lambda eta: GF, valley_loss, VALLEY, [0.05, 0.1], time=0.25)
    for rates, errors in (([0.1], [1.0]), ([0.1, 0.1], [1.0, 2.0]), ([0.1, 0.2], [1.0, np.nan])):
        with raises("errors", f"{errors}"):
            eomdl.errors.observed_order(rates, errors)
    with raises("reference", "save_params=False"):
        eomdl.errors.local_error(GF, descend(save_params=False))
    with raises("steps", "[3]"):
        eomdl.errors.local_error(GF, descend(), steps=[3])
    with raises("steps", "None"):
        eomdl.errors.local_error(GF, descend(save_steps=2, num_steps=4))


def test_rows_of_several_lengths_are_no_numbers():
    ragged = [[1], [1, 2]]
    with raises("errors", f"{ragged}"):
        eomdl.errors.observed_order([0.1, 0.2], ragged)
    with raises("steps", f"{ragged}"):
        eomdl.errors.local_error(GF, descend(), steps=ragged)


def test_observe_state():
    with raises("observe_state['n']", "1.0"):
        solve(observe_state={"n": 1.0})
    with raises("observe_state['n']", "x"):
        solve(observe_state={"n": lambda t, state, args: {"x": None}})


# ------------------------------------------------------------------ inside jit


def test_shapes_are_checked_where_values_are_traced():
    @jax.jit
    def run(eta):
        return solve(loss=lambda p, args: jnp.stack([p["x"], p["y"]]) * eta)

    with raises("loss", "(2,)"):
        run(0.1)
