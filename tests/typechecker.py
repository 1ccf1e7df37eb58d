"""What the tests check of every call: it returns what its annotation says, and so do the fields of a result.

By an import hook of its own: that of jaxtyping binds the arguments of every call of every function, which took two fifths of
the time of some tests.
"""

import ast
import functools
import sys
import types
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from typing import Any, get_args, get_type_hints

import beartype
import jaxtyping


def _has_shape(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(_has_shape(part) for part in get_args(hint))


def _is_known(hint: Any) -> bool:
    return "ForwardRef" not in repr(
        hint
    )  # beartype does not know a type that has itself in it (rooted trees)


_CHECKS: dict[types.CodeType, Callable] = {}  # an inner function is made again and again, its code once


def _check_of(function: Callable) -> Callable:
    """Return what takes the result of a function and returns it, or raises an error where it is not what the annotation says."""
    code = function.__code__
    if code not in _CHECKS:
        _CHECKS[code] = _make_check(function)
    return _CHECKS[code]


def _make_check(function: Callable) -> Callable:
    def check(out: Any) -> Any:
        return out

    named = types.SimpleNamespace(__annotations__={"return": function.__annotations__["return"]})
    try:
        hint = get_type_hints(named, function.__globals__, include_extras=True)["return"]
    except NameError:  # of what is imported for a checker only
        return check
    if not _is_known(hint):
        return check
    check.__annotations__ = {"return": hint}
    check.__name__, check.__qualname__ = function.__name__, function.__qualname__
    check.__module__ = function.__module__  # where names in strings are looked up
    checked = beartype.beartype(check)
    if not _has_shape(hint):
        return checked

    def check_shapes(out: Any) -> Any:
        with jaxtyping.jaxtyped("context"):  # sizes of one name are equal in all of the result
            return checked(out)

    return check_shapes


def result(function: Callable) -> Callable:
    """Return the function with its result checked."""
    if function.__annotations__.get("return", Any) is Any:
        return function

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        return _check_of(function)(function(*args, **kwargs))

    return checked


def fields(cls: type) -> type:
    """Return the class with the shapes of its fields checked where one is made, if it is a dataclass."""
    # A trajectory is a pytree: JAX makes one of whatever a map gives.
    hints = getattr(cls.__init__, "__annotations__", {}) if cls.__name__ != "Trajectory" else {}
    return (
        jaxtyping.jaxtyped(typechecker=_fields_with_shapes)(cls)
        if any(map(_has_shape, hints.values()))
        else cls
    )


def _fields_with_shapes(function: Callable) -> Callable:
    # Other arguments the library refuses by itself, with its own error.
    hints = function.__annotations__
    function.__annotations__ = {n: hint for n, hint in hints.items() if _is_known(hint) and _has_shape(hint)}
    return beartype.beartype(function)


class _Decorate(ast.NodeTransformer):
    """Decorates all functions of a module, innermost, and all of its classes, outermost."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.decorator_list.append(self._decorator("result", node))
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.generic_visit(node)
        node.decorator_list.insert(0, self._decorator("fields", node))
        return node

    def _decorator(self, name: str, node: ast.stmt) -> ast.expr:
        call = ast.parse(f"__import__('typechecker').{name}", mode="eval").body
        for part in ast.walk(call):
            if isinstance(part, ast.expr):
                ast.copy_location(part, node)
        return call


class _Loader(SourceFileLoader):
    def path_stats(self, path: Any) -> Any:
        raise OSError("no time of change: its code is not cached beside that of the users' imports")

    def source_to_code(self, data: Any, path: Any, *args: Any, **kwargs: Any) -> types.CodeType:
        return compile(_Decorate().visit(ast.parse(data, path)), path, "exec", dont_inherit=True)


class _Finder(PathFinder):
    package = ""

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.split(".")[0] != cls.package:
            return None
        spec = super().find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install(package: str) -> None:
    """Check all functions and dataclasses of a package, which is not imported yet."""
    _Finder.package = package
    sys.meta_path.insert(0, _Finder)
