"""The flow of a step map: accuracy and cost by points, past the edge, for Adam and heavy ball; memory."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eomdl
from benchmarks.aliases import Params
from benchmarks.conftest import Record, Size
from benchmarks.measure import STAGES, bar_row, compiled, time_ratio
from benchmarks.problems import LOSS, digits
from paper_repro import networks
from paper_repro.harness import Images
from paper_repro.papers.edge_of_stability import CASES, TOLERANCES, setting


ETA, STEPS = 0.1, 200


def _random_mlp(seed: int) -> list[dict[str, jax.Array]]:
    sizes = (64, 64, 64, 10)
    keys = jax.random.split(jax.random.key(seed), 3)
    return [
        {"w": jax.random.normal(k, (m, n)) / np.sqrt(m), "b": jnp.zeros(n)}
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


# The bars were set on one initialization, which is not at hand; two stand here for it.
INITS = {"A": lambda: _random_mlp(0), "B": lambda: networks.zero_bias_init((64, 64, 64, 10), seed=9)}
LIMITS = {2: 1.3e-3, 3: 3.5e-4, 4: 1.1e-4, 6: 1.5e-5, 8: 3.5e-6}
MINIMAX_LIMITS = {6: 6e-6, 8: 1e-6}


@cache
def _descent(init: str) -> tuple[Params, eomdl.Trajectory, float]:
    observe = {"sharpness": eomdl.sharpness(LOSS)}
    params = INITS[init]()
    run = eomdl.descend(LOSS, params, optax.sgd(ETA), STEPS, args=digits(1000), observe=observe)
    return params, run, ETA * run.observables["sharpness"].max()


STEP = eomdl.optimizer_step(LOSS, optax.sgd(ETA))


def _distance(init: str, flow: eomdl.AbstractFlow) -> float:
    params, real, _ = _descent(init)
    path = eomdl.solve(flow, params, STEPS, args=digits(1000), rtol=1e-12, atol=1e-10, estimate_error=False)
    return float(eomdl.compare(real, {"flow": path}).distance["flow"].max())


@pytest.mark.parametrize("init", INITS)
def test_points(record: Record, full: None, init: str) -> None:
    """More points come nearer to gradient descent, down to the limits set."""

    def rows() -> list[dict[str, Any]]:
        _, _, bound = _descent(init)
        flow = _distance(init, eomdl.GradientFlow(LOSS, ETA))
        out = [
            {"init": init, "eta_lambda_max": bound, "weights": "gradient flow", "points": 1, "distance": flow}
        ]
        for weights, limits in (("Taylor", LIMITS), ("minimax", MINIMAX_LIMITS)):
            for points, limit in limits.items():
                b = eomdl.flows.minimax_weights(points, bound) if weights == "minimax" else None
                error = _distance(init, eomdl.InterpolatingFlow(STEP, ETA, points, weights=b))
                out.append(
                    {"init": init, "eta_lambda_max": bound, "weights": weights, "points": points}
                    | {"distance": error, "limit": limit, "passed": bool(error <= limit)}
                )
        return out

    listed = record("points", rows)
    assert all(
        row["passed"] for row in listed if "passed" in row and (init == "A" or row["weights"] == "minimax")
    )
    errors = [row["distance"] for row in listed if row["weights"] != "minimax"]
    assert np.all(np.diff(errors) < 0)


def test_field_cost(record: Record, size: Size) -> None:
    """Flops of one increment; seconds of the whole field, whose loop XLA's flop count does not see."""

    def bars() -> dict[str, Any]:
        params = INITS["A"]()
        gradient, base = compiled(lambda x, args: jax.grad(LOSS)(x, args), params, digits(1000))
        one = eomdl.InterpolatingFlow(STEP, ETA, 1)
        _, cost = compiled(lambda x, args: one(0.0, one.init(x, args), args), params, digits(1000))
        four = eomdl.InterpolatingFlow(STEP, ETA, 4)
        field, _ = compiled(lambda x, args: four(0.0, four.init(x, args), args), params, digits(1000))
        ratio = time_ratio(field, gradient, (params, digits(1000)), size.rounds) / 4
        return bar_row(
            "interpolating field, one point (gradients, flops)", cost["flops"] / base["flops"], 1.15
        ) | {"seconds_per_point": ratio}

    assert record("bar", bars)["passed"]


def test_memory_is_flat_in_the_points(record: Record) -> None:
    """The field with 16 points needs at most 1.1 times the memory of that with 2."""

    def bar() -> dict[str, Any]:
        params = INITS["A"]()
        sizes = []
        for points in (2, 16):
            flow = eomdl.InterpolatingFlow(STEP, ETA, points)
            program, _ = compiled(lambda x, args, f=flow: f(0.0, f.init(x, args), args), params, digits(1000))
            sizes.append(program.memory_analysis().temp_size_in_bytes)
        return bar_row("memory of the field, 16 points over 2 points", sizes[1] / sizes[0], 1.1)

    assert record("bar", bar)["passed"]


EDGE = {case.name: case for case in CASES}
EDGE_LIMITS = {4: (5e-4, 20.0), 6: (2e-4, 35.0)}


