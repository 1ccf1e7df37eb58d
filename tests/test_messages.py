"""Wrong inputs that people give, and the way out that the answer must name."""

import inspect
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import QUADRATIC, VALLEY, assert_close, quadratic_loss, symmetric, valley_loss

import eomdl
from eomdl import _warn


SGD, RATE = optax.sgd(0.05), 0.05
FLOW = eomdl.GradientFlow(valley_loss, RATE)
SCHEDULE = optax.cosine_decay_schedule(0.1, 10)
FOR_OPTIMIZERS = r"InterpolatingFlow\(eomdl\.optimizer_step\(loss, optimizer\)"


def with_aux(params, args):
    return valley_loss(params, args), params


def per_example(params, args):
    return jnp.ones(3) * valley_loss(params, args)


def descend(loss=valley_loss, params=VALLEY, optimizer=SGD, **options):
    return eomdl.descend(loss, params, optimizer, 4, **options)


CASES = {
    "an optimizer for a rate": (lambda: eomdl.GradientFlow(valley_loss, SGD), FOR_OPTIMIZERS),
    "a schedule for a rate": (lambda: eomdl.EquationOfMotion(valley_loss, SCHEDULE, 1), FOR_OPTIMIZERS),
    "a schedule for a clock": (lambda: eomdl.flows.AdamFlow(valley_loss, SCHEDULE), FOR_OPTIMIZERS),
    "a negative rate": (
        lambda: eomdl.GradientFlow(valley_loss, -0.1),
        "learning_rate: .* > 0, got -0.1; for ascent negate",
    ),
    "no rate": (
        lambda: eomdl.GradientFlow(valley_loss, 0.0),
        "learning_rate: expected a finite number > 0, got 0.0",
    ),
    "a rate for an optimizer": (lambda: descend(optimizer=0.1), r"optimizer: .*optax\.sgd\(learning_rate\)"),
    "a schedule for an optimizer": (
        lambda: descend(optimizer=SCHEDULE),
        r"optimizer: .*optax\.sgd\(learning_rate\)",
    ),
    "a loss with aux": (lambda: descend(with_aux), r"loss: .*\(value, aux\) .*\[0\]"),
    "a flow of a loss with aux": (
        lambda: eomdl.solve(eomdl.GradientFlow(with_aux, RATE), VALLEY, 4),
        r"\(value, aux\)",
    ),
    "losses for a loss": (lambda: descend(per_example), r"loss: .*shape \(3,\).*take its mean"),
    "data for args": (lambda: descend(data=1), "'data'; did you mean 'args'"),
    "batch for batches": (lambda: descend(batch=1), "'batch'; did you mean 'batches'"),
    "a misspelt option": (lambda: descend(save_step=2), "'save_step'; did you mean 'save_steps'"),
    "complex parameters": (lambda: descend(params=jnp.ones(2) * 1j), "split_real_and_imaginary"),
    "a warm-up of a run that continues": (
        lambda: eomdl.solve(eomdl.GradientFlow(valley_loss, RATE), VALLEY, 4, warmup=2, resume=descend().end),
        "warmup: expected 0 or None for a run that continues",
    ),
    "a warm-up without the optimizer's step": (
        lambda: eomdl.solve(eomdl.flows.AdamFlow(valley_loss, RATE), VALLEY, 4, warmup=2),
        r"warmup: .*AdamFlow does not know .*resume=eomdl\.descend",
    ),
}


