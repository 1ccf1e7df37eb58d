r"""Rooted trees and the exact coefficients of the modified equation of gradient descent.

A rooted tree is the sorted tuple of its branches: `()` is the single node, `((),)`
the chain of two, `((), ())` the bush with two leaves.

The modified equation of explicit Euler for $x' = f(x)$ with step $h$ is the B-series
(Hairer, Lubich & Wanner 2006, ch. IX; Chartier, Hairer & Vilmart 2010)

$$x' = \sum_t h^{|t|-1} c(t) F(t)(x), \qquad c(t) = \omega(t) / \sigma(t),$$

with $F(t)$ the elementary differential of the tree and $\sigma(t)$ its symmetry. This
file is pure Python on exact integers and fractions, without JAX.
"""

from collections import Counter
from fractions import Fraction
from functools import cache
from itertools import pairwise
from math import factorial, prod
from typing import TypeAlias


Tree: TypeAlias = tuple["Tree", ...]

LEAF: Tree = ()


def size(tree: Tree) -> int:
    """Number of nodes $|t|$."""
    return 1 + sum(size(branch) for branch in tree)


@cache
def rooted_trees(n: int) -> tuple[Tree, ...]:
    """All rooted trees with `n` nodes: 1, 1, 2, 4, 9, 20, 48, ... of them (OEIS A000081)."""
    return tuple((*branches,) for branches in _forests(n - 1, n - 1))


@cache
def _forests(nodes: int, largest: int) -> tuple[Tree, ...]:
    """All multisets of trees with `nodes` nodes in all, none larger than `largest`."""
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
    r"""Order $\sigma(t)$ of the automorphism group of the tree."""
    return prod(factorial(m) * symmetry(t) ** m for t, m in Counter(tree).items())


@cache
def iterate_weight(tree: Tree, n: int) -> int:
    r"""Coefficient $P_t(n)$ of $F(t)/\sigma(t)$ in the n-th iterate of the map $x + f(x)$.

    $P_t(n) = \sum_{j<n} \prod_i P_{t_i}(j)$ over the branches $t_i$ of $t$: a polynomial
    in n of degree $|t|$.
    """
    return sum(prod(iterate_weight(b, j) for b in tree) for j in range(n))


@cache
def omega(tree: Tree) -> Fraction:
    r"""$\omega(t) = P_t'(0)$: the logarithm of the step map, tree by tree.

    The derivative of a polynomial at 0 from its forward differences there,
    $P'(0) = \sum_{m \ge 1} \frac{(-1)^{m-1}}{m} \Delta^m P(0)$. The chain of n nodes has
    $(-1)^{n-1}/n$; the bush with k leaves has the Bernoulli number $B_k$.
    """
    differences = [iterate_weight(tree, n) for n in range(size(tree) + 1)]
    total = Fraction(0)
    for m in range(1, size(tree) + 1):
        differences = [b - a for a, b in pairwise(differences)]
        total += Fraction((-1) ** (m - 1), m) * differences[0]
    return total


@cache
def modified_equation(n: int) -> dict[Tree, Fraction]:
    """Nonzero coefficients $c(t)$ of the trees with `n` nodes: the field $F_n$."""
    coefficients = {t: omega(t) / symmetry(t) for t in rooted_trees(n)}
    return {t: c for t, c in coefficients.items() if c}
