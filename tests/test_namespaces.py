"""One name for each thing, found in one place, documented, and quick to import."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import eomdl


ROOT = Path(eomdl.__file__).parent
REPOSITORY = ROOT.parent
NAMESPACES = [name for name in eomdl.__all__ if inspect.ismodule(getattr(eomdl, name))]
PRIVATE_ROOMS = {"_check", "linalg", "reports", "storage"}
PUBLIC = [(eomdl, name) for name in eomdl.__all__ if name not in {*NAMESPACES, "__version__"}]
PUBLIC += [(getattr(eomdl, space), name) for space in NAMESPACES for name in getattr(eomdl, space).__all__]
MODULES = [module.name for module in pkgutil.walk_packages(eomdl.__path__, "eomdl.")]


def test_there_are_few_public_names():
    assert len(PUBLIC) <= 133


def test_a_name_stands_in_one_namespace():
    names = [name for _, name in PUBLIC]
    assert not {name for name in names if names.count(name) > 1}


def test_what_stands_in_all_is_public_and_nothing_else():
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert rooms - PRIVATE_ROOMS == set(NAMESPACES)
    for space in NAMESPACES:
        module = getattr(eomdl, space)
        names = {
            name for name, thing in vars(module).items() if not (name[0] == "_" or inspect.ismodule(thing))
        }
        assert names == set(module.__all__), space


@pytest.mark.source
@pytest.mark.parametrize(("space", "name"), PUBLIC, ids=lambda x: getattr(x, "__name__", x))
def test_every_public_name_is_documented(space, name):
    thing = getattr(space, name)
    text = inspect.getdoc(thing)
    assert text
    assert len(text.split()) > 5
    # A dataclass without a docstring gets its signature for one.
    assert not text.startswith(f"{name}(")


@pytest.mark.source
@pytest.mark.parametrize("name", [name for space, name in PUBLIC if space is eomdl and name != "RESULTS"])
def test_every_name_at_the_top_has_an_example(name):
    assert "```python" in inspect.getdoc(getattr(eomdl, name))


def test_no_function_has_the_name_of_a_module():
    for module in MODULES:
        found = importlib.import_module(module)
        parent, _, name = module.rpartition(".")
        assert getattr(importlib.import_module(parent), name) is found, f"{module} is hidden by a function"
    last = {module.rpartition(".")[2] for module in MODULES}
    assert not last & {name for _, name in PUBLIC}


TOP = """descend iterate solve compare Trajectory Comparison RESULTS AbstractFlow StepMap optimizer_step GradientFlow
EquationOfMotion InterpolatingFlow citation counterterms report sharpness on_batch WeightDecay Checkpoints Ensemble __version__"""


def test_the_top_level_is_the_verbs_the_nouns_and_the_namespaces():
    assert set(eomdl.__all__) == {*TOP.split(), *NAMESPACES}
    # conftest's import hook puts `jaxtyping` into every module.
    found = {name for name in vars(eomdl) if not name.startswith("_")} - {"jaxtyping"} - PRIVATE_ROOMS
    assert found == set(eomdl.__all__) - {"__version__"}


# Modules that the repository's own pages are drawn with, and that a user gets through `plot` and `report`.
DRAWING = {"eomdl.plotting._inline", "eomdl.plotting._lines", "eomdl.reports.page"}
COUNTED = {"eomdl.flows.equation_of_motion", "eomdl.observe.curvature"}  # in benchmarks/test_large.py


def is_public(dotted: str) -> bool:
    """Whether `eomdl.x` or `eomdl.x.y` is public; what follows is an attribute of a public thing."""
    if dotted in DRAWING or dotted.endswith("__all__"):
        return True
    _, first, *rest = dotted.split(".")
    if first not in eomdl.__all__:
        return False
    return first not in NAMESPACES or not rest or rest[0] in getattr(eomdl, first).__all__


def names_in_code(tree: ast.AST) -> set[str]:
    """What a module imports or uses of `eomdl`, by its full name."""
    full_names, found = {"eomdl": "eomdl"}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("eomdl.")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "eomdl":
            if node.module in DRAWING | COUNTED:
                continue
            imports = {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            full_names |= imports
            found |= set(imports.values())
    for node in ast.walk(tree):
        chain, inner = [], node
        while isinstance(inner, ast.Attribute):
            chain.append(inner.attr)
            inner = inner.value
        if chain and isinstance(inner, ast.Name) and inner.id in full_names:
            found.add(".".join([full_names[inner.id], *reversed(chain)]))
    return found


def names_in_text(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w./-])eomdl(?!\.md)(?:\.\w+)+(?![\w/-])", text))


CODE = [path for room in ("paper_repro", "benchmarks", "docs") for path in (REPOSITORY / room).rglob("*.py")]
TEXT = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *(REPOSITORY / "docs").rglob("*.md")]


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_reproductions_and_benchmarks_use_what_is_public(path):
    assert not {name for name in names_in_code(ast.parse(path.read_text())) if not is_public(name)}


@pytest.mark.parametrize("path", TEXT, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_the_documentation_speaks_of_what_is_public(path):
    text = path.read_text()
    names = names_in_text(text) | {
        f"{module}.{name}"
        for module, line in re.findall(r"^from (eomdl[\w.]*) import (.+)$", text, re.MULTILINE)
        for name in line.split(", ")
        if module not in DRAWING
    }
    assert not {name for name in names if not is_public(name)}


@pytest.mark.parametrize("module", [m for m in MODULES if m.split(".")[1] not in PRIVATE_ROOMS - {"reports"}])
def test_docstrings_and_messages_speak_of_what_is_public(module):
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    names = {name for text in texts if isinstance(text, str) for name in names_in_text(text)}
    assert not {name for name in names if not is_public(name)}


def test_private_names_are_seen():
    assert is_public("eomdl.Trajectory.load")
    assert not is_public("eomdl.geometry.path.path_shape")
    code = (
        "from eomdl import geometry, _tree\ngeometry.path_shape(geometry.as_matrix)\nimport eomdl.runs.loop"
    )
    names = names_in_code(ast.parse(code))
    assert {name for name in names if not is_public(name)} == {
        "eomdl._tree",
        "eomdl.geometry.as_matrix",
        "eomdl.runs.loop",
    }
    assert names_in_text("An `eomdl.flows.RodState`, docs/eomdl.md") == {"eomdl.flows.RodState"}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_importing_brings_little_beyond_what_it_stands_on():
    """Counted and not timed: the packages that `import eomdl` adds, and the dear parts of SciPy."""
    code = """
import jax, diffrax, optax, equinox, sys
before = set(sys.modules)
import eomdl
new = set(sys.modules) - before
packages = [{m.partition(".")[0] for m in modules} for modules in (new, before)]
print(sorted(packages[0] - packages[1] - set(sys.stdlib_module_names)))
print(sorted(m for m in new if m in ("scipy.linalg", "scipy.cluster", "scipy.optimize")))
"""
    packages, dear = run(code).splitlines()
    assert packages == "['eomdl', 'tqdm']"
    assert dear == "[]"
