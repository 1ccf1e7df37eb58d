"""The report on a learning rate: its numbers by the library's own functions, its reasons where there is no answer."""

import dataclasses
import functools
import html
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    LABEL_ARGS,
    NET,
    NET_ARGS,
    NET_BATCHES,
    NORMALIZED,
    VALLEY,
    net_loss,
    normalized_loss,
    valley_loss,
)

import eomdl
from eomdl.reports.finding import Finding, Table, number, of, percent
from eomdl.reports.questions import discreteness, edge, symmetries
from eomdl.reports.study import QUICK, make_study
from eomdl.reports.written import QUESTIONS


# ------------------------------------------------- numbers in words


def test_numbers_have_three_digits():
    assert [number(x) for x in (0.0, 0.123456, 1234.5, 99999.0, 1.2345e-5, 1e7, -2e-4)] == [
        "0",
        "0.123",
        "1234",
        "99999",
        "1.23·10⁻⁵",
        "1.00·10⁷",
        "-2.00·10⁻⁴",
    ]
    assert number(float("nan")) == "not finite"
    assert [percent(x) for x in (0.0312, 1.0, 20.0)] == ["3.1 %", "100 %", "20 times"]
    assert [of(x, "it") for x in (0.5, 3.0)] == ["50 % of it", "3 times it"]


def test_a_finding_as_text():
    table = Table(("block", "share"), (("a", 0.25), ("b", float("nan"))), fractions=(1,))
    text = Finding("Yes.", numbers={"size": "3"}, tables={"blocks": table}, notes=("mind",)).text()
    assert text == "Yes.\n  size: 3\n  blocks: block | share\n    a | 25 %\n    b | \n  ! mind\n"


# ------------------------------------------------- plain gradient descent, by a second route

ETA, STEPS = 0.05, 12


@pytest.fixture(scope="module")
def plain():
    return eomdl.report(valley_loss, VALLEY, ETA, STEPS, quick=True)


def test_every_question_is_answered(plain):
    assert list(plain.findings) == [question.name for question in QUESTIONS]
    assert all(finding.answered for finding in plain.findings.values())
    assert 4 <= len(plain.summary) <= 5
    assert all(sentence in plain.text() for sentence in plain.summary)


def test_the_sharpness_is_the_hessian_s_largest_eigenvalue(plain):
    x, unravel = jax.flatten_util.ravel_pytree(VALLEY)
    exact = np.linalg.eigvalsh(jax.hessian(lambda v: valley_loss(unravel(v), None))(x)).max()
    found = plain.data["edge"]
    np.testing.assert_allclose(found["sharpness"][0], exact, rtol=1e-6)
    assert found["threshold"] == 2
    assert plain.findings["edge"].answer.startswith("No.")


def test_the_distance_is_that_of_compare(plain):
    real = eomdl.descend(valley_loss, VALLEY, optax.sgd(ETA), STEPS)
    flow = eomdl.GradientFlow(valley_loss, ETA)
    measured = eomdl.compare(real, {"flow": eomdl.solve(flow, VALLEY, STEPS)}).distance["flow"]
    found = plain.data["distance"]
    np.testing.assert_allclose(found["measured"], measured, rtol=1e-2, atol=1e-9)
    np.testing.assert_allclose(found["predicted"][1:], measured[1:], rtol=0.1)


def test_the_largest_rate_is_the_library_s(plain):
    found = plain.data["rates"]
    assert not found["capped"]
    direct = eomdl.errors.largest_learning_rate(
        valley_loss, VALLEY, ETA * STEPS, found["tolerance"], points=STEPS
    )
    np.testing.assert_allclose(found["value"], direct.value, rtol=1e-3)
    assert found["limited_by"] == direct.limited_by


