"""Ten million parameters: time and memory of every kind of run, and where the gradients of one `solve` go."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import pytest

import eomdl
from benchmarks import large
from benchmarks.aliases import Args, Loss, Params
from benchmarks.conftest import Record, Size
from benchmarks.large import Case
from benchmarks.measure import compiled
from eomdl.flows.equation_of_motion import SHARPNESS_RTOL
from eomdl.observe.curvature import Sharpness


SIZES = {"MLP": (2048, 2048, 2048), "transformer": (384, 6)}
SMOKE_SIZES = {"MLP": (32,), "transformer": (24, 1)}
EXAMPLES = {"MLP": 128, "transformer": 8}
DESCEND_LIMIT = 1.05  # of a hand-written scan
COPIES_LIMIT = 12  # of the parameters, for the state of `solve`
GRADIENTS_LIMIT = 7.0  # a step, of order 1, everything counted
BEFORE_LIMIT = 0.1  # of all, for what is measured before the run


def _run(case: Case) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.large", json.dumps(dataclasses.asdict(case))]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _case(size: Size, network: str, what: str, solver: str = "Tsit5") -> Case:
    sizes: Sequence[int] = (SMOKE_SIZES if size.smoke else SIZES)[network]
    # `descend` long enough that what a run takes beside its steps (records, observables: some 30 ms) counts for little.
    long = 60 if jax.default_backend() == "cpu" else 4_000
    steps = 2 if size.smoke else long if what == "descend" else 4
    return Case(network, what, sizes, EXAMPLES[network], steps, solver)


@pytest.mark.parametrize("what", large.RUNS)
@pytest.mark.parametrize("network", large.NETWORKS)
def test_large_runs(record: Record, size: Size, network: str, what: str) -> None:
    """Time in steps of a hand-written scan, memory in copies of the parameters."""
    if size.smoke and (network, what) != ("transformer", "EquationOfMotion, order 1"):
        pytest.skip("not in the smoke size")
    row = record("large runs", _run, _case(size, network, what))
    if what == "descend":
        assert row["steps_per_step"] <= DESCEND_LIMIT


@pytest.mark.parametrize("solver", ["Bosh3", "Ralston", "Heun"])
def test_solvers_of_few_stages(record: Record, size: Size, full: None, solver: str) -> None:
    """The state of `solve` is at most 12 copies of the parameters."""
    row = record("large runs", _run, _case(size, "MLP", "EquationOfMotion, order 1", solver))
    assert row["copies"] <= COPIES_LIMIT


class Tally:
    """Counts evaluations of a loss."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        """Count one."""
        self.count += 1


class Counted(eqx.Module):
    """A loss that counts how often it is evaluated: a gradient once, a field of order n n + 1 times."""

    loss: Loss
    tally: Tally = eqx.field(static=True)

    def __call__(self, params: Params, args: Args) -> jax.Array:
        """The loss, counted."""
        jax.debug.callback(self.tally)
        return self.loss(params, args)


def _sharpness_flops(loss: Loss, params: Params, args: Args) -> float:
    """Flops of a measurement of the sharpness: what its products share, and each of them."""
    count = jax.jit(Sharpness(loss, 16, SHARPNESS_RTOL).tridiagonal)(params, args).num_products
    grad = jax.grad(loss)
    _, shared = compiled(lambda p, args: jax.linearize(lambda q: grad(q, args), p)[1], params, args)
    product = jax.jit(lambda p, args: jax.linearize(lambda q: grad(q, args), p)[1])(params, args)
    _, each = compiled(lambda product, vector: product(vector), product, params)
    return shared["flops"] + int(count) * each["flops"]


def _gradients(sizes: Sequence[int], num_examples: int, num_steps: int) -> list[dict[str, Any]]:
    """Where the gradients of `solve` with its defaults go, per step of gradient descent."""
    loss, params, args = large.mlp(sizes, num_examples)
    sharpness = float(jax.jit(eomdl.sharpness(loss))(params, args))
    tally = Tally()
    flow = eomdl.EquationOfMotion(Counted(loss, tally), large.ETA_LAMBDA / sharpness, order=1)

    def counted(**options: Any) -> tuple[int, Any]:
        tally.count = 0
        run = eomdl.solve(flow, params, num_steps, args=args, save_steps=[num_steps], **options)
        jax.effects_barrier()
        return tally.count, run

    unseen, run = counted(diagnose=False)
    given, _ = counted(diagnose=False, rtol=run.stats.rtol, atol=run.stats.atol)
    _, one = compiled(jax.grad(loss), params, args)
    plain = eomdl.EquationOfMotion(loss, flow.learning_rate, order=1)
    _, field = compiled(lambda p, args: plain(0.0, p, args), params, args)
    per_field = field["flops"] / one["flops"] / (flow.order + 1)
    parts = {
        "ODE steps": given * per_field,
        "tolerances, measured before": (unseen - given) * per_field,
        "the measurement of the sharpness before": _sharpness_flops(loss, params, args) / one["flops"],
        "the measurement of the sharpness at the end": _sharpness_flops(loss, run.final_params, args)
        / one["flops"],
    }
    parts["everything"] = sum(parts.values())
    num_params = sum(x.size for x in jax.tree.leaves(params))
    return [
        {
            "num_params": num_params,
            "num_steps": num_steps,
            "ode_steps": int(run.stats.num_steps),
            "part": part,
            "gradients_per_step": gradients / num_steps,
            "share": gradients / parts["everything"],
        }
        for part, gradients in parts.items()
    ]


def test_where_the_gradients_go(record: Record, size: Size) -> None:
    """Order 1 at eta lambda 0.3 takes at most 7 gradients a step, and a tenth of them at most before the run."""
    sizes, examples, steps = ((32,), 64, 50) if size.smoke else ((700, 600), 256, 50)
    rows = record("large cost", _gradients, sizes, examples, steps)
    by = {row["part"]: row for row in rows}
    assert size.smoke or by["everything"]["gradients_per_step"] <= GRADIENTS_LIMIT
    before = (
        by["tolerances, measured before"]["share"] + by["the measurement of the sharpness before"]["share"]
    )
    assert size.smoke or before <= BEFORE_LIMIT
