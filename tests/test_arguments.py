"""Every argument of every public function: each wrong value is accepted with meaning, or refused by its name."""

import dataclasses
import inspect
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
from calls import CALLS, SGD, WRONG, evaluate
from helpers import VALLEY, valley_loss

import eomdl
from eomdl import _check
from eomdl._result import AbstractResult


# ------------------------------------------------- what is accepted, and means something

ARRAYS = {"a wrong shape", "an array"}
# Data for a function of the user's: any pytree.
ANYTHING = {f"{name}.args" for name in CALLS} - {"geometry.gradient_points.args"}
OPTIONAL = {
    "descend.step_size",
    "iterate.step_size",
    "solve.dt0",
    "choice.choose_flow.probe_steps",
    "choice.choose_flow.budget",
    "errors.convergence_study.time",
    "choice.fitted_weights.order",
    "sharpness.rtol",
    "telemetry.EdgeTelemetry.along_every",
    "telemetry.EdgeTelemetry.edge_every",
    "flows.CentralFlow.directions",
}
OPTIONAL |= {f"{verb}.observe" for verb in ("descend", "iterate", "solve")}
ACCEPTED: dict[str, set[str]] = {
    "InterpolatingFlow.weights": {"an array"},
    "Ensemble.args_axis": {"minus one"},
    "runs.each.args_axis": {"minus one"},
    "Checkpoints.folder": {"a string"},
    "runs.RowsOnDisk.folder": {"a string"},
    "Checkpoints.like": {"minus a half", "NaN", "infinity", *ARRAYS},  # pytrees of one array
    "flows.step_data.n": {"minus one", "huge"},  # counted round
    "curvature.eigenvalues_over_batches.batches": {"an array"},
    "observe.angle_per_step.block": ARRAYS,
    "observe.decay_rate.values": ARRAYS,
    "observe.block_norm.where": {"a string"},
    "observe.shift_component.where": {"a string"},
    "observe.shift_component.axis": {"minus one"},
    "errors.local_error.batches": ARRAYS,
    "errors.predict_error.leading": {"True"},
    "plotting.plot of a predicted error.measured": {"an array"},  # of two steps
    "plotting.plot of a plane.paths": {"None"},
    "errors.observed_order.learning_rates": {"an array"},
    "errors.observed_order.errors": {"an array"},
    "losses.OnHost.arrays": ARRAYS,
    "noise.DiagonalNoise.scale": ARRAYS,
    "noise.NoiseOperator.normals_like": ARRAYS,
    "geometry.count_regions_on_line.a": {"an array"},
    "geometry.count_regions_on_line.b": {"an array"},
    "geometry.gradient_points.params": {"minus a half", "a wrong shape"},
    "geometry.gradient_points.args": ARRAYS,
    "geometry.participation_ratio.points": {"an array"},
    "geometry.loss_plane.x": {"an array"},
    "geometry.loss_plane.y": {"an array"},
    "geometry.secant.end": {"minus a half", *ARRAYS},
    "symmetry.Scaling.outgoing": {"empty"},
    "symmetry.Scaling.transform.amount": {"minus one", "minus a half"},  # the same for all units
    "symmetry.Translation.transform.amount": {"minus one", "minus a half"},
    "symmetry.Translation.block": {"a string"},
    "symmetry.Translation.axis": {"None", "minus one"},
    "symmetry.conservation.models": {"empty"},
    "symmetry.translation_decay_rate.order": {"None"},
    "runs.Crossing.observable": {"a string"},
    "descend.monitors": {"empty"},
    "iterate.monitors": {"empty"},
    "solve.monitors": {"empty"},
    "runs.Crossing.level": {"minus one", "minus a half"},
    # Its shape is that of the parameters, known in `solve`, and it is made of length 1.
    "flows.EdgeFlow.direction": {"None", "minus a half", "a wrong shape", "an array"},
    "flows.EdgeFlow.magnitude": {"None"},
    "flows.Target.name": {"a string"},
    "runs.Trajectory.rows.index": {"empty"},
    "runs.Trajectory.load.path": {"a string"},  # no such file
    "runs.Trajectory.load.like": set(WRONG),  # looked at when there is a file
    "runs.Trajectory.save.path": {"a string"},
    "runs.Trajectory.save.events": {"empty"},
    "Comparison.load.path": {"a string"},
    "Comparison.save.path": {"a string"},
    "runs.Crossing.__call__.values": {"an array"},
    "Checkpoints.observe.observe": {"None"},
    "curvature.SpectralDensity.at.points": {"an array"},
    "curvature.SpectralDensity.interval.points": {"an array"},
}
ACCEPTED |= {
    f"symmetry.{law}.{name}": ARRAYS
    for law in (
        "effective_learning_rate",
        "equilibrium_angle",
        "equilibrium_norm",
        "scale_norm_after_step",
        "scale_norm_rate",
    )
    for name in ("norm", "gradient_norm", "learning_rate", "weight_decay")
}
# Named by what the user's function makes of them.
ALSO_NAMED = {
    "curvature.eigenvalues_over_batches.batches": "loss",
    "errors.convergence_study.learning_rates": "time",
}


MOST = 600  # characters of a message: more is not read


