"""The noise of a minibatch gradient."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
from typing_extensions import override

from eomdl import _check, _tree, _warn
from eomdl._types import Args, Params
from eomdl.losses.examples import PER_EXAMPLE, Losses, MeanLoss, WeightedLoss, evaluate_losses
from eomdl.noise.base import AbstractNoise


_MIXED = 1e3  # rounding units by which the loss of an example may change where another one does


class MinibatchNoise(AbstractNoise):
    r"""The noise of the gradient of a minibatch, $g_B - g$: mean 0, covariance $C = f \Sigma$.

    $$\Sigma = \frac1N \sum_i (g_i - g)(g_i - g)^\top, \qquad f = \frac1B \text{ with replacement}, \quad
    f = \frac{N - B}{(N - 1)\,B} \text{ without},$$

    with the gradients $g_i$ of the N examples and their mean g. A square root of C needs no matrix: the gradient of
    $\sum_i w_i \ell_i$ with $w = \sqrt{f/N}\,(z - \bar z)$ and N standard normal numbers z has the covariance C, exactly.

    ```python
    noise = eomdl.noise.MinibatchNoise(losses, batch_size=8)
    weights = noise.sample_weights(jax.random.key(0), data)
    kick = noise.apply(params, weights, data)  # one gradient
    ```

    **Arguments:**

    - `losses`: function `(params, args) -> (N,)`, the loss of every example. The leading axis of every leaf of `args` counts
        the examples; what belongs to no example is a field of the losses (an `equinox.Module`).
    - `batch_size`: B, from 1 to N. B = N without replacement is gradient descent: the noise is 0 (`validate` warns).
    - `replacement`: whether an example may be drawn twice in one batch. With `False`, each batch is drawn from all examples. The
        batches of *reshuffled* epochs have this covariance too, but are not independent: a model with independent noise is of
        order 1 only for them.

    **Cost:** `apply`: one gradient of the mean loss, in its memory. `covariance_product`: a forward derivative and a gradient.
    `trace` and `third_cumulant_ratio`: the gradients of all examples one by one, `chunk_size` at a time.

    **Raises:** `ValueError` for a wrong argument; when called, for losses of another shape than (N,), N = 1, and B > N.

    Source: Gess, Kassing & Konarovskyi 2023 (arXiv 2302.07125), for the square root.
    """

    losses: Losses = eqx.field(converter=lambda f: _check.function("losses", f, PER_EXAMPLE))
    batch_size: int = eqx.field(static=True, converter=lambda n: _check.integer("batch_size", n, 1))
    replacement: bool = eqx.field(
        default=False, static=True, converter=lambda x: _check.flag("replacement", x)
    )

    if TYPE_CHECKING:  # a checker knows no converters

        def __init__(self, losses: Losses, batch_size: int, replacement: bool = False) -> None: ...

    def factor(self, args: Args) -> float:
        r"""Return f of $C = f \Sigma$."""
        count = self._count(args)
        if self.replacement:
            return 1 / self.batch_size
        return (count - self.batch_size) / ((count - 1) * self.batch_size)

    @override
    def apply(self, params: Params, weights: jax.Array, args: Args) -> Params:
        r"""Return $\nabla \sum_i w_i \ell_i$ for weights of shape (N,).

        For those of `sample_weights` it is normal noise with the covariance C; for `counts / B - 1 / N`, with how often each example
        is in a batch, it is the noise of that batch.
        """
        count = self._count(args)
        if jnp.shape(weights) != (count,):
            raise ValueError(
                f"weights: expected shape ({count},), one for each example, got {jnp.shape(weights)}"
            )
        return jax.grad(WeightedLoss(self.losses, jnp.asarray(weights)))(params, args)

    @override
    def normals_like(self, params: Params, args: Args) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self._count(args),), _tree.dtype(params))

    @override
    def weights_from(self, normals: jax.Array, args: Args) -> jax.Array:
        r"""Return $w = \sqrt{f/N}\,(z - \bar z)$."""
        scale = (self.factor(args) / self._count(args)) ** 0.5
        return scale * (normals - jnp.mean(normals))

    def sample_weights(self, key: jax.Array, args: Args) -> jax.Array:
        """Return N normal weights, whose sum is 0, with which `apply` has the covariance C."""
        return self.weights_from(jax.random.normal(key, (self._count(args),)), args)

    def trace(self, params: Params, args: Args, chunk_size: int = 1) -> jax.Array:
        r"""Return $\mathrm{tr}\,C = f\,\frac1N \sum_i |g_i - g|^2$, the mean square of the noise.

        **Cost:** the gradients of all examples, in the memory of `chunk_size` gradients.
        """
        squares = self._mean_over_examples(params, args, chunk_size, lambda d: _tree.vdot(d, d))
        return self.factor(args) * squares

    def third_cumulant_ratio(self, params: Params, args: Args, chunk_size: int = 1) -> jax.Array:
        r"""Return how skewed the noise is, $\sum_j |\kappa_{3,j}| / \sum_j C_{jj}^{3/2}$ over the parameters j.

        It is the mean skewness of a component of $g_B$, where each counts by the cube of its standard deviation, and
        exactly 0 for symmetric noise. It falls as $B^{-1/2}$. The noise-dominated models of RMSProp and Adam are of order 1
        only where it is small. Without replacement $\kappa_3 = \frac{(N - B)(N - 2B)}{(N-1)(N-2) B^2} \mu_3$, with
        replacement $\mu_3 / B^2$, where $\mu_3$ is the third moment of $g_i - g$. NaN where there is no noise.

        **Cost:** as `trace`.
        """
        n, b = self._count(args), self.batch_size
        if self.replacement:
            third = 1 / b**2
        else:  # of two examples the noise is symmetric
            third = (n - b) * (n - 2 * b) / ((n - 1) * max(n - 2, 1) * b**2)
        powers = lambda d: (jax.tree.map(jnp.square, d), jax.tree.map(lambda x: x**3, d))
        variance, cubes = self._mean_over_examples(params, args, chunk_size, powers)
        size = jax.tree.reduce(
            jnp.add, jax.tree.map(lambda x: jnp.sum((self.factor(args) * x) ** 1.5), variance)
        )
        return (
            abs(third) * jax.tree.reduce(jnp.add, jax.tree.map(lambda x: jnp.sum(jnp.abs(x)), cubes)) / size
        )

    def validate(self, params: Params, args: Args) -> None:
        """Raise `ValueError` where the loss of one example depends on another one, as with batch normalization; warn where B = N.

        Found by a second evaluation, in which the first example is another one. **Cost:** two evaluations of the losses.
        """
        count = self._count(args)
        values = evaluate_losses(self.losses, params, args)
        if self.batch_size == count and not self.replacement:
            _warn.warn(
                f"batch_size: {count} of {count} examples without replacement are all of them: there is no noise, and the steps are "
                "those of gradient descent"
            )
        other = jax.tree.map(lambda leaf: jnp.asarray(leaf).at[0].set(leaf[-1]), args)
        changed = jnp.abs(evaluate_losses(self.losses, params, other) - values)[1:]
        if _tree.is_traced(changed):
            return
        bound = _MIXED * jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values))
        if not jnp.all(changed <= bound):
            raise ValueError(
                f"losses: expected losses of which each depends on its own example, got one that changes by {jnp.max(changed):.2g} where "
                "another example does, as with batch normalization: the noise of a minibatch is then no sum over examples. Take "
                "the means of the normalization as constants, or another normalization (over features)"
            )

    def _count(self, args: Args) -> int:
        count = _check.num_examples("args", args)
        if count == 1:
            raise ValueError("args: expected at least 2 examples, got 1, whose batches have no noise")
        if self.batch_size > count and not self.replacement:
            raise ValueError(
                f"batch_size: expected at most the {count} examples in args, got {self.batch_size}; "
                "with replacement=True a batch may be larger"
            )
        return count

    def _mean_over_examples(
        self, params: Params, args: Args, chunk_size: int, function: Callable[[Params], Any]
    ) -> Any:
        """Return the mean over the examples of a function of $g_i - g$."""
        chunk_size = _check.integer("chunk_size", chunk_size, 1)
        loss = MeanLoss(self.losses)
        mean = jax.grad(loss)(params, args)
        count = self._count(args)

        def of_example(i: jax.Array, weight: jax.Array) -> Any:
            example = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, i, 1), args)
            deviation = _tree.sub(jax.grad(loss)(params, example), mean)
            return jax.tree.map(lambda x: weight.astype(x.dtype) * x, function(deviation))

        def of_chunk(total: Any, start: jax.Array) -> tuple[Any, None]:
            index = start + jnp.arange(chunk_size)
            parts = jax.vmap(lambda i: of_example(i, jnp.where(i < count, 1 / count, 0.0)))(index)
            return jax.tree.map(lambda x, part: x + jnp.sum(part, axis=0), total, parts), None

        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, mean))
        return jax.lax.scan(of_chunk, zero, jnp.arange(0, count, chunk_size))[0]
