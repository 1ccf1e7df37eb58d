"""What an optimizer does, found by trying it: gradient descent, with momentum or without, or something else."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from eomdl import _tree
from eomdl._types import Params


_TRIES = 3  # steps that tell the numbers; the others check them


@dataclasses.dataclass(frozen=True)
class Rule:
    r"""Gradient descent with momentum, as `optax.sgd` has it; $\beta = 0$ is plain gradient descent.

    - `learning_rate` $\eta$, `momentum` $\beta$, `nesterov`.
    """

    learning_rate: float
    momentum: float = 0.0
    nesterov: bool = False

    @property
    def name(self) -> str:
        """The optimizer in words."""
        if self.momentum == 0:
            return "plain gradient descent"
        return f"gradient descent with {'Nesterov ' * self.nesterov}momentum {self.momentum:.3g}"

    @property
    def threshold(self) -> float:
        r"""The largest stable $\eta \lambda$ on a quadratic.

        2; heavy ball $2 + 2\beta$; Nesterov $(2 + 2\beta) / (1 + 2\beta)$ (Cohen et al. 2021, arXiv 2103.00065, appendix B).
        """
        return (2 + 2 * self.momentum) / (1 + 2 * self.momentum * self.nesterov)

    @property
    def time_step(self) -> float:
        r"""$\eta / (1 - \beta)$: how far one step follows gradient flow, in time."""
        return self.learning_rate / (1 - self.momentum)

    @property
    def memory_factor(self) -> float:
        r"""By what the counter term is multiplied: $(1 + \beta) / (1 - \beta)$ for heavy ball, see `eomdl.flows.MomentumFlow`."""
        return 1 + 2 * self.momentum ** (2 if self.nesterov else 1) / (1 - self.momentum)

    def updates(self, gradients: np.ndarray) -> np.ndarray:
        """What it makes of gradients, shape (n,), in n steps from rest."""
        rows, memory = [], 0.0
        for gradient in gradients:
            memory = self.momentum * memory + gradient
            used = gradient + self.momentum * memory if self.nesterov else memory
            rows.append(-self.learning_rate * used)
        return np.asarray(rows)


def recognize(optimizer: optax.GradientTransformation, params: Params, num_steps: int) -> Rule | None:
    """The rule that the optimizer follows over all steps, or None if it is another.

    It is given gradients along one random direction, of sizes that change from step to step. A schedule, a decay of the
    weights, a clipping, an update by signs or by squares each leave the direction, or the sizes that the rule makes of them.

    **Cost:** no gradients; `num_steps` updates of the optimizer.
    """
    sizes = np.cos(1.3 * np.arange(max(num_steps, _TRIES))) + 0.4
    try:
        seen, left = (
            np.asarray(x, float) for x in _tried(optimizer, params, _direction(params), jnp.asarray(sizes))
        )
    except Exception:  # one that needs more than the gradient, say: it is another rule, whatever it is
        return None
    tolerance = float(jnp.finfo(_tree.dtype(params)).eps) ** 0.5
    largest = np.max(np.abs(seen))
    if not np.isfinite(largest) or largest == 0 or np.max(left) > tolerance * largest:
        return None
    for rule in _candidates(sizes, seen):
        if rule.learning_rate > 0 and 0 <= rule.momentum < 1:
            apart = np.max(np.abs(rule.updates(sizes) - seen))
            if apart <= tolerance * largest:
                return rule
    return None


def _candidates(sizes: np.ndarray, seen: np.ndarray) -> list[Rule]:
    """Rules that fit the first steps: update k is minus a sum of c_j times gradient k - j."""
    c: list[float] = []
    for k in range(_TRIES):
        known = sum(c[j] * sizes[k - j] for j in range(k))
        c.append(float((-seen[k] - known) / sizes[0]))
    if abs(c[1]) < 1e-3 * abs(c[0]):
        return [Rule(c[0])]
    beta = round(c[2] / c[1], 5)  # float32 gives no more
    return [Rule(c[0], beta), *([Rule(c[1] / beta**2, beta, nesterov=True)] if beta else [])]


def _direction(params: Params) -> Params:
    """A random direction, drawn on the host: JAX's generator takes longer to compile than all the rest."""
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(generator.normal(size=x.shape), x.dtype), params)


@eqx.filter_jit
def _tried(
    optimizer: optax.GradientTransformation, params: Params, direction: Params, sizes: jax.Array
) -> Any:
    """The updates along the direction, in units of it, (n,), and how far they leave it, (n,)."""
    norm = _tree.norm(direction)

    def step(state: Any, size: jax.Array) -> tuple[Any, Any]:
        updates, state = optimizer.update(_tree.scale(size, direction), state, params)
        along = _tree.vdot(updates, direction) / norm**2
        return state, (along, _tree.norm(_tree.sub(updates, _tree.scale(along, direction))) / norm)

    return jax.lax.scan(step, optimizer.init(params), sizes)[1]
