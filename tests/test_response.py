"""What is this optimizer: its response in one step, its rule in every step, and thresholds held against real runs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import NET, NET_ARGS, flat, net_loss, normal, quadratic_loss, symmetric

from eomdl.maps.response import MomentumRule, linear_response, recognize_momentum
from eomdl.maps.sensitivity import Unknown


LR = 0.01
THRESHOLDS = {
    "gd": (optax.sgd(LR), 2.0),
    "heavy ball": (optax.sgd(LR, 0.9), 2 + 2 * 0.9),
    "nesterov": (optax.sgd(LR, 0.9, nesterov=True), (2 + 2 * 0.9) / (1 + 2 * 0.9)),
    "rmsprop": (optax.rmsprop(LR, 0.9), 2.0),
    "rmsprop, momentum": (optax.rmsprop(LR, 0.9, momentum=0.5), 3.0),
    "adam": (optax.adam(LR, 0.9, 0.99), 2 * 1.9 / 0.1),
    "adamw, schedule": (optax.adamw(optax.cosine_decay_schedule(LR, 100), 0.8), 2 * 1.8 / 0.2),
    "mean of gradients": (optax.chain(optax.ema(0.9), optax.scale(-LR)), 2 * 1.9 / 0.1),
    "decay before a memory": (optax.chain(optax.add_decayed_weights(0.1), optax.sgd(LR, 0.9)), 3.8),
    "decay before Adam": (
        optax.chain(optax.add_decayed_weights(1e-3), optax.adam(LR, 0.9, 0.9)),
        2 * 1.9 / 0.1,
    ),
    "three gradients a step": (optax.MultiSteps(optax.sgd(LR, 0.9), 3).gradient_transformation(), 3.8),
}


def at_step(optimizer, count=5):
    """The optimizer's state after a few steps, with the next gradient."""
    state, params = optimizer.init(NET), NET
    for _ in range(count):
        gradient = jax.grad(net_loss)(params, NET_ARGS)
        updates, new = optimizer.update(gradient, state, params)
        params, state = optax.apply_updates(params, updates), new
    return state, jax.grad(net_loss)(params, NET_ARGS), params


@pytest.mark.parametrize("name", THRESHOLDS)
def test_thresholds_of_known_optimizers(name):
    optimizer, threshold = THRESHOLDS[name]
    found = linear_response(optimizer, *at_step(optimizer))
    assert bool(found.is_known)
    np.testing.assert_allclose(found.threshold, threshold, rtol=1e-6)


def remembering(weight):
    """Steps by the gradient and `weight` times what is remembered, m' = m / 2 + g."""

    def update(gradient, state, params=None):
        updates = jax.tree.map(lambda g, m: -LR * (g + weight * m), gradient, state.trace)
        return updates, optax.TraceState(jax.tree.map(lambda g, m: g + m / 2, gradient, state.trace))

    return optax.GradientTransformation(lambda p: optax.TraceState(jax.tree.map(jnp.zeros_like, p)), update)


KINDS = [
    (optax.lion(LR), Unknown.OTHER_MEMORY),
    (optax.sign_sgd(LR), Unknown.NONLINEAR),
    (optax.adagrad(LR), Unknown.OTHER_MEMORY),
    (optax.amsgrad(LR), Unknown.OTHER_MEMORY),
    (optax.adabelief(LR), Unknown.OTHER_MEMORY),
    (optax.sgd(-LR), Unknown.CLIMBS),
    (optax.sgd(0.0), Unknown.STILL),
    (optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(LR)), Unknown.COUPLED),
    (optax.chain(optax.clip_by_global_norm(1e-3), optax.adam(LR)), Unknown.COUPLED),
    (optax.chain(optax.adaptive_grad_clip(1e-3), optax.rmsprop(LR)), Unknown.COUPLED),
    (optax.chain(optax.clip(1e-2), optax.adam(LR)), Unknown.NONLINEAR),
    (optax.chain(optax.clip(1e-2), optax.sgd(LR)), Unknown.NONLINEAR),
    (optax.chain(optax.trace(0.9), optax.sgd(LR, 0.5)), Unknown.SEVERAL),
    (optax.masked(optax.sgd(LR), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)), Unknown.CLIMBS),
    (optax.lbfgs(), Unknown.RAISED),
    # A complex pair of multipliers leaves the unit circle before one at -1 does, or one leaves it at 1.
    (remembering(1.0), Unknown.UNORDERED),
    (remembering(-1.0), Unknown.UNORDERED),
    (optax.MultiSteps(optax.sgd(LR), 10**6).gradient_transformation(), Unknown.ENDLESS),
]


