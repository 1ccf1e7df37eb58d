r"""How long the steps of an adaptive Runge-Kutta method are along a path, from the differences of the path.

For $x' = L x$ the error that the method estimates in a step of length h is a polynomial in hL, $\sum_i \epsilon_i (hL)^i x$, with
$\epsilon_i = (b - \hat b)^T A^{i-1} 1$ of its tableau, and $L^i x = D^i x$ is a derivative of the path, which the differences give:
$D = \log(1 + \Delta)$. The controller keeps this error at the tolerance; stability needs $|R(h \lambda)| \le 1$.
"""

import math
from typing import NamedTuple, cast

import diffrax
import numpy as np
from jaxtyping import Complex, Float

from eomdl._costs import evaluations_per_step
from eomdl.choice.differences import Differences
from eomdl.series.weights import log_coefficients


_CONTROLLER_SAFETY = 0.9  # of diffrax's controller: the next step aims at 0.9 of what the tolerance allows
_LENGTHS = np.geomspace(0.02, 64, 256)  # of an ODE step, in strides


class Method(NamedTuple):
    """A solver of diffrax with step size control.

    - `order`: of the error, as the controller takes it.
    - `length_ratio`: how many times as long the steps would be by the linear part of the error estimate, as measured on networks.
    - `growth`: the error of the run over that allowed in one step, where the path contracts and errors do not add up,
        and where stability limits the steps: as measured on networks.
    """

    name: str
    solver: diffrax.AbstractERK
    order: int
    length_ratio: float
    growth: tuple[float, float]

    @property
    def evaluations(self) -> int:
        """The number of evaluations of the field in one step."""
        return evaluations_per_step(self.solver)

    def polynomials(self, degree: int) -> tuple[np.ndarray, np.ndarray]:
        r"""Return $\epsilon_1 \dots$ of the error estimate, and $r_1 \dots$ of $R(z) = 1 + \sum_i r_i z^i$, up to a degree."""
        tableau = cast(diffrax.ButcherTableau, self.solver.tableau)
        a = np.zeros((len(tableau.b_sol),) * 2)
        for i, row in enumerate(tableau.a_lower):
            a[i + 1, : i + 1] = row
        powers = [np.ones(len(a))]
        for _ in range(degree - 1):
            powers.append(a @ powers[-1])
        error = np.array([tableau.b_error @ p for p in powers])
        # Zero but for rounding below the order of the estimate.
        error = np.where(np.abs(error) > 1e-12, error, 0.0)
        return error, np.array([tableau.b_sol @ p for p in powers])


METHODS = (
    Method("Bosh3", diffrax.Bosh3(), 3, 1.0, (2.2, 2.2)),
    Method("Tsit5", diffrax.Tsit5(), 5, 1.2, (0.55, 1.2)),
    Method("Dopri8", diffrax.Dopri8(), 8, 1.3, (0.7, 0.7)),
)


class StepLengths(NamedTuple):
    """The error that a method estimates in a step from stride k, shape (n, lengths): root mean square over the parameters."""

    method: Method
    errors: Float[np.ndarray, "n lengths"]

    def allowed(self, tolerance: float) -> Float[np.ndarray, " n"]:
        """Return the length of a step whose error is kept at the tolerance, at each stride."""
        within = self.errors <= tolerance * _CONTROLLER_SAFETY**self.method.order
        first_beyond = np.where(within.all(1), len(_LENGTHS), np.argmin(within, axis=1))
        return _LENGTHS[np.maximum(first_beyond - 1, 0)]

    def along(self, tolerance: float, stable: float, strides: float) -> Float[np.ndarray, " strides"]:
        """Return the length of a step at each of so many strides, none longer than what is stable.

        After the strides measured the lengths continue to grow as a power of the step, as in their second half.
        """
        allowed = self.allowed(tolerance)
        n = len(allowed)
        k = np.arange(n, max(math.ceil(strides), n))
        half = n // 2
        slope = np.log(allowed[-1] / allowed[half]) / np.log(n / (half + 1)) if n > 2 else 0.0
        later = allowed[-1] * ((k + 1) / n) ** np.clip(slope, 0, 1)
        lengths = np.concatenate([allowed, later])[: math.ceil(strides)] / self.method.length_ratio
        return np.minimum(lengths, stable)


def step_lengths(method: Method, measured: Differences) -> StepLengths:
    """Return the errors of a method's steps along the strides whose differences were measured."""
    j = measured.order
    error, _ = method.polynomials(j)
    # The error of each length as a sum of differences: rows of coefficients.
    derivatives = _powers(log_coefficients(j))
    rows = (error * _LENGTHS[:, None] ** np.arange(1, j + 1)) @ derivatives
    products = measured.products[:, :j, :j]
    squares = np.einsum("hi,kij,hj->kh", rows, products, rows)
    return StepLengths(method, np.sqrt(np.maximum(squares, 0) / measured.size))


def stable_length(method: Method, rates: Complex[np.ndarray, " modes"]) -> float:
    r"""Return the longest step with $|R(h \lambda)| \le 1$ for the decaying modes $\lambda$; infinite if there are none."""
    decaying = rates[rates.real < 0]
    if len(decaying) == 0:
        return math.inf
    _, stability = method.polynomials(method.evaluations + 1)
    z = _LENGTHS[:, None] * decaying
    size = np.abs(1 + np.sum(stability * z[..., None] ** np.arange(1, len(stability) + 1), axis=-1)).max(
        axis=1
    )
    beyond = np.flatnonzero(size > 1 + 1e-9)
    return float(_LENGTHS[max(beyond[0] - 1, 0)]) if len(beyond) else math.inf


def _powers(series: np.ndarray) -> np.ndarray:
    """Return the coefficients of the powers 1, 2, ... of a series without constant term, cut at its length: one power a row."""
    rows = [series]
    for _ in range(len(series) - 1):
        product = np.convolve(rows[-1], series)
        rows.append(np.concatenate([[0.0], product])[: len(series)])
    return np.stack(rows)
