"""What a reproduction is, how it is found, run, kept and read again.

A reproduction is a module of `paper_repro.papers`:

- its docstring: the title, then the setting;
- `SOURCE`, `SECONDS` (expected at full size on two cores), optionally `MAIN = True` (runs when no name is given);
- `Size`, a NamedTuple whose defaults are the full size, and `SMOKE`, a small one of it;
- `measure(size, images) -> {name: DataFrame}`: all that takes time; `images(count)` loads the data;
- `claims(tables) -> [Claim]` and `pictures(tables) -> {name: Figure}`: made from the tables only.
"""

import dataclasses
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import pkgutil
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pandas as pd

from eomdl.plotting._inline import page_colours, svg
from paper_repro import data, papers
from paper_repro.claims import Claim


Tables = dict[str, pd.DataFrame]
ROOT = Path(__file__).parent
_AGAIN = "`python -m paper_repro NAME --fresh` runs it again"
_KEYS = {
    "name",
    "title",
    "source",
    "setting",
    "options",
    "code",
    "environment",
    "seconds",
    "tables",
    "pictures",
    "claims",
}


@dataclasses.dataclass(frozen=True)
class Images:
    """`images(count)`: `(inputs, labels)` from the folder of the command line, `--subset` of them if given."""

    folder: str | None = None
    subset: int | None = None

    def __call__(self, count: int, seed: int | None = 0) -> tuple[jax.Array, jax.Array]:
        """As `paper_repro.data.load`."""
        return data.load(self.folder, self.subset or count, seed)


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks of every reproduction."""

    data: str | None = None
    subset: int | None = None
    seeds: int | None = None
    float32: bool = False
    smoke: bool = False


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """One module of `paper_repro.papers`."""

    name: str
    title: str
    setting: str
    source: str
    seconds: int
    main: bool
    full: Any
    smoke: Any
    measure: Callable[[Any, Images], Tables]
    claims: Callable[[Tables], list[Claim]]
    pictures: Callable[[Tables], dict[str, Any]]

    def size(self, options: Options) -> Any:
        """The full or the smoke size, with the number of seeds asked for."""
        size = self.smoke if options.smoke else self.full
        asked = options.seeds is not None and "seeds" in size._fields
        return size._replace(seeds=options.seeds) if asked else size


@dataclasses.dataclass(frozen=True)
class Result:
    """What one run of a reproduction has left in its folder."""

    reproduction: Reproduction
    tables: Tables
    claims: list[Claim]
    pictures: dict[str, str]  # SVG
    record: dict[str, Any]  # what result.json holds

    @property
    def failed(self) -> list[Claim]:
        """The claims that do not hold."""
        return [claim for claim in self.claims if claim.holds is False]


def discover() -> dict[str, Reproduction]:
    """Every reproduction by name, the main ones first."""
    found = [_reproduction(info.name) for info in pkgutil.iter_modules(papers.__path__)]
    return {r.name: r for r in sorted(found, key=lambda r: (not r.main, r.name))}


def _reproduction(module_name: str) -> Reproduction:
    module = importlib.import_module(f"paper_repro.papers.{module_name}")
    title, _, setting = inspect.cleandoc(module.__doc__ or "").partition("\n")
    return Reproduction(
        name=module_name.replace("_", "-"),
        title=title.removesuffix("."),
        setting=" ".join(setting.split()),
        source=module.SOURCE,
        seconds=module.SECONDS,
        main=getattr(module, "MAIN", False),
        full=module.Size(),
        smoke=module.SMOKE,
        measure=module.measure,
        claims=module.claims,
        pictures=module.pictures,
    )


def run(reproduction: Reproduction, options: Options, out: Path) -> Result:
    """Measure, then write tables, claims and pictures; what is returned is read from what was written."""
    start = time.perf_counter()
    tables = reproduction.measure(reproduction.size(options), Images(options.data, options.subset))
    seconds = time.perf_counter() - start
    # JAX never drops compiled programs, and thirteen reproductions use up a process's memory maps.
    jax.clear_caches()
    folder = out / reproduction.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)  # until all is written, nothing is done
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False)
    with page_colours():
        figures = reproduction.pictures(_tables(folder, list(tables)))
        for name, figure in figures.items():
            (folder / f"{name}.svg").write_text(svg(figure, f"{reproduction.name}-{name}"))
    record = {
        "name": reproduction.name,
        "title": reproduction.title,
        "source": reproduction.source,
        "setting": reproduction.setting,
        "options": dataclasses.asdict(options),
        "code": code_version(),
        "environment": environment(),
        "seconds": round(seconds, 1),
        "tables": list(tables),
        "pictures": list(figures),
        "claims": [dataclasses.asdict(c) for c in _judged(reproduction.claims(tables), options)],
    }
    # As a whole or not at all: what is there counts as done.
    aside = folder / "result.json.part"
    aside.write_text(json.dumps(record, indent=1) + "\n")
    aside.replace(folder / "result.json")
    return read(reproduction, out)


def _judged(claims: list[Claim], options: Options) -> list[Claim]:
    """Claims are not asserted in single precision, and some of them not at the smoke size."""
    return [
        dataclasses.replace(c, holds=None) if options.float32 or (options.smoke and c.full_only) else c
        for c in claims
    ]


def read(reproduction: Reproduction, out: Path) -> Result:
    """The result in the reproduction's folder.

    Raises `ValueError` with the file's name if one of its files is damaged or missing.
    """
    folder = out / reproduction.name
    record = _record(folder)
    pictures = {name: _read(folder / f"{name}.svg", Path.read_text) for name in record["pictures"]}
    claims = [Claim(**c) for c in record["claims"]]
    return Result(reproduction, _tables(folder, record["tables"]), claims, pictures, record)


def _record(folder: Path) -> dict[str, Any]:
    """What result.json holds, whole."""
    path = folder / "result.json"
    record = _read(path, lambda path: json.loads(path.read_text()))
    if not isinstance(record, dict) or not record.keys() >= _KEYS:
        raise ValueError(f"{path}: expected a record with {', '.join(sorted(_KEYS))}, got another; {_AGAIN}")
    return record


def _read(path: Path, how: Callable[[Path], Any]) -> Any:
    try:
        return how(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: expected what a run writes, got {type(error).__name__}: {error}; {_AGAIN}"
        ) from error


def is_done(reproduction: Reproduction, options: Options, out: Path) -> bool:
    """Whether its result is there, with these options and this code."""
    return is_kept(reproduction, options, out) and read(reproduction, out).record["code"] == code_version()


def is_kept(reproduction: Reproduction, options: Options, out: Path) -> bool:
    """Whether a result is there, with these options, of this or an earlier version of the code."""
    path = out / reproduction.name / "result.json"
    return path.exists() and _record(path.parent)["options"] == dataclasses.asdict(options)


def _tables(folder: Path, names: list[str]) -> Tables:
    return {name: _read(folder / f"{name}.csv", pd.read_csv) for name in names}


def code_version() -> str:
    """A checksum of the library's and the reproductions' sources."""
    digest = hashlib.sha256()
    for folder in (ROOT.parent / "eomdl", ROOT):
        for path in sorted(folder.rglob("*.py")):
            digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def environment() -> dict[str, str]:
    """Versions, machine and commit, to be kept beside every number."""
    packages = ("eomdl", "jax", "jaxlib", "diffrax", "optax", "equinox", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    commit = git.stdout.strip() or "not a git checkout"
    return versions | {"python": platform.python_version(), "machine": platform.platform(), "commit": commit}
