"""The fingerprint of a flow or a step map: a string that is the same in every process and every version of Python.

A resumed run keeps the tolerances of a flow with the same fingerprint, and a folder of checkpoints is of one run by it.
"""

import dataclasses
import enum
import functools
import hashlib
import inspect
import itertools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from eomdl import _devices
from eomdl._types import Args, Params


_dtype_name = functools.cache(str)  # NumPy is slow to name its dtypes
_DEPTH = 12  # of objects within objects
_INLINED = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2")
# Names, and what follows from the shapes of the inputs and outputs; JAX versions differ in them.
_IGNORED = ("name", "weak_type", "num_carry", "num_consts", "ft_in", "ft_out", "sharding", "out_sharding")


def fingerprint(model: eqx.Module, params: Params, args: Args) -> str:
    """Return the class of a model, and a hash of its numbers, its arrays and the programs of its functions.

    Another loss, optimizer, order, learning rate, number or array that a function closes over gives another fingerprint.
    A function counts by its jaxpr at an example. Only the functions that a model holds are traced, not the model: the
    derivatives that a flow takes of its loss are other programs in other versions of JAX, and take a hundred times as long
    to trace. Classes count by their name and their fields, so that a method which is edited gives the same fingerprint.

    A function is traced as `(params, args)`, `(params)`, `(args)`, `(params, args, k)` or `(t, params, args)`, an
    optimizer as its update of `params`. Where none of them traces, it counts by its name, the names and numbers in
    its code, and what it closes over. A program is compared by how its outputs come about: names, `jit`, `checkpoint`,
    the order of the operations and operations without an effect do not count.

    **Limits:** a function for which another version of JAX writes another program has another fingerprint there. From JAX
    0.9 to 0.12 those are functions that take derivatives themselves (of `tanh`, `max`), sort, or index by an array (0.9
    only). Another precision gives another fingerprint.

    **Arguments:** `model`, a flow, a step map, or a loss that is a Module; `params` and `args`, the
    parameters and the data that its functions see.

    **Cost:** one trace of each function; nothing is compiled or computed.
    """
    return f"{type(model).__qualname__}#{_object(model, (params, args), _DEPTH).hex()[:16]}"


def checksum(*parts: bytes) -> int:
    """Return a number > 0 of 31 bits."""
    return int.from_bytes(_digest(*parts)[:4], "big") % (2**31 - 1) + 1


def _digest(*parts: bytes | str) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.digest()


# ------------------------------------------------------------------ objects


def _object(x: Any, example: tuple, depth: int) -> bytes:
    """Return the hash of anything that a model may hold."""
    if depth == 0:
        return _digest("...")
    if eqx.is_array_like(x):
        return _array(x)
    if isinstance(x, str | bytes | None):
        return _digest(repr(x))
    if isinstance(x, eqx.Module) and type(x).__module__.partition(".")[0] == "eomdl":
        return _digest(type(x).__qualname__, *_parts(x, example, depth))
    program = _program(_update(x) if isinstance(x, optax.GradientTransformation) else x, example)
    if program is not None:
        return program
    name = getattr(x, "__qualname__", type(x).__qualname__)
    return _digest(name, *_parts(x, example, depth))


def _parts(x: Any, example: tuple, depth: int) -> Iterable[bytes]:
    """Return the hashes of what an object is made of."""
    parts: Iterable[Any] = ()
    if isinstance(x, types.FunctionType):
        cells = [_content(cell) for cell in x.__closure__ or ()]
        parts = [x.__module__, *sorted(_code_words(x.__code__)), *cells, x.__defaults__, x.__kwdefaults__]
    elif isinstance(x, types.MethodType):
        parts = [x.__func__, x.__self__]
    elif isinstance(x, functools.partial):  # `jax.tree_util.Partial` is one
        parts = [x.func, x.args, x.keywords]
    elif isinstance(x, Mapping):
        parts = itertools.chain.from_iterable(x.items())
    elif isinstance(x, tuple | list):
        parts = x
    elif dataclasses.is_dataclass(x) and not isinstance(x, type):
        names = [field.name for field in dataclasses.fields(x) if hasattr(x, field.name)]
        parts = itertools.chain.from_iterable((name, getattr(x, name)) for name in names)
    return [_object(part, example, depth - 1) for part in parts]


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _code_words(code: types.CodeType) -> set[str]:
    """Return the names and the numbers in a function's code: they are the same in all versions of Python."""
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    numbers = {repr(c) for c in code.co_consts if isinstance(c, int | float | complex)}
    return numbers.union(code.co_names, *map(_code_words, inner))


