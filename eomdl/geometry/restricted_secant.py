"""Where the gradient points along a path: towards its end, or not (restricted secant inequality)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from typing_extensions import override

from eomdl import _check, _tree
from eomdl._result import AbstractResult, Note, Table, series_table
from eomdl._types import Args, Loss, Observable, Params
from eomdl.observe.base import sees_batch
from eomdl.observe.batch import on_batch
from eomdl.runs.trajectory import Trajectory


@dataclasses.dataclass(frozen=True)
class Secants(AbstractResult):
    r"""Gradients G along a path $w_k$ against the displacement $w_k - w^*$ from a fixed point, (n,) each.

    - `steps`: step numbers.
    - `distance` $|w - w^*|$, `gradient_norm` $|G|$.
    - `rsi` $= \langle G, w - w^* \rangle / |w - w^*|^2$ and `eb` $= |G| / |w - w^*|$ (restricted secant inequality and error
        bound), per unit of time.
    - `gamma` = rsi / eb, the cosine of gradient and displacement.
    - `learning_rate` $= rsi / eb^2$: the step along -G that ends nearest to $w^*$; `contraction`
        $= 1 - \gamma^2$: what is left of $|w - w^*|^2$ after it.
    - `random_gamma`: (n, m), cosines of G with m fixed random directions, of size $1/\sqrt{dim}$: the baseline.
    - `notes`: what a reader must know: runs that failed, steps that are masked.

    NaN where they are not defined: at $w^*$ itself (0/0), and for `gamma` where the gradient vanishes.

    Its picture shows $\gamma$ (dotted: the random directions), RSI and EB, and the locally best learning rate against steps;
    `eomdl.plotting.plot` takes several, the first solid, the others dashed.
    """

    steps: Int[np.ndarray, " n"]
    distance: Float[np.ndarray, " n"]
    gradient_norm: Float[np.ndarray, " n"]
    rsi: Float[np.ndarray, " n"]
    eb: Float[np.ndarray, " n"]
    gamma: Float[np.ndarray, " n"]
    learning_rate: Float[np.ndarray, " n"]
    contraction: Float[np.ndarray, " n"]
    random_gamma: Float[np.ndarray, "n m"]
    notes: tuple[Note, ...]

    def parts_from(self, other: "Secants", tolerance: float = 0.1) -> int | None:
        r"""Return the first common step from which on $\gamma$ is never again within `tolerance` of the other's.

        The tolerance is absolute, since $\gamma$ is a cosine. None if $\gamma$ is within it at the last step where both are
        defined.

        **Raises:** `ValueError` if there is no such step.
        """
        _check.kind("other", other, Secants, "an eomdl.geometry.Secants")
        tolerance = float(_check.nonnegative_scalar("tolerance", tolerance))
        steps, own, others = np.intersect1d(self.steps, other.steps, return_indices=True)
        difference = np.abs(self.gamma[own] - other.gamma[others])
        steps, difference = steps[~np.isnan(difference)], difference[~np.isnan(difference)]
        if len(steps) == 0:
            raise ValueError("other: expected a step in common at which gamma is defined, got none")
        close = np.flatnonzero(difference <= tolerance)
        if len(close) == 0:
            return int(steps[0])
        return int(steps[close[-1] + 1]) if close[-1] + 1 < len(steps) else None

    @property
    def random_size(self) -> Float[np.ndarray, " n"]:
        """The root mean square of `random_gamma`."""
        return np.sqrt(np.mean(self.random_gamma**2, axis=1))

    @override
    def _tables(self) -> tuple[Table, ...]:
        columns = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "notes"}
        columns["random_gamma"] = self.random_size
        return (series_table("Gradients against the displacement from the end", columns),)


def secant(loss: Loss, end: Params, num_random: int = 4) -> Observable:
    r"""Return the observable $(\langle G, d \rangle, |G|, |d|, c_1, \dots, c_m)$, $G = \nabla L(w)$, $d = w - w^*$, shape (3 + m,).

    $c_i$ are the cosines of G with m = `num_random` fixed random directions. `secants` makes the
    quantities of the literature of them. With `eomdl.on_batch(loss)` it sees the step's own minibatch.

    **Cost:** one gradient, and m random vectors drawn again, one at a time.

    **Raises:** `ValueError` for a wrong argument.
    """
    _check.function("loss", loss)
    end = _check.params("end", end)
    for leaf in jax.tree.leaves(end):
        _check.numbers("end", leaf, "finite parameters")
    # Not a closure: another end point is other data, and compiles nothing.
    measure = jax.tree_util.Partial(_products, loss, end, _check.integer("num_random", num_random, 1))
    return on_batch(measure) if sees_batch(loss) else measure


def _products(loss: Loss, end: Params, num_random: int, params: Params, args: Args) -> jax.Array:
    _check.same_structure("params", params, "end", end)
    gradient = jax.grad(loss)(params, args)
    size = _tree.norm(gradient)
    displacement = _tree.sub(params, end)

    def cosine(key: jax.Array) -> jax.Array:
        direction = _tree.random_normal(key, params)
        product = _tree.vdot(gradient, direction) / _tree.norm(direction)
        return jnp.where(size > 0, product / jnp.where(size > 0, size, 1), jnp.nan)

    products = jnp.stack([_tree.vdot(gradient, displacement), size, _tree.norm(displacement)])
    cosines = jax.lax.map(cosine, jax.random.split(jax.random.key(0), num_random))
    return jnp.concatenate([products, cosines])


def secants(
    run: Callable[..., Trajectory],
    losses: Mapping[str, Loss],
    *,
    end: Params | None = None,
    num_random: int = 4,
) -> dict[str, Secants]:
    r"""Return RSI, EB and their ratio along a path, with respect to its own end point.

    $$RSI(w) = \frac{\langle G, w - w^* \rangle}{|w - w^*|^2}, \qquad EB(w) = \frac{|G|}{|w - w^*|}, \qquad
    \gamma = \frac{RSI}{EB}.$$

    The path is not stored: `run` is called twice, first to find the end $w^*$, then to measure, and the two
    must end at the same bits.

    **Arguments:**

    - `run`: a function of `descend`'s, `iterate`'s or `solve`'s options `observe` and `save_params`, such as
        `lambda **options: eomdl.descend(loss, params, optimizer, 500, args=data, **options)`. An iterator of
        batches is to be made inside it.
    - `losses`: `{name: loss}`, whose gradients G are taken, such as
        `{"full batch": loss, "minibatch": eomdl.on_batch(loss)}`.
    - `end`: another $w^*$; `run` is then called once.
    - `num_random`: random directions of the baseline.

    **Returns:** `{name: Secants}`.

    **Cost:** the run twice, and one gradient for each loss and saved step.

    **Raises:** `ValueError` for a wrong argument, or if the run is not the same twice.

    Source: Guille-Escuret et al. 2024 (arXiv 2306.11922).
    """
    expected = "a function of the options of a run, lambda **options: eomdl.descend(..., **options)"
    _check.function("run", run, expected, takes=0, options=("observe", "save_params"))
    if not isinstance(losses, Mapping) or not losses:
        raise ValueError(f"losses: expected a dict {{name: loss}}, got {_check.show(losses)}")
    first = None
    if end is None:
        first = run(observe=None, save_params=False)
        _check.kind("run", first, Trajectory, "a function that returns an eomdl.Trajectory")
        end = first.final_params
    observe = {name: secant(loss, end, num_random) for name, loss in losses.items()}
    path = run(observe=observe, save_params=False)
    if first is not None:
        _check_same_end(first, path)
    return {name: _to_secants(path, path.observables[name], end) for name in losses}


def _check_same_end(first: Trajectory, second: Trajectory) -> None:
    a, b = (jax.tree.leaves((t.end.step, t.final_params)) for t in (first, second))
    if not all(np.array_equal(x, y) for x, y in zip(a, b, strict=True)):
        difference = max(
            float(np.max(np.abs(np.asarray(x) - np.asarray(y)))) for x, y in zip(a, b, strict=True)
        )
        raise ValueError(
            "run: expected the same path twice, bit for bit, got end points that differ by "
            f"{difference:.1e}; batches from an iterator must be made inside the function, from a fixed seed"
        )


def _to_secants(path: Trajectory, products: Any, end: Params) -> Secants:
    products = np.asarray(products)
    inner, size, distance = products[:, :3].T
    # Below that the displacement is the rounding of the parameters.
    resolution = 8 * float(jnp.finfo(_tree.dtype(end)).eps) * float(_tree.norm(end))
    at_end = distance <= resolution
    notes = [Note(path.message, is_fault=True)] if path.message else []
    if at_end.any():
        masked = np.array2string(np.asarray(path.steps)[at_end], threshold=6, edgeitems=2)
        many = f"{at_end.sum()} of {len(at_end)} saved steps"
        notes.append(Note(f"{many} are at the end point itself (0/0) and masked: {masked}"))

    def divide(mask: np.ndarray, numerator: Any, denominator: Any) -> np.ndarray:
        out = np.full(distance.shape, np.nan, products.dtype)
        with np.errstate(invalid="ignore"):  # infinite over infinite, where a run diverges
            return np.divide(numerator, denominator, out=out, where=mask)

    away, moving = ~at_end, ~at_end & (size > 0)
    if np.any(away & (size == 0)):
        still = (away & (size == 0)).sum()
        notes.append(Note(f"{still} saved steps have no gradient: gamma is not defined there"))
    # Divided one after the other: a product would overflow where a run diverges.
    along_displacement, along_gradient = divide(away, inner, distance), divide(moving, inner, size)
    gamma = divide(moving, along_gradient, distance)
    return Secants(
        steps=np.asarray(path.steps),
        distance=distance,
        gradient_norm=size,
        rsi=divide(away, along_displacement, distance),
        eb=divide(away, size, distance),
        gamma=gamma,
        learning_rate=divide(moving, along_gradient, size),
        contraction=1 - gamma**2,
        random_gamma=products[:, 3:],
        notes=tuple(notes),
    )
