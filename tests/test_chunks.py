"""Means over chunks: the plain mean in value and every derivative, in the memory of one chunk, from device, host and file."""

import gc
import threading
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import NET, assert_close, net_loss, normal

import eomdl
from eomdl.losses import MeanOverChunks, OnHost


def squares(params, args):
    """Mean of 1/2 (a.x - b)^2."""
    a, b = args
    return 0.5 * jnp.mean((a @ params - b) ** 2)


def weighted_squares(params, args):
    a, b, w = args
    return 0.5 * jnp.sum(w * (a @ params - b) ** 2) / jnp.sum(w)


def last_of(args):
    return args[-1]


SGD = optax.sgd(1e-3)
X = jnp.array([0.3, -1.2, 0.7])
WHOLE, UNEVEN = (normal(5, 12, 3), normal(6, 12)), (normal(5, 11, 3), normal(6, 11))
NET_WHOLE, NET_UNEVEN = ((normal(7, n, 3), normal(8, n, 2)) for n in (12, 11))
CHUNKED, CHUNKED_NET = MeanOverChunks(squares, 4), MeanOverChunks(net_loss, 4)


def host(args):
    return OnHost(jax.tree.map(np.asarray, args))


def derivatives(loss, params, args):
    """Value, gradient, two counter terms, and the gradient of the squared gradient."""

    def square(p):
        return optax.tree.vdot(*[jax.grad(loss)(p, args)] * 2)

    value = jax.value_and_grad(loss)(params, args)
    terms = eomdl.counterterms(loss, params, 2, args=args)
    return value, terms, jax.grad(square)(params)


@eqx.filter_jit
def all_derivatives(loss, params, args):
    return derivatives(loss, params, args)


# ---------------------------------------------------------------- what it is


@pytest.mark.parametrize("args", [WHOLE, UNEVEN], ids=["whole", "uneven"])
@pytest.mark.parametrize("place", [lambda args: args, host], ids=["device", "host"])
def test_counter_terms_of_squares_in_closed_form(args, place):
    a, b = (np.asarray(x) for x in args)
    hessian = a.T @ a / len(a)
    gradient = a.T @ (a @ np.asarray(X) - b) / len(a)
    (value, first), terms, square = all_derivatives(CHUNKED, X, place(args))
    np.testing.assert_allclose(value, 0.5 * np.mean((a @ np.asarray(X) - b) ** 2), rtol=1e-14)
    np.testing.assert_allclose(first, gradient, rtol=1e-13)
    vector = gradient
    for j, term in enumerate(terms):  # (eta H)^j / (j + 1)
        vector = hessian @ vector
        np.testing.assert_allclose(term, vector / (j + 2), rtol=1e-12)
    np.testing.assert_allclose(square, 2 * hessian @ gradient, rtol=1e-12)


@pytest.mark.parametrize("args", [NET_WHOLE, NET_UNEVEN], ids=["whole", "uneven"])
@pytest.mark.parametrize("place", [lambda args: args, host], ids=["device", "host"])
def test_every_derivative_of_a_network_s_loss_is_that_of_the_plain_mean(args, place):
    plain = all_derivatives(net_loss, NET, args)
    assert_close(all_derivatives(CHUNKED_NET, NET, place(args)), plain, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [1, 5, 11, 100])
def test_any_size_of_chunk(size):
    chunked = MeanOverChunks(squares, size)
    np.testing.assert_allclose(chunked(X, UNEVEN), squares(X, UNEVEN), rtol=1e-14)


def test_a_last_chunk_that_counts_in_full_would_be_seen():
    a, b = UNEVEN
    wrong = np.mean([squares(X, (a[i : i + 4], b[i : i + 4])) for i in (0, 4, 8)])
    assert abs(wrong - CHUNKED(X, UNEVEN)) > 1e-3


@pytest.mark.parametrize("place", [lambda args: args, host], ids=["device", "host"])
def test_weights_per_example(place):
    weights = np.random.default_rng(0).uniform(0.1, 3, 11)
    weights[4:8] = 0  # a chunk of weight 0 has no mean
    args = (*UNEVEN, jnp.asarray(weights))
    chunked = MeanOverChunks(weighted_squares, 4, last_of)
    expected = all_derivatives(weighted_squares, X, args)
    assert_close(all_derivatives(chunked, X, place(args)), expected, rtol=1e-12, atol=1e-14)
    unweighted = MeanOverChunks(weighted_squares, 4)(X, args)
    assert not np.isclose(unweighted, expected[0][0], rtol=1e-3)


def test_float32_stays_and_another_mean_is_no_tracer():
    args = jax.tree.map(lambda x: x.astype(jnp.float32), UNEVEN)
    for data in (args, host(args)):
        value, gradient = jax.value_and_grad(CHUNKED)(X.astype(jnp.float32), data)
        assert value.dtype == gradient.dtype == jnp.float32
        np.testing.assert_allclose(value, squares(X, UNEVEN), rtol=1e-6)