def _array(x: Any, dtype: Any = None) -> bytes:
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x, dtype = jax.random.key_data(x), None
    array = np.asarray(_devices.on_host(x), dtype)
    return _digest(_dtype_name(array.dtype), str(array.shape), array.tobytes())


# ----------------------------------------------------------------- programs


@functools.lru_cache(64)  # the same function again, so that JAX knows its trace
def _update(optimizer: optax.GradientTransformation) -> Callable[[Params], Any]:
    """Return the first step of an optimizer, with a gradient of zeros, as a function of the parameters."""

    def update(params: Params) -> Any:
        gradient = jax.tree.map(jnp.zeros_like, params)
        return optimizer.update(gradient, optimizer.init(params), params)

    return update


def _program(f: Any, example: tuple[Params, Args]) -> bytes | None:
    """Return the hash of a function's jaxpr at the first arguments that it takes, or None if it takes none of them."""
    if not callable(f):
        return None
    (params, args), time = example, np.zeros(())
    signatures = ((params, args), (params,), (args,), (params, args, time), (time, params, args))
    # A Module that takes more is a flow or a step map, whose derivatives are not to be traced.
    for arguments in signatures[:1] if isinstance(f, eqx.Module) else signatures:
        for trace in _traces(f, arguments):
            try:
                inspect.signature(f).bind(*arguments)  # quicker to fail than a trace
                jaxpr = trace(f, arguments)
            except Exception:  # a function that is called wrongly may raise anything
                continue
            return _jaxpr(jaxpr)
    return None


def _traces(f: Callable, arguments: tuple) -> Iterator[Callable[[Callable, tuple], ClosedJaxpr]]:
    """Yield the ways to trace a function. Numbers in its data are variables, unless it must know them; strings are known."""
    leaves = jax.tree.leaves(arguments)
    yield _trace if _is_hashable(f) and all(map(eqx.is_array_like, leaves)) else _trace_numbers
    if not all(map(eqx.is_array, leaves)):
        yield _trace_arrays


def _is_hashable(f: Callable) -> bool:
    try:
        hash(f)
    except TypeError:  # a Module with arrays
        return False
    return True


def _trace(f: Callable, arguments: tuple) -> ClosedJaxpr:
    return jax.jit(f).trace(*arguments).jaxpr  # `jit` knows what it has traced before; nothing is compiled


def _trace_numbers(f: Callable, arguments: tuple, is_variable: Callable = eqx.is_array_like) -> ClosedJaxpr:
    variables, rest = eqx.partition(arguments, is_variable)
    return jax.make_jaxpr(lambda variables: f(*eqx.combine(variables, rest)))(variables)


def _trace_arrays(f: Callable, arguments: tuple) -> ClosedJaxpr:
    return _trace_numbers(f, arguments, eqx.is_array)


def _jaxpr(jaxpr: ClosedJaxpr | Jaxpr, rules: bool = True) -> bytes:
    """Return the hash of a program: of its outputs, as functions of its inputs."""
    variables = jaxpr.jaxpr.invars if isinstance(jaxpr, ClosedJaxpr) else jaxpr.invars
    inputs = [_digest("input", str(i), _shape(variable)) for i, variable in enumerate(variables)]
    return _digest(*_outputs(jaxpr, inputs, rules))


