r"""Elementary differentials of rooted trees, and linear combinations of them.

$F(\bullet) = f$ and $F([t_1, \dots, t_m]) = f^{(m)}(F(t_1), \dots, F(t_m))$
(Hairer, Lubich & Wanner 2006, III.1). Three rules keep the cost down; all of them use
multilinearity:

- trees that differ in only one branch are summed in that branch before $f$ is
  differentiated: $a f'(u) + b f'(v) = f'(a u + b v)$;
- a combination of one tree keeps its scalar outside, so that every derivative runs
  along $F(t)$ itself and XLA recognizes the parts that it has computed already;
- $f'(w)$ is computed together with a second derivative: $f''(u, v) + f'(w)$ is a single
  derivative of $(x, u) \mapsto f'(x) u$.
"""

import functools
from typing import Any

from jax.typing import ArrayLike

from eomdl import _tree
from eomdl._autodiff import directional_derivative, jvp
from eomdl._types import Params, VectorField
from eomdl.series.trees import LEAF, Tree


class ElementaryDifferentials:
    """The elementary differentials of `f` at the point `x`, each computed once."""

    def __init__(self, f: VectorField, x: Params):
        self._f = f
        self._x = x
        self._values: dict[Tree, Params] = {LEAF: f(x)}

    def __getitem__(self, tree: Tree) -> Params:
        """Return $F(t)(x)$."""
        if tree not in self._values:
            self._values[tree] = self.combination({tree: 1.0})
        return self._values[tree]

    def combination(self, coefficients: dict[Tree, Any]) -> Params:
        r"""Return $\sum_t c_t F(t)(x)$; the scalars $c_t$ may be traced."""
        last_branch: dict[Tree, dict[Tree, Any]] = {}
        terms = []
        for tree, c in coefficients.items():
            if tree == LEAF:
                terms.append(_tree.scale(c, self[LEAF]))
            else:
                last_branch.setdefault(tree[:-1], {})[tree[-1]] = c
        linear = last_branch.pop((), None)
        for branches, inner in last_branch.items():
            c, v = self._factor(inner)
            if linear is not None and len(branches) == 1:
                b, w = self._factor(linear)
                value = self._second_plus_first(self[branches[0]], v, _tree.scale(b / c, w))
                linear = None
            else:
                directions = [*(self[branch] for branch in branches), v]
                value = directional_derivative(self._f, directions)(self._x)
            terms.append(_tree.scale(c, value))
        if linear is not None:
            b, w = self._factor(linear)
            terms.append(_tree.scale(b, directional_derivative(self._f, [w])(self._x)))
        return functools.reduce(_tree.add, terms)

    def _factor(self, coefficients: dict[Tree, Any]) -> tuple[ArrayLike, Params]:
        """Return the combination as a scalar and a vector; of one tree the vector is $F(t)$ itself."""
        if len(coefficients) == 1:
            ((tree, c),) = coefficients.items()
            return c, self[tree]
        return 1.0, self.combination(coefficients)

    def _second_plus_first(self, u: Params, v: Params, w: Params) -> Params:
        """Return $f''(u, v) + f'(w)$."""

        def first(x: Params, u: Params) -> Params:
            return jvp(self._f, x, u)[1]

        return jvp(lambda at: first(*at), (self._x, u), (v, w))[1]
