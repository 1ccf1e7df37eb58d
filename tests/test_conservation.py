"""Charges along a run against their laws: decay, momentum, minibatches, flows."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import LABEL_ARGS, NORMALIZED, SCALE, SCALE_ARGS, normal, normalized_loss, scale_only_loss

import eomdl
from eomdl.plotting import plot


ETA, DECAY = 0.05, 0.4


# ------------------------------------------------------- charges along a run, with momentum


def train(
    beta, decay, steps=12, batches=None, eta=ETA, loss=normalized_loss, start=NORMALIZED, args=LABEL_ARGS
):
    optimizer = optax.sgd(eta, momentum=beta or None)
    return eomdl.descend(eomdl.WeightDecay(loss, decay), start, optimizer, steps, args=args, batches=batches)


BATCHES = (normal(47, 12, 6, 3), jnp.asarray(np.random.default_rng(0).integers(0, 2, (12, 6))))
CHARGES = {
    "translation": eomdl.symmetry.Translation("head"),
    "scale": eomdl.symmetry.Scaling([("first.w", 1)]),
    "rescale": eomdl.symmetry.Scaling([("norm.gain", 0), ("norm.shift", 0)], [("head", 0)]),
}


@pytest.fixture(scope="module")
def runs():
    return {(b, d): train(b, d, batches=BATCHES) for b in (0.0, 0.9) for d in (0.0, DECAY)}


@pytest.mark.parametrize("name", CHARGES)
@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, DECAY])
def test_exact_laws_hold_to_rounding_on_minibatches(runs, name, beta, decay):
    settings = {"learning_rate": ETA, "weight_decay": decay, "momentum": beta}
    found = eomdl.symmetry.conservation(runs[beta, decay], CHARGES[name], **settings)
    scale = np.abs(found.charge).max()
    assert found.errors["exact"].max() < 1e-12 * scale
    if name != "translation" or decay:  # else all of them are constant, and right
        assert found.change > 1e-3
        assert found.errors["gradient flow"].max() > 100 * found.errors["exact"].max()
        if beta == 0:
            assert found.errors["first order"].max() < 0.2 * found.errors["gradient flow"].max()
    # The laws know their arguments: another momentum or decay breaks them.
    wrong = eomdl.symmetry.conservation(
        runs[beta, decay], CHARGES[name], **settings | {"weight_decay": decay + 0.1}
    )
    assert wrong.errors["exact"].max() > 1e-4 * scale


def test_exact_law_without_momentum_is_the_one_of_the_theory(runs):
    run, scale = runs[0.0, DECAY], CHARGES["scale"]
    found = eomdl.symmetry.conservation(run, scale, learning_rate=ETA, weight_decay=DECAY)
    for k in range(12):
        batch = jax.tree.map(lambda leaf, k=k: leaf[k], BATCHES)
        g = jax.grad(normalized_loss)(run.at(k), batch)["first"]["w"]
        after = (1 - ETA * DECAY) ** 2 * found.charge[k] + ETA**2 * np.sum(np.square(g), axis=0)
        np.testing.assert_allclose(found.charge[k + 1], after, rtol=1e-12)


def test_a_run_that_begins_in_motion(runs):
    whole = runs[0.9, DECAY]
    rows = jax.tree.map(lambda leaf: leaf[4:], (whole.steps, whole.times, whole.params))
    late = eqx.tree_at(lambda t: (t.steps, t.times, t.params), whole, rows)
    for symmetry in CHARGES.values():
        found = eomdl.symmetry.conservation(
            late, symmetry, learning_rate=ETA, weight_decay=DECAY, momentum=0.9
        )
        assert found.errors["exact"].max() < 1e-12 * np.abs(found.charge).max()


def test_first_order_law_converges_at_second_order():
    """Halving the learning rate at fixed time quarters what the first-order law misses; flow's error halves."""
    errors = []
    for eta, steps in ((0.02, 40), (0.01, 80), (0.005, 160)):
        run = train(0.0, DECAY, steps, eta=eta)
        found = eomdl.symmetry.conservation(run, CHARGES["scale"], learning_rate=eta, weight_decay=DECAY)
        errors.append([found.errors[law][-1] for law in ("gradient flow", "first order")])
    orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    np.testing.assert_allclose(orders[-1], [1, 2], atol=0.1)


