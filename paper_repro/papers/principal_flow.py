"""The principal flow on quadratics: stable, oscillating, and through every iterate in the complex plane.

f(w) = (w_1^2 + 0.01 w_2^2) / 2 from (-0.35, -0.2), 20 steps of gradient descent with learning rate 0.5 (monotone), 0.9 (close to the
singularity at eta * lambda = 1) and 1.05 (oscillating). Gradient flow, the equation of motion with 1 to 4 counter terms, and the
principal flow, real and complex; tolerance 1e-12.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
import pandas as pd
from matplotlib.figure import Figure

import eomdl
from paper_repro import claims as made, pictures as draw, runs
from paper_repro.harness import Images, Tables


SOURCE = "Rosca et al. 2023, On a continuous time model of gradient descent dynamics (arXiv 2302.01952)."
SECONDS = 45
CURVATURES, START = (1.0, 0.01), (-0.35, -0.2)
REAL, COMPLEX, FLOW = "principal flow", "principal flow, complex", "gradient flow"
EXACT = 1e-11


class Size(NamedTuple):
    """Learning rates, steps and counter terms."""

    rates: tuple[float, ...] = (0.5, 0.9, 1.05)
    steps: int = 20
    terms: tuple[int, ...] = (1, 2, 4)


SMOKE = Size(terms=(1,))


def loss(w: Any, args: Any) -> Any:
    """A valley with curvatures 1 and 0.01."""
    del args
    return 0.5 * (CURVATURES[0] * w["a"] ** 2 + CURVATURES[1] * w["b"] ** 2)


def measure(size: Size, images: Images) -> Tables:
    """Gradient descent and its flows at every learning rate."""
    start = {"a": jnp.asarray(START[0]), "b": jnp.asarray(START[1])}
    rows, paths = [], []
    for rate in size.rates:
        flows: dict[str, Any] = {FLOW: eomdl.GradientFlow(loss, rate)}
        flows |= {f"EoM {n}": eomdl.EquationOfMotion(loss, rate, n) for n in size.terms}
        flows |= {
            REAL: eomdl.flows.PrincipalFlow(loss, rate),
            COMPLEX: eomdl.flows.ComplexPrincipalFlow(loss, rate),
        }
        real = eomdl.descend(loss, start, optax.sgd(rate), size.steps)
        options: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-13, "estimate_error": False, "diagnose": False}
        models = runs.solve_all(flows, start, size.steps, **options)
        found = eomdl.compare(real, models)
        even = found.at_multiples_of(2)
        for name in models:
            errors = {"largest": found.distance[name].max(), "largest, even": even.distance[name].max()}
            rows.append({"learning rate": rate, "model": name} | errors)
        paths.append(runs.coordinates({"GD": real} | models).assign(rate=rate))
    return {"errors": pd.DataFrame(rows), "paths": pd.concat(paths)}


def claims(tables: Tables) -> list[made.Claim]:
    """What is exact, and what is not."""
    errors = tables["errors"].set_index(["model", "learning rate"])
    below = [rate for rate in tables["errors"]["learning rate"].unique() if rate < 1]
    others = errors.drop([REAL, COMPLEX], level="model")["largest, even"]
    every, even = errors["largest"], errors["largest, even"]
    what = "Largest distance"
    return [
        made.law(
            "The principal flow passes through all iterates where eta * lambda < 1.",
            every[REAL][below],
            EXACT,
            what,
        ),
        made.law(
            "The principal flow passes through the even iterates at every learning rate.",
            even[REAL],
            EXACT,
            what,
        ),
        made.law(
            "In the complex plane it passes through all iterates at every learning rate.",
            every[COMPLEX],
            EXACT,
            what,
        ),
        made.Claim(
            "Gradient flow and the equation of motion do not, at even iterates either.",
            f"Smallest of their largest distances: {others.min():.1e}.",
            bool(others.min() > 100 * EXACT),
        ),
    ]


def pictures(tables: Tables) -> dict[str, Figure]:
    """The coordinate along the sharp direction against steps."""
    figures = {}
    for rate, some in tables["paths"].groupby("rate", sort=False):
        figure, axes = draw.panel("step", "w along the sharp direction", f"learning rate {rate:g}")
        for color, (run, path) in enumerate(some.groupby("run", sort=False)):
            if run == "GD":
                axes.plot(path["step"], path["a"], "k.", label=run)
            elif not str(run).startswith("EoM"):
                axes.plot(path["step"], path["a"], f"C{color}", lw=1, label=run)
        figures[f"rate-{rate:g}"] = draw.add_legend(figure)
    return figures