def test_the_force_is_the_first_counter_term(plain):
    (xi,) = eomdl.counterterms(valley_loss, VALLEY, 1)
    gradient = jax.grad(valley_loss)(VALLEY, None)
    (xi, _), (gradient, _) = map(jax.flatten_util.ravel_pytree, (xi, gradient))
    found = plain.data["discreteness"]
    sizes = jnp.linalg.norm(xi), jnp.linalg.norm(gradient)
    np.testing.assert_allclose(found["fraction"][0], ETA * sizes[0] / sizes[1], rtol=1e-8)
    np.testing.assert_allclose(found["cosine"][0], xi @ gradient / (sizes[0] * sizes[1]), rtol=1e-8)
    np.testing.assert_allclose(found["block_fraction"]["x"], xi[0] ** 2 / (xi @ xi), rtol=1e-8)
    assert plain.findings["discreteness"].notes == ()  # no kinks


def test_each_term_of_the_equation_of_motion_comes_nearer(plain):
    models = plain.data["models"]["models"]
    fractions = [models[name]["fraction"] for name in models]
    assert list(models) == [
        "gradient flow",
        "equation of motion with 1 term",
        "equation of motion with 2 terms",
    ]
    assert fractions[0] > 5 * fractions[1] > 5 * fractions[2]
    costs = [models[name]["cost"] for name in models]
    assert costs == sorted(costs)


