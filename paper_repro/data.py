"""Real data: scikit-learn's digits by default, any folder of IDX files by option."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np


_IMAGES = "train-images*idx3-ubyte*"
_LABELS = "train-labels*idx1-ubyte*"
_IMAGES_MAGIC, _LABELS_MAGIC = 2051, 2049  # unsigned bytes in 3 and 1 dimensions


def read_idx(path: str | Path, magic: int) -> np.ndarray:
    """An array of unsigned bytes from an IDX file, gzipped or not.

    Raises `ValueError` with the file's name if the magic number or the shape is another one or the file is damaged.
    """
    path = Path(path)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: expected a whole gzip file, got a damaged one ({error}); download it again"
        ) from None
    if len(content) < 4 or struct.unpack(">I", content[:4])[0] != magic:
        raise ValueError(f"{path}: expected an IDX file with magic number {magic}, got {content[:4]!r}")
    rank = magic % 256
    header = 4 + 4 * rank
    if len(content) < header:
        raise ValueError(f"{path}: expected an IDX header of {header} bytes, got {len(content)}")
    shape = struct.unpack(f">{rank}I", content[4:header])
    expected = header + math.prod(shape)  # in Python's integers: a damaged header has any
    if len(content) != expected:
        raise ValueError(
            f"{path}: expected {expected} bytes for shape {shape}, got {len(content)}; download it again"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def load(folder: str | Path | None, subset: int, seed: int | None = 0) -> tuple[jnp.ndarray, jnp.ndarray]:
    """`subset` images and labels: features in [0, 1] with shape (subset, pixels), integer labels.

    From scikit-learn's digits, or from the training IDX files in `folder`. Which ones is
    a random choice fixed by `seed`, or the first ones if it is None.
    """
    if folder is None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        images = images / 16.0
    else:
        images, labels = read_folder(folder)
        images = images / 255.0
    if not 1 <= subset <= len(images):
        raise ValueError(f"subset: expected 1 to {len(images)} images, got {subset}")
    order = np.arange(len(images)) if seed is None else np.random.default_rng(seed).permutation(len(images))
    chosen = order[:subset]
    dtype = jnp.result_type(float)
    return jnp.asarray(images[chosen], dtype), jnp.asarray(labels[chosen].astype(np.int32))


def read_folder(folder: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of the training IDX files in `folder`, as bytes: shapes (n, pixels) and (n,)."""
    images = read_idx(_only(folder, _IMAGES), _IMAGES_MAGIC)
    if not images.size:
        raise ValueError(f"{_only(folder, _IMAGES)}: expected images, got shape {images.shape}")
    labels = read_idx(_only(folder, _LABELS), _LABELS_MAGIC)
    if len(images) != len(labels):
        raise ValueError(f"{folder}: expected as many labels as images, {len(images)}, got {len(labels)}")
    return images.reshape(len(images), -1), labels


def _only(folder: str | Path, pattern: str) -> Path:
    found = sorted(Path(folder).glob(pattern))
    if not found:
        raise ValueError(f"data: expected a folder with a file {pattern}, got {folder}")
    return found[0]