def test_jit_vmap_and_eager_agree_and_data_have_derivatives():
    many = jnp.stack([X, 2 * X, -X])
    expected = jnp.stack([jax.grad(squares)(x, UNEVEN) for x in many])
    for data in (UNEVEN, host(UNEVEN)):
        np.testing.assert_allclose(
            jax.vmap(lambda x, d=data: jax.grad(CHUNKED)(x, d))(many), expected, rtol=1e-12
        )
    of_labels = jax.grad(lambda b: CHUNKED(X, (UNEVEN[0], b)))(UNEVEN[1])
    np.testing.assert_allclose(
        of_labels, jax.grad(lambda b: squares(X, (UNEVEN[0], b)))(UNEVEN[1]), rtol=1e-12
    )


# --------------------------------------------------------------------- memory


def temporaries(function, params, args) -> int:
    program = jax.jit(function).lower(params, args).compile()
    return program.memory_analysis().temp_size_in_bytes


def xi(n):
    def term(loss):
        return lambda params, args: eomdl.EquationOfMotion(loss, 0.1, n + 1)(0.0, params, args)

    return term


JAX = tuple(map(int, jax.__version__.split(".")[:2]))
DERIVATIVES = {"gradient": jax.grad, "xi_0": xi(0), "xi_1": xi(1), "sharpness": eomdl.sharpness}


@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
def test_memory_does_not_grow_with_the_data(derivative):
    one, four = ((normal(7, n, 3), normal(8, n, 2)) for n in (2000, 8000))
    chunked = derivative(MeanOverChunks(net_loss, 500))
    few, many = (temporaries(chunked, NET, args) for args in (one, four))
    assert many < 1.01 * few + 1000  # the sums of the chunks are 8 bytes each
    plain = [temporaries(derivative(net_loss), NET, args) for args in (one, four)]
    if jax.default_backend() == "cpu":
        assert plain[1] > 3.5 * plain[0]
        assert plain[1] > 8 * many
    else:  # a GPU has 30 MiB of work space for anything
        assert plain[1] - plain[0] > 6000 * 3 * 8  # a number for each example and input at least
    uneven = temporaries(chunked, NET, jax.tree.map(lambda x: x[:-1], four))
    # One chunk more, of another size. XLA of JAX 0.9 keeps a little more for it (2.07 times, for xi_1).
    assert uneven < (2 if JAX >= (0, 10) else 2.2) * many


# ----------------------------------------------------------------- from the host


def test_the_next_chunk_is_read_while_one_is_computed(monkeypatch):
    data = host(WHOLE)
    by_hand, plain = [], OnHost._read

    def noted(self, size, i):
        by_hand.append(not threading.current_thread().name.startswith("eomdl-reader"))
        return plain(self, size, i)

    monkeypatch.setattr(OnHost, "_read", noted)
    chunked = MeanOverChunks(squares, 1)
    for function in (chunked, jax.grad(chunked), jax.value_and_grad(chunked)):
        compiled = jax.jit(function).lower(X, data).compile()
        for _ in range(3):
            jax.block_until_ready(compiled(X, data))
    # Forwards, backwards, both, three times each: a chunk is waited for where the direction turns.
    assert sum(by_hand) <= 1 + 1 + 3 * 2
    assert len(by_hand) >= 3 * (12 + 12 + 24)


def test_runs_from_a_file_are_those_from_the_device(tmp_path):
    np.save(tmp_path / "a.npy", np.asarray(UNEVEN[0]))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    streamed = OnHost((mapped, np.asarray(UNEVEN[1])))
    step_map = eomdl.optimizer_step(CHUNKED, optax.sgd(0.1))
    options = dict(rtol=1e-9, atol=1e-9, estimate_error=False, diagnose=False)
    for flow in (
        eomdl.EquationOfMotion(CHUNKED, 0.1),
        eomdl.InterpolatingFlow(step_map, 0.1, 2),
    ):
        there, here = (eomdl.solve(flow, X, 3, args=args, **options) for args in (streamed, UNEVEN))
        assert not there.message
        assert_close(there.params, here.params, rtol=1e-12)
    there, here = (
        eomdl.descend(CHUNKED, X, optax.sgd(0.1), 5, args=args, observe={"loss": CHUNKED})
        for args in (streamed, UNEVEN)
    )
    assert_close((there.params, there.observables), (here.params, here.observables), rtol=1e-12)


def test_thousands_of_chunks_do_not_wait_for_each_other():
    a, b = normal(5, 512, 40), normal(6, 512)
    data, loss = host((a, b)), MeanOverChunks(squares, 8)
    run = eomdl.descend(loss, jnp.zeros(40), SGD, 40, args=data, save_steps=[40])
    plain = eomdl.descend(squares, jnp.zeros(40), SGD, 40, args=(a, b), save_steps=[40])
    assert_close(run.params, plain.params, rtol=1e-12)


