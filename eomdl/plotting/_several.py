"""Pictures of several results of one type, `{name: result}`, beside those of one."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from eomdl._result import plot


Draw = Callable[..., Any]  # ({name: result}, **options) -> figure
_Draw = TypeVar("_Draw", bound=Draw)

_SEVERAL: dict[type, Draw] = {}


def register_several(kind: type) -> Callable[[_Draw], _Draw]:
    """Register a function that draws `{name: result}` for a type of result; it draws one result under the name of its type."""

    def register(draw: _Draw) -> _Draw:
        _SEVERAL[kind] = draw
        plot.register(kind, lambda result, **options: draw({kind.__name__: result}, **options))
        return draw

    return register


@plot.register(Mapping)
def plot_several(results: Mapping[str, Any], **options: Any) -> Any:
    """Return the picture of several results of one type, or of dicts of them."""
    kinds = {type(result) for result in _leaves(results)}
    if len(kinds) != 1 or not kinds <= _SEVERAL.keys():
        names = ", ".join(sorted(kind.__name__ for kind in _SEVERAL))
        raise ValueError(
            f"result: expected a dict {{name: result}} of one type, {names}, got "
            f"{sorted(kind.__name__ for kind in kinds) or 'an empty dict'}"
        )
    return _SEVERAL[kinds.pop()](results, **options)


def _leaves(results: Mapping[Any, Any]) -> list[Any]:
    return [
        leaf
        for result in results.values()
        for leaf in (_leaves(result) if isinstance(result, Mapping) else [result])
    ]