@pytest.mark.parametrize(("optimizer", "unknown"), KINDS, ids=range(len(KINDS)))
def test_what_is_not_known_has_no_threshold_but_a_reason(optimizer, unknown):
    gradient = jax.grad(net_loss)(NET, NET_ARGS)
    found = linear_response(optimizer, optimizer.init(NET), gradient, NET)
    assert Unknown(int(found.unknown)) == unknown
    assert unknown.reason
    assert np.isnan(found.threshold)


def test_rates_are_those_of_adam():
    optimizer = optax.chain(optax.clip_by_global_norm(1e3), optax.adam(LR, 0.9, 0.99, eps=1e-3))
    state, gradient, params = at_step(optimizer)
    found = linear_response(optimizer, state, gradient, params)
    nu = 0.99 * flat(state[1][0].nu) + 0.01 * flat(gradient) ** 2
    expected = LR / (np.sqrt(nu / (1 - 0.99**6)) + 1e-3) / (1 - 0.9**6)
    np.testing.assert_allclose(flat(found.rates), expected, rtol=1e-9)
    np.testing.assert_allclose(flat(found.velocity_rates[0]), expected, rtol=1e-9)
    momentum = linear_response(optax.sgd(LR, 0.9), *at_step(optax.sgd(LR, 0.9)))
    np.testing.assert_allclose(flat(momentum.rates), LR, rtol=1e-12)
    np.testing.assert_allclose(flat(momentum.velocity_rates[0]), 10 * LR, rtol=1e-9)
    np.testing.assert_allclose(flat(momentum.counter_rates[0]), 10 * LR * 19 / 2, rtol=1e-9)


def test_a_parameter_that_never_had_a_gradient_has_no_rate():
    """As the rows of an embedding that no batch has seen, where lr / eps says nothing of what a gradient will do."""
    optimizer, gradient = optax.adam(LR), jax.grad(net_loss)(NET, NET_ARGS)
    gradient["layer0"]["w"] = gradient["layer0"]["w"].at[0].set(0)
    rates = linear_response(optimizer, optimizer.init(NET), gradient, NET).rates["layer0"]["w"]
    np.testing.assert_array_equal(rates[0], 0)
    np.testing.assert_allclose(rates[1:], LR / (np.abs(gradient["layer0"]["w"][1:]) + 1e-8) / 0.1, rtol=1e-6)


@pytest.mark.parametrize("is_mean", [True, False])
def test_of_accumulated_gradients_the_present_one_stands_for_those_to_come(is_mean):
    """RMSProp of the mean or the sum of three gradients: its rate is lr over the root of 0.1 times the square of that."""
    optimizer = optax.MultiSteps(optax.rmsprop(LR, 0.9), 3, use_grad_mean=is_mean).gradient_transformation()
    params, gradients = jnp.ones(2), jnp.array([[1.0, -2.0], [3.0, 0.5], [-0.2, 4.0]])
    state = optimizer.init(params)
    find_rates = jax.jit(lambda state, gradient: linear_response(optimizer, state, gradient, params).rates)
    for k, gradient in enumerate(gradients):
        total = jnp.sum(gradients[:k], axis=0) + (3 - k) * gradient
        expected = LR / jnp.sqrt(0.1 * total**2 / 9 + 1e-8) if is_mean else 3 * LR / jnp.sqrt(0.1 * total**2)
        np.testing.assert_allclose(find_rates(state, gradient), expected, rtol=1e-6)
        state = optimizer.update(gradient, state, params)[1]


# --------------------------------------------------------------- thresholds, really


def hold(name, state):
    """The optimizer's state with second moments that stay as they are."""
    nu = {"a": jnp.array([1.0, 4.0, 0.5]), "b": jnp.array([2.0, 0.3])}
    if "adam" in name:
        count = jnp.asarray(10**6)
        return (state[0]._replace(count=count, nu=jax.tree.map(lambda v: 1e-3 * v, nu)), *state[1:])
    return (state[0]._replace(nu=nu), *state[1:]) if "rms" in name else state


