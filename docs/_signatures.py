"""Signatures of equinox modules for the reference: their fields are arguments, which only the class itself knows."""

import importlib
import inspect

import griffe


class ModuleSignatures(griffe.Extension):
    """Give every class without an `__init__` of its own the signature that Python sees."""

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        for module in self._modules(pkg):
            for cls in module.classes.values():
                if not cls.is_alias and "__init__" not in cls.members:
                    self._add(cls, module)

    def _modules(self, module: griffe.Module):
        yield module
        for child in module.modules.values():
            if not child.is_alias:
                yield from self._modules(child)

    def _add(self, cls: griffe.Class, module: griffe.Module) -> None:
        thing = getattr(importlib.import_module(module.path), cls.name)
        if inspect.isabstract(thing) or not isinstance(
            thing, type(importlib.import_module("equinox").Module)
        ):
            return
        parameters = [
            griffe.Parameter(p.name, kind=_KINDS[p.kind], default=_default(p))
            for p in inspect.signature(thing).parameters.values()
        ]
        init = griffe.Function(
            "__init__",
            parameters=griffe.Parameters(*parameters),
            parent=cls,
            lineno=cls.lineno,
        )
        cls.set_member("__init__", init)


_KINDS = {
    inspect.Parameter.POSITIONAL_ONLY: griffe.ParameterKind.positional_only,
    inspect.Parameter.POSITIONAL_OR_KEYWORD: griffe.ParameterKind.positional_or_keyword,
    inspect.Parameter.VAR_POSITIONAL: griffe.ParameterKind.var_positional,
    inspect.Parameter.KEYWORD_ONLY: griffe.ParameterKind.keyword_only,
    inspect.Parameter.VAR_KEYWORD: griffe.ParameterKind.var_keyword,
}


def _default(parameter: inspect.Parameter) -> str | None:
    return (
        None
        if parameter.default is inspect.Parameter.empty
        else repr(parameter.default)
    )