def test_bytes_and_wide_numbers_are_handed_over_as_jax_knows_them():
    bright = np.arange(24, dtype=np.uint8).reshape(12, 2)

    def brightness(params, args):
        assert args.dtype == jnp.uint8
        return params * jnp.mean(args.astype(float) / 255)

    np.testing.assert_allclose(
        MeanOverChunks(brightness, 5)(1.0, OnHost(bright)), bright.mean() / 255, rtol=1e-12
    )
    with jax.enable_x64(False):
        wide = OnHost(np.arange(6.0))
        value = MeanOverChunks(lambda p, a: jnp.mean(a), 4)(jnp.ones(1), wide)
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, 2.5)


def test_the_fingerprint_is_that_of_the_data(monkeypatch):
    at_once = host(WHOLE).fingerprint
    monkeypatch.setattr("eomdl.losses.host._BYTES_AT_ONCE", 300)  # a few examples
    assert host(WHOLE).fingerprint == at_once
    other = (WHOLE[0], WHOLE[1].at[-1].add(1e-12))
    assert len({host(args).fingerprint for args in (WHOLE, UNEVEN, other)}) == 3


def test_a_run_goes_on_with_the_data_it_began_with(tmp_path):
    store = eomdl.Checkpoints(tmp_path / "run", 2)

    def run(args, num_steps, **options):
        return eomdl.descend(CHUNKED, X, SGD, num_steps, args=args, **options)

    run(host(UNEVEN), 2, checkpoints=store)
    again = run(host(UNEVEN), 4, checkpoints=store, resume=store.latest)
    np.testing.assert_array_equal(again.final_params, run(host(UNEVEN), 4).final_params)
    other = host((UNEVEN[0], UNEVEN[1].at[-1].add(1e-3)))
    with pytest.raises(
        ValueError, match=r"checkpoints: expected the data on the host .* nothing was overwritten"
    ):
        run(other, 6, checkpoints=store, resume=store.latest)
    branch = eomdl.Checkpoints(tmp_path / "branch", 2)
    assert run(other, 6, checkpoints=branch, resume=store.latest).end.step == 6


# ------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((WHOLE[0], UNEVEN[1]), r"args: expected .*, got args\[0\]: 12, args\[1\]: 11"),
        ((WHOLE[0], 2.0), r"args\[1\]: expected arrays .*, got a scalar.*field of the loss"),
        ((jnp.zeros((0, 3)), jnp.zeros(0)), r"args\[0\]: expected arrays .*, got no examples"),
        (None, "args: expected arrays .*was the data not passed"),
    ],
)
def test_data_without_a_common_leading_axis(args, said):
    with pytest.raises(ValueError, match=said):
        CHUNKED(X, args)
    with pytest.raises(ValueError, match=said):  # at the call, before a step is taken
        eomdl.descend(CHUNKED, X, optax.sgd(0.1), 2, args=args)


def test_data_on_the_host_in_part():
    with pytest.raises(ValueError, match=r"args: expected eomdl.losses.OnHost for all of the data"):
        CHUNKED(X, (OnHost(np.zeros((11, 3))), UNEVEN[1]))


def test_wrong_losses_and_weights():
    with pytest.raises(ValueError, match=r"loss: expected a real scalar, .*shape \(4,\)"):
        MeanOverChunks(lambda p, args: args[1] * p[0], 4)(X, UNEVEN)
    with pytest.raises(ValueError, match=r"weights: expected one for each of 4 examples, got shape \(4, 3\)"):
        MeanOverChunks(squares, 4, lambda args: args[0])(X, UNEVEN)
    with pytest.raises(ValueError, match=r"arrays\[0\]: expected numbers, got dtype <U1"):
        OnHost((np.array(["a", "b"]),))


def test_data_on_the_host_are_let_go():
    """JAX keeps the object with its programs, as long as it keeps those; what the object holds goes at `close`."""
    threads = {thread.name for thread in threading.enumerate()}
    with OnHost(np.zeros((11, 3))) as data:
        array = weakref.ref(data._arrays)
        loss = MeanOverChunks(lambda params, x: jnp.mean((x - params) ** 2), 4)
        program = jax.jit(loss)
        assert program(1.0, data) == 1.0
        assert loss(1.0, data) == 1.0
    gc.collect()
    assert array() is None
    assert {thread.name for thread in threading.enumerate()} <= threads
    data.close()
    for use in (loss, jax.jit(lambda params, args: loss(params, args)), lambda _, args: args.fingerprint):
        with pytest.raises(ValueError, match=r"^args: expected data on the host .* after `close`"):
            use(2.0, data)
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="after `close`"):
        jax.block_until_ready(program(2.0, data))
