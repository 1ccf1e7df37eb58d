r"""The counter terms as the logarithm of the step map, by power series: no trees.

The iterates $x_0 = x$, $x_{j+1} = x_j + \eta f(x_j)$ are power series in $\eta$, and
the field whose flow passes through them is (Gelfreich & Vieiro 2018)

$$F = \sum_{m \ge 0} \frac{(-1)^m}{m+1} \Delta^m f(x_j)\big|_{j=0},$$

where $\Delta^m f = O(\eta^m)$: K iterates give the terms of $\eta^0 \dots \eta^{K-1}$
exactly. It shares only the step map with the rooted trees, so each is an oracle for the
other. It costs more from order 2 on (about 11 / 26 / 52 gradients for order 2 / 3 / 4).
"""

from collections.abc import Callable
from math import comb

import jax
import jax.numpy as jnp
from optax import tree

from benchmarks.aliases import Params, VectorField


def _polynomial(coefficients: list[Params], s: jax.Array) -> Params:
    r"""Return $\sum_k a_k s^k$, by Horner's rule."""
    value = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        value = tree.add(coefficient, tree.scale(s, value))
    return value


def _taylor_coefficients(f: VectorField, curve: list[Params], degree: int) -> list[Params]:
    r"""Return the coefficients of $s^0 \dots s^{degree}$ of $f(\sum_k a_k s^k)$."""
    g: Callable[[jax.Array], Params] = lambda s: f(_polynomial(curve, s))
    coefficients = []
    factorial = 1.0
    for k in range(degree + 1):
        coefficients.append(tree.scale(1.0 / factorial, g(jnp.zeros(()))))
        g = _derivative(g)
        factorial *= k + 1
    return coefficients


def _derivative(g: Callable[[jax.Array], Params]) -> Callable[[jax.Array], Params]:
    return lambda s: jax.jvp(g, (s,), (jnp.ones_like(s),))[1]


def modified_field_series(f: VectorField, x: Params, order: int) -> tuple[Params, ...]:
    r"""Return $(F_1, \dots, F_{order+1})$ with $F = \sum_j \eta^{j-1} F_j$, as pytrees like `x`.

    The modified equation of $x \mapsto x + \eta f(x)$ by the power-series logarithm of
    the map. It has the same value as by rooted trees, for which it is an oracle in the tests.
    """
    zeros = tree.zeros_like(x)
    points = order + 1
    iterate = [x]
    fields = []  # fields[j][k]: coefficient of eta^k in f(x_j)
    for j in range(points):
        # Of x_j as a power series in eta, the terms up to eta^order: all that can reach the result.
        coefficients = _taylor_coefficients(f, iterate, order)
        fields.append(coefficients)
        if j + 1 < points:
            padded = iterate + [zeros] * (points - len(iterate))
            shifted = [zeros, *coefficients[:order]]
            iterate = [tree.add(a, b) for a, b in zip(padded, shifted, strict=True)]
    result = []
    for k in range(points):
        total = zeros
        for m in range(points):
            for j in range(m + 1):
                weight = (-1.0) ** m / (m + 1) * (-1.0) ** (m - j) * comb(m, j)
                total = tree.add(total, tree.scale(weight, fields[j][k]))
        result.append(total)
    return tuple(result)
