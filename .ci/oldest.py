"""Print pip constraints that hold every dependency at the oldest version that pyproject.toml promises."""

import re
import tomllib
from pathlib import Path


FLOOR = re.compile(r"([\w.-]+)(?:\[.*\])?>=([\w.]+)")
# What the library and its tests run on; tools that build and check are left as they come.
EXTRAS = ("plot", "shape", "distributed", "repro", "test")

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
promised = [*project["dependencies"]]
for extra in EXTRAS:
    promised += project["optional-dependencies"][extra]
for requirement in promised:
    floor = FLOOR.match(requirement)
    if floor:
        print(f"{floor[1]}=={floor[2]}")
    elif not requirement.startswith("eomdl["):
        raise ValueError(f"pyproject.toml: expected an oldest version, got {requirement!r}")