REAL = {
    "gd": lambda lr: optax.sgd(lr),
    "heavy ball": lambda lr: optax.sgd(lr, 0.9),
    "nesterov": lambda lr: optax.sgd(lr, 0.9, nesterov=True),
    "rmsprop": lambda lr: optax.rmsprop(lr, 1 - 1e-9),
    "adam": lambda lr: optax.adam(lr, 0.9, 1 - 1e-9),
}


@pytest.mark.parametrize("name", REAL)
def test_a_real_run_is_stable_below_the_threshold_and_not_above(name):
    args = (jnp.asarray(symmetric([0.1, 0.3, 0.5, 1.0, 2.0])), jnp.zeros(5))
    start = {"a": 1e-6 * normal(0, 3), "b": 1e-6 * normal(1, 2)}
    gradient = jax.grad(quadratic_loss)(start, args)
    small = REAL[name](1e-3)
    found = linear_response(small, hold(name, small.init(start)), gradient, start)
    r = np.sqrt(flat(found.rates))
    largest = np.linalg.eigvalsh(r[:, None] * np.asarray(args[0]) * r)[-1]

    @jax.jit
    def norms(lr):
        optimizer = REAL[name](lr)

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(quadratic_loss)(params, args), state, params)
            size = jnp.linalg.norm(jnp.concatenate(jax.tree.leaves(params)))
            return (optax.apply_updates(params, updates), state), size

        begin = (start, hold(name, optimizer.init(start)))
        return jax.lax.scan(step, begin, length=500)[1]

    edge = 1e-3 * found.threshold / largest
    assert bool(found.is_known)
    below, above = norms(0.98 * edge), norms(1.02 * edge)
    assert below[-1] < 0.1 * below[0]
    assert np.max(above) > 10 * np.max(
        below
    )  # there is a transient with a memory; later its squares hold it back


def test_clipping_is_seen_in_a_wide_float32_layer():
    """Where only the direction of the gradient itself tells a clipped norm from a smaller rate."""
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(LR))
    params = jnp.ones(100_000, jnp.float32)
    gradient = jnp.asarray(np.random.default_rng(0).normal(size=100_000), jnp.float32)
    respond = jax.jit(lambda g: linear_response(clipped, clipped.init(params), g, params).unknown)
    assert Unknown(int(respond(gradient))) == Unknown.COUPLED
    assert Unknown(int(respond(1e-3 * gradient))) == Unknown.KNOWN


def groups(rate):
    """Groups with rates, memories and decays of their own, and a frozen one."""
    first = optax.chain(optax.add_decayed_weights(0.3), optax.sgd(rate, 0.9))
    second = optax.chain(
        optax.trace(0.5, nesterov=True), optax.add_decayed_weights(0.2), optax.scale(-3 * rate)
    )
    return optax.partition(
        {"a": first, "b": second, "c": optax.set_to_zero()}, {"a": "a", "b": "b", "c": "c"}
    )


def test_groups_reach_their_edge_together():
    """The ratio of all groups is 1 where the largest multiplier of the whole linear map of parameters and memories is."""
    params = {"a": jnp.ones(3), "b": jnp.ones(2), "c": jnp.ones(2)}
    hessian = jnp.asarray(symmetric([0.1, 0.3, 0.5, 1.0, 2.0, 3.0, 4.0]))
    state = groups(1.0).init(params)
    rows, structure = jax.tree.flatten((params, state))
    sizes = np.cumsum([x.size for x in rows])[:-1]

    def step(rate, flat):
        leaves = [x.reshape(row.shape) for x, row in zip(jnp.split(flat, sizes), rows, strict=True)]
        params, state = structure.unflatten(leaves)
        gradient = jax.grad(quadratic_loss)(params, (hessian, jnp.zeros(7)))
        updates, state = groups(rate).update(gradient, state, params)
        return jnp.concatenate(
            [x.ravel() for x in jax.tree.leaves((optax.apply_updates(params, updates), state))]
        )

    def largest(rate):
        of_all = np.asarray(jax.jacobian(lambda x: step(rate, x))(jnp.zeros(sum(x.size for x in rows))))
        moving = np.r_[:5, 7 : len(of_all)]  # the frozen ones have a multiplier of 1
        return np.abs(np.linalg.eigvals(of_all[np.ix_(moving, moving)])).max()

    found = linear_response(
        groups(0.1), state, jax.grad(quadratic_loss)(params, (hessian, jnp.zeros(7))), params
    )
    root = np.sqrt(flat(found.rates))
    matrix = root[:, None] * (np.asarray(hessian) + np.diag(flat(found.decay))) * root
    ratio = np.linalg.eigvalsh(matrix)[-1] / found.threshold
    np.testing.assert_array_equal(found.rates["c"], 0)
    assert largest(0.999 * 0.1 / ratio) < 1 < largest(1.001 * 0.1 / ratio)


