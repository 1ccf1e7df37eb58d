"""Data that stay on the host, handed to compiled programs chunk by chunk."""

import functools
import hashlib
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import override

from eomdl import _check


_BYTES_AT_ONCE = 2**24  # that a checksum reads


@jax.tree_util.register_static
class OnHost:
    """Data that stay in the host's memory or in a file, for losses that take them chunk by chunk.

    ```python
    images = np.load("images.npy", mmap_mode="r")  # may be larger than all memory
    data = eomdl.losses.OnHost((images, labels))
    loss = eomdl.losses.MeanOverChunks(mean_loss, 1000)
    run = eomdl.descend(loss, params, optax.sgd(0.1), 100, args=data)
    ```

    A compiled program asks for one chunk after the other. While it computes on one, a thread reads the next from the
    array or the file. The device holds one chunk, the host three: the current one, the next, and JAX's copy. Pass it as the
    whole `args` of `eomdl.losses.MeanOverChunks` and of functions built on it; other losses and observables cannot
    index it.

    The arrays keep their own dtype. Bytes (`uint8`) are a quarter of the traffic of `float32`; let the loss divide by 255.
    Without x64, 64 bits become 32.

    **Arguments:** `arrays`, a pytree of NumPy arrays (`np.memmap` is one), whose leading axis counts the examples. They
    must not change as long as they are used.

    **Cost:** every pass over the data (one for a gradient, one more for each order of derivative, one more where the
    value is asked for beside the gradient) reads all of them once. Two objects with the same arrays compile twice, and
    JAX's persistent cache keeps no program that calls back.

    **Memory:** JAX keeps programs, and with them this object, its arrays and its thread, until `jax.clear_caches()`. `close()` lets
    arrays and thread go at once, and so does the end of a block `with eomdl.losses.OnHost(arrays) as data:`; what uses the
    object afterwards raises.

    **Devices:** the chunks go to one device. Data for several devices fit in their memories together: `jax.device_put`
    with a sharding.

    **Raises:** `ValueError` if `arrays` has a leaf that is no array, or whose leading axis is another; where it is used,
    after `close`, or in one of several processes.
    """

    def __init__(self, arrays: Any):
        expected = "a pytree of NumPy arrays whose leading axis counts the examples"
        for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
            name = f"arrays{jax.tree_util.keystr(path)}"
            _check.kind(name, leaf, np.ndarray | jax.Array, expected)
            if not (jnp.issubdtype(leaf.dtype, np.number) or leaf.dtype == bool):
                raise ValueError(f"{name}: expected numbers, got dtype {leaf.dtype}")
        self.num_examples = _check.num_examples("arrays", arrays)
        self._arrays = jax.tree.map(np.asanyarray, arrays)
        self._reader = ThreadPoolExecutor(1, "eomdl-reader")
        self._lock = threading.Lock()
        self._last, self._direction = 0, -1  # as if it had just come back to the first chunk
        self._prefetched: tuple[Any, Future | None] = (None, None)

    @override
    def __repr__(self) -> str:
        arrays = [f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(self._arrays)]
        return f"OnHost({', '.join(arrays)})"

    def close(self) -> None:
        """Let the arrays and the thread that reads them go. Closing twice does nothing more."""
        with self._lock:
            self._reader.shutdown(cancel_futures=True)
            self._arrays, self._prefetched = None, (None, None)

    def __enter__(self) -> "OnHost":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _require_open(self) -> Any:
        if self._arrays is None:
            raise ValueError("args: expected data on the host that can be read, got an OnHost after `close`")
        return self._arrays

    @functools.cached_property
    def fingerprint(self) -> str:
        """A checksum of the data, by which a run that continues recognizes them. **Cost:** reads all of them once."""
        digest = hashlib.blake2b(repr(self).encode(), digest_size=6)
        leaves = jax.tree.leaves(self._require_open())
        num_bytes = max(1, sum(leaf.nbytes for leaf in leaves))
        count = max(1, self.num_examples * _BYTES_AT_ONCE // num_bytes)
        for leaf in leaves:
            for start in range(0, self.num_examples, count):
                digest.update(np.ascontiguousarray(leaf[start : start + count]).tobytes())
        return digest.hexdigest()

    def chunk(self, i: Any, size: int) -> Any:
        """Return the examples i * `size`, ..., (i + 1) * `size` - 1; i may be traced."""
        return self._request(i, size, size)

    def rest(self, size: int) -> Any:
        """Return the examples behind the last whole chunk."""
        count, rest = divmod(self.num_examples, size)
        return self._request(count, size, rest)

    def _request(self, i: Any, size: int, length: int) -> Any:
        if jax.process_count() > 1:
            raise ValueError(
                f"args: expected arrays of all processes, got eomdl.losses.OnHost in one of {jax.process_count()}: "
                "jax.make_array_from_process_local_data makes them of the parts that each process loads"
            )
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                (length, *leaf.shape[1:]), jax.dtypes.canonicalize_dtype(leaf.dtype)
            ),
            self._require_open(),
        )
        # NumPy in and out, and a scalar for an argument: JAX calls in a callback can wait for each other for ever.
        fetch = functools.partial(self._fetch, size)
        return jax.pure_callback(fetch, shapes, i, vmap_method="sequential")

    def _fetch(self, size: int, i: Any) -> Any:
        """Return chunk i, and start to read the one that is likely to be asked for next."""
        i, count = int(i), -(-self.num_examples // size)
        with self._lock:
            self._require_open()
            self._direction, self._last = self._guess_direction((i - self._last) % count, count), i
            place, prefetched = self._prefetched
            next_place = (size, (i + self._direction) % count)
            self._prefetched = (next_place, self._reader.submit(self._read, *next_place))
        if prefetched is not None and place == (size, i):
            return prefetched.result()
        return self._read(size, i)

    def _guess_direction(self, move: int, count: int) -> int:
        """Return 1 or -1: sums run forwards, their derivatives backwards; where one follows the other, a chunk comes twice."""
        return {1: 1, count - 1: -1, 0: -self._direction}.get(move, self._direction)

    def _read(self, size: int, i: int) -> Any:
        def cut(leaf: np.ndarray) -> np.ndarray:
            dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
            return np.array(leaf[i * size : (i + 1) * size], dtype, copy=True)

        return jax.tree.map(cut, self._require_open())


def data_fingerprint(args: Any) -> str:
    """The checksum of data on the host, empty for all other data."""
    return args.fingerprint if isinstance(args, OnHost) else ""
