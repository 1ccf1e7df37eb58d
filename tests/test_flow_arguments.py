"""The laws of a flow's arguments and documents, over every flow in the registry."""

import dataclasses
import inspect
import re

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import VALLEY, pulled_loss
from registry import ALL, FLOWS, NOISY_FLOWS, for_each

import eomdl


NO_NUMBER = [np.nan, np.inf, -np.inf, -0.1, "0.1", None, 1j, True, np.ones(2)]
CLOCKS = ("learning_rate", "step_size")  # 0 is no number for them either


@for_each([*FLOWS, *NOISY_FLOWS])
def test_a_wrong_argument_is_named(entry):
    flow = entry.make(pulled_loss, entry.rates[0])
    numbers = 0
    for field in dataclasses.fields(flow):
        value = getattr(flow, field.name)
        if eqx.is_array(value) and value.ndim == 0:
            wrong = [*NO_NUMBER, *[0, 0.0] * (field.name in CLOCKS)]
        elif isinstance(value, int) and not isinstance(value, bool):
            wrong = [-1, 1.5, 2.0, "2", True, *[None] * (field.default is not None)]
        else:
            continue
        numbers += 1
        for bad in wrong:
            with pytest.raises(ValueError, match=rf"^{field.name}: expected .*got .*{re.escape(repr(bad))}"):
                dataclasses.replace(flow, **{field.name: bad})
    assert numbers > 0


@ALL
def test_what_steps_cannot_be_taken_on_is_named(entry):
    for loss in (lambda p, args: p["x"] * jnp.ones(2), lambda p, args: {"x": p["x"]}):
        with pytest.raises(ValueError, match=r"^(loss|field|step_map|step_map\(state, args, k\)): expected"):
            eomdl.solve(entry.make(loss, 0.1), VALLEY, 4, args=entry.args)


AUTHORS = r"[A-Z]\w+(( &|,| and) [A-Z]\w+)*( et al\.)?"
SOURCE = re.compile(rf"{AUTHORS} (19|20)\d\d\b|arXiv \d{{4}}\.\d{{4,5}}|[Dd]erived here")
PUBLIC = [
    x
    for space in (eomdl, eomdl.flows)
    for name in space.__all__
    if inspect.isclass(x := getattr(space, name)) or name.endswith("flow")
]
PUBLIC_FLOWS = [
    x
    for x in PUBLIC
    if not inspect.isclass(x) or (issubclass(x, eomdl.AbstractFlow) and not inspect.isabstract(x))
]


@pytest.mark.source
@pytest.mark.parametrize("flow", PUBLIC_FLOWS, ids=lambda flow: flow.__name__)
def test_every_flow_names_its_source_and_is_listed(flow):
    assert SOURCE.search(inspect.getdoc(flow))
    # A class by its type, a function that makes one by its name.
    listed = {type(entry.make(pulled_loss, entry.rates[0])) for entry in [*FLOWS, *NOISY_FLOWS]}
    listed |= {entry.name for entry in FLOWS}
    assert (flow if inspect.isclass(flow) else flow.__name__) in listed


def test_a_document_without_a_source_is_seen():
    for text in ("Gradient flow in 2000 steps.", "The flow of Adam. Source: a paper.", "After 1024 steps"):
        assert not SOURCE.search(text)
