"""One name for each thing, found in one place, documented, and quick to import."""

import importlib
import inspect
import pkgutil
import statistics
import subprocess
import sys
import time

import pytest

import eomdl


NAMESPACES = [
    "errors",
    "flows",
    "geometry",
    "losses",
    "maps",
    "observe",
    "plotting",
    "runs",
    "series",
    "symmetry",
]
PUBLIC = [(eomdl, name) for name in eomdl.__all__ if name not in {*NAMESPACES, "__version__"}]
PUBLIC += [(getattr(eomdl, space), name) for space in NAMESPACES for name in getattr(eomdl, space).__all__]
MODULES = [module.name for module in pkgutil.walk_packages(eomdl.__path__, "eomdl.")]


@pytest.mark.parametrize("space, name", PUBLIC, ids=lambda x: getattr(x, "__name__", x))
def test_every_public_name_is_documented(space, name):
    thing = getattr(space, name)
    text = inspect.getdoc(thing)
    assert text and len(text.split()) > 5
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
EquationOfMotion InterpolatingFlow counterterms sharpness on_batch WeightDecay Checkpoints Ensemble __version__"""


def test_the_top_level_is_the_verbs_the_nouns_and_the_namespaces():
    assert set(eomdl.__all__) == {*TOP.split(), *NAMESPACES}
    assert {name for name in vars(eomdl) if not name.startswith("_")} == set(eomdl.__all__) - {"__version__"}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_what_is_dear_is_imported_where_it_is_used():
    dear = ("matplotlib", "pandas", "scipy.cluster", "scipy.optimize", "sklearn", "skdim")
    found = run(f"import sys, eomdl; print([m for m in {dear} if m in sys.modules])")
    assert found.strip() == "[]"


def test_importing_takes_little_longer_than_what_it_stands_on():
    anchors = "import jax, diffrax, optax, equinox"
    seconds = {anchors: [], "import eomdl": []}
    for _ in range(5):
        for code, measured in seconds.items():
            start = time.perf_counter()
            run(code)
            measured.append(time.perf_counter() - start)
    # The smallest of several: what else the machine did can only add.
    assert min(seconds["import eomdl"]) <= 1.3 * min(seconds[anchors]), statistics.median(
        seconds["import eomdl"]
    )
