"""The structure of a state: it survives the disk, and tells one optimizer's state from another's."""

import json
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import VALLEY, assert_identical, valley_loss

import eomdl
from eomdl import _structure


class Pair(NamedTuple):
    first: object
    second: object


class Layer(eqx.Module):
    weight: object
    name: str = eqx.field(static=True, default="layer")


PLAIN = {
    "dict": {"b": 1.0, "a": {"c": 2.0}},
    "list and tuple": [1.0, (2.0, [3.0])],
    "None": {"a": None, "b": (None, 1.0)},
    "integer keys": {3: 1.0, 1: 2.0},
    "named tuple": Pair(1.0, {"x": Pair(2.0, None)}),
    "empty": {"a": (), "b": [], "c": {}, "d": 1.0},
    "leaf": 1.0,
    "optax": optax.adam(0.1).init({"w": jnp.ones(2)}),
}


def through_json(tree):
    description = json.loads(json.dumps(_structure.describe(tree)))
    return _structure.rebuild(description, jax.tree.leaves(tree))


@pytest.mark.parametrize("name", PLAIN)
def test_plain_structures_come_back_as_they_were(name):
    assert_identical(through_json(PLAIN[name]), PLAIN[name])


def test_a_module_comes_back_as_a_node_that_is_described_as_the_module():
    tree = {"a": Layer(1.0), "b": 2.0}
    node = through_json(tree)
    assert node["a"]["weight"] == 1.0
    assert _structure.describe(node) == _structure.describe(tree)
    back = _structure.restore("state", jax.tree.map(np.asarray, node), tree)
    assert isinstance(back["a"], Layer)
    assert back["a"].name == "layer"
    assert back["b"] == 2.0


def test_a_class_of_the_same_fields_is_another_structure():
    class Other(NamedTuple):
        first: object
        second: object

    with pytest.raises(
        ValueError, match=r"^state: expected the structure of this run's, got a .*Other in place"
    ):
        _structure.restore("state", Other(1.0, 2.0), Pair(1.0, 2.0))
    with pytest.raises(ValueError, match=r"^state\.first: expected shape \(2,\), got \(3,\)"):
        _structure.restore("state", Pair(np.ones(3), 1.0), Pair(np.ones(2), 1.0))


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.1),
    "rmsprop": optax.rmsprop(0.1),
}


@pytest.fixture(scope="module")
def runs():
    return {name: eomdl.descend(valley_loss, VALLEY, o, 3) for name, o in OPTIMIZERS.items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_comes_back_from_the_disk_and_goes_on_bit_for_bit(tmp_path, runs, name):
    runs[name].save(tmp_path / "run.npz")
    loaded = eomdl.Trajectory.load(tmp_path / "run.npz")
    assert_identical(loaded.end, runs[name].end)
    ends = [eomdl.descend(valley_loss, VALLEY, OPTIMIZERS[name], 6, resume=r) for r in (runs[name], loaded)]
    assert_identical(ends[0].end.state, ends[1].end.state)


@pytest.mark.parametrize("old", OPTIMIZERS)
@pytest.mark.parametrize("new", OPTIMIZERS)
@pytest.mark.parametrize("what", ["descend", "solve", "choose_points"])
def test_no_run_goes_on_with_the_state_of_another_optimizer(runs, old, new, what):
    step = eomdl.optimizer_step(valley_loss, OPTIMIZERS[new])
    run = {
        "descend": lambda: eomdl.descend(valley_loss, VALLEY, OPTIMIZERS[new], 4, resume=runs[old]),
        "solve": lambda: eomdl.solve(eomdl.InterpolatingFlow(step, 0.1, 1), VALLEY, 4, resume=runs[old]),
        "choose_points": lambda: eomdl.choice.choose_points(step, VALLEY, 4, start=runs[old].end),
    }[what]
    if old == new:
        run()
        return
    with pytest.raises(ValueError, match=r"end\.state: expected the structure .*got .* in place of"):
        run()


def test_a_key_and_its_numbers_are_not_the_same():
    key = jax.random.key(0)
    same = _structure.restore("end.state", {"k": key}, {"k": key})["k"]
    assert_identical(jax.random.key_data(same), jax.random.key_data(key))
    for saved, like in ((jnp.zeros(()), key), (key, jnp.zeros(()))):
        with pytest.raises(ValueError, match=r"^end\.state\['k'\]: expected dtype .*, got "):
            _structure.restore("end.state", {"k": saved}, {"k": like})
