r"""Rooted trees and the exact coefficients of modified equations.

A rooted tree is the sorted tuple of its branches: `()` is the single node, `((),)`
the chain of two, `((), ())` the bush with two leaves.

The modified equation of a Runge-Kutta method for $x' = f(x)$ with step $h$ (of explicit Euler, which is gradient
descent) is the B-series (Hairer, Lubich & Wanner 2006, ch. IX; Chartier, Hairer & Vilmart 2010)

$$x' = \sum_t h^{|t|-1} c(t) F(t)(x), \qquad c(t) = \omega(t) / \sigma(t),$$

with $F(t)$ the elementary differential of the tree and $\sigma(t)$ its symmetry. All is exact, in integers and fractions.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from functools import cache
from itertools import pairwise
from math import factorial, prod
from typing import Any, TypeAlias

from eomdl import _check


Tree: TypeAlias = tuple["Tree", ...]

LEAF: Tree = ()
MAX_NODES = 12  # there are 4,766 trees of 12 nodes, and with each further one about 2.7 times as many


def size(tree: Tree) -> int:
    """Return the number of nodes $|t|$."""
    return 1 + sum(size(branch) for branch in tree)


@cache
def rooted_trees(n: int) -> tuple[Tree, ...]:
    """Return all rooted trees with `n` nodes: 1, 1, 2, 4, 9, 20, 48, ... of them (OEIS A000081)."""
    return tuple((*branches,) for branches in _forests(n - 1, n - 1))


@cache
def _forests(nodes: int, largest: int) -> tuple[Tree, ...]:
    """Return all multisets of trees with `nodes` nodes in all, none larger than `largest`."""
    if nodes == 0:
        return ((),)
    return tuple(
        sorted(
            {
                tuple(sorted((tree, *rest), key=lambda t: (size(t), t)))
                for n in range(1, min(nodes, largest) + 1)
                for tree in rooted_trees(n)
                for rest in _forests(nodes - n, n)
            }
        )
    )


@cache
def symmetry(tree: Tree) -> int:
    r"""Return the order $\sigma(t)$ of the automorphism group of the tree."""
    return prod(factorial(m) * symmetry(t) ** m for t, m in Counter(tree).items())


@dataclasses.dataclass(frozen=True)
class ButcherTableau:
    r"""An explicit Runge-Kutta method: $Y_i = x + h \sum_{j<i} a_{ij} f(Y_j)$, $x_1 = x + h \sum_i b_i f(Y_i)$.

    `a[i]` has the i numbers of stage i, so `a[0]` is empty. All become exact fractions.

    **Raises:** `ValueError` for an implicit method, and for weights `b` whose sum is not exactly 1.
    """

    a: tuple[tuple[Fraction, ...], ...]
    b: tuple[Fraction, ...]

    def __post_init__(self) -> None:
        b = _fractions("b", self.b)
        if sum(b) != 1:
            raise ValueError(
                f"b: expected weights that sum to 1, got {sum(b)}; `fractions.Fraction` is exact"
            )
        try:
            rows = list(self.a)
        except TypeError:
            raise ValueError(f"a: expected rows of numbers, got {_check.show(self.a)}") from None
        a = tuple(_fractions(f"a[{i}]", row) for i, row in enumerate(rows))
        if [len(row) for row in a] != list(range(len(b))):
            raise ValueError(
                f"a: expected rows with 0, 1, ... numbers, one for each of b ({len(b)}): an explicit method, got "
                f"{[len(row) for row in a]}"
            )
        object.__setattr__(self, "a", a)
        object.__setattr__(self, "b", b)


def _fractions(name: str, values: Iterable[Any]) -> tuple[Fraction, ...]:
    try:
        return tuple(Fraction(value) for value in values)
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        raise ValueError(f"{name}: expected numbers, got {_check.show(values)}") from None


def _tableau(*rows: tuple[Fraction | int, ...]) -> ButcherTableau:
    """Return the tableau of the rows of a and, last, b."""
    *a, b = rows
    return ButcherTableau(tuple(a), b)  # type: ignore[arg-type]


_HALF = Fraction(1, 2)
_SIXTH, _THIRD = Fraction(1, 6), Fraction(1, 3)
EULER = _tableau((), (1,))
"""Explicit Euler: gradient descent, for the field of a loss."""
MIDPOINT = _tableau((), (_HALF,), (0, 1))
"""The explicit midpoint rule, order 2."""
HEUN = _tableau((), (1,), (_HALF, _HALF))
"""Heun's method, the explicit trapezoidal rule, order 2: gradient descent with the mean of two gradients."""
RK4 = _tableau((), (_HALF,), (0, _HALF), (0, 0, 1), (_SIXTH, _THIRD, _THIRD, _SIXTH))
"""The classical method of Runge and Kutta, order 4."""


