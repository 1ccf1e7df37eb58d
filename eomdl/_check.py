"""Argument checks: one `ValueError` form, "name: expected ..., got ...".

Each function returns the argument, converted, or raises. Traced values pass; shapes and dtypes are always checked.
"""

import operator
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eomdl import _reads, _tree
from eomdl._types import Args, Array, Loss, Observable, Params, StateObservable


RAGGED = (  # what to do about it
    "let the loader leave out a last batch that is smaller (`drop_last=True` in PyTorch, `drop_remainder=True` in tf.data), which "
    "is a step less, or fill it up with examples whose weight in the loss is 0"
)


def _wrong(name: str, expected: str, got: Any) -> ValueError:
    return ValueError(f"{name}: expected {expected}, got {got}")


def _show(value: Any) -> str:
    try:
        return f"{value!r:.80}"
    except ValueError:  # Python prints no integer of more than 4300 digits
        return f"a {type(value).__name__} that is too long to print"


def makes_array(value: Any) -> bool:
    """Return whether NumPy makes an array of a value: not of rows of several lengths, nor of random keys."""
    try:
        np.asarray(value)
    except (TypeError, ValueError):
        return False
    return True


def finite_scalar(name: str, value: Any) -> jax.Array:
    """Return a finite scalar as a floating-point array."""
    return _scalar(name, value, "a finite number", lambda x: True)


def positive_scalar(name: str, value: Any) -> jax.Array:
    """Return a finite scalar > 0 as a floating-point array."""
    return _scalar(name, value, "a finite number > 0", lambda x: x > 0)


def nonnegative_scalar(name: str, value: Any) -> jax.Array:
    """Return a finite scalar >= 0 as a floating-point array."""
    return _scalar(name, value, "a finite number >= 0", lambda x: x >= 0)


def fraction(name: str, value: Any) -> jax.Array:
    """Return a scalar in [0, 1) as a floating-point array."""
    return _scalar(name, value, "a number in [0, 1)", lambda x: 0 <= x < 1)


_FOR_OPTIMIZERS = (
    "; the flow of an optimizer, with its schedule, is eomdl.InterpolatingFlow(eomdl.optimizer_step(loss, optimizer), step_size, "
    "points=2), where step_size is a number that sets the clock"
)


def _scalar(name: str, value: Any, expected: str, holds: Callable[[float], bool]) -> jax.Array:
    if _is_optimizer(value) or callable(value):
        raise _wrong(name, expected, f"{_show(value)}{_FOR_OPTIMIZERS}")
    array = _array(name, value, expected)
    if array.shape != () or not _is_real(array):
        raise _wrong(name, expected, f"{_show(value)} (shape {array.shape}, dtype {array.dtype})")
    # One dtype for 0.1, numpy.float32(0.1) and numpy.float64(0.1): else each would compile again.
    array = jax.lax.convert_element_type(array, jnp.result_type(float))
    if not _tree.is_traced(array) and not (np.isfinite(array) and holds(float(array))):
        ascent = name in ("learning_rate", "step_size") and float(array) < 0
        raise _wrong(name, expected, f"{_show(value)}{'; for ascent negate the loss' * ascent}")
    return array


def _is_real(array: Array) -> bool:
    """Return whether an array is of real numbers: no truth values, complex numbers, objects or random keys."""
    return jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, np.integer)


def _array(name: str, value: Any, expected: str) -> jax.Array:
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError):
        raise _wrong(name, expected, _show(value)) from None


