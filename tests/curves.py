"""Curves and clouds whose shape is known, and runs made of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import eomdl


@functools.cache
def short_run() -> eomdl.Trajectory:
    return eomdl.iterate(lambda x, args, k: x, jnp.ones(1), 1)


def trajectory(path, steps=None) -> eomdl.Trajectory:
    """A run with these parameters, saved at these steps."""
    steps = np.arange(len(jax.tree.leaves(path)[0])) if steps is None else np.asarray(steps)
    return dataclasses.replace(short_run(), params=path, steps=steps)


def turned(path: np.ndarray, dimension: int, seed: int = 0) -> np.ndarray:
    """The same curve elsewhere in more dimensions: rotated and moved."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(dimension, path.shape[1])))
    return path @ q.T + rng.normal(size=dimension)


def helix(s: np.ndarray, radius=1.0, rise=0.5) -> np.ndarray:
    return np.stack([radius * np.cos(s), radius * np.sin(s), rise * s], axis=1)


def random_walk(rows: int, dimension: int, seed: int = 0) -> np.ndarray:
    return np.cumsum(np.random.default_rng(seed).normal(size=(rows, dimension)), axis=0)


WALK = random_walk(1200, 1000)


def torus(seed: int, dimension: int, points: int = 400) -> np.ndarray:
    """A product of circles: a manifold without a boundary, in 2 `dimension` coordinates."""
    angles = np.random.default_rng(seed).uniform(0, 2 * np.pi, (points, dimension))
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


class Fixed:
    """An estimator of one's own; says what it was given."""

    def __init__(self, value):
        self.value = value

    def fit(self, X):
        if len(X) < 30:
            raise ValueError("want more")
        self.dimension_ = self.value
        return self
