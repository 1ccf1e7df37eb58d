"""What things cost, each in one place: gradients of the loss, and evaluations of the field in a step of a solver.

Gradients are flops over those of one gradient, as XLA counts them on a tanh MLP (`benchmarks/` measures them).
"""

import math
from typing import Any, cast

import diffrax


# A Hessian-vector product where the gradient at the same point is computed too, and the two together.
HESSIAN_VECTOR_PRODUCT = 1.7
GRADIENT_AND_PRODUCT = 1 + HESSIAN_VECTOR_PRODUCT
# The derivative of a step of gradient descent along a vector, which computes the step as well.
STEP_DERIVATIVE = GRADIENT_AND_PRODUCT

_EQUATION_OF_MOTION = (1.0, GRADIENT_AND_PRODUCT, 5.0, 9.0, 26.0, 53.0, 144.0)


def equation_of_motion(order: int) -> float:
    """Return the gradients in one evaluation of the field with `order` counter terms; NaN above 6, where it was not measured."""
    return _EQUATION_OF_MOTION[order] if order < len(_EQUATION_OF_MOTION) else math.nan


def is_counted(solver: diffrax.AbstractSolver) -> bool:
    """Whether the evaluations in a step of a solver are known: of explicit Runge-Kutta methods."""
    return isinstance(solver, diffrax.AbstractERK) and isinstance(solver.tableau, diffrax.ButcherTableau)


def field_evaluations(solver: diffrax.AbstractSolver, num_steps: Any) -> Any:
    """Return the evaluations of the field in one integration of so many steps, rejected ones included; NaN where not known."""
    if isinstance(solver, diffrax.Euler):
        return num_steps
    if not is_counted(solver):
        return num_steps * math.nan
    solver = cast(diffrax.AbstractERK, solver)
    # The last evaluation of a step is the first one of the next, but for the first step.
    first = cast(diffrax.ButcherTableau, solver.tableau).fsal
    return num_steps * evaluations_per_step(solver) + first * (num_steps > 0)


def evaluations_per_step(solver: diffrax.AbstractERK) -> int:
    """Return the evaluations of the field in one step of a Runge-Kutta solver; a last one that the next step uses is left to it."""
    tableau = cast(diffrax.ButcherTableau, solver.tableau)
    return int(tableau.num_stages - tableau.fsal)
