"""What do finite steps add to gradient flow?"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eomdl import _tree
from eomdl._autodiff import hessian_vector_product
from eomdl._types import Args, Loss, Params
from eomdl.errors.comparison import top_level_blocks
from eomdl.maps.response import MomentumRule
from eomdl.plotting._study import lines_picture
from eomdl.reports.finding import Finding, NoAnswer, Table, block, number, of, percent
from eomdl.reports.study import Study


TITLE = "What do the finite steps add?"
PROBES = (16.0, 64.0)  # by which a step is divided to see whether the gradient is smooth
ROUNDING = 100.0  # machine epsilons of a gradient that are rounding
ROUGH = 0.02  # of the gradient's change that the Hessian does not explain over the first; on a smooth loss the second has 1/4

_MEANING = (
    "Finite steps act as if the loss had one more term, η/4 times the squared gradient: they prefer flat places, which is "
    "called implicit regularization. Its force is η ξ₀ with ξ₀ = ½ H g, where g is the gradient and H the matrix of "
    "curvatures. A cosine near 1 says that the force acts along the gradient, as if the rate were larger; near 0, sideways; "
    "below 0, that it holds the descent back."
)


def ask(study: Study) -> Finding:
    """Measure size and direction of the first counter term along the run, whole and by block."""
    rule = study.rule
    if rule is None:
        raise NoAnswer(
            "The terms that finite steps add are known for gradient descent, with momentum and without. Those of an optimizer "
            "that rescales its steps are others."
        )
    data, steps = study.whole_data, study.steps[study.measured]
    forces = [_measure_force(study.loss, study.at(row), data, study.learning_rate) for row in study.measured]
    force = jax.tree.map(lambda *x: np.asarray(x, float), *forces)
    fraction = study.step_size * rule.memory_factor * force["force"] / force["gradient"]
    cosine, largest = force["cosine"], float(np.nanmax(fraction))
    answer, summary = _answer(fraction, cosine, largest)
    table, at_start = _by_block(force["blocks"])
    if len(at_start) > 1:
        name, most = max(at_start.items(), key=lambda pair: pair[1])
        answer += f" At the start {percent(most)} of its square acts on {block(name)}."
    return Finding(
        answer=answer,
        summary=summary,
        meaning=_MEANING,
        numbers={
            "η |ξ₀| / |g| at the start": percent(fraction[0]),
            "η |ξ₀| / |g| at the end": percent(fraction[-1]),
            "largest along the run": f"{percent(largest)} (step {steps[np.nanargmax(fraction)]})",
        },
        tables={"by block of the parameters": table},
        pictures={
            "force": lines_picture({"η |ξ₀| / |g|": (steps, fraction)}, "force over gradient"),
            "cosine": lines_picture(
                {"cosine of ξ₀ and g": (steps, cosine)}, "cosine", "linear", (-1.05, 1.05)
            ),
        },
        data={"steps": steps, "fraction": fraction, "cosine": cosine, "block_fraction": at_start},
        notes=_notes(study, rule, *force["rough"].T),
    )


def _answer(fraction: np.ndarray, cosine: np.ndarray, largest: float) -> tuple[str, str]:
    """Return the answer, and the summary in one sentence."""
    answer = (
        f"A force of {of(fraction[0], 'the gradient')} at the start and {of(fraction[-1], 'the gradient')} at the end; its cosine with "
        f"the gradient is {number(cosine[0])} and {number(cosine[-1])}."
    )
    if largest < 1:
        return (
            answer,
            f"The finite steps add a force of at most {of(largest, 'the gradient')}, towards flat places.",
        )
    return (
        f"{answer} Where it is as large as the gradient itself, it is not all that the steps add: take it for a warning.",
        "The finite steps change the path as much as the gradient itself does: no small correction describes them.",
    )


def _by_block(blocks: dict[str, tuple[np.ndarray, np.ndarray]]) -> tuple[Table, dict[str, float]]:
    """Return the part of the force's square that acts on each block and its cosine there, at the start and at the end."""
    squares = {name: sizes[[0, -1]] ** 2 for name, (sizes, _) in blocks.items()}
    total = sum(squares.values(), np.zeros(2))
    fractions = {
        name: np.where(total > 0, square / np.where(total > 0, total, 1), 0.0)
        for name, square in squares.items()
    }
    order = sorted(blocks, key=lambda name: -fractions[name][0])
    columns = ("block", "part of the square, start", "end", "cosine, start", "cosine, end")
    rows = tuple((block(n), *map(float, fractions[n]), *map(float, blocks[n][1][[0, -1]])) for n in order)
    return Table(columns, rows, fractions=(1, 2)), {name: float(fractions[name][0]) for name in order}


def _notes(study: Study, rule: MomentumRule, rough: np.ndarray, rougher: np.ndarray) -> tuple[str, ...]:
    """Return the caveats. `rough`, `rougher`: the gradient's change that derivatives do not see, over a 16th and a 64th of a step."""
    notes = []
    if rule.momentum:
        notes.append(
            f"With momentum the force is multiplied by the memory's factor {number(rule.memory_factor)}; that holds once "
            "the memory has filled."
        )
    if study.batches is not None:
        notes.append("This is the force on the whole data; the noise of the minibatches adds one of its own.")
    kinks = (rough > ROUGH) & (rougher > rough / 2)
    if np.mean(kinks) > 0.2:
        notes.append(
            "The loss has kinks (relu, max-pool, an absolute value): within a fraction of a step its gradient changes by jumps "
            f"that derivatives do not see ({percent(float(np.median(rough[kinks])))} of its change, at the median). Terms of "
            "second order and higher leave those out."
        )
    return tuple(notes)


@eqx.filter_jit
def _measure_force(loss: Loss, params: Params, data: Args, eta: Any) -> dict[str, Any]:
    """Measure the gradient and half of H g: sizes, cosine, by block; and how much of the gradient's change is by jumps."""
    gradient = jax.grad(loss)(params, data)
    product = hessian_vector_product(loss, params, data, gradient)

    def rough(length: Any) -> jax.Array:
        ahead = jax.grad(loss)(_tree.sub(params, _tree.scale(length, gradient)), data)
        change = _tree.sub(ahead, gradient)
        left = _tree.norm(_tree.add(change, _tree.scale(length, product)))
        rounding = ROUNDING * jnp.finfo(left.dtype).eps * _tree.norm(gradient)
        return jnp.where(left > rounding, left / jnp.maximum(_tree.norm(change), rounding), 0.0)

    parts = zip(top_level_blocks(product).items(), top_level_blocks(gradient).values(), strict=True)
    return {
        "gradient": _tree.norm(gradient),
        "force": _tree.norm(product) / 2,
        "cosine": _cosine(product, gradient),
        "blocks": {name: (_tree.norm(p) / 2, _cosine(p, g)) for (name, p), g in parts},
        "rough": jnp.stack([rough(eta / parts) for parts in PROBES]),
    }


def _cosine(a: Params, b: Params) -> jax.Array:
    size = _tree.norm(a) * _tree.norm(b)
    return jnp.where(size > 0, _tree.vdot(a, b) / jnp.where(size > 0, size, 1), 0.0)