CASES |= {
    "a flow without a rate": (
        lambda: eomdl.errors.convergence_study(lambda: FLOW, valley_loss, VALLEY, [0.1, 0.05]),
        r"flow: expected a function learning rate -> .*cannot be called so: too many positional",
    ),
    "an optimizer of two arguments": (
        lambda: eomdl.errors.convergence_study(
            lambda rate: FLOW, valley_loss, VALLEY, [0.1], optimizer=lambda rate, momentum: SGD
        ),
        "optimizer: expected a function learning rate -> .*missing a required argument: 'momentum'",
    ),
    "a run without options": (
        lambda: eomdl.geometry.secants(lambda: descend(), {"loss": valley_loss}),
        r"run: expected .*lambda \*\*options: .*unexpected keyword argument 'observe'",
    ),
    "more arguments of one": (
        lambda: eomdl.optimizer_step(valley_loss, SGD, extra_args=lambda params: {}),
        r"extra_args: expected a function \(params, args\) -> dict",
    ),
    "more arguments that are none": (
        lambda: descend(extra_args=lambda params, args: 1.0),
        r"extra_args: expected a function \(params, args\) -> dict, got float",
    ),
    "a loss without data": (
        lambda: eomdl.GradientFlow(lambda params: 0.0, RATE),
        r"loss: expected a function \(params, args\)",
    ),
    "an amount for other units": (
        lambda: eomdl.symmetry.Scaling(["x"]).transform(VALLEY, jnp.ones(3)),
        r"amount: expected the shape of the charge, \(\)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_answer_names_a_way_out(case):
    call, expected = CASES[case]
    with pytest.raises((ValueError, TypeError), match=expected) as caught:
        call()
    assert not re.search(r"<function .* at 0x[^>]*> *$", str(caught.value))


def test_the_way_out_for_complex_parameters_is_one():
    def loss(z, args):
        return jnp.sum(jnp.abs(z - (1 + 2j)) ** 2)

    run = eomdl.descend(
        lambda p, args: loss(jax.lax.complex(*p), args), (jnp.zeros(2), jnp.zeros(2)), optax.sgd(0.25), 60
    )
    np.testing.assert_allclose(run.final_params, [[1, 1], [2, 2]], rtol=1e-12)


def test_a_run_that_diverges_gives_the_largest_stable_rate():
    hessian = jnp.asarray(symmetric([0.5, 2.0, 8.0]))
    run = eomdl.descend(quadratic_loss, jnp.ones(3), optax.sgd(1e40), 10, args=(hessian, jnp.zeros(3)))
    assert run.result == eomdl.RESULTS.nonfinite
    rate = run.stats.diagnostics["2 / sharpness at the start"]
    np.testing.assert_allclose(rate.value, [2 / 8], rtol=2e-3)
    # The rate comes before the data.
    assert re.search("smaller learning rate.*look at the data", run.message)
    assert any(note.startswith("2 / sharpness at the start: 0.25") for note in run.notes)


def test_a_stable_run_says_nothing_of_rates():
    assert descend().notes == ()


def test_a_warning_gives_no_advice_that_was_taken():
    steep = (40 * jnp.eye(3), jnp.zeros(3))
    for stride, advice in ((1, True), (2, False)):
        flow = eomdl.InterpolatingFlow(
            eomdl.optimizer_step(quadratic_loss, optax.sgd(0.1)), 0.1, 2, stride=stride
        )
        with pytest.warns(UserWarning, match="near the identity") as caught:
            path = eomdl.solve(flow, jnp.ones(3), 4, args=steep, estimate_error=False)
        said = " ".join([str(caught[0].message), *path.notes])
        assert ("try stride=2" in said) == advice
        assert "warmup" not in said  # there is no memory to fill


@pytest.mark.parametrize(
    ("optimizer", "helps"), [(optax.sgd(0.1, 0.9), False), (optax.adam(2.0, 0.1, 0.1), True)]
)
def test_real_steps_first_are_advised_where_a_memory_scales_the_steps(optimizer, helps):
    flow = eomdl.InterpolatingFlow(eomdl.optimizer_step(quadratic_loss, optimizer), 0.1, 2)
    with pytest.warns(UserWarning, match="near the identity") as caught:
        flow.validate(jnp.ones(3), (40 * jnp.eye(3), jnp.zeros(3)))
    assert ("warmup=10" in str(caught[0].message)) == helps


def test_a_warning_points_at_the_users_line():
    library = {"__name__": "eomdl.somewhere", "warn": inspect.unwrap(_warn.warn)}
    exec("def inner(): warn('words')\ndef outer(): inner()", library)
    with pytest.warns(UserWarning, match="words") as caught:
        library["outer"]()
    assert caught[0].filename == __file__


def test_a_flow_beyond_its_validity_warns_once_at_its_run():
    flow = eomdl.EquationOfMotion(quadratic_loss, 0.6, 1)  # eta*lambda_max is 1.2
    options = {"args": QUADRATIC.args, "rtol": 1e-6, "atol": 1e-8, "estimate_error": False}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = eomdl.solve(flow, QUADRATIC.params, 2, **options)
        jax.jit(lambda w: eomdl.solve(flow, w, 2, **options).final_params)(QUADRATIC.params)
        prediction = eomdl.errors.predict_error(flow, QUADRATIC.params, 2, args=QUADRATIC.args)
    # Under jit no value is known, and a prediction hands on the notes.
    assert [str(warning.message) for warning in caught] == [str(note) for note in path.notes if note.is_fault]
    assert "eta*lambda_max reached" in str(caught[0].message)
    assert any("eta*lambda_max" in note for note in prediction.notes)


def test_a_generator_that_a_run_has_read_is_refused():
    def batches(pulls):
        yield from pulls

    source = batches([QUADRATIC.args] * 9)
    eomdl.descend(quadratic_loss, QUADRATIC.params, SGD, 4, batches=source)
    flow = eomdl.GradientFlow(quadratic_loss, RATE)
    with pytest.raises(
        ValueError, match=r"^batches: expected an iterator that begins at step 0, got one that another run"
    ):
        eomdl.solve(flow, QUADRATIC.params, 4, batches=source)


@pytest.mark.parametrize(
    "once", [lambda pulls: zip(*pulls, strict=True), lambda pulls: map(tuple, zip(*pulls, strict=True)), iter]
)
def test_an_iterator_that_is_used_up_is_told_from_one_without_batches(once):
    pulls = [(QUADRATIC.args)] * 4
    source = once(pulls) if once is iter else once(tuple(zip(*pulls, strict=True)))
    eomdl.descend(quadratic_loss, QUADRATIC.params, SGD, 3, batches=source)
    short = eomdl.descend(quadratic_loss, QUADRATIC.params, SGD, 4, batches=source)
    assert "another run has read from" in short.message
    with pytest.raises(
        ValueError, match=r"^batches: .* an empty iterator, used up by another run perhaps; a list"
    ):
        eomdl.descend(quadratic_loss, QUADRATIC.params, SGD, 4, batches=source)


def test_a_generator_may_go_through_a_run_and_its_continuation():
    source = (args for args in [QUADRATIC.args] * 9)
    first = eomdl.descend(quadratic_loss, QUADRATIC.params, SGD, 4, batches=source)
    whole = eomdl.descend(quadratic_loss, QUADRATIC.params, SGD, 9, batches=source, resume=first)
    expected = eomdl.descend(quadratic_loss, QUADRATIC.params, SGD, 9, args=QUADRATIC.args)
    assert_close(whole.final_params, expected.final_params, rtol=1e-14)
