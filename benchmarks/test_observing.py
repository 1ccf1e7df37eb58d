"""What observing adds to a run: of each observable the cost in gradients, and of the run the seconds."""

import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import optax
import pytest

import eomdl
from benchmarks.conftest import Record, Size
from benchmarks.measure import compiled, gradient, problem


STEPS, EVERY = 200, 10
LOOPS = "sharpness (16 matvecs)"  # XLA counts the flops of a loop's body once: no figure in flops
CASES: dict[str, Callable[[Any], Any]] = {
    "loss": lambda case: case.loss,
    LOOPS: lambda case: eomdl.sharpness(case.loss),
    "charges of 64 units (rescale)": lambda case: (
        eomdl.symmetry.Scaling([("0.w", 1), ("0.b", 0)], [("1.w", 0)]).charge
    ),
    "secant (RSI, EB; 4 random directions)": lambda case: eomdl.geometry.secant(case.loss, case.params),
    "curvature of gradient flow": lambda case: eomdl.geometry.flow_curvature(
        eomdl.GradientFlow(case.loss, case.learning_rate)
    ),
    "torsion of gradient flow": lambda case: eomdl.geometry.flow_torsion(
        eomdl.GradientFlow(case.loss, case.learning_rate)
    ),
}


def _seconds(run: Callable[..., eomdl.Trajectory]) -> float:
    """The shortest of three runs after one that compiles."""
    run()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(run().end.state)
        times.append(time.perf_counter() - start)
    return min(times)


def _descent(p: str, **options: Any) -> Callable[..., eomdl.Trajectory]:
    case = problem(p)
    optimizer = optax.sgd(case.learning_rate)

    def run(**more: Any) -> eomdl.Trajectory:
        return eomdl.descend(
            case.loss,
            case.params,
            optimizer,
            STEPS,
            args=case.args,
            save_params=False,
            save_steps=EVERY,
            **options,
            **more,
        )

    return run


def _observed(p: str, name: str) -> dict[str, Any]:
    case = problem(p)
    observable = CASES[name](case)
    _, cost = compiled(lambda x, args: observable(x, args), case.params, case.args)
    bare, watched = _seconds(_descent(p)), _seconds(_descent(p, observe={"it": observable}))
    return {
        "observed": name,
        "problem": case.name,
        "every": EVERY,
        "gradients": None if name == LOOPS else cost["flops"] / gradient(p)[1],
        "compile_s": cost["trace_s"] + cost["compile_s"],
        "run_seconds_ratio": watched / bare,
        "steps_once": (watched / bare - 1) * EVERY,
    }


@pytest.mark.parametrize("name", CASES)
def test_observing(record: Record, size: Size, name: str) -> None:
    """One observation costs less than 8 gradients."""
    row = record("observing", _observed, size.problem, name)
    # Seconds are recorded and not asserted: at smoke size they are those of whatever else the machine does.
    assert row["gradients"] is None or row["gradients"] < 8


def _checkpointed(p: str) -> dict[str, Any]:
    run = _descent(p)
    with tempfile.TemporaryDirectory() as folder:
        names = iter(range(100))

        def writing() -> eomdl.Trajectory:
            return run(checkpoints=eomdl.Checkpoints(f"{folder}/{next(names)}", EVERY))

        bare, written = _seconds(run), _seconds(writing)
        store = eomdl.Checkpoints(f"{folder}/0")
        count = len(store)
        size = sum(path.stat().st_size for path in store.folder.iterdir()) / count
    return {
        "observed": f"a checkpoint of {size / 1024:.0f} KiB written",
        "problem": problem(p).name,
        "every": EVERY,
        "checkpoints": count,
        "run_seconds_ratio": written / bare,
        "steps_once": (written / bare - 1) * EVERY,
    }


def test_checkpointing(record: Record, size: Size) -> None:
    """A run writes as many checkpoints as it should; their cost is recorded."""
    row = record("observing", _checkpointed, size.problem)
    assert row["checkpoints"] == STEPS // EVERY + 1