def test_the_page_is_one_file_with_words_beside_every_picture(plain, tmp_path):
    plain.save(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text == plain.html
    assert not re.search(r'(src|href)="https?:|@import|<link [^>]*stylesheet', text)
    assert text.count('role="img"') == text.count("<figure>") >= 7
    assert not re.search(r">\s*-?\d+\.\d{7,}\s*<", text)  # no number with all its digits
    # A notebook shows the same page, in a frame.
    (inside,) = re.fullmatch(
        r"<iframe srcdoc='([^']*)' style='[^']*'></iframe>", plain._repr_html_()
    ).groups()
    assert html.unescape(inside) == plain.html


# ------------------------------------------------- where there is no answer, or another


@pytest.fixture(scope="module")
def adam():
    """Minibatches and Adam, and no data that the loss could take as a whole."""
    return eomdl.report(net_loss, NET, 0.01, 12, optimizer=optax.adam, batches=NET_BATCHES, quick=True)


def test_reasons_are_given(adam):
    findings = adam.findings
    for name in ("edge", "symmetries"):
        assert "only minibatches are given" in findings[name].answer
    assert "rescales its steps" in findings["distance"].answer
    assert "minibatches" in findings["rates"].answer
    assert "gradient descent" in findings["discreteness"].answer
    answered = [name for name, finding in findings.items() if finding.answered]
    assert answered == ["models", "path"]
    assert "Not answered, with the reason in its section" in adam.summary[-1]


def test_flows_of_adam_begin_once_its_averages_have_filled(adam):
    notes = adam.findings["models"].notes
    assert any("begin at step 3 " in note for note in notes)
    models = adam.data["models"]["models"]
    assert (
        models["interpolating flow of 4 points"]["fraction"]
        < models["interpolating flow of 2 points"]["fraction"]
        < 0.1
    )


@pytest.mark.parametrize(
    ("optimizer", "rate", "threshold", "since"),
    [
        (lambda rate: optax.adam(rate, 0.5, 0.9), 0.03, 6, 10),
        (lambda rate: optax.rmsprop(rate, 0.9), 0.009, 2, 8),
        (optax.sgd, 0.2, 2, None),
    ],
    ids=["adam", "rmsprop", "gradient descent"],
)
def test_threshold_and_since_are_those_of_the_telemetry(optimizer, rate, threshold, since):
    optimizer = functools.cache(optimizer)  # the run of the report and this one share their program
    finding = edge.ask(make_study(net_loss, NET, rate, 16, optimizer, NET_ARGS, None, QUICK))
    telemetry = eomdl.telemetry.EdgeTelemetry(net_loss, optimizer(rate), along_every=None, edge_every=1)
    eomdl.descend(net_loss, NET, optimizer(rate), 17, args=NET_ARGS, monitors=[telemetry])
    results = telemetry.results()
    np.testing.assert_allclose(finding.data["threshold"], threshold, rtol=1e-9)
    np.testing.assert_allclose(results.thresholds, threshold, rtol=1e-9)
    np.testing.assert_allclose(finding.data["eta_lambda"], results.values[:, 0], rtol=5e-3)
    answer = "No." if since is None else f"Yes, from about step {since} on"
    verdict = "below the edge" if since is None else f"at the edge or beyond since step {since}"
    assert finding.data["since"] == since
    assert finding.answer.startswith(answer)
    assert verdict in results.verdict


def test_a_run_that_breaks_down_is_reported_up_to_there():
    finding = edge.ask(study(valley_quartic, jnp.array([1.0, 2.0]), 0.9, 20))
    assert "broke down: after step" in finding.answer
    assert "broke down" in finding.summary


def test_an_edge_of_another_operator_is_said():
    def held(w, args):
        return jnp.sum(w * (w - 1.5 * jax.lax.stop_gradient(w)))

    finding = edge.ask(study(held, jnp.array([1.0, 2.0]), 0.1, 4))
    assert any("stop_gradient" in note and "75%" in note for note in finding.notes)


def study(loss, params, rate, steps, args=None):
    return make_study(loss, params, rate, steps, optax.sgd, args, None, QUICK)


def valley_quartic(params, args):
    del args
    return jnp.sum(params**4)


def test_symmetries_and_their_drift():
    finding = symmetries.ask(study(normalized_loss, NORMALIZED, 0.2, 12, LABEL_ARGS))
    drifts = finding.data["drifts"]
    scale = next(label for label in drifts if label.startswith("scale of first.w"))
    run = eomdl.descend(normalized_loss, NORMALIZED, optax.sgd(0.2), 12, args=LABEL_ARGS)
    squares = (
        jnp.sum(run.final_params["first"]["w"] ** 2, axis=0),
        jnp.sum(NORMALIZED["first"]["w"] ** 2, axis=0),
    )
    expected = jnp.linalg.norm(squares[0] - squares[1])
    np.testing.assert_allclose(drifts[scale]["change"], expected, rtol=1e-8)
    assert "drifts most" in finding.answer
    assert "predicts it to rounding" in finding.answer


def test_kinks_are_seen_and_smooth_losses_are_not_suspected():
    rng = np.random.default_rng(0)
    data, weights = jnp.asarray(rng.normal(size=(2000, 3))), jnp.asarray(rng.normal(size=3))

    def rough(activation):
        def loss(w, x):
            return jnp.mean((activation(x @ w - 0.3) - jnp.sin(x[:, 0])) ** 2)

        return discreteness._measure_force(loss, weights, data, 0.5)["rough"]

    long, short = rough(jax.nn.relu)
    assert long > discreteness.ROUGH
    assert short > long / 2
    long, short = rough(jnp.sin)
    np.testing.assert_allclose(long / short, 4, rtol=0.3)


def test_a_fixed_optimizer_with_another_rate_is_refused():
    with pytest.raises(ValueError, match=r"learning_rate: expected 0.05, the optimizer's own, got 0.1"):
        eomdl.report(valley_loss, VALLEY, 0.1, 5, optimizer=optax.sgd(0.05))


def test_an_optimizer_that_cannot_be_made_is_named():
    with pytest.raises(ValueError, match=r"optimizer: expected an optax\.GradientTransformation"):
        eomdl.report(valley_loss, VALLEY, 0.1, 5, optimizer=lambda rate: rate / 0)


def test_a_question_that_fails_does_not_stop_the_others(monkeypatch):
    from eomdl.reports import written

    def broken(study):
        raise RuntimeError("out of luck\nsecond line")

    question = dataclasses.replace(QUESTIONS[0], ask=broken)
    finding = written._ask(question, None)
    assert finding.answer == "Not answered. RuntimeError: out of luck"
    assert not finding.answered