def accepted(place: str, wrong: str, valid: Any) -> bool:
    if place in ANYTHING or wrong in ACCEPTED.get(place, set()):
        return True
    optional = valid is None or place in OPTIONAL
    return (wrong == "None" and optional) or (wrong == "True" and isinstance(valid, bool))


def refused(function: Any, options: dict[str, Any], place: str, name: str, value: Any) -> str | None:
    """What is wrong with how a wrong value is met, or None."""
    try:
        evaluate(function)(**{key: evaluate(valid) for key, valid in {**options, name: value}.items()})
    except ValueError as error:
        if len(str(error)) > MOST:
            return f"a message of {len(str(error))} characters"
        named = name in str(error) or ALSO_NAMED.get(place, name) in str(error)
        return None if named else f"does not name {name}: {error!s:.100}"
    except Exception as error:
        return f"{type(error).__name__}: {error!s:.100}"
    return "accepted"


@pytest.mark.parametrize("call", CALLS)
def test_wrong_values_are_refused_by_the_argument_s_name(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function, options = CALLS[call]
    failures = {}
    for name, valid in options.items():
        place = f"{call}.{name}"
        for wrong, value in WRONG.items():
            if not accepted(place, wrong, valid):
                found = refused(function, options, place, name, value)
                if found:
                    failures[f"{place} = {wrong}"] = found
    assert failures == {}
    assert list(tmp_path.iterdir()) == []  # nothing written before it is refused


NO_CALLS = "RESULTS AbstractFlow AbstractMonitor AbstractNoise StepMap RunOptions Eigenpairs"


def test_every_public_function_is_here():
    tried = {name.rpartition(".")[2] for name in CALLS}
    spaces = [eomdl, *(getattr(eomdl, space) for space in SPACES)]
    for space in spaces:
        for name in space.__all__:
            thing = getattr(space, name)
            if callable(thing) and name not in NO_CALLS.split() and not is_result(thing):
                assert name in tried, f"{name} is not in CALLS"
                function, options = next(
                    call for key, call in CALLS.items() if key.rpartition(".")[2] == name
                )
                known = set(inspect.signature(evaluate(function)).parameters) - {"options"}
                assert known <= set(options), f"arguments of {name} left out: {known - set(options)}"


# What a run calls.
NO_METHODS = [
    "Checkpoints.begin",
    "Checkpoints.due",
    "Checkpoints.write",
    "Trajectory.events_in",
]


def test_every_method_of_a_result_is_here():
    tried = {".".join(name.split(".")[-2:]) for name in CALLS}
    shared = {"load", "save", "table", "plot"}  # of every result: tried of two
    for space in [eomdl, *(getattr(eomdl, space) for space in SPACES)]:
        for thing in (getattr(space, name) for name in space.__all__):
            if not isinstance(thing, type) or not issubclass(thing, AbstractResult | eomdl.Checkpoints):
                continue
            for name, method in inspect.getmembers(thing, inspect.isroutine):
                has_arguments = not name.startswith("_") and set(inspect.signature(method).parameters) - {
                    "self"
                }
                if has_arguments and name not in shared and f"{thing.__name__}.{name}" not in NO_METHODS:
                    assert f"{thing.__name__}.{name}" in tried, f"{thing.__name__}.{name} is not in CALLS"


SPACES = [name for name in eomdl.__all__ if inspect.ismodule(getattr(eomdl, name))]


def is_result(thing: Any) -> bool:
    """What functions return and users only read: dataclasses and named tuples without checks."""
    return isinstance(thing, type) and (
        (dataclasses.is_dataclass(thing) and not issubclass(thing, eqx.Module)) or issubclass(thing, tuple)
    )


def test_numbers_of_the_host_keep_their_digits_without_x64():
    with jax.enable_x64(False):
        rate = eomdl.observe.decay_rate(np.exp(-1e-9 * np.arange(3.0)), 1.0)
        order = eomdl.errors.observed_order([0.1, 0.05], [4e-50, 1e-50])
    np.testing.assert_allclose(rate, 1e-9, rtol=1e-6)
    assert order == pytest.approx(2)


UNUSUAL: dict[str, Any] = {
    "unprintable": 10**5000,
    "ragged": [[1.0], [1.0, 2.0]],
    "objects": np.array([None, 1]),
    "a date": np.datetime64("2020-01-01"),
    "a key": jax.random.key,
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_values_are_refused_by_name_too(kind, tmp_path):
    """What cannot be printed, compared or made an array: by each of the checks that the others are made of."""
    value = jax.random.key(0) if kind == "a key" else UNUSUAL[kind]
    for check in (
        _check.positive_scalar,
        _check.positive_numbers,
        _check.seed,
        _check.step_numbers,
        _check.flag,
    ):
        with pytest.raises(ValueError, match=r"^size: expected "):
            check("size", value)
    for name, call in {
        "save_steps": lambda: eomdl.descend(valley_loss, VALLEY, SGD, 3, save_steps=value),
        "num_steps": lambda: eomdl.descend(valley_loss, VALLEY, SGD, value),
        "schedule": lambda: eomdl.Checkpoints(tmp_path, value),
        "learning_rate": lambda: eomdl.GradientFlow(valley_loss, value),
        "n": lambda: eomdl.series.modified_equation(value),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: expected "):
            call()