def test_the_damped_oscillator_has_its_closed_form():
    """Translation with decay: mass p'' + (1 - beta) p' + decay p = 0, underdamped here, from half of its first update."""
    eta, beta, decay = 0.1, 0.9, 2.0
    run = train(beta, decay, 40, eta=eta)
    found = eomdl.symmetry.conservation(
        run, CHARGES["translation"], learning_rate=eta, weight_decay=decay, momentum=beta
    )
    mass, t = eta / 2 * (1 + beta), eta * np.arange(41.0)
    rate, omega = (1 - beta) / (2 * mass), np.sqrt(decay / mass - ((1 - beta) / (2 * mass)) ** 2)
    start = found.charge[0]
    slope = -decay * start / 2
    wave = np.cos(omega * t)[:, None] * start + np.sin(omega * t)[:, None] * (slope + rate * start) / omega
    expected = np.exp(-rate * t)[:, None] * wave
    np.testing.assert_allclose(found.laws["damped oscillator"], expected, atol=1e-12)


@pytest.mark.parametrize("name", CHARGES)
def test_the_damped_oscillator_knows_the_transient_of_momentum(name):
    """From step 0 with momentum 0.9 the laws without a transient miss most of the change; it does not."""
    for eta, steps in ((0.1, 24), (0.05, 48), (0.025, 96)):
        run = train(0.9, DECAY, steps, eta=eta)
        found = eomdl.symmetry.conservation(
            run, CHARGES[name], learning_rate=eta, weight_decay=DECAY, momentum=0.9
        )
        error = found.errors["damped oscillator"].max()
        assert error < 0.02 * found.change
        assert error < 0.02 * min(found.errors[law].max() for law in ("gradient flow", "first order"))


def test_the_damped_oscillator_without_momentum_is_of_first_order():
    errors = []
    for eta, steps in ((0.05, 48), (0.025, 96), (0.0125, 192)):
        run = train(0.0, DECAY, steps, eta=eta)
        found = eomdl.symmetry.conservation(run, CHARGES["scale"], learning_rate=eta, weight_decay=DECAY)
        errors.append(found.errors["damped oscillator"].max())
    np.testing.assert_allclose(np.log2(np.array(errors[:-1]) / np.array(errors[1:])), 1, atol=0.1)


def test_flows_predict_charges_from_the_start_alone():
    eta, steps = 0.02, 20
    run = train(0.0, DECAY, steps, eta=eta)
    loss = eomdl.WeightDecay(normalized_loss, DECAY)
    models = {
        f"EoM {n}": eomdl.solve(
            eomdl.EquationOfMotion(loss, eta, n),
            NORMALIZED,
            steps,
            args=LABEL_ARGS,
            rtol=1e-8,
            atol=1e-8,
            estimate_error=False,
        )
        for n in (0, 1)
    }
    for symmetry in CHARGES.values():
        found = eomdl.symmetry.conservation(
            run, symmetry, learning_rate=eta, weight_decay=DECAY, models=models
        )
        errors = [found.errors[name].max() for name in models]
        assert errors[1] < 0.2 * errors[0]
        # Gradient flow obeys its own law.
        np.testing.assert_allclose(found.models["EoM 0"], found.laws["gradient flow"], rtol=1e-5, atol=1e-6)


def test_wrong_arguments_of_conservation(runs):
    run, symmetry = runs[0.0, 0.0], CHARGES["scale"]
    with pytest.raises(ValueError, match="momentum: expected a number in"):
        eomdl.symmetry.conservation(run, symmetry, learning_rate=ETA, momentum=1.0)
    with pytest.raises(ValueError, match="learning_rate"):
        eomdl.symmetry.conservation(run, symmetry, learning_rate=0.0)
    with pytest.raises(ValueError, match=r"^models: expected a dict"):
        eomdl.symmetry.conservation(run, symmetry, learning_rate=ETA, models={"a": 1})
    gaps = eomdl.descend(normalized_loss, NORMALIZED, optax.sgd(ETA), 4, args=LABEL_ARGS, save_steps=2)
    with pytest.raises(ValueError, match="run: expected parameters saved at two or more consecutive steps"):
        eomdl.symmetry.conservation(gaps, symmetry, learning_rate=ETA)


