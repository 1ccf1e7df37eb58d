"""`python -m pytest benchmarks -n 0 --benchmark-enable [--smoke]`."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import pytest
from pytest_benchmark.fixture import BenchmarkFixture


Rows = TypeVar("Rows", dict[str, Any], list[dict[str, Any]])


class Record(Protocol):
    """What the fixture `record` is."""

    def __call__(self, table: str, function: Callable[..., Rows], *args: Any) -> Rows:
        """Run once, keep the rows for the table of that name, and return them."""


@dataclasses.dataclass(frozen=True)
class Size:
    """What to run: everything, or in under three minutes."""

    smoke: bool
    data: str | None = None  # a folder of IDX files for the suites that take real images

    @property
    def problem(self) -> str:
        """Name of the problem to run on."""
        return "small" if self.smoke else "main"

    @property
    def rounds(self) -> int:
        """How often a time is measured."""
        return 5 if self.smoke else 20


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--smoke` and `--data`."""
    parser.addoption("--smoke", action="store_true", help="benchmarks: a small size, under 3 minutes")
    parser.addoption(
        "--data", help="benchmarks: a folder with MNIST or other IDX files; random images by default"
    )


@pytest.fixture(scope="session")
def size(pytestconfig: pytest.Config) -> Size:
    """The size asked for on the command line."""
    return Size(pytestconfig.getoption("--smoke"), pytestconfig.getoption("--data"))


@pytest.fixture
def full(size: Size) -> None:
    """For tests that the smoke size leaves out."""
    if size.smoke:
        pytest.skip("not in the smoke size")


@pytest.fixture
def record(benchmark: BenchmarkFixture) -> Record:
    """Run once under pytest-benchmark; keep the numbers returned beside the seconds.

    Paths stay out of the file: anything whose name is "path" is dropped.
    """

    def run(table: str, function: Callable[..., Rows], *args: Any) -> Rows:
        rows = benchmark.pedantic(function, args=args, rounds=1, iterations=1)
        listed = [rows] if isinstance(rows, dict) else rows
        benchmark.group = table
        benchmark.extra_info["table"] = table
        benchmark.extra_info["rows"] = [{k: v for k, v in row.items() if k != "path"} for row in listed]
        return rows

    return run
