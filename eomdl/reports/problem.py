"""A training problem in a Python file: `loss`, `params`, and what else there is."""

import contextlib
import difflib
import importlib.util
import io
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import equinox as eqx
import jax

from eomdl import _check
from eomdl._types import Args, Loss, Params
from eomdl.reports.study import Optimizer, first_batches


NEEDED, OPTIONAL = ("loss", "params"), ("args", "optimizer", "batches")
_MODULE = "__eomdl_file__"  # under which the file is imported: not "__main__"
_MISSING = object()


class Problem(NamedTuple):
    """What a file defines; `optimizer` is None where it defines none. `printed`: what it wrote while it was read."""

    loss: Loss
    params: Params
    args: Args
    optimizer: Optimizer | None
    batches: Any
    printed: str


class WrongFile(Exception):
    """A file that does not define a problem. The message is one line; `details` are of the user's own code."""

    def __init__(self, message: str, details: str = ""):
        super().__init__(message)
        self.details = details


def read_problem(target: str, num_steps: int) -> Problem:
    """Return the problem in `FILE.py` or `FILE.py:NAME`.

    NAME is an object in the file with `loss`, `params`, ... as keys (a dict) or attributes (a class, a namespace), or a
    function without arguments that returns one. What it does not have is taken from the file itself. `batches` may be a
    function of the number of steps.

    **Raises:** `WrongFile`.
    """
    path, name = _split(target)
    module, printed = _import(path)
    places: list[Any] = [module]
    if name:
        places.insert(0, _find_object(module, name, path))
    defined = {key: _first(places, key) for key in (*NEEDED, *OPTIONAL)}
    for key in NEEDED:
        if defined[key] is _MISSING:
            raise WrongFile(f"{path}: expected it to define `{key}`, got {_instead(places, key)}")
    values: dict[str, Any] = {key: None if value is _MISSING else value for key, value in defined.items()}
    batches = values["batches"]
    if callable(batches):
        with _in_user_code(path, "`batches(num_steps)`"):
            batches = batches(num_steps)
    with _in_user_code(path, "`batches`"):
        batches = first_batches(batches, num_steps)
    problem = Problem(values["loss"], values["params"], values["args"], values["optimizer"], batches, printed)
    _try(problem, path)
    return problem


def _split(target: str) -> tuple[Path, str]:
    """Split into path and name; a colon belongs to the path where there is such a file."""
    if Path(target).is_file():
        path, name = Path(target), ""
    else:
        head, colon, name = target.rpartition(":")
        path = Path(head if colon and name.isidentifier() and len(head) > 1 else target)
        name = name if path != Path(target) else ""
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        near = difflib.get_close_matches(path.name, _siblings(path), n=1)
        hint = f"; nearest: {path.with_name(near[0])}" if near else ""
        raise WrongFile(f"FILE: expected a Python file, got {what}: {path}{hint}")
    return path, name


def _siblings(path: Path) -> list[str]:
    folder = path.parent
    return [other.name for other in folder.glob("*.py")] if folder.is_dir() else []


def _import(path: Path) -> tuple[ModuleType, str]:
    """Import the file as a module, as `python FILE` would find its neighbours; return it and what it printed."""
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    if spec is None or spec.loader is None:
        raise WrongFile(f"FILE: expected a Python file, got {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    printed = io.StringIO()
    try:
        with _in_user_code(path, "importing it"), contextlib.redirect_stdout(printed):
            spec.loader.exec_module(module)
    except WrongFile as error:
        raise WrongFile(f"{error}", printed.getvalue() + error.details) from error.__cause__
    return module, printed.getvalue()


@contextlib.contextmanager
def _in_user_code(path: Path, what: str) -> Iterator[None]:
    """Turn an error of the user's code into one line, with its traceback from the user's files on."""
    try:
        yield
    except SystemExit as error:
        raise WrongFile(
            f"{path}: expected a file that can be imported, but {what} called sys.exit({error.code!r}); put what runs "
            'under `if __name__ == "__main__":`'
        ) from None
    except Exception as error:
        first_line = f"{type(error).__name__}: {error}".splitlines()[0]
        raise WrongFile(f"{path}: {what} raised {first_line}", shorten(error, path)) from error


def shorten(error: BaseException, path: Path) -> str:
    """Return the lines of a traceback in the user's file and in those beside it, without the last line of the traceback."""
    folder = path.resolve().parent
    if isinstance(error, SyntaxError):
        return "".join(traceback.format_exception_only(error))
    kept = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_file()
        and Path(frame.filename).resolve().is_relative_to(folder)
        and "site-packages" not in frame.filename
    ]
    return "".join(["Traceback, in your files only:\n", *traceback.format_list(kept)])


def _find_object(module: ModuleType, name: str, path: Path) -> Any:
    thing = getattr(module, name, _MISSING)
    if thing is _MISSING:
        names = [n for n in vars(module) if not n.startswith("_")]
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise WrongFile(f"{path}: expected it to define {name!r}, got no such name{hint}")
    if callable(thing) and not isinstance(thing, type):
        with _in_user_code(path, f"`{name}()`"):
            thing = thing()
    return thing


def _first(places: list[Any], key: str) -> Any:
    """Return the value in the first place that has it."""
    for place in places:
        value = place.get(key, _MISSING) if isinstance(place, Mapping) else getattr(place, key, _MISSING)
        if value is not _MISSING:
            return value
    return _MISSING


def _instead(places: list[Any], key: str) -> str:
    """Return in words what it defines instead, the nearest first."""
    names: list[str] = []
    for place in places:
        names += [
            str(n)
            for n in (place if isinstance(place, Mapping) else dir(place))
            if not str(n).startswith("_")
        ]
    near = difflib.get_close_matches(key, names, n=3, cutoff=0.5)
    return f"no such name; nearest: {', '.join(near)}" if near else "no such name"


def _try(problem: Problem, path: Path) -> None:
    """Call the loss once on the shapes of its data: what it raises is shown in the user's own lines."""
    data = problem.args
    if problem.batches is not None:
        data = _example(problem.batches)
    if not callable(problem.loss):
        raise WrongFile(
            f"{path}: expected `loss` to be a function (params, args), got {_check.show(problem.loss)}"
        )
    if not any(_is_real(leaf) for leaf in jax.tree.leaves(problem.params)):
        raise WrongFile(
            f"{path}: expected `params` to be a pytree of real floating-point arrays, got {_check.show(problem.params)}"
        )
    with _in_user_code(path, "`loss(params, args)`"):
        eqx.filter_eval_shape(problem.loss, problem.params, data)


def _is_real(leaf: Any) -> bool:
    return isinstance(leaf, float) or getattr(getattr(leaf, "dtype", None), "kind", "") in ("f", "V")


def _example(batches: Any) -> Any:
    """Return the first batch of a list, or of stacked arrays."""
    if isinstance(batches, list):
        return batches[0] if batches else None
    return jax.tree.map(lambda leaf: leaf[0], batches)
