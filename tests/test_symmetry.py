"""Symmetries of the loss: checks, proposals, and what they say of single steps (theory.md, section 5)."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    LABEL_ARGS,
    NET,
    NET_ARGS,
    NORMALIZED,
    SCALE,
    SCALE_ARGS,
    assert_close,
    flat,
    label_loss,
    net,
    normal,
    normalized_loss,
    scale_invariant_loss,
    scale_only_loss,
)

import eomdl


HEAD = "layer1.w"


def last_layer(params):
    return params["layer1"]["w"]


# ------------------------------------------------------------ does it hold at all?


def relu_loss(params, args):
    """Mean squared error of a ReLU network: every hidden unit can be rescaled."""
    x, y = args
    return jnp.mean((net(params, x, jax.nn.relu) - y) ** 2)


RESCALE = eomdl.symmetry.Scaling([("layer0.w", 1), ("layer0.b", 0)], [("layer1.w", 0)])


def test_check_translation():
    holds = eomdl.symmetry.check(label_loss, NET, eomdl.symmetry.Translation(HEAD), LABEL_ARGS)
    assert holds.holds
    assert holds.gradient < 1e-13
    assert holds.value < 1e-13
    assert "translation of layer1.w along axis -1: the symmetry holds" in holds.verdict
    for symmetry in (eomdl.symmetry.Translation(last_layer, 0), eomdl.symmetry.Translation("layer0.w")):
        broken = eomdl.symmetry.check(label_loss, NET, symmetry, LABEL_ARGS)
        assert not broken.holds
        assert broken.gradient > 1e-3
        assert broken.value > 1e-3
        assert "does not hold" in broken.verdict
        assert f"{broken.gradient:.1e}" in broken.verdict


def test_check_scale():
    holds = eomdl.symmetry.check(scale_invariant_loss, SCALE, eomdl.symmetry.Scaling(["w"]), SCALE_ARGS)
    assert holds.holds
    assert holds.gradient < 1e-13
    assert holds.value < 1e-13
    for block in ("gain", lambda p: p):
        broken = eomdl.symmetry.check(
            scale_invariant_loss, SCALE, eomdl.symmetry.Scaling([block]), SCALE_ARGS
        )
        assert not broken.holds
        assert broken.gradient > 1e-3
        assert broken.value > 1e-3


def test_check_rescale():
    assert eomdl.symmetry.check(relu_loss, NET, RESCALE, NET_ARGS).holds
    whole = eomdl.symmetry.Scaling(["layer0"], [last_layer])
    assert eomdl.symmetry.check(relu_loss, NET, whole, NET_ARGS).holds
    without_bias = eomdl.symmetry.Scaling([("layer0.w", 1)], [("layer1.w", 0)])
    assert not eomdl.symmetry.check(relu_loss, NET, without_bias, NET_ARGS).holds


def test_checks_take_weight_decay_off():
    def decayed(loss):
        return eomdl.WeightDecay(eomdl.WeightDecay(loss, 0.1), 0.2)

    assert eomdl.symmetry.check(decayed(label_loss), NET, eomdl.symmetry.Translation(HEAD), LABEL_ARGS).holds
    assert eomdl.symmetry.check(
        decayed(scale_invariant_loss), SCALE, eomdl.symmetry.Scaling(["w"]), SCALE_ARGS
    ).holds


def test_checks_see_a_slight_violation():
    def slightly(params, args):
        return label_loss(params, args) + 1e-4 * jnp.sum(last_layer(params))

    symmetry = eomdl.symmetry.Translation(HEAD)
    assert not eomdl.symmetry.check(slightly, NET, symmetry, LABEL_ARGS).holds
    assert eomdl.symmetry.check(slightly, NET, symmetry, LABEL_ARGS, tolerance=0.1).holds


@pytest.mark.parametrize(
    "symmetry", [eomdl.symmetry.Translation(HEAD), eomdl.symmetry.Scaling(["layer0.w"]), RESCALE]
)
def test_transformations_form_a_group(symmetry):
    charge = symmetry.charge(NET)
    a, b = normal(31, *charge.shape), normal(32, *charge.shape)
    assert_close(symmetry.transform(NET, jnp.zeros(charge.shape)), NET, rtol=1e-15)
    assert_close(
        symmetry.transform(symmetry.transform(NET, a), b), symmetry.transform(NET, a + b), rtol=1e-13
    )


# ----------------------------------------------------------------------- proposals


def labels_of(found):
    return {check.symmetry.label for check in found}


def test_proposes_the_softmax_and_the_relu_units():
    def loss(params, args):
        x, labels = args
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(net(params, x, jax.nn.relu), labels))

    found = eomdl.symmetry.propose(eomdl.WeightDecay(loss, 0.1), NET, LABEL_ARGS)
    assert labels_of(found) == {
        "translation of layer1.b along axis 0",
        "translation of layer1.w along axis 1",
        "rescale of layer0.w (axis 1) and layer0.b (axis 0) against layer1.w (axis 0)",
    }
    assert all(check.holds for check in found)


def test_proposes_every_symmetry_of_a_normalized_network():
    found = eomdl.symmetry.propose(normalized_loss, NORMALIZED, LABEL_ARGS)
    assert labels_of(found) == {
        "translation of first.b in every entry",
        "translation of head along axis 1",
        "scale of first.w (axis 1)",
        "rescale of norm.gain (axis 0) and norm.shift (axis 0) against head (axis 0)",
    }


def test_proposes_a_linear_layer_as_a_whole_where_units_do_not_line_up():
    """A flattened image: no axis of the second array counts the channels, but the layers rescale as wholes."""

    def loss(params, args):
        x, y = args
        h = jax.nn.relu(x[:, :, None] * params["conv"][None, None])  # (N, 3, 2)
        return jnp.mean((h.reshape(len(x), 6) @ params["dense"] - y) ** 2)

    params = {"conv": normal(45, 2), "dense": normal(46, 6, 2)}
    found = eomdl.symmetry.propose(loss, params, NET_ARGS)
    assert labels_of(found) == {"rescale of conv against dense"}


def test_proposes_nothing_for_a_tanh_network():
    def loss(params, args):
        x, y = args
        return jnp.mean((net(params, x) - y) ** 2)

    assert eomdl.symmetry.propose(loss, NET, NET_ARGS) == []


@pytest.mark.parametrize("zeros", [{"b"}, {"w1"}, {"b", "w1"}, {"b", "w1", "w0"}])
def test_zeros_hide_no_symmetry_and_make_none(zeros):
    """Biases start at 0 in flax and Keras, a last layer sometimes: there a bias scales freely, and the layers below are not used."""
    start = {
        f"layer{i}": {
            "w": jnp.zeros_like(NET[f"layer{i}"]["w"]) if f"w{i}" in zeros else NET[f"layer{i}"]["w"],
            "b": jnp.zeros_like(NET[f"layer{i}"]["b"]) if "b" in zeros else NET[f"layer{i}"]["b"],
        }
        for i in (0, 1)
    }
    found = eomdl.symmetry.propose(relu_loss, start, NET_ARGS)
    assert labels_of(found) == {
        "rescale of layer0.w (axis 1) and layer0.b (axis 0) against layer1.w (axis 0)"
    }
    # A check says the same.
    assert eomdl.symmetry.check(relu_loss, start, RESCALE, NET_ARGS).holds
    for false in (
        eomdl.symmetry.Scaling(["layer0.b"]),
        eomdl.symmetry.Translation("layer0.w"),
        eomdl.symmetry.Scaling([("layer0.w", 1)], [("layer1.w", 0)]),
    ):
        found = eomdl.symmetry.check(relu_loss, start, false, NET_ARGS)
        assert not found.holds
        assert min(found.gradient, found.value) > 1e-4


def test_a_loss_that_is_finite_at_one_point_only_is_said():
    def loss(p, args):
        return jnp.where(jnp.sum(p["b"] ** 2) > 0, jnp.nan, jnp.sum(p["w"] ** 2))

    start = {"w": jnp.ones(2), "b": jnp.zeros(2)}
    found = eomdl.symmetry.check(loss, start, eomdl.symmetry.Scaling(["b"]))
    assert "because of zeros only" in found.notes[0]


def test_the_loss_is_looked_at_first():
    with pytest.raises(ValueError, match=r"loss: expected .*\(6, 2\)"):
        eomdl.symmetry.check(lambda p, args: args[1] + p["layer1"]["b"][None], NET, RESCALE, NET_ARGS)


def test_proposals_for_a_loss_that_is_a_module():
    found = eomdl.symmetry.propose(eomdl.losses.GradientPenalty(label_loss, 0.0), NET, LABEL_ARGS)
    assert "translation of layer1.w along axis 1" in labels_of(found)


def test_names_of_blocks_that_do_not_exist():
    for bad in (eomdl.symmetry.Translation("layer1.v"), eomdl.symmetry.Scaling([("layer_1.w", 0)])):
        with pytest.raises(ValueError, match=r"block: expected the name of a block.*layer1\.w"):
            eomdl.symmetry.check(label_loss, NET, bad, LABEL_ARGS)
    with pytest.raises(ValueError, match=r"nearest are .*'layer0\.b'"):
        eomdl.observe.block_norm("nothing like it")(NET, None)
    np.testing.assert_allclose(
        eomdl.observe.block_norm("layer1")(NET, None), np.linalg.norm(flat(NET["layer1"])), rtol=1e-14
    )


def test_wrong_symmetries():
    with pytest.raises(ValueError, match=r"axis: expected an axis of layer1\.w"):
        eomdl.symmetry.check(label_loss, NET, eomdl.symmetry.Translation(HEAD, 2), LABEL_ARGS)
    with pytest.raises(ValueError, match="block: expected one array"):
        eomdl.symmetry.check(label_loss, NET, eomdl.symmetry.Translation("layer1"), LABEL_ARGS)
    with pytest.raises(ValueError, match="expected one number of units"):
        eomdl.symmetry.Scaling([("layer0.w", 0)], [("layer1.w", 0)]).charge(NET)
    with pytest.raises(ValueError, match="for all members or for none"):
        eomdl.symmetry.Scaling([("layer0.w", 0), "layer0.b"])
    with pytest.raises(ValueError, match="incoming: expected a list of blocks"):
        eomdl.symmetry.Scaling("layer0.w")
    with pytest.raises(ValueError, match="incoming: expected at least one block"):
        eomdl.symmetry.Scaling([])
    with pytest.raises(ValueError, match=r"symmetry: expected an eomdl\.symmetry\.Translation"):
        eomdl.symmetry.check(label_loss, NET, "layer1.w", LABEL_ARGS)


# ------------------------------------------------------------ the theory's identities


def test_hessian_along_a_scale_invariant_block_is_minus_the_gradient():
    # H theta_A = -grad f (theory.md, section 5), which the norm's law at order 1 uses
    w = SCALE["w"]

    def f(w):
        return scale_invariant_loss({"w": w, "gain": SCALE["gain"]}, SCALE_ARGS)

    np.testing.assert_allclose(jax.hessian(f)(w) @ w, -jax.grad(f)(w), rtol=1e-11)


# ----------------------------------------------------------------------- laws

ETA, DECAY = 0.05, 0.4


def test_translation_law_of_gradient_descent_is_exact():
    # p_(k+1) = (1 - eta lambda) p_k: the rate is -log(1 - eta lambda)/eta at every step
    loss = eomdl.WeightDecay(label_loss, DECAY)
    observe = {"p": eomdl.observe.shift_component(last_layer)}
    run = eomdl.descend(loss, NET, optax.sgd(ETA), 10, args=LABEL_ARGS, observe=observe)
    p = run.observables["p"]
    np.testing.assert_allclose(p, p[0][None] * (1 - ETA * DECAY) ** np.arange(11)[:, None], rtol=1e-10)
    exact = eomdl.symmetry.translation_decay_rate(ETA, DECAY, None)
    np.testing.assert_allclose(exact, -np.log(1 - ETA * DECAY) / ETA, rtol=1e-14)
    np.testing.assert_allclose(eomdl.observe.decay_rate(p, ETA), exact, rtol=1e-10)


@pytest.mark.parametrize("order", range(4))
def test_translation_law_of_the_flows(order):
    loss = eomdl.WeightDecay(label_loss, DECAY)
    flow = eomdl.EquationOfMotion(loss, ETA, order)
    observable = eomdl.observe.shift_component(last_layer)
    series = sum(ETA ** (j - 1) * DECAY**j / j for j in range(1, order + 2))
    predicted = eomdl.symmetry.translation_decay_rate(ETA, DECAY, order)
    np.testing.assert_allclose(predicted, series, rtol=1e-14)
    velocity = eqx.filter_jit(eomdl.observe.lie_derivative(observable, flow))(NET, LABEL_ARGS)
    np.testing.assert_allclose(velocity, -predicted * observable(NET, None), rtol=1e-10)


def test_translation_numbers_of_the_paper():
    rates = [eomdl.symmetry.translation_decay_rate(0.01, 0.01, n) for n in (0, 1, 2, None)]
    np.testing.assert_allclose(rates[:2], [0.01, 0.0100005], rtol=1e-14)
    np.testing.assert_allclose(rates[2], 0.0100005 + 1e-4 * 1e-6 / 3, rtol=1e-14)
    np.testing.assert_allclose(rates[3], 0.010000500033, atol=1e-12)
    assert eomdl.symmetry.translation_decay_rate(0.1, 0.0, 3) == 0.0


def test_scale_law_of_gradient_descent_is_exact():
    loss = eomdl.WeightDecay(scale_only_loss, DECAY)
    gradient = lambda w, args: jnp.linalg.norm(jax.grad(scale_only_loss)(w, args))
    observe = {"norm": eomdl.observe.block_norm(), "gradient": gradient}
    run = eomdl.descend(loss, SCALE["w"], optax.sgd(ETA), 20, args=SCALE_ARGS, observe=observe)
    norm, gradient = run.observables["norm"], run.observables["gradient"]
    after = eomdl.symmetry.scale_norm_after_step(norm[:-1], gradient[:-1], ETA, DECAY)
    np.testing.assert_allclose(norm[1:], after, rtol=1e-13)
    np.testing.assert_allclose(
        norm[1:] ** 2, (1 - ETA * DECAY) ** 2 * norm[:-1] ** 2 + ETA**2 * gradient[:-1] ** 2, rtol=1e-13
    )


@pytest.mark.parametrize("order", [0, 1])
def test_scale_law_of_the_flows(order):
    # d log |w|^2 / dt = 2 <w, F(w)> / |w|^2
    flow = eomdl.EquationOfMotion(eomdl.WeightDecay(scale_only_loss, DECAY), ETA, order)
    w = SCALE["w"]
    norm = jnp.linalg.norm(w)
    gradient = jnp.linalg.norm(jax.grad(scale_only_loss)(w, SCALE_ARGS))
    rate = eomdl.observe.lie_derivative(lambda w, args: jnp.log(jnp.sum(w**2)), flow)(w, SCALE_ARGS)
    np.testing.assert_allclose(
        eomdl.symmetry.scale_norm_rate(norm, gradient, ETA, DECAY, order), rate, rtol=1e-12
    )
    by_hand = [-2 * DECAY, -(2 * DECAY + ETA * DECAY**2) + ETA * gradient**2 / norm**2][order]
    np.testing.assert_allclose(rate, by_hand, rtol=1e-12)


def test_equilibrium_norm_and_angle():
    # A constant tangential force c/|w| keeps the norm where decay and growth balance, and turns by
    # arccos(1 - eta lambda) a step: w' = (1 - eta lambda) w - eta (c / r) t, |t| = 1, t _|_ w.
    eta, decay, c = 0.1, 0.3, 1.7
    w = np.array([2.0, 0.0])
    radii, angles = [], []
    for _ in range(2000):
        r = np.linalg.norm(w)
        tangent = np.array([-w[1], w[0]]) / r
        new = (1 - eta * decay) * w - eta * (c / r) * tangent
        angles.append(np.arccos(w @ new / (r * np.linalg.norm(new))))
        radii.append(r)
        w = new
    assert radii[0] != pytest.approx(radii[-1], rel=0.1)
    start = eomdl.symmetry.equilibrium_norm(radii[0], c / radii[0], eta, decay)
    end = eomdl.symmetry.equilibrium_norm(radii[-1], c / radii[-1], eta, decay)
    np.testing.assert_allclose([start, end], radii[-1], rtol=1e-10)
    np.testing.assert_allclose(end**4, eta * c**2 / (decay * (2 - eta * decay)), rtol=1e-13)
    np.testing.assert_allclose(eomdl.symmetry.equilibrium_angle(eta, decay), angles[-1], rtol=1e-10)
    np.testing.assert_allclose(eomdl.symmetry.equilibrium_angle(1e-4, 1e-2), np.sqrt(2e-6), rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_equilibrium_norm_with_momentum_is_that_of_random_gradients(beta):
    """Heavy ball with a tangential gradient of size c/r in a new random direction at each step: uncorrelated with the last update."""
    eta, decay, c, rng = 0.5, 0.3, 1.7, np.random.default_rng(0)
    w = np.full(1000, eomdl.symmetry.equilibrium_norm(1.0, c, eta, decay, beta) / np.sqrt(1000))
    update, norms = np.zeros(1000), []
    for _ in range(1500):
        r2 = w @ w
        direction = rng.normal(size=1000)
        direction -= (direction @ w / r2) * w
        update = beta * update - eta * (c / np.sqrt(r2 * (direction @ direction)) * direction + decay * w)
        w = w + update
        norms.append(r2)
    expected = eomdl.symmetry.equilibrium_norm(1.0, c, eta, decay, beta)
    np.testing.assert_allclose(np.sqrt(np.mean(norms[300:])), expected, rtol=5e-3)


def test_rescaling_law():
    # f(a u, v/a) = f(u, v): gradient flow conserves |u|^2 - |v|^2; the counter term changes it by
    # eta (|grad_u f|^2 - |grad_v f|^2), since gradient descent does by eta^2 times that a step
    def loss(params, args):
        x, y = args
        return jnp.mean((jnp.outer(x @ params["u"], params["v"]) - y) ** 2)

    params = {"u": normal(23, 3), "v": normal(24, 2)}
    balance = lambda p, args: jnp.sum(p["u"] ** 2) - jnp.sum(p["v"] ** 2)
    conserved = eomdl.observe.lie_derivative(balance, eomdl.GradientFlow(loss, ETA))(params, NET_ARGS)
    np.testing.assert_allclose(conserved, 0, atol=1e-12)
    broken = eomdl.observe.lie_derivative(balance, eomdl.EquationOfMotion(loss, ETA, 1))(params, NET_ARGS)
    expected = ETA * balance(jax.grad(loss)(params, NET_ARGS), None)
    np.testing.assert_allclose(broken, expected, rtol=1e-10)
    assert abs(expected) > 1e-3


def test_members_that_are_no_blocks_are_refused():
    with pytest.raises(ValueError, match=r"^incoming: expected a list of blocks or \(block, axis\)"):
        eomdl.symmetry.Scaling([("layer0.w", 0, 1)])
    with pytest.raises(ValueError, match=r"^axis: expected an axis of the array layer0\.w, got 2"):
        eomdl.symmetry.Scaling([("layer0.w", 2)]).charge(NET)