def test_equilibrium_with_momentum():
    """Heavy ball driven by tangential noise: norm and angle settle where the closed forms say."""
    eta, decay, beta, dimension, steps = 0.1, 0.02, 0.9, 50, 6000
    rng = np.random.default_rng(0)
    w, v = rng.normal(size=dimension), np.zeros(dimension)
    squares, turns, sizes = [], [], []
    for _ in range(steps):
        noise = rng.normal(size=dimension)
        r = np.linalg.norm(w)
        g = (noise - w * (w @ noise) / r**2) / r  # scale invariance: tangential, and of size 1/r
        sizes.append(r * np.linalg.norm(g))
        v = beta * v + g + decay * w
        new = w - eta * v
        turns.append(1 - w @ new / (r * np.linalg.norm(new)))
        squares.append(r**2)
        w = new
    late = slice(steps // 2, None)
    c = np.sqrt(np.mean(np.square(sizes[late])))
    predicted = eomdl.symmetry.equilibrium_norm(1.0, c, eta, decay, beta)
    np.testing.assert_allclose(np.sqrt(np.mean(squares[late])), predicted, rtol=0.02)
    assert abs(predicted / eomdl.symmetry.equilibrium_norm(1.0, c, eta, decay) - 1) > 0.2  # momentum matters
    np.testing.assert_allclose(
        np.arccos(1 - np.mean(turns[late])), eomdl.symmetry.equilibrium_angle(eta, decay, beta), rtol=0.03
    )


def test_effective_learning_rate():
    """A step on w turns its direction as a step at the effective rate on the unit sphere does, to first order."""
    eta = 1e-6

    def direction(w, eta):
        w = w - eta * jax.grad(scale_only_loss)(w, SCALE_ARGS)
        return w / jnp.linalg.norm(w)

    w = 3.0 * SCALE["w"]
    unit = w / jnp.linalg.norm(w)
    rate = eomdl.symmetry.effective_learning_rate(jnp.linalg.norm(w), eta)
    np.testing.assert_allclose(direction(w, eta) - unit, direction(unit, rate) - unit, rtol=1e-3, atol=1e-12)
    np.testing.assert_allclose(eomdl.symmetry.effective_learning_rate(2.0, 0.1, 0.9), 0.25, rtol=1e-12)


def test_frame_and_plot(runs):
    found = {
        name: eomdl.symmetry.conservation(
            runs[0.9, DECAY], s, learning_rate=ETA, weight_decay=DECAY, momentum=0.9
        )
        for name, s in CHARGES.items()
    }
    frame = found["scale"].to_frame()
    assert {"step", "measured", "exact", "gradient flow", "first order", "error exact"} <= set(frame.columns)
    figure = plot(found)
    for (left, right), charge in zip(np.reshape(figure.axes, (3, 2)), found.values(), strict=True):
        drawn = {line.get_label(): line.get_ydata() for line in left.lines}
        total = charge.charge.reshape(len(charge.steps), -1).sum(axis=1)
        np.testing.assert_array_equal(drawn["measured"], total)
        assert drawn.keys() - {"measured"} == charge.predictions.keys()
        errors = {line.get_label(): line.get_ydata() for line in right.lines}
        np.testing.assert_array_equal(errors["gradient flow"][1:], charge.errors["gradient flow"][1:])


def test_parameters_must_be_saved(runs):
    run, symmetry = next(iter(runs.values())), next(iter(CHARGES.values()))
    bare = dataclasses.replace(run, params=None)
    with pytest.raises(ValueError, match=r"^run: expected saved params"):
        eomdl.symmetry.conservation(bare, symmetry, learning_rate=ETA)
    with pytest.raises(
        ValueError, match=r"^models\['bare'\]: expected an eomdl.Trajectory with saved params"
    ):
        eomdl.symmetry.conservation(run, symmetry, learning_rate=ETA, models={"bare": bare})
