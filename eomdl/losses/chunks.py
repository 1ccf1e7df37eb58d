"""The mean of a loss over data, chunk by chunk."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp

from eomdl import _check
from eomdl._types import Args, Loss, Params
from eomdl.losses.host import OnHost


class MeanOverChunks(eqx.Module):
    r"""The mean of a loss over the examples in `args`, in the memory of one chunk.

    $$L(\theta) = \frac{\sum_c W_c \, \ell(\theta, c)}{\sum_c W_c}$$

    over chunks c of the examples. $\ell$ is your loss: the mean over the examples that it is given. $W_c$ is the number
    of examples in the chunk, so that L is the mean over all examples, to rounding, with a last chunk that is not full too.

    ```python
    def mean_loss(params, args):
        images, labels = args
        return jnp.mean(optax.softmax_cross_entropy(network(params, images), labels))

    loss = eomdl.losses.MeanOverChunks(mean_loss, 1000)
    run = eomdl.descend(loss, params, optax.sgd(0.1), 100, args=(images, labels))
    ```

    Derivatives of a mean are means of derivatives: gradient, Hessian-vector products and counter terms of any order are
    computed chunk by chunk too (`jax.lax.map` and `jax.checkpoint`), forwards and backwards. Their memory is that
    for one chunk, and does not grow with the data. The data themselves stay where they are: on the device, on several
    devices, or, as `eomdl.losses.OnHost`, on the host or in a file.

    **Arguments:**

    - `loss`: function `(params, args) -> scalar`, a mean over the examples in `args`, not a sum. A loss that couples examples
        (batch normalization) becomes another one: the mean over the chunks of its value on each. A penalty on the
        parameters is computed once, outside: `WeightDecay(MeanOverChunks(loss, 1000), 1e-3)`.
    - `chunk_size`: examples in a chunk; more than there are means one chunk. The loss is compiled once if it divides their
        number, else twice.
    - `weights`: for a loss that is a weighted mean, $\ell = \sum_i w_i \ell_i / \sum_i w_i$, the function `args -> w`
        (weights >= 0, shape (n,)) that takes the weights from `args`. $W_c$ is then their sum over the chunk. A chunk
        whose weights are all 0 is left out.

    `args` is a pytree of arrays with one leading axis, that of the examples. A number that belongs to no example is a
    field of the loss: make it an `equinox.Module`.

    **Chunks.** If `chunk_size` divides the number of examples into m chunks, chunk i has the examples i, i + m, i + 2 m, ...
    So of data sharded over devices every device has a part of each chunk, and only the sum is sent. For sharded data
    choose a size that divides the number of examples and is a multiple of the number of devices; with another one JAX
    gathers the data. If it does not divide, a chunk has consecutive examples.

    **Cost** of a gradient: that of the mean in one piece; with the value, one evaluation of the loss more. A counter
    term costs more than that of the mean in one piece: its derivatives are sums over all chunks, one after the other, and
    what would be kept for the next one is computed again. The guide "Larger than one device" has the figures.

    **Raises:** `ValueError` for a wrong argument; when called, if the leaves of `args` disagree in their leading axis,
    or one has none, or the loss is no scalar.
    """

    loss: Loss = eqx.field(converter=lambda f: _check.function("loss", f))
    chunk_size: int = eqx.field(static=True, converter=lambda n: _check.integer("chunk_size", n, 1))
    weights: Callable[[Args], jax.Array] | None = eqx.field(
        default=None,
        converter=lambda f: (
            None if f is None else _check.function("weights", f, "a function args -> weights", takes=1)
        ),
    )

    if TYPE_CHECKING:  # a checker knows no converters

        def __init__(
            self, loss: Loss, chunk_size: int, weights: Callable[[Args], jax.Array] | None = None
        ) -> None: ...

    def __call__(self, params: Params, args: Args) -> jax.Array:
        """Return the mean over all examples in `args`."""
        data = args if _is_on_host(args) else _OnDevice(args)
        size = min(self.chunk_size, data.num_examples)
        count, rest = divmod(data.num_examples, size)

        # The chunk is taken from the data again too, or all chunks would be kept.
        @functools.partial(jax.checkpoint, prevent_cse=False)  # in a loop nothing else could merge the two
        def weigh_chunk(params: Params, i: jax.Array) -> tuple[jax.Array, jax.Array]:
            return self._weigh(params, data.chunk(i, size), size)

        weighted, weights = jax.lax.map(functools.partial(weigh_chunk, params), jnp.arange(count))
        total, total_weight = jnp.sum(weighted), jnp.sum(weights)
        if rest:
            weigh_rest = jax.checkpoint(lambda params: self._weigh(params, data.rest(size), rest))
            last, last_weight = weigh_rest(params)
            total, total_weight = total + last, total_weight + last_weight
        return total / total_weight

    def _weigh(self, params: Params, chunk: Args, size: int) -> tuple[jax.Array, jax.Array]:
        r"""Return $W_c \ell(\theta, c)$ and $W_c$."""
        if self.weights is None:
            value = _scalar(self.loss(params, chunk))
            return size * value, jnp.asarray(size, value.dtype)
        weights = self.weights(chunk)
        if jnp.shape(weights) != (size,):
            raise ValueError(
                f"weights: expected one for each of {size} examples, got shape {jnp.shape(weights)}"
            )
        weight = jnp.sum(weights)
        dtype = jax.eval_shape(lambda: _scalar(self.loss(params, chunk))).dtype
        # A weighted mean with no weight is 0 / 0, and so is its derivative: it must not be taken.
        weighted = jax.lax.cond(
            weight > 0,
            lambda: (weight * _scalar(self.loss(params, chunk))).astype(dtype),
            lambda: jnp.zeros((), dtype),
        )
        return weighted, weight.astype(dtype)


class _OnDevice:
    """Examples in JAX arrays, on one device or several, chunk by chunk as in `OnHost`."""

    def __init__(self, args: Args):
        if any(map(_is_on_host, jax.tree.leaves(args, is_leaf=_is_on_host))):
            raise ValueError(
                "args: expected eomdl.losses.OnHost for all of the data or none, got a part of it"
            )
        self.num_examples = _check.num_examples("args", args)
        self._args = jax.tree.map(jnp.asarray, args)

    def chunk(self, i: Any, size: int) -> Args:
        count, rest = divmod(self.num_examples, size)

        def cut(leaf: jax.Array) -> jax.Array:
            if rest:  # the first `size * count` examples as an array would be a copy of the data
                return jax.lax.dynamic_slice_in_dim(leaf, i * size, size)
            # Every device has a part of each chunk: the sharded axis stays the first.
            return jax.lax.dynamic_index_in_dim(
                leaf.reshape(size, count, *leaf.shape[1:]), i, axis=1, keepdims=False
            )

        return jax.tree.map(cut, self._args)

    def rest(self, size: int) -> Args:
        start = self.num_examples // size * size
        return jax.tree.map(lambda leaf: leaf[start:], self._args)


def _is_on_host(part: Any) -> bool:
    return isinstance(part, OnHost)


def _scalar(value: Any) -> jax.Array:
    if jnp.shape(value) != ():
        raise ValueError(f"loss: expected a real scalar, the mean over a chunk, got shape {jnp.shape(value)}")
    return jnp.asarray(value)