def _outputs(jaxpr: ClosedJaxpr | Jaxpr, inputs: list[bytes], rules: bool) -> list[bytes]:
    """Return the hash of every output: of the operation that it comes from and, in turn, of its inputs."""
    consts = map(_array, jaxpr.consts) if isinstance(jaxpr, ClosedJaxpr) else ()
    program = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    known = dict(zip([*program.constvars, *program.invars], [*consts, *inputs], strict=True))

    def read(atom: Any) -> bytes:
        aval: Any = atom.aval
        return _array(atom.val, aval.dtype) if isinstance(atom, Literal) else known[atom]

    for equation in program.eqns:
        outputs = _equation(equation, [read(atom) for atom in equation.invars], rules)
        known |= zip(equation.outvars, outputs, strict=True)
    return [read(atom) for atom in program.outvars]


def _equation(equation: Any, inputs: list[bytes], rules: bool) -> list[bytes]:
    name, params = equation.primitive.name, equation.params
    if name in _INLINED:
        return _outputs(params.get("jaxpr", params.get("call_jaxpr")), inputs, rules)
    if name == "convert_element_type" and _shape(equation.invars[0]) == _shape(equation.outvars[0]):
        return inputs  # of a weak type to a strong one
    stated = [(key, _parameter(params[key], rules)) for key in sorted(params) if key not in _IGNORED]
    parts = [part for key, value in stated if value for part in (key, value)]
    if rules and name in _DERIVATIVES:
        parts.append(_DERIVATIVES[name](equation))
    return [
        _digest(name, str(i), _shape(variable), *inputs, *parts)
        for i, variable in enumerate(equation.outvars)
    ]


def _shape(variable: Any) -> str:
    return f"{_dtype_name(getattr(variable.aval, 'dtype', None))}{getattr(variable.aval, 'shape', None)}"


def _parameter(x: Any, rules: bool) -> bytes | str:
    """Return a parameter of an operation, or "" for None and False, which new versions add, and for objects of JAX's own."""
    if isinstance(x, ClosedJaxpr | Jaxpr):
        return _jaxpr(x, rules)
    if x is None or x is False:
        return ""
    if isinstance(x, enum.Enum):
        return x.name
    if isinstance(x, bool | int | float | complex | np.number):
        return repr(x.item() if isinstance(x, np.number) else x)
    if isinstance(x, str | np.dtype):
        return str(x)
    if isinstance(x, np.ndarray | jax.Array):
        return _array(x)
    parts = list(x.values()) if isinstance(x, Mapping) else x
    if isinstance(parts, tuple | list):
        values = [_parameter(part, rules) for part in parts]
        return _digest(*values) if any(values) else ""
    return ""


def _tangents(equation: Any) -> bytes:
    return _rule(equation, lambda f, x: jax.jvp(f, (x,), (x,)))


def _cotangents(equation: Any) -> bytes:
    def pull_back(f: Callable, x: list) -> Any:
        y, pull = jax.vjp(f, x)
        return pull(y)

    return _rule(equation, pull_back)


# Functions with a derivative of their own: two of the same values may differ in it.
_DERIVATIVES = {"custom_jvp_call": _tangents, "custom_vjp_call": _cotangents}


def _rule(equation: Any, differentiate: Callable) -> bytes:
    """Return the hash of the program that a function's own rule for its derivative gives."""
    avals = [atom.aval for atom in equation.invars]
    real = [jnp.issubdtype(aval.dtype, jnp.inexact) for aval in avals]

    def program(values: list) -> Any:
        def call(reals: list) -> list:
            at = iter(reals)
            inputs = [next(at) if is_real else v for v, is_real in zip(values, real, strict=True)]
            bound = equation.primitive.get_bind_params(equation.params)
            functions, params = (
                bound if isinstance(bound, tuple) else ((), bound)
            )  # a tuple in older versions of JAX
            outputs = equation.primitive.bind(*functions, *inputs, **params)
            return [y for y in outputs if jnp.issubdtype(y.dtype, jnp.inexact)]

        return differentiate(call, [v for v, is_real in zip(values, real, strict=True) if is_real])

    values = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    try:
        jaxpr = jax.make_jaxpr(program)(values)
    except Exception:  # a rule that is not defined, or not for these inputs
        return _digest("no rule")
    return _jaxpr(jaxpr, rules=False)