@pytest.mark.parametrize("name", EDGE)
def test_edge_of_stability(record: Record, full: None, name: str) -> None:
    """Past the edge the strided flow stays near gradient descent, and the number of points chosen is a good one."""
    case = EDGE[name]
    steps = 1000

    def rows() -> list[dict[str, Any]]:
        start, args = setting(case, Images())
        optimizer, eta = optax.sgd(case.learning_rate), case.learning_rate
        save = list(range(0, steps + 1, 10))
        real = eomdl.descend(
            case.loss, start, optimizer, steps, args=args, save_steps=save,
            observe={"sharpness": eomdl.sharpness(case.loss, 12)},
        )  # fmt: skip
        step = eomdl.optimizer_step(case.loss, optimizer)
        chosen = eomdl.choice.choose_points(step, start, steps, args=args, stride=2, max_points=6).points
        flows: dict[int, eomdl.AbstractFlow] = {0: eomdl.GradientFlow(case.loss, eta)}
        flows |= {k: eomdl.InterpolatingFlow(step, eta, k, stride=2) for k in (2, 3, 4, 6)}
        out = []
        for points, flow in flows.items():
            path = eomdl.solve(
                flow,
                start,
                steps,
                args=args,
                save_steps=save,
                estimate_error=False,
                max_steps=2000,
                rtol=TOLERANCES["rtol"],
                atol=TOLERANCES["atol"],
            )
            relative = eomdl.compare(real, {"flow": path}).relative_distance["flow"]
            done = len(relative) == len(save)
            out.append(
                {
                    "network": name,
                    "points": points,
                    "eta_sharpness": eta * float(real.observables["sharpness"].max()),
                    "at_200": relative[20] if len(relative) > 20 else None,
                    "at_400": relative[40] if len(relative) > 40 else None,
                    "at_1000": relative[-1] if done else None,
                    "gradients_per_step": STAGES * int(path.stats.num_steps) * max(2 * points, 1) / steps,
                    "chosen": points == chosen,
                }
            )
        return out

    by_points = {row["points"]: row for row in record("edge", rows)}
    ended = {k: row["at_1000"] for k, row in by_points.items() if row["at_1000"] is not None}
    if name == "MLP, squared error":
        for points, (distance, gradients) in EDGE_LIMITS.items():
            assert ended[points] <= distance
            assert by_points[points]["gradients_per_step"] <= gradients
    if "cross entropy" in name:
        assert min(ended[k] for k in (4, 6)) <= ended[0] / 10
    (chosen,) = [row for row in by_points.values() if row["chosen"]]
    if case.asserted:
        assert chosen["at_1000"] <= 2 * min(v for k, v in ended.items() if k)


class Case(NamedTuple):
    """`make` and `uncorrected` take the time of a step, which is lr for Adam and lr/(1 - beta) for heavy ball."""

    make: Callable
    uncorrected: Callable
    step: float
    transient: int  # steps
    steps: tuple[float, ...]  # for the orders; the transient lasts the same time for all


OPTIMIZERS = {
    "Adam": Case(
        optax.adam, lambda h: eomdl.flows.AdamFlow(LOSS, h, order=0), 1e-4, 2000, (1e-4, 5e-5, 2.5e-5)
    ),
    "heavy ball": Case(
        lambda h: optax.sgd(0.1 * h, momentum=0.9),
        lambda h: eomdl.GradientFlow(LOSS, h),
        0.05,
        100,
        (0.0125, 0.00625, 0.003125),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer(record: Record, full: None, name: str) -> None:
    """Default hyperparameters: 50 steps after the transient, and the order of the one-step defect there."""
    case = OPTIMIZERS[name]
    params, args = INITS["A"](), digits(1000)

    def flow(points: int, h: float) -> eomdl.AbstractFlow:
        if points == 0:
            return case.uncorrected(h)
        return eomdl.InterpolatingFlow(eomdl.optimizer_step(LOSS, case.make(h)), h, points)

    def rows() -> list[dict[str, Any]]:
        optimizer, begin, end = case.make(case.step), case.transient, case.transient + 50
        warm = eomdl.descend(LOSS, params, optimizer, begin, args=args, save_steps=[begin])
        real = eomdl.descend(LOSS, params, optimizer, end, args=args, save_steps=[end], resume=warm)
        out: list[dict[str, Any]] = []
        for points in (0, 1, 2, 3, 4, 6):
            path = eomdl.solve(
                flow(points, case.step),
                params,
                end,
                args=args,
                save_steps=[end],
                resume=warm,
                rtol=1e-12,
                atol=1e-12,
            )
            comparison = eomdl.compare(real, {"flow": path})
            row = {"optimizer": name, "points": points, "distance": comparison.distance["flow"][-1]}
            row |= {"ode_error": comparison.ode_error["flow"][-1]}
            row |= {"times_nearer": out[0]["distance"] / row["distance"] if out else 1.0}
            if points in (1, 2):
                study = eomdl.errors.convergence_study(
                    partial(flow, points),
                    LOSS,
                    params,
                    case.steps,
                    optimizer=case.make,
                    warmup=case.transient * case.step,
                    args=args,
                )
                row |= {
                    "observed_order": study.order,
                    "ode_share": float((study.ode_errors / study.errors).max()),
                }
            out.append(row)
        return out

    listed = record("optimizer", rows)
    clear = [row for row in listed if row["distance"] > 3 * row["ode_error"]]
    assert np.all(np.diff([row["distance"] for row in clear]) < 0)
    assert listed[-1]["times_nearer"] >= 100
    for row in listed:
        # Adam's order is recorded and not asserted: with the default eps of 1e-8 a component steps by its sign where
        # its gradient passes 0, and with b2 = 0.999 it moves far within its memory. paper_repro's adam asserts it
        # for the smoother setting of the paper.
        if "observed_order" in row and name != "Adam":
            assert abs(row["observed_order"] - row["points"] - 1) < 0.15
