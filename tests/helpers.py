"""Problems with known answers, in `PROBLEMS`, and the losses that the tests share.

A new closed form is tested by being listed. (Flows are listed in `registry.py`.) Losses and optimizers
are made once, here: JAX caches compiled programs by the identity of the function.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree


# ------------------------------------------------- problems with known answers


class Problem(NamedTuple):
    name: str
    loss: Callable[[Any, Any], jax.Array]
    params: Any
    args: Any
    counterterms: Callable[[Any, Any, int], Sequence[Any]]  # (params, args, order): closed form


def quadratic_loss(params, args):
    """1/2 x'Hx - b'x on the flattened parameters; args = (H, b)."""
    hessian, b = args
    x, _ = ravel_pytree(params)
    return 0.5 * jnp.vdot(x, hessian @ x) - jnp.vdot(b, x)


def _quadratic_counterterms(params, args, order):
    # F = log(1 - eta H)/(eta H) g = -sum_j (eta H)^j/(j + 1) g
    hessian, b = (np.asarray(a) for a in args)
    x, unravel = ravel_pytree(params)
    gradient = hessian @ np.asarray(x) - b
    eigenvalues, vectors = np.linalg.eigh(hessian)
    return [
        unravel(vectors @ (eigenvalues**j / (j + 1) * (vectors.T @ gradient))) for j in range(1, order + 1)
    ]


def cubic_loss(params, args):
    """-y^3/3: descent follows y' = y^2."""
    del args
    return -(params**3) / 3


SQUARE_SERIES = np.array([1, -1, 3 / 2, -8 / 3, 31 / 6, -157 / 15, 649 / 30])  # of h^(n-1) y^(n+1)


def linear_loss(params, args):
    return jnp.vdot(args, params)