@cache
def iterate_weight(tree: Tree, n: int, method: ButcherTableau = EULER) -> Fraction:
    r"""Return the coefficient $P_t(n)$ of $F(t)/\sigma(t)$ in the n-th iterate of the method with h = 1.

    $P_t(n+1) = P_t(n) + \sum_i b_i D_i(t, n)$ with $D_i(t, n) = \prod_k Y_i(t_k, n)$ over the branches $t_k$ of $t$, the
    coefficient of $f(Y_i)$. It is a polynomial in n of degree $|t|$. For explicit Euler $P_t(n) = \sum_{j<n} \prod_k P_{t_k}(j)$.
    """
    stages = ((j, i, b) for j in range(n) for i, b in enumerate(method.b))
    return sum((b * _slope(tree, j, i, method) for j, i, b in stages), Fraction(0))


@cache
def _slope(tree: Tree, n: int, stage: int, method: ButcherTableau) -> Fraction:
    """Return $D_i(t, n)$, the coefficient of f at stage i of the step after the n-th iterate."""
    return prod((_stage(branch, n, stage, method) for branch in tree), start=Fraction(1))


@cache
def _stage(tree: Tree, n: int, stage: int, method: ButcherTableau) -> Fraction:
    """Return $Y_i(t, n)$, the coefficient of stage i itself."""
    moved = sum((a * _slope(tree, n, j, method) for j, a in enumerate(method.a[stage])), Fraction(0))
    return iterate_weight(tree, n, method) + moved


@cache
def omega(tree: Tree, method: ButcherTableau = EULER) -> Fraction:
    r"""Return $\omega(t) = P_t'(0)$, the coefficient of the logarithm of the step map.

    The derivative of a polynomial at 0 from its forward differences there,
    $P'(0) = \sum_{m \ge 1} \frac{(-1)^{m-1}}{m} \Delta^m P(0)$. For explicit Euler the chain of n nodes has
    $(-1)^{n-1}/n$; the bush with k leaves has the Bernoulli number $B_k$.
    """
    differences = [iterate_weight(tree, n, method) for n in range(size(tree) + 1)]
    total = Fraction(0)
    for m in range(1, size(tree) + 1):
        differences = [b - a for a, b in pairwise(differences)]
        total += Fraction((-1) ** (m - 1), m) * differences[0]
    return total


def modified_equation(n: int, method: ButcherTableau = EULER) -> dict[Tree, Fraction]:
    """Return the nonzero coefficients $c(t)$ of the trees with `n` nodes: the field $F_n$ of the method's modified equation.

    **Arguments:** `n`: an integer from 1 to 12; `method`: an explicit method. **Cost:** once in a process, 6 s for n = 12 and
    explicit Euler, 20 s for n = 11 and `RK4`; each node more takes 3 times as long.

    **Raises:** `ValueError` for a wrong argument.
    """
    n = _check.integer("n", n, 1, MAX_NODES)
    return dict(
        _modified_equation(n, _check.kind("method", method, ButcherTableau, "an eomdl.series.ButcherTableau"))
    )


@cache
def _modified_equation(n: int, method: ButcherTableau) -> dict[Tree, Fraction]:
    coefficients = {t: omega(t, method) / symmetry(t) for t in rooted_trees(n)}
    return {t: c for t, c in coefficients.items() if c}
