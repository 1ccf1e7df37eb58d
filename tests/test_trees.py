"""Rooted trees and the exact coefficients of the modified equation."""

from fractions import Fraction
from math import factorial

import pytest

from eomdl.series.trees import (
    LEAF,
    iterate_weight,
    modified_equation,
    omega,
    rooted_trees,
    size,
    symmetry,
)


def tree(*branches):
    """The tree with these branches, in the library's order."""
    return tuple(sorted(branches, key=lambda t: (size(t), t)))


f = LEAF
f_f = tree(f)  # f'f
f_f_f = tree(f_f)  # f'f'f
f_ff = tree(f, f)  # f''(f, f)

# theory.md, section 2: elementary differential -> coefficient
TABLE = {
    1: {f: Fraction(1)},
    2: {f_f: Fraction(-1, 2)},
    3: {f_ff: Fraction(1, 12), f_f_f: Fraction(1, 3)},
    4: {
        tree(f, f, f): Fraction(0),
        tree(f, f_f): Fraction(-1, 12),
        tree(f_ff): Fraction(-1, 12),
        tree(f_f_f): Fraction(-1, 4),
    },
    5: {
        tree(f, f, f, f): Fraction(-1, 720),
        tree(f, f, f_f): Fraction(-1, 120),
        tree(f, f_ff): Fraction(1, 120),
        tree(f, f_f_f): Fraction(1, 20),
        tree(f_f, f_f): Fraction(1, 60),
        tree(tree(f, f, f)): Fraction(1, 180),
        tree(tree(f, f_f)): Fraction(1, 10),
        tree(tree(f_ff)): Fraction(3, 40),
        tree(tree(f_f_f)): Fraction(1, 5),
    },
}


@pytest.mark.parametrize("n", TABLE)
def test_table_of_coefficients(n):
    assert set(rooted_trees(n)) == set(TABLE[n])
    assert modified_equation(n) == {t: c for t, c in TABLE[n].items() if c}


def test_number_of_trees():
    assert [len(rooted_trees(n)) for n in range(1, 10)] == [1, 1, 2, 4, 9, 20, 48, 115, 286]  # OEIS A000081


def test_trees_are_distinct_and_of_their_size():
    for n in range(1, 9):
        trees = rooted_trees(n)
        assert len(set(trees)) == len(trees)
        assert {size(t) for t in trees} == {n}
        assert all(t == tree(*t) for t in trees)


def test_chains_have_the_logarithm_series():
    chain = LEAF
    for n in range(1, 11):
        assert omega(chain) == Fraction((-1) ** (n - 1), n)
        assert symmetry(chain) == 1
        chain = (chain,)


def test_bushes_have_bernoulli_numbers():
    bernoulli = ["1", "-1/2", "1/6", "0", "-1/30", "0", "1/42", "0", "-1/30", "0", "5/66"]
    for k, b in enumerate(bernoulli):
        assert omega((LEAF,) * k) == Fraction(b)
        assert symmetry((LEAF,) * k) == factorial(k)


def test_symmetry_counts_the_automorphisms():
    # Cayley: n! / (density * symmetry) summed over the trees counts (n-1)! monotone labelings.
    def density(t):
        result = size(t)
        for branch in t:
            result *= density(branch)
        return result

    for n in range(1, 8):
        labelings = [Fraction(factorial(n), density(t) * symmetry(t)) for t in rooted_trees(n)]
        assert all(count.denominator == 1 for count in labelings)
        assert sum(labelings) == factorial(n - 1)


def test_omega_is_the_derivative_at_zero_of_the_iterate_weight():
    # P(n) in the monomial basis, by Lagrange interpolation at n = 0 ... |t|: another route to P'(0).
    for n in range(1, 7):
        for t in rooted_trees(n):
            slope = Fraction(0)
            for j in range(1, n + 1):
                weight = Fraction(1, j)
                for i in range(1, n + 1):
                    if i != j:
                        weight *= Fraction(-i, j - i)
                slope += weight * iterate_weight(t, j)
            assert omega(t) == slope
            assert iterate_weight(t, 0) == 0


def test_scalar_square():
    # f(y) = y^2 at y = 1: a node with m branches contributes f^(m)(1) = 1, 2, 2, 0, ...
    def elementary_differential(t):
        value = (1, 2, 2)[len(t)] if len(t) < 3 else 0
        for branch in t:
            value *= elementary_differential(branch)
        return value

    series = [
        sum(c * elementary_differential(t) for t, c in modified_equation(n).items()) for n in range(1, 8)
    ]
    assert series == [Fraction(s) for s in ("1", "-1", "3/2", "-8/3", "31/6", "-157/15", "649/30")]