def symmetric(eigenvalues, seed: int = 0) -> np.ndarray:
    """A dense symmetric matrix with these eigenvalues."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(len(eigenvalues),) * 2))
    return q @ np.diag(eigenvalues) @ q.T


HESSIAN = jnp.asarray(symmetric([-0.4, 0.1, 0.7, 1.3, 2.0]))
QUADRATIC = Problem(
    "quadratic",
    quadratic_loss,
    {"a": (jnp.array([0.3, -1.1]), jnp.array(0.7, float)), "b": [jnp.array([[1.9, -0.2]])]},
    (HESSIAN, jnp.array([0.5, -0.3, 0.2, 0.1, 1.0])),
    _quadratic_counterterms,
)
PROBLEMS = [
    QUADRATIC,
    Problem(
        "scalar square",
        cubic_loss,
        jnp.array(0.6, float),
        None,
        lambda y, args, order: [-c * y ** (n + 2) for n, c in enumerate(SQUARE_SERIES[1 : order + 1], 1)],
    ),
    Problem(
        "linear",
        linear_loss,
        jnp.array([1.0, 2.0]),
        jnp.array([0.5, -2.0]),
        lambda x, args, order: [jnp.zeros_like(x)] * order,
    ),
]


# ------------------------------------------------------------------ losses


def valley_loss(params, args):
    """Two parameters, a curved valley: everything nonlinear, compiles in no time."""
    del args
    x, y = params["x"], params["y"]
    return 0.5 * (y - jnp.sin(x)) ** 2 + 0.25 * jnp.log(1 + x**2) * (1.5 + jnp.cos(y))


def pulled_loss(params, pull):
    """The valley with data: another smooth function of two parameters for every number."""
    return valley_loss(params, None) + pull * params["x"] * params["y"]


def pulled_losses(params, pulls):
    """The valley, and a pull by each example; their noise has rank 2 and is skewed."""
    x, y = params["x"], params["y"]
    return valley_loss(params, None) + pulls * x * y + pulls**2 * jnp.sin(x - 2 * y)


# With a dtype: without, JAX takes a number for weakly typed, and compiles again where a run's strongly typed one comes.
VALLEY = {"x": jnp.array(1.2, float), "y": jnp.array(-0.7, float)}
VALLEY_REST = {"x": jnp.array(0.0, float), "y": jnp.array(0.0, float)}  # a minimum, whatever the pull


def normal(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape))


def net_params(seed: int = 0, sizes: Sequence[int] = (3, 4, 2)) -> dict[str, dict[str, jax.Array]]:
    keys = jax.random.split(jax.random.key(seed), len(sizes))
    return {
        f"layer{i}": {
            "w": jax.random.normal(key, (m, n)) / np.sqrt(m),
            "b": 0.1 * jax.random.normal(jax.random.fold_in(key, 1), (n,)),
        }
        for i, (key, m, n) in enumerate(zip(keys, sizes, sizes[1:], strict=False))
    }


def net(params, x, activation=jnp.tanh):
    layers = list(params.values())
    for layer in layers[:-1]:
        x = activation(x @ layer["w"] + layer["b"][None])
    return x @ layers[-1]["w"] + layers[-1]["b"][None]


def net_loss(params, args):
    """Mean squared error of a tanh network."""
    x, y = args
    return jnp.mean((net(params, x) - y) ** 2)


def label_loss(params, args):
    """Softmax cross entropy with integer labels."""
    x, labels = args
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(net(params, x), labels))


NET = net_params()
NET_ARGS = (normal(1, 6, 3), normal(2, 6, 2))
LABEL_ARGS = (normal(1, 6, 3), jnp.array([0, 1, 1, 0, 1, 0]))
NET_BATCHES = (normal(3, 12, 2, 3), normal(4, 12, 2, 2))  # 12 steps, 2 examples each


def scale_invariant_loss(params, args):
    """The weights act through their direction alone; the gain does not."""
    x, y = args
    w = params["w"]
    return jnp.mean((params["gain"] * jnp.tanh(x @ w / jnp.sqrt(jnp.sum(w**2))) - y) ** 2)


SCALE = {"w": normal(20, 3), "gain": jnp.array(1.3, float)}
SCALE_ARGS = (normal(21, 6, 3), normal(22, 6))


def scale_only_loss(w, args):
    return scale_invariant_loss({"w": w, "gain": 1.3}, args)


def normalized_loss(params, args):
    """Linear, batch norm with gain and shift, ReLU, linear, softmax; the first bias does nothing."""
    x, labels = args
    h = x @ params["first"]["w"] + params["first"]["b"][None]
    h = h - jnp.mean(h, axis=0, keepdims=True)
    h = h / jnp.sqrt(jnp.mean(h**2, axis=0, keepdims=True))
    h = jax.nn.relu(h * params["norm"]["gain"][None] + params["norm"]["shift"][None])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(h @ params["head"], labels))


NORMALIZED = {
    "first": {"w": normal(40, 3, 4), "b": normal(41, 4)},
    "norm": {"gain": 1 + 0.3 * normal(42, 4), "shift": normal(43, 4)},
    "head": normal(44, 4, 2),
}


def flat(tree: Any) -> np.ndarray:
    """All leaves in one NumPy vector."""
    return np.concatenate([np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(tree)])


def assert_close(actual: Any, expected: Any, rtol: float = 1e-10, atol: float | None = None) -> None:
    """Pytrees of one structure; the error is measured against the norm of the whole."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert [np.shape(a) for a in jax.tree.leaves(actual)] == [np.shape(b) for b in jax.tree.leaves(expected)]
    a, b = flat(actual), flat(expected)
    assert np.all(np.isfinite(a))
    error = np.linalg.norm(a - b)
    allowed = rtol * np.linalg.norm(b) if atol is None else atol
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


def assert_identical(actual: Any, expected: Any) -> None:
    """Pytrees equal bit for bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def assert_same_from_two_programs(actual: Any, expected: Any) -> None:
    """Equal bit for bit, but to rounding where the older code generator (see `conftest.py`) fuses each in its own way."""
    if "--xla_cpu_use_fusion_emitters=false" in os.environ.get("XLA_FLAGS", ""):
        assert_close(actual, expected, rtol=1e-11)
    else:
        assert_identical(actual, expected)


COMPILED: list[str] = []  # grows by one whenever XLA compiles


def _on_event(event, duration, **kwargs):
    del duration, kwargs
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(event)


jax.monitoring.register_event_duration_secs_listener(_on_event)


def counted(loss: Callable[[Any, Any], jax.Array]) -> tuple[Callable[[Any, Any], jax.Array], list[int]]:
    """The loss, and a list that grows by one whenever Python runs it: eagerly, or to trace it."""
    calls: list[int] = []

    def counting(params, args):
        calls.append(1)
        return loss(params, args)

    return counting, calls
