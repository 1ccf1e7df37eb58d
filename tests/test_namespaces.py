"""One name for each thing, found in one place, documented, and quick to import."""

import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import eomdl


NAMESPACES = [
    "curvature",
    "errors",
    "flows",
    "geometry",
    "losses",
    "maps",
    "observe",
    "plotting",
    "reports",
    "runs",
    "series",
    "symmetry",
]
PUBLIC = [(eomdl, name) for name in eomdl.__all__ if name not in {*NAMESPACES, "__version__"}]
PUBLIC += [(getattr(eomdl, space), name) for space in NAMESPACES for name in getattr(eomdl, space).__all__]
MODULES = [module.name for module in pkgutil.walk_packages(eomdl.__path__, "eomdl.")]


@pytest.mark.parametrize(("space", "name"), PUBLIC, ids=lambda x: getattr(x, "__name__", x))
def test_every_public_name_is_documented(space, name):
    thing = getattr(space, name)
    text = inspect.getdoc(thing)
    assert text
    assert len(text.split()) > 5
    # A dataclass without a docstring gets its signature for one.
    assert not text.startswith(f"{name}(")


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
    found = {name for name in vars(eomdl) if not name.startswith("_")} - {"jaxtyping"}
    assert found == set(eomdl.__all__) - {"__version__"}


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
    assert packages == "['eomdl', 'matfree', 'tqdm']"
    assert dear == "[]"