def numbers(
    name: str,
    value: Any,
    expected: str,
    holds: Callable[[np.ndarray], Any] = np.isfinite,
    ndim: int | None = None,
) -> Array:
    """Return a real floating-point array that is not empty; `holds` must be true of every number.

    What is no JAX array becomes a NumPy array: without x64 JAX would cut it to float32.
    """
    if not isinstance(value, jax.Array) and not makes_array(value):
        raise _wrong(name, expected, _show(value))
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    if array.size == 0 or not _is_real(array) or ndim not in (None, array.ndim):
        raise _wrong(name, expected, f"{_show(value)} (shape {array.shape}, dtype {array.dtype})")
    if jnp.issubdtype(array.dtype, np.integer):
        array = array.astype(float if isinstance(array, np.ndarray) else jnp.result_type(float))
    if not _tree.is_traced(array) and not np.all(holds(np.asarray(array))):
        raise _wrong(name, expected, _show(value))
    return array


def positive_numbers(name: str, value: Any) -> Array:
    """Return an array of finite numbers > 0."""
    return numbers(name, value, "finite numbers > 0", lambda x: np.isfinite(x) & (x > 0))


def nonnegative_numbers(name: str, value: Any) -> Array:
    """Return an array of finite numbers >= 0."""
    return numbers(name, value, "finite numbers >= 0", lambda x: np.isfinite(x) & (x >= 0))


def fractions(name: str, value: Any) -> Array:
    """Return an array of numbers in [0, 1)."""
    return numbers(name, value, "numbers in [0, 1)", lambda x: (x >= 0) & (x < 1))


def flag(name: str, value: Any) -> bool:
    """Return True or False."""
    if not isinstance(value, bool | np.bool_):
        raise _wrong(name, "True or False", _show(value))
    return bool(value)


def kind(name: str, value: Any, cls: Any, expected: str) -> Any:
    """Return the value, an instance of a class."""
    if not isinstance(value, cls):
        raise _wrong(name, expected, f"{type(value).__name__}: {_show(value)}")
    return value


def mapping(name: str, value: Any, cls: Any, expected: str) -> Mapping[str, Any]:
    """Return the value, a dict of instances of a class that is not empty."""
    if not isinstance(value, Mapping) or not value or not all(isinstance(v, cls) for v in value.values()):
        raise _wrong(name, f"a dict {{name: {expected}}}", _show(value))
    return value


def step_numbers(name: str, value: Any) -> list[int]:
    """Return step numbers, at least one."""
    steps = np.asarray(value if makes_array(value) else ())
    if steps.ndim != 1 or steps.size == 0 or steps.dtype.kind not in "iu" or steps.min() < 0:
        raise _wrong(name, "a sequence of step numbers", _show(value))
    return steps.tolist()


def seed(name: str, value: Any) -> int:
    """Return the seed of a random number generator."""
    return integer(name, value, 0, 2**63 - 1)


def path(name: str, value: Any) -> Path:
    """Return a path in the file system."""
    return Path(kind(name, value, str | os.PathLike, "a path, a string or a pathlib.Path"))


def where(name: str, value: Any) -> Any:
    """Return the name of a block of the parameters, or a function that selects it."""
    if not isinstance(value, str) and not callable(value):
        raise _wrong(name, "the name of a block, or a function params -> block", _show(value))
    return value


def integer(name: str, value: Any, minimum: int, maximum: int = 2**31 - 1) -> int:
    """Return a Python integer from `minimum` to `maximum`."""
    expected = f"an integer >= {minimum}" + (f" and <= {maximum}" if maximum < 2**31 - 1 else "")
    if isinstance(value, bool | np.bool_):
        raise _wrong(name, expected, _show(value))
    try:
        number = operator.index(value)
    except TypeError:
        raise _wrong(name, expected, _show(value)) from None
    if not minimum <= number <= maximum:
        raise _wrong(name, expected, _show(number))
    return number


_COMPLEX = (
    "; give real and imaginary part as two real arrays, as optax.contrib.split_real_and_imaginary does: "
    "lambda p, args: loss(jax.lax.complex(*p), args)"
)