# --------------------------------------------------------------- in every step

PARTS = {"a": jnp.ones((2, 3)), "b": jnp.ones(2)}


@pytest.mark.parametrize("params", [PARTS, jnp.ones(()), jax.tree.map(jnp.float32, PARTS)])
@pytest.mark.parametrize(
    ("optimizer", "rule"),
    [
        (optax.sgd(1e5), MomentumRule(1e5)),  # what is near is a part of the step, however large
        (optax.sgd(0.02, momentum=0.9), MomentumRule(0.02, 0.9)),
        (optax.sgd(0.05, momentum=0.8, nesterov=True), MomentumRule(0.05, 0.8, nesterov=True)),
    ],
    ids=["plain", "heavy ball", "Nesterov"],
)
def test_gradient_descent_is_recognized(optimizer, rule, params):
    found = recognize_momentum(optimizer, params, 20)
    assert found.nesterov == rule.nesterov
    np.testing.assert_allclose(
        [found.learning_rate, found.momentum], [rule.learning_rate, rule.momentum], rtol=1e-5
    )


OTHERS = {
    "adam": optax.adam(0.1),
    "late schedule": optax.sgd(optax.piecewise_constant_schedule(0.1, {18: 0.5})),
    "decay": optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(1e-9)),
    "clipping": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    "signs": optax.sign_sgd(0.1),
    "two rates": optax.partition({"a": optax.sgd(0.1), "b": optax.sgd(0.2)}, {"a": "a", "b": "b"}),
    "still": optax.set_to_zero(),
    "ascent": optax.sgd(-0.1),
    "needs the value": optax.lbfgs(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_not(name):
    assert recognize_momentum(OTHERS[name], PARTS, 20) is None


@pytest.mark.parametrize(
    "rule",
    [MomentumRule(0.3), MomentumRule(0.3, 0.6), MomentumRule(0.3, 0.6, nesterov=True)],
    ids=lambda rule: rule.name,
)
def test_the_threshold_is_where_a_parabola_diverges(rule):
    """Root of the characteristic equation of x_{k+1} = (1 + b) x_k - b x_{k-1} - eta lambda (...) on the unit circle."""
    b, nesterov = rule.momentum, rule.nesterov

    def largest(product):
        seen = (1 + b, -b) if nesterov else (1, 0)
        return np.abs(np.roots([1, -(1 + b) + product * seen[0], b + product * seen[1]])).max()

    assert largest(0.999 * rule.threshold) < 1
    assert largest(1.001 * rule.threshold) > 1


@pytest.mark.parametrize(
    "rule",
    [MomentumRule(LR), MomentumRule(LR, 0.8), MomentumRule(LR, 0.8, nesterov=True)],
    ids=lambda rule: rule.name,
)
def test_the_response_in_a_step_is_that_of_the_rule_in_every_step(rule):
    optimizer = optax.sgd(LR, rule.momentum, rule.nesterov)
    found = linear_response(optimizer, *at_step(optimizer))
    np.testing.assert_allclose(found.threshold, rule.threshold, rtol=1e-9)
    np.testing.assert_allclose(flat(found.velocity_rates[0]), rule.step_size, rtol=1e-9)
    expected = rule.step_size * rule.memory_factor / 2
    np.testing.assert_allclose(flat(found.counter_rates[0]), expected, rtol=1e-9)
