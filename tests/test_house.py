"""The house: arrows between the floors of `eomdl` point down, and every room has its size."""

import ast
import dataclasses
import importlib
import inspect
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import equinox as eqx
import pytest

import eomdl


pytestmark = pytest.mark.source
ROOT = Path(eomdl.__file__).parent
MODULES = {
    ".".join(("eomdl", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}

GROUND = (
    "_types",
    "_tree",
    "_warn",
    "_upstream",
    "_reads",
    "_autodiff",
    "_check",
    "_blocks",
    "_costs",
    "_devices",
    "_end",
    "_fingerprint",
    "_processes",
    "_shards",
    "_structure",
    "_target",
)
FLOORS = (
    GROUND,
    ("storage",),
    ("_result",),
    ("linalg",),
    ("losses",),
    ("curvature", "noise"),
    ("series",),
    ("observe",),
    ("maps",),
    ("flows",),
    ("runs",),
    ("telemetry",),
    ("errors",),
    ("choice",),
    ("geometry", "symmetry"),
    ("plotting",),
    ("reports",),
    ("__main__",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def room(module: str) -> str:
    return module.split(".")[1]


def imports(node: ast.AST, inside: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import statement, and whether it stands in a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, inside
        yield from imports(child, inside or isinstance(child, FUNCTIONS))


def imported(statement: ast.Import | ast.ImportFrom) -> list[str]:
    """What is imported: modules of `eomdl` by their own name, others as they are written."""
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    assert statement.level == 0, "relative import"
    assert statement.module
    names = [f"{statement.module}.{alias.name}" for alias in statement.names]
    return [name if name in TREES else statement.module for name in names]


def arrows(module: str, inside: bool) -> set[str]:
    """The modules of `eomdl` that one imports, on top or inside of functions."""
    found = {
        name
        for statement, in_function in imports(TREES[module])
        if in_function == inside
        for name in imported(statement)
    }
    return {name for name in found if name.split(".")[0] == "eomdl"}


ROOMS = [module for module in TREES if module != "eomdl"]


def test_every_module_has_a_floor():
    assert {room(module) for module in ROOMS} == set(FLOOR)


def test_contributing_names_every_room_in_its_order_with_its_sentence():
    text = (ROOT.parent / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", text.partition("## The house")[2], re.MULTILINE)
    sentences = {name: ast.get_docstring(TREES[f"eomdl.{name}"]).splitlines()[0] for name in FLOOR}
    assert [(name, sentences[name]) for name in FLOOR] == rows
    assert all(sentence.endswith((".", "?", "page.")) for sentence in sentences.values())


@pytest.mark.parametrize("module", ROOMS)
def test_arrows_point_down(module):
    floor = FLOOR[room(module)]
    imported_here = arrows(module, inside=False) | arrows(module, inside=True)  # lazy ones included
    up = {name for name in imported_here if name == "eomdl" or FLOOR[room(name)] > floor}
    assert not up, f"{module} imports from higher floors: {sorted(up)}"


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """What is left when everything whose arrows are gone is taken away; empty without a cycle."""
    left = {node: set(targets) for node, targets in graph.items()}
    while free := [node for node, targets in left.items() if not targets & left.keys()]:
        for node in free:
            del left[node]
    return sorted(left)


def test_no_import_cycles():
    # A package stands for the modules in it, which it collects: it is no node of its own.
    packages = {module for module, path in MODULES.items() if path.name == "__init__.py"}
    modules = {module: arrows(module, inside=False) - packages for module in ROOMS if module not in packages}
    assert not cycle(modules)
    # Rooms of one floor do not import each other both ways either.
    rooms: dict[str, set[str]] = {name: set() for name in FLOOR}
    for module in ROOMS:
        rooms[room(module)] |= {room(name) for name in arrows(module, inside=False)} - {room(module)}
    assert not cycle(rooms)


def test_a_cycle_is_seen():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == ["a", "b", "c", "d"]
    assert not cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function, its docstring and decorators not counted."""
    count = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function, clean=False) is not None:
        count -= function.body[0].end_lineno - function.body[0].lineno + 1
    return count


@pytest.mark.parametrize("module", TREES)
def test_functions_and_files_are_short(module):
    functions = [node for node in ast.walk(TREES[module]) if isinstance(node, FUNCTIONS)]
    assert not {function.name: lines(function) for function in functions if lines(function) > 60}
    assert len(MODULES[module].read_text().splitlines()) < 400


@pytest.mark.parametrize("module", TREES)
def test_nothing_is_passed_by_nonlocal(module):
    assert not [node.lineno for node in ast.walk(TREES[module]) if isinstance(node, ast.Nonlocal)]


ROOMS_OUTSIDE = ("tests", "benchmarks", "paper_repro", "docs")
EVERY_TREE = TREES | {
    str(path.relative_to(ROOT.parent)): ast.parse(path.read_text())
    for folder in ROOMS_OUTSIDE
    for path in sorted((ROOT.parent / folder).rglob("*.py"))
}
PUBLIC_AFTER_ALL = {"_replace", "_asdict", "_fields", "_make", "_exit"}  # of named tuples, of `os`


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(tree: ast.AST) -> set[str]:
    """What a module defines itself: functions, classes, variables and attributes of `self`."""
    nodes = list(ast.walk(tree))
    stored = [n for n in nodes if isinstance(n, ast.Name | ast.Attribute) and isinstance(n.ctx, ast.Store)]
    return {node.name for node in nodes if isinstance(node, (*FUNCTIONS, ast.ClassDef))} | {
        node.id if isinstance(node, ast.Name) else node.attr
        for node in stored
        if isinstance(node, ast.Name) or ast.unparse(node.value) == "self"
    }


def private_names_of_others(tree: ast.AST, own: set[str]) -> set[str]:
    """The private names that a module imports, reads off something, or has in a string like "package._module"."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            names = [f"{module}.{alias.name}" if module else alias.name for alias in node.names]
            parts = [part for name in names for part in name.split(".")]
        elif isinstance(node, ast.Attribute):
            parts = [node.attr]
        elif isinstance(node, ast.Constant) and re.fullmatch(
            r"(jax|equinox|optax|diffrax)[\w.]*", str(node.value)
        ):
            parts = node.value.split(".")
        else:
            continue
        found |= {part for part in parts if is_private(part)} - own
    return found


def test_private_names_of_other_packages_stand_in_one_module():
    files = [path for path in ROOT.parent.rglob("*.py") if ".venv" not in path.parts]
    modules = {part for path in files for part in (path.stem, path.parent.name) if is_private(part)}
    own = modules.union(PUBLIC_AFTER_ALL, *map(own_names, EVERY_TREE.values()))
    found = {name: private_names_of_others(tree, own) for name, tree in EVERY_TREE.items()}
    assert {name: names for name, names in found.items() if names} == {
        "eomdl._upstream": {"_src", "_errors"},
    }


@pytest.mark.parametrize(
    "source",
    [
        "from jax._src import core",
        "import jax._src.core",
        "x = jax._src.core",
        "cast(Any, eqx)._src",
        "x = result._src",
        "y = logging.getLogger('jax._src')",
    ],
)
def test_a_private_name_of_another_package_is_seen(source):
    assert private_names_of_others(ast.parse(source), own_names(ast.parse("self._x = _y"))) == {"_src"}


def test_matplotlib_is_imported_in_plotting_only():
    with_it = {
        module
        for module, tree in TREES.items()
        for name in itertools.chain.from_iterable(imported(statement) for statement, _ in imports(tree))
        if name.split(".")[0] == "matplotlib"
    }
    assert with_it
    assert {room(module) for module in with_it} == {"plotting"}


def test_what_type_checkers_are_told_is_what_is_there():
    told = set()
    for module, tree in TREES.items():
        for kind in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            for stated in (node.body[0] for node in kind.body if isinstance(node, ast.If)):
                here = importlib.import_module(module)
                real = inspect.signature(getattr(here, kind.name)).parameters
                assert [argument.arg for argument in stated.args.args[1:]] == list(real)
                defaults = [p.default for p in real.values() if p.default is not p.empty]
                said = [eval(ast.unparse(default), vars(here)) for default in stated.args.defaults]
                assert said == defaults
                told.add(getattr(here, kind.name))
    # Every public module whose fields have converters tells them: a checker would ask for what they convert to.
    public = {getattr(space, name) for space in (eomdl, eomdl.flows, eomdl.maps) for name in space.__all__}
    converting = {
        kind
        for kind in public
        if inspect.isclass(kind)
        and issubclass(kind, eqx.Module)
        and any("converter" in field.metadata for field in dataclasses.fields(kind))
    }
    assert converting
    assert converting <= told
