"""Modified equations of Runge-Kutta methods and of fields that are no gradients."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import VALLEY, assert_close, valley_loss

import eomdl
from eomdl.flows import ModifiedFlow
from eomdl.series import HEUN, MIDPOINT, RK4, ButcherTableau, modified_equation
from eomdl.series.euler import modified_field
from eomdl.series.trees import EULER


METHODS = {"Euler": (EULER, 1), "midpoint": (MIDPOINT, 2), "Heun": (HEUN, 2), "RK4": (RK4, 4)}
CHAIN, BUSH = ((((),),),), (((), ()),)


def lotka_volterra(x, args):
    del args
    return jnp.array([x[0] * (1 - x[1]), x[1] * (x[0] - 1)])


def rotation(x, args):
    """A bilinear game, both players at once: min_a max_b of a b."""
    del args
    return jnp.array([-x[1], x[0]])


@pytest.mark.parametrize("method", METHODS)
def test_a_method_of_order_p_has_no_terms_below_h_to_the_p(method):
    tableau, p = METHODS[method]
    assert modified_equation(1, tableau) == {(): 1}
    assert all(modified_equation(n, tableau) == {} for n in range(2, p + 1))
    assert modified_equation(p + 1, tableau)


def test_midpoint_rule_by_hand():
    """h^2 (-f''(f, f)/24 - f'f'f/6): the difference of the Taylor series of a step and of the solution."""
    assert modified_equation(3, MIDPOINT) == {((), ()): Fraction(-1, 24), (((),),): Fraction(-1, 6)}


@pytest.mark.parametrize("method", METHODS)
def test_chains_are_the_logarithm_of_the_stability_function(method):
    """On x' = x a step multiplies by R(h), and the modified rate is log R(h) / h."""
    tableau, p = METHODS[method]
    stability = np.polynomial.Polynomial([1 / np.prod(range(1, k + 1), initial=1) for k in range(p + 1)])
    chain, coefficients = (), [1.0]
    for n in range(2, 7):
        chain = (chain,)
        coefficients.append(float(modified_equation(n, tableau).get(chain, 0)))
    h = np.array([0.01, 0.02])
    np.testing.assert_allclose(
        np.polynomial.Polynomial(coefficients)(h), np.log(stability(h)) / h, rtol=1e-11
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("order", [1, 3])
def test_the_local_error_has_the_order_of_the_terms_kept(method, order):
    """O(h^(n+2)), and of the method's own order if the terms kept begin later."""
    tableau, p = METHODS[method]
    expected = max(order, p - 1) + 2
    x, rates = jnp.array([1.2, 0.7]), [0.04, 0.02]
    errors = []
    for h in rates:
        flow = ModifiedFlow(lotka_volterra, h, order, tableau)
        path = eomdl.solve(flow, x, 1, rtol=1e-13, atol=1e-14, estimate_error=False)
        errors.append(float(jnp.linalg.norm(path.params[-1] - flow.map(x, None, 0))))
    assert eomdl.errors.observed_order(rates, errors) == pytest.approx(expected, abs=0.1)


def test_gradient_descent_is_euler_on_the_descent_field():
    def descent(x, args):
        return jax.tree.map(jnp.negative, jax.grad(valley_loss)(x, args))

    for order in (0, 1, 3):
        mine = ModifiedFlow(descent, 0.1, order)(0.0, VALLEY, None)
        assert_close(mine, eomdl.EquationOfMotion(valley_loss, 0.1, order)(0.0, VALLEY, None))


def test_simultaneous_players_of_a_bilinear_game_spiral_out():
    """The radius grows by sqrt(1 + h^2) a step; gradient flow circles; h/2 is the first term of its rate."""
    start, h = jnp.array([1.0, 0.0]), 0.1
    real = eomdl.iterate(lambda x, args, k: x + h * rotation(x, args), start, 50)
    radius = {
        order: np.linalg.norm(eomdl.solve(ModifiedFlow(rotation, h, order), start, 50).params, axis=1)
        for order in (0, 1, 3)
    }
    np.testing.assert_allclose(np.linalg.norm(real.params, axis=1), (1 + h**2) ** (np.arange(51) / 2))
    np.testing.assert_allclose(radius[0], 1, rtol=1e-4)
    np.testing.assert_allclose(radius[1], np.exp(h / 2 * h * np.arange(51)), rtol=1e-5)
    np.testing.assert_allclose(radius[3][-1], (1 + h**2) ** 25, rtol=1e-5)


def test_alternating_players_do_not_spiral():
    """Their map is a composition of two: its flow is the logarithm, from iterates, and it stays on a closed curve."""

    def alternating(x, args, k):
        del args, k
        first = x[0] - 0.1 * x[1]
        return jnp.array([first, x[1] + 0.1 * first])

    start = jnp.array([1.0, 0.0])
    real = eomdl.iterate(alternating, start, 200)
    flow = eomdl.InterpolatingFlow(alternating, 0.1, points=6)
    path = eomdl.solve(flow, start, 200)
    radius = np.linalg.norm(real.params, axis=1)
    assert 0.9 < radius.min() < radius.max() < 1.1
    assert eomdl.compare(real, {"flow": path}).distance["flow"].max() < 1e-3


def test_heun_on_a_loss_is_followed_to_fourth_order():
    def descent(x, args):
        return jax.tree.map(jnp.negative, jax.grad(valley_loss)(x, args))

    flow = ModifiedFlow(descent, 0.1, 2, HEUN)
    real = eomdl.iterate(flow.map, VALLEY, 30)
    models = {"gradient flow": eomdl.GradientFlow(valley_loss, 0.1), "order 2": flow}
    paths = {name: eomdl.solve(model, VALLEY, 30) for name, model in models.items()}
    distance = eomdl.compare(real, paths).distance
    assert distance["order 2"].max() < 0.2 * distance["gradient flow"].max()
    sgd = eomdl.descend(valley_loss, VALLEY, optax.sgd(0.1), 30)
    assert eomdl.compare(sgd, {"flow": paths["order 2"]}).distance["flow"].max() > distance["order 2"].max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"field": 3}, "field: expected a function"),
        ({"step_size": 0.0}, "step_size: expected"),
        ({"order": 11}, "order: expected"),
        ({"method": "RK4"}, "method: expected an eomdl.series.ButcherTableau"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ModifiedFlow(**{"field": rotation, "step_size": 0.1, **arguments})


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (((1,),), (1,), r"^a: expected rows with 0, 1, \.\.\. numbers, one for each of b \(1\): an explicit"),
        (((), ()), (1, 0), "^a: expected rows with 0, 1"),
        (((),), (Fraction(1, 2),), "^b: expected weights that sum to 1"),
        (
            ((), (0.5,)),
            (1 / 6, 5 / 6),
            "^b: expected weights that sum to 1, .* `fractions.Fraction` is exact",
        ),
        (((),), (), "^b: expected weights that sum to 1"),
        (((), ("half",)), (0, 1), r"^a\[1\]: expected numbers"),
        (((),), (float("nan"),), "^b: expected numbers"),
        (3, (1,), "^a: expected rows of numbers"),
    ],
)
def test_a_tableau_that_is_not_explicit_or_not_consistent_is_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        ButcherTableau(a, b)


def test_sizes_that_nobody_can_wait_for_are_refused():
    for n in (2**30, 13, 0, -1, 2.5, True):
        with pytest.raises(ValueError, match=r"^n: expected an integer >= 1 and <= 12, got"):
            modified_equation(n)
    with pytest.raises(ValueError, match=r"^method: expected an eomdl\.series\.ButcherTableau"):
        modified_equation(2, [[], [1]])
    with pytest.raises(ValueError, match=r"^order: expected an integer >= 0 and <= 10"):
        modified_field(lambda x: -x, jnp.ones(2), 0.1, 10**400)
    run = eomdl.descend(valley_loss, VALLEY, optax.sgd(0.05), 12)
    with pytest.raises(ValueError, match="about which 1073741826 steps were saved"):
        eomdl.errors.variances_along(run, [6], [[[1.0, 0.0]]], 2**30)


def test_what_is_done_with_the_coefficients_changes_no_others():
    modified_equation(3).clear()
    assert modified_equation(3)


def test_a_velocity_unlike_the_state_is_refused():
    with pytest.raises(ValueError, match="field's velocity"):
        eomdl.solve(ModifiedFlow(lambda x, _: x[:1], 0.1), jnp.array([1.0, 2.0]), 3)