def params(name: str, value: Params) -> Params:
    """Return a pytree of real floating-point arrays; Python floats become arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(value)
    expected = "a pytree of real floating-point arrays"
    if not leaves:
        raise _wrong(name, expected, f"no leaves in {_show(value)}")
    for path, leaf in leaves:
        where = f"{name}{jax.tree_util.keystr(path)}"
        if isinstance(leaf, float):
            continue
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            hint = "; keep the rest out with equinox.partition(model, equinox.is_inexact_array)"
            raise _wrong(where, expected, f"{type(leaf).__name__}{hint}")
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise _wrong(where, expected, f"dtype {leaf.dtype}{_COMPLEX * jnp.iscomplexobj(leaf)}")
    return jax.tree.map(jnp.asarray, value)


def floating(name: str, value: Any) -> None:
    """Raise for a leaf that is no real floating-point number or array; none is read or moved."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(value):
        dtype = getattr(leaf, "dtype", None) or np.asarray(leaf).dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            where = f"{name}{jax.tree_util.keystr(path)}"
            raise _wrong(where, "real floating-point arrays", f"dtype {dtype}")


def wide_enough(name: str, state: Any) -> None:
    """Raise for a floating-point leaf of 16 bits or less, whose rounding is larger than an ODE solver's steps."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and jnp.finfo(leaf.dtype).bits < 32:
            where = f"{name}{jax.tree_util.keystr(path)}"
            raise _wrong(where, "float32 or float64 to integrate in", f"{leaf.dtype}; cast it before `solve`")


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
        got = f"a function that raised {type(error).__name__}: {error} ({', '.join(given)}{hint})"
        raise _wrong(name, expected, got) from error


def loss_is_scalar(loss: Loss, params: Params, args: Args, source: str = "args") -> None:
    """Raise unless the loss is one real number and, where it can be evaluated, finite at the start.

    `source`: where the data come from, for the message.
    """
    expected = "a function (params, args) -> real scalar"
    if not callable(loss):
        raise _wrong("loss", expected, repr(loss))
    _reads.assert_unchanged("loss", loss)
    _data(source, args)
    traced = _tree.is_traced(loss, params, args)
    call = eqx.filter_eval_shape if traced else _evaluate
    out = _try("loss", expected, call, loss, params, args, names=("params", source))
    if not isinstance(out, float) and getattr(out, "shape", None) != ():
        hint = "; take its mean: lambda p, args: jnp.mean(loss(p, args))" * hasattr(out, "shape")
        if isinstance(out, tuple):
            hint = "; of (value, aux) take the value: lambda p, args: loss(p, args)[0]"
        raise _wrong("loss", expected, f"output of shape {getattr(out, 'shape', None)}: {out!r:.80}{hint}")
    if not jnp.issubdtype(jnp.result_type(out), jnp.floating):
        raise _wrong("loss", expected, f"output of dtype {out.dtype}")
    if not traced and not _tree.is_traced(out) and not np.isfinite(out):
        raise _wrong("loss", "a finite value at the initial params", float(out))


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
            raise _wrong(
                where, "JAX or NumPy arrays", f"a {type(leaf).__module__}.{type(leaf).__name__}; take {hint}"
            )


@eqx.filter_jit
def _evaluate(loss: Loss, params: Params, args: Args) -> Any:
    # One program compiles sooner than the operations of the loss one by one.
    return loss(params, args)


def function(name: str, value: Any, expected: str = "a function (params, args) -> real scalar") -> Any:
    """Return the value, something to call."""
    if not callable(value):
        raise _wrong(name, expected, _show(value))
    return value


def observable(name: str, value: Any) -> Observable:
    """Return the value, something to call as an observable."""
    return function(name, value, "a function (params, args) -> array")


def optimizer(value: Any) -> None:
    """Raise unless the value is an optax optimizer."""
    if not _is_optimizer(value):
        hint = "; of a learning rate or a schedule make one: optax.sgd(learning_rate)"
        is_rate = callable(value) or isinstance(value, float | int)
        raise _wrong("optimizer", "an optax.GradientTransformation", f"{_show(value)}{hint * is_rate}")


def _is_optimizer(value: Any) -> bool:
    return callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))


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
        raise _wrong(argument, f"a dict {{name: {expected.removeprefix('a ')}}}", _show(value))
    for name, function in (value or {}).items():
        if not isinstance(name, str):
            raise _wrong(argument, "names that are strings", repr(name))
        if not callable(function):
            raise _wrong(f"{argument}[{name!r}]", expected, repr(function))
        _reads.assert_unchanged(f"{argument}[{name!r}]", function)


def _only_arrays(place: str, shapes: Any) -> None:
    leaves = jax.tree.leaves(shapes, is_leaf=lambda x: x is None)
    if not leaves or not all(hasattr(leaf, "shape") for leaf in leaves):
        raise _wrong(place, "an array or a pytree of arrays", f"{shapes}")


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


def num_examples(name: str, value: Any) -> int:
    """Return the length that the leading axes of all leaves have in common, at least 1."""
    expected = "arrays whose leading axis counts the examples"
    leaves = jax.tree_util.tree_leaves_with_path(value)
    if not leaves:
        raise _wrong(name, expected, f"none in {_show(value)}; was the data not passed?")
    lengths = {f"{name}{jax.tree_util.keystr(path)}": np.shape(leaf)[:1] for path, leaf in leaves}
    for place, length in lengths.items():
        if not length or length[0] == 0:
            hint = "what belongs to no example is a field of the loss (an equinox.Module)"
            raise _wrong(place, expected, "no examples" if length else f"a scalar; {hint}")
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{place}: {length}" for place, (length,) in lengths.items())
        raise _wrong(name, f"{expected}, as many in each", counts)
    return next(iter(lengths.values()))[0]


def stacked(name: str, batches: Any) -> Any:
    """Return batches in arrays with one leading axis that counts them; a list has one batch after the other, as in a run."""
    if not isinstance(batches, list):
        return batches
    try:
        return jax.tree.map(lambda *leaves: jnp.stack(list(map(jnp.asarray, leaves))), *batches)
    except (TypeError, ValueError) as error:
        raise _wrong(name, "batches of one structure and shape", f"others ({error}); {RAGGED}") from error


def same_structure(name: str, value: Any, like_name: str, like: Any) -> None:
    """Raise unless both have the same pytree structure and leaf shapes."""
    if jax.tree.structure(value) != jax.tree.structure(like):
        raise _wrong(
            name,
            f"the structure of {like_name}, {jax.tree.structure(like)}",
            jax.tree.structure(value),
        )
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(value), jax.tree.leaves(like), strict=True):
        if jnp.shape(a) != jnp.shape(b):
            raise _wrong(
                f"{name}{jax.tree_util.keystr(path)}",
                f"the shape in {like_name}, {jnp.shape(b)}",
                jnp.shape(a),
            )


def stack(name: str, value: Any, like_name: str, like: Any) -> Any:
    """Return a stack of vectors like a pytree, at most as many as its dimension: a leading axis on every leaf counts them."""
    value = params(name, value)
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(value)}
    if len(lengths) != 1 or lengths & {(), (0,)} or max(lengths)[0] > _tree.size(like):
        expected = f"vectors like {like_name}, in leaves with one leading axis that counts them, at most {_tree.size(like)}"
        raise _wrong(name, expected, f"shapes {[jnp.shape(leaf) for leaf in jax.tree.leaves(value)]}")
    same_structure(f"one of {name}", jax.tree.map(lambda leaf: leaf[0], value), like_name, like)
    return value


def positive_like(name: str, value: Any, like_name: str, like: Any) -> Any:
    """Return a pytree like another, of finite numbers > 0."""
    value = params(name, value)
    same_structure(name, value, like_name, like)
    for path, leaf in jax.tree_util.tree_leaves_with_path(value):
        positive_numbers(f"{name}{jax.tree_util.keystr(path)}", leaf)
    return value
