"""Checks of what users write: losses, observables, optimizers. Functions are tried on shapes."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eomdl import _reads, _tree
from eomdl._check.values import is_optimizer, show, wrong
from eomdl._types import Args, Loss, Observable, Params, StateObservable


def shape_of(
    name: str, expected: str, function: Callable, *inputs: Any, names: Sequence[str] = ("params", "args")
) -> Any:
    """Return shape and dtype of the function's output, without evaluating it. `names`: of its inputs, for the message."""
    return _try(name, expected, eqx.filter_eval_shape, function, *inputs, names=names)


def _try(
    name: str, expected: str, call: Callable, function: Callable, *inputs: Any, names: Sequence[str]
) -> Any:
    try:
        return call(function, *inputs)
    except Exception as error:
        given = [f"{n} = {eqx.tree_pformat(x, width=1000):.120}" for n, x in zip(names, inputs, strict=True)]
        hint = "; was the data not passed?" if "args = None" in given else ""
        if "harding" in f"{type(error).__name__}: {error}":
            hint += "; on a mesh with AxisType.Explicit name the sharding of every product (`out_sharding=`), or use AxisType.Auto"
        got = f"a function that raised {type(error).__name__}: {error!s:.200} ({', '.join(given)}{hint})"
        raise wrong(name, expected, got) from error


def loss_is_scalar(loss: Loss, params: Params, args: Args, source: str = "args") -> None:
    """Raise unless the loss is one real number and, where it can be evaluated, finite at the start.

    `source`: where the data come from, for the message.
    """
    expected = "a function (params, args) -> real scalar"
    if not callable(loss):
        raise wrong("loss", expected, show(loss))
    _reads.assert_unchanged("loss", loss)
    _data(source, args)
    traced = _tree.is_traced(loss, params, args)
    call = eqx.filter_eval_shape if traced else _evaluate
    out = _try("loss", expected, call, loss, params, args, names=("params", source))
    if not isinstance(out, float) and getattr(out, "shape", None) != ():
        hint = "; take its mean: lambda p, args: jnp.mean(loss(p, args))" * hasattr(out, "shape")
        if isinstance(out, tuple):
            hint = "; of (value, aux) take the value: lambda p, args: loss(p, args)[0]"
        raise wrong("loss", expected, f"output of shape {getattr(out, 'shape', None)}: {show(out)}{hint}")
    if not jnp.issubdtype(jnp.result_type(out), jnp.floating):
        raise wrong("loss", expected, f"output of dtype {out.dtype}")
    if not traced and not _tree.is_traced(out) and not np.isfinite(out):
        raise wrong("loss", "a finite value at the initial params", float(out))


def _data(name: str, args: Args) -> None:
    """Raise for tables and sparse matrices of other packages, of which JAX can make nothing."""
    sparse, table, tensor = (
        "jax.experimental.sparse.BCOO.from_scipy_sparse(x), or x.toarray()",
        "x.to_numpy()",
        "x.numpy()",
    )
    hints = {"scipy": sparse, "pandas": table, "polars": table, "torch": tensor, "tensorflow": tensor}
    for path, leaf in jax.tree_util.tree_leaves_with_path(args):
        hint = hints.get(type(leaf).__module__.partition(".")[0])
        if hint is not None:
            where = f"{name}{jax.tree_util.keystr(path)}"
            raise wrong(
                where, "JAX or NumPy arrays", f"a {type(leaf).__module__}.{type(leaf).__name__}; take {hint}"
            )


@eqx.filter_jit
def _evaluate(loss: Loss, params: Params, args: Args) -> Any:
    # One program compiles sooner than the operations of the loss one by one.
    return loss(params, args)


def function(
    name: str,
    value: Any,
    expected: str = "a function (params, args) -> real scalar",
    takes: int = 2,
    options: Sequence[str] = (),
) -> Any:
    """Return the value, something to call with so many arguments by place, and options by these names."""
    if not callable(value):
        raise wrong(name, expected, show(value))
    try:
        inspect.signature(value).bind(*[None] * takes, **dict.fromkeys(options))
    except TypeError as error:
        raise wrong(name, expected, f"{show(value)}, which cannot be called so: {error}") from None
    except ValueError:  # of some functions written in C no signature is known
        pass
    return value


def observable(name: str, value: Any) -> Observable:
    """Return the value, something to call as an observable."""
    return function(name, value, "a function (params, args) -> array")


def optimizer(value: Any) -> None:
    """Raise unless the value is an optax optimizer."""
    if not is_optimizer(value):
        hint = "; of a learning rate or a schedule make one: optax.sgd(learning_rate)"
        is_rate = callable(value) or isinstance(value, float | int)
        raise wrong("optimizer", "an optax.GradientTransformation", f"{show(value)}{hint * is_rate}")


def observables(
    observe: Mapping[str, Observable] | None, params: Params, seen_by: Callable[[Observable], Args]
) -> dict[str, Observable]:
    """Named functions `(params, args) -> arrays`, tried once on shapes only, each with the data that it sees."""
    expected = "a function (params, args) -> array or pytree of arrays"
    _named_functions("observe", observe, expected)
    for name, function in (observe or {}).items():
        place = f"observe[{name!r}]"
        _only_arrays(place, shape_of(place, expected, function, params, seen_by(function)))
    return dict(observe or {})


def _named_functions(argument: str, value: Any, expected: str) -> None:
    """Raise for anything but None or a dict of functions by name."""
    if value is not None and not isinstance(value, Mapping):
        raise wrong(argument, f"a dict {{name: {expected.removeprefix('a ')}}}", show(value))
    for name, function in (value or {}).items():
        if not isinstance(name, str):
            raise wrong(argument, "names that are strings", show(name))
        if not callable(function):
            raise wrong(f"{argument}[{name!r}]", expected, show(function))
        _reads.assert_unchanged(f"{argument}[{name!r}]", function)


def _only_arrays(place: str, shapes: Any) -> None:
    leaves = jax.tree.leaves(shapes, is_leaf=lambda x: x is None)
    if not leaves or not all(hasattr(leaf, "shape") for leaf in leaves):
        raise wrong(place, "an array or a pytree of arrays", show(shapes))


def state_observables(
    observe: Mapping[str, StateObservable] | None, state: Any, args: Args
) -> dict[str, StateObservable]:
    """Named functions `(t, state, args) -> arrays`, tried once on shapes only."""
    expected = "a function (t, state, args) -> array or pytree of arrays"
    _named_functions("observe_state", observe, expected)
    t = jnp.zeros((), jnp.result_type(float))
    for name, function in (observe or {}).items():
        place = f"observe_state[{name!r}]"
        shapes = shape_of(place, expected, function, t, state, args, names=("t", "state", "args"))
        _only_arrays(place, shapes)
    return dict(observe or {})
