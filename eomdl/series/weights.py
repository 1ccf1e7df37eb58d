r"""The weights with which the increments of a map sum to its logarithm.

With increments $d_i = x_{i+1} - x_i$ of the iterates of a map $\Psi$ near the identity,
$\log \Psi \, (x) = \sum_j \frac{(-1)^{j+1}}{j} \Delta^j x = \sum_i b_i d_i$, where
$\sum_i b_i z^i$ stands for $\log(z)/(z - 1)$ on the multipliers z of the map
(Gelfreich & Vieiro 2018).
"""

import math
from fractions import Fraction

import numpy as np
from jaxtyping import Float

from eomdl import _check


MAX_POINTS = 64  # the terms grow like 2^K, so that rounding ends the series long before


def taylor_weights(points: int) -> Float[np.ndarray, " points"]:
    r"""Return $b_0, \dots, b_{K-1}$ with $\sum_i b_i z^i = \sum_{m<K} \frac{(-1)^m}{m+1} (z-1)^m$.

    Formal order K = `points`. **Raises:** `ValueError` if `points` is not an integer >= 1.
    """
    points = _check.integer("points", points, 1, MAX_POINTS)
    exact = [
        # (z - 1)^m = sum_i C(m, i) (-1)^(m-i) z^i
        sum(Fraction((-1) ** i * math.comb(m, i), m + 1) for m in range(i, points))
        for i in range(points)
    ]
    return np.array([float(b) for b in exact])


def difference_weights(order: int) -> Float[np.ndarray, " order"]:
    r"""Return c with $\Delta^{j} x = \sum_i c_i d_i$ for j = `order` >= 1: j signed binomials."""
    n = order - 1
    return np.array([(-1.0) ** (n - i) * math.comb(n, i) for i in range(order)])


def log_coefficients(order: int) -> Float[np.ndarray, " order"]:
    r"""Return $1, -1/2, 1/3, \dots$: $\log(1 + \Delta) = \sum_j c_j \Delta^j$, up to j = `order`."""
    j = np.arange(1, order + 1)
    return (-1.0) ** (j + 1) / j


def difference_coefficients(weights: Float[np.ndarray, " points"]) -> Float[np.ndarray, " points"]:
    r"""Return $c_1, \dots, c_K$ with $\sum_i b_i d_i = \sum_j c_j \Delta^j x$, that is $c_j = \sum_i \binom{i}{j-1} b_i$."""
    return np.array([sum(math.comb(i, j) * b for i, b in enumerate(weights)) for j in range(len(weights))])


def weights_of_differences(coefficients: Float[np.ndarray, " points"]) -> Float[np.ndarray, " points"]:
    r"""Return $b_0, \dots, b_{K-1}$ with $\sum_i b_i d_i = \sum_j c_j \Delta^j x$."""
    points = len(coefficients)
    rows = [np.pad(difference_weights(j + 1), (0, points - 1 - j)) for j in range(points)]
    return np.asarray(coefficients) @ np.stack(rows)


def centred_weights(points: int) -> Float[np.ndarray, " points_and_one"]:
    r"""Return $b_{-1}, \dots, b_{K-1}$, of Taylor's series about the second of K + 2 iterates, formal order K + 1.

    With y the iterate before x, $\log(1 + \Delta) x = (1 + \Delta) \log(1 + \Delta) y
    = \Delta y + \sum_{j \ge 2} \frac{(-1)^j}{j (j-1)} \Delta^j y$: the terms fall faster by a factor j - 1.
    """
    j = np.arange(2, points + 2)
    return weights_of_differences(np.append(1.0, (-1.0) ** j / (j * (j - 1))))


def step_back_weights(points: int) -> Float[np.ndarray, " points"]:
    r"""Return b with $x - y = \sum_i b_i d_i$ for the iterate y before x, extrapolated: $y = (1 + \Delta)^{-1} x$ cut after $\Delta^K$."""
    j = np.arange(1, points + 1)
    return weights_of_differences((-1.0) ** (j + 1))


def minimax_weights(points: int, bound: float, order: int | None = None) -> Float[np.ndarray, " points"]:
    r"""Return the weights of least error for every multiplier in $[1 - B, 1]$, not only near 1.

    $\min_b \max_{z \in [1-B, 1]} |\sum_i b_i z^i - \log(z)/(z-1)|$ among the weights of formal
    order p. For gradient descent B bounds $\eta \lambda_{max}$ along the path.

    **Arguments:** `points` K; `bound` B, 0 < B < 1, such as 1.2 times
    $\eta \lambda_{max}$ at the start; `order` p, 1 <= p <= K, by default K // 2.

    **Returns:** $b_0, \dots, b_{K-1}$, for `InterpolatingFlow(..., weights=...)`.

    **Raises:** `ValueError` for a wrong argument.
    """
    from scipy.optimize import linprog

    points = _check.integer("points", points, 1, MAX_POINTS)
    order = max(points // 2, 1) if order is None else _check.integer("order", order, 1, MAX_POINTS)
    if order > points:
        raise ValueError(f"order: expected at most points = {points}, got {order}")
    bound = float(_check.positive_scalar("bound", bound))
    if bound >= 1:
        raise ValueError(f"bound: expected a number < 1, where the logarithm ends, got {bound}")
    # In y = (1 - z)/B: y^p T_j(2y - 1) are the free directions, which fit what Taylor's terms leave.
    y = 0.5 - 0.5 * np.cos(np.linspace(0, np.pi, 40 * points))
    m = np.arange(order, 400)
    rest = np.sum((bound * y[:, None]) ** m / (m + 1), axis=1) if bound < 0.9 else _rest(bound * y, order)
    free = points - order
    basis = [np.polynomial.chebyshev.Chebyshev.basis(j, domain=[0, 1])(y) * y**order for j in range(free)]
    taylor = np.array([1 / (j + 1) for j in range(order)] + [0.0] * free)  # in powers of (1 - z)
    if free:
        size = float(np.abs(rest).max())
        matrix, ones = np.stack(basis, axis=1), np.ones((len(y), 1))
        target = rest / size
        fit = linprog(
            np.append(np.zeros(free), 1.0),
            A_ub=np.block([[matrix, -ones], [-matrix, -ones]]),
            b_ub=np.concatenate([target, -target]),
            bounds=[(None, None)] * free + [(0, None)],
        )
        fitted = np.polynomial.chebyshev.Chebyshev(size * fit.x[:free], domain=[0, 1])
        series = np.asarray(fitted.convert(kind=np.polynomial.Polynomial).coef, float)
        taylor[order : order + len(series)] = series / bound ** np.arange(order, order + len(series))
    # (1 - z)^j = sum_i C(j, i) (-z)^i
    return np.array(
        [sum(taylor[j] * math.comb(j, i) * (-1.0) ** i for j in range(i, points)) for i in range(points)]
    )


def _rest(w: np.ndarray, order: int) -> np.ndarray:
    r"""Return $-\log(1-w)/w$ without its first terms."""
    w = np.where(w == 0, np.finfo(float).tiny, w)
    return -np.log1p(-w) / w - np.sum(w[:, None] ** np.arange(order) / (np.arange(order) + 1), axis=1)
