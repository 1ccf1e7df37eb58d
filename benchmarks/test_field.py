"""One evaluation of the field: cost against one gradient, and compile time, by order and route."""

import pytest

from benchmarks import measure
from benchmarks.conftest import Record, Size


ROUTES = [("trees", n) for n in range(7)] + [("series", n) for n in range(1, 5)] + [("nested", 1)]


@pytest.mark.parametrize(("route", "order"), ROUTES, ids=lambda x: str(x))
def test_field(record: Record, size: Size, route: str, order: int) -> None:
    """An evaluation costs at least the one gradient in it."""
    if size.smoke and order > (2 if route == "series" else 4):
        pytest.skip("not in the smoke size")
    row = record("field", measure.field_cost, "main", order, route, size.rounds)
    assert row["gradients"] >= 0.99
