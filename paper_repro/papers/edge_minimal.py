"""Every flow of the edge of stability on its smallest example.

f(x, y) = (y + zeta x) x^2 / 2 - eps (x + y) with zeta = 1, eps = 0.05, learning rate 0.3, from (0.02, 6.3): the curvature of x is
about y, which rises by the slope until eta y passes 2. Then x jumps from side to side, which drives y down again. 200 steps; each flow
against what it predicts: iterates (gradient flow, principal flow), even iterates (stride 2), midpoints (rod), the smoothed path (edge,
central).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from matplotlib.figure import Figure

import eomdl
from paper_repro import claims as made, pictures as draw, runs
from paper_repro.harness import Images, Tables


SOURCE = "The example: Berthier 2026; flows: Rosca et al. 2023, Cohen et al. 2025, Regis & Chewi 2026, Marion 2026."
SECONDS = 80
RATE, ZETA, EPS = 0.3, 1.0, 0.05
START = (0.02, 6.3)
FLOW, PRINCIPAL, STRIDE = "gradient flow", "principal flow", "stride 2"
EDGE, ROD, CENTRAL = "edge flow", "rod flow", "central flow"


class Size(NamedTuple):
    """Steps."""

    steps: int = 200


SMOKE = Size(steps=120)


def loss(w: Any, args: Any) -> Any:
    """Sharpness rises with y; a large x lowers it."""
    del args
    return 0.5 * (w["y"] + ZETA * w["x"]) * w["x"] ** 2 - EPS * (w["x"] + w["y"])


def models() -> dict[str, Any]:
    """All flows, by name."""
    step = eomdl.optimizer_step(loss, optax.sgd(RATE))
    return {
        FLOW: eomdl.GradientFlow(loss, RATE),
        PRINCIPAL: eomdl.flows.PrincipalFlow(loss, RATE),
        CENTRAL: eomdl.flows.CentralFlow(loss, RATE),
        ROD: eomdl.flows.RodFlow(step, RATE),
        EDGE: eomdl.flows.EdgeFlow(loss, RATE),
        STRIDE: eomdl.InterpolatingFlow(step, RATE, 4, stride=2),
    }


def measure(size: Size, images: Images) -> Tables:
    """Gradient descent, and every flow against what it predicts."""
    start = {"x": jnp.asarray(START[0]), "y": jnp.asarray(START[1])}
    observe = {"sharpness": eomdl.sharpness(loss, 2)}
    real = eomdl.descend(loss, start, optax.sgd(RATE), size.steps + 1, observe=observe)
    flows = models()
    options: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-10, "estimate_error": False, "diagnose": False}
    solved = runs.solve_all(flows, start, size.steps, observe=observe, **options)
    rows = []
    for name, path in solved.items():
        found = eomdl.compare(real, {name: path}).at_multiples_of(flows[name].stride)
        apart = found.relative_distance[name]
        rows.append(
            {
                "model": name,
                "target": flows[name].target.name,
                "at the end": apart[-1],
                "largest of the second half": np.nanmax(apart[len(apart) // 2 :]),
                "message": path.message,
            }
        )
    curves = [
        runs.coordinates({name: path}).assign(sharpness=RATE * path.observables["sharpness"])
        for name, path in {"GD": real, **solved}.items()
    ]
    return {"errors": pd.DataFrame(rows), "paths": pd.concat(curves)}


def claims(tables: Tables) -> list[made.Claim]:
    """What follows gradient descent through the edge, and what does not."""
    errors = tables["errors"].set_index("model")["largest of the second half"]
    through = [name for name in errors.index if name not in (FLOW, PRINCIPAL)]
    shown = "; ".join(f"{name} {errors[name]:.1e}" for name in errors.index)
    real = tables["paths"][tables["paths"]["run"] == "GD"]["sharpness"]
    return [
        made.Claim(
            "Gradient descent comes to the edge of stability, passes it and comes back.",
            f"eta * sharpness from {real.iloc[0]:.2f} to at most {real.max():.2f}.",
            bool(real.iloc[0] < 2 < real.max() < 4),
        ),
        made.Claim(
            "The flows for the edge are nearer to what they predict than gradient flow to gradient descent, "
            "by more than 2 times at their largest in the second half.",
            f"Parts of the distance travelled: {shown}.",
            bool(errors[through].max() < errors[FLOW] / 2),
        ),
    ]


def pictures(tables: Tables) -> dict[str, Figure]:
    """Sharpness and x against steps."""
    sharp, top = draw.panel("step", "eta * sharpness", "")
    across, low = draw.panel("step", "x", "")
    for color, (run, path) in enumerate(tables["paths"].groupby("run", sort=False)):
        shown = path[path["step"] % 2 == 0] if run == STRIDE else path
        for axes, column in ((top, "sharpness"), (low, "x")):
            if run == "GD":
                axes.plot(shown["step"], shown[column], "k.", ms=3, label=run)
            elif run != PRINCIPAL:  # it leaves the picture
                axes.plot(shown["step"], shown[column], f"C{color}", lw=1, label=run)
    top.axhline(2, color="0.6", lw=1)
    return {"sharpness": draw.add_legend(sharp), "x": draw.add_legend(across)}
