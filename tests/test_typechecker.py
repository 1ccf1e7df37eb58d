"""What checks the results of all functions: it sees a wrong type and a wrong shape, and it is there in every module."""

import dataclasses
import inspect
import pkgutil
from importlib import import_module

import jax.numpy as jnp
import pytest
import typechecker
from beartype.roar import BeartypeCallHintReturnViolation
from jaxtyping import Float, TypeCheckError

import eomdl


def number(x) -> int:
    return x


def later(x) -> "list[Later]":
    return x


class Later:
    """A name that is not there yet where it is named."""


def pair(x, y) -> tuple[Float[jnp.ndarray, " n"], Float[jnp.ndarray, "n m"]]:
    return x, y


def none(x) -> None:
    return x


@pytest.mark.parametrize(
    ("function", "right", "wrong"),
    [
        (number, (1,), ("one",)),
        (none, (None,), (1,)),
        (later, ([Later()],), ([1],)),
        (pair, (jnp.ones(2), jnp.ones((2, 3))), (jnp.ones(2), jnp.ones((3, 2)))),
    ],
)
def test_a_wrong_result_is_an_error(function, right, wrong):
    checked = typechecker.result(function)
    checked(*right)
    with pytest.raises(BeartypeCallHintReturnViolation):
        checked(*wrong)
    checked(*right)


def test_an_inner_function_is_checked_each_time_it_is_made():
    def make(n):
        @typechecker.result
        def inner(x) -> int:
            return x + n

        return inner

    assert make(1)(1) == 2
    for n in (0.5, "a"):
        with pytest.raises((BeartypeCallHintReturnViolation, TypeError)):
            make(n)(1)


def test_a_wrong_shape_of_a_field_is_an_error():
    @typechecker.fields
    @dataclasses.dataclass
    class Pair:
        x: Float[jnp.ndarray, " n"]
        y: Float[jnp.ndarray, " n"]
        name: str

    Pair(jnp.ones(2), jnp.ones(2), 3)  # type: ignore[arg-type]  # other fields the library refuses by itself
    with pytest.raises(TypeCheckError):
        Pair(jnp.ones(2), jnp.ones(3), "")


def test_all_annotated_functions_of_the_library_are_checked():
    names = [module.name for module in pkgutil.walk_packages(eomdl.__path__, "eomdl.")]
    unchecked, count = [], 0
    for module in map(import_module, (name for name in names if not name.endswith("__main__"))):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and "return" in function.__annotations__:
                count += 1
                if not hasattr(function, "__wrapped__"):
                    unchecked.append((module.__name__, name, function.__annotations__["return"]))
    assert count > 500
    assert [entry for entry in unchecked if entry[2] is not typechecker.Any] == []


def test_the_tests_of_a_group_run_in_one_worker(request):
    """A group shares its programs: scattered over the workers it is compiled in each of them, which no result would show."""
    if request.config.getoption("loadgroup", False):  # in a worker of pytest-xdist
        assert request.node.nodeid.endswith("@test_typechecker")
