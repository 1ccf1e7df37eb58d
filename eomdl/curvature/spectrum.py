"""Trace and spectral density of the Hessian, from random vectors."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from typing_extensions import override

from eomdl import _check, _tree
from eomdl._autodiff import hessian_operator
from eomdl._result import AbstractResult, Estimate, Note, Table
from eomdl._types import Args, Loss, Numbers, Params
from eomdl.linalg.symmetric import ritz_quadrature


@dataclasses.dataclass(frozen=True)
class SpectralDensity(AbstractResult):
    r"""The eigenvalues of a Hessian of n parameters as a density, from `spectral_density`.

    For each of s random vectors v the m eigenvalues of a small matrix and the weights that they have in v:
    $v^\top f(H) v / |v|^2 \approx \sum_j w_j f(\lambda_j)$, exact for polynomials f up to degree 2 m - 1.

    - `nodes`, `weights`: shape (s, m); the weights of a row sum to 1.
    - `num_params`: n.

    **Intervals** are Student's, from the spread over the s vectors, on a log scale where all samples are positive. They are to cover the
    right value in 95 of 100 cases. Measured over 200 seeds, for 2 to 16 vectors: 90 to 98, and 88 to 98 where one eigenvalue makes
    nearly all of the mean. They do not contain what m products leave unresolved: among many eigenvalues take a `width` of at least
    their range over m.

    Its picture shows the density on a log scale with a band of these intervals; dotted, the height of a single eigenvalue among n,
    $1/(n w \sqrt{2\pi})$. Its option `width` is w, by default a hundredth of the range of the eigenvalues.
    """

    nodes: Float[np.ndarray, "s m"]
    weights: Float[np.ndarray, "s m"]
    num_params: int
    notes: tuple[Note, ...] = ()

    def mean(self, function: Callable[[np.ndarray], np.ndarray]) -> Estimate:
        r"""Return the mean of f over all eigenvalues, $\mathrm{tr} f(H) / n$, with its interval; f takes an array, element by element."""
        _check.function("function", function, "a function of an array of eigenvalues", takes=1)
        return _estimate(np.sum(self.weights * function(self.nodes), axis=1))

    def at(self, points: Numbers, width: float) -> tuple[Float[np.ndarray, " p"], Float[np.ndarray, " p"]]:
        """Return the density at `points`, shape (p,), with each eigenvalue a Gaussian of that width, and its standard errors."""
        densities = self._densities(points, width)
        return densities.mean(axis=0), _standard_error(densities)

    def interval(
        self, points: Numbers, width: float
    ) -> tuple[Float[np.ndarray, " p"], Float[np.ndarray, " p"]]:
        """Return the ends of the intervals of `at`: the lower and the upper ones."""
        return _interval(self._densities(points, width))

    def _densities(self, points: Numbers, width: float) -> Float[np.ndarray, "s p"]:
        """Return the density that each vector sees."""
        points = np.asarray(_check.numbers("points", points, "finite eigenvalues, shape (p,)", ndim=1))
        width = float(_check.positive_scalar("width", width))
        distance = (points[:, None, None] - self.nodes) / width
        bells = np.exp(-(distance**2) / 2) / (width * np.sqrt(2 * np.pi))
        return np.sum(self.weights * bells, axis=2).T

    @override
    def _tables(self) -> tuple[Table, ...]:
        # The moments of the density, which need no width.
        moments: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "mean of the eigenvalues": lambda values: values,
            "mean of their squares": np.square,
            "part below 0": lambda values: (values < 0).astype(float),
        }
        found = {name: self.mean(function) for name, function in moments.items()}
        rows = [(name, e.value, e.standard_error, *e.interval) for name, e in found.items()]
        title = f"Spectrum of the Hessian of {self.num_params:,} parameters"
        columns = ("what", "value", "standard error", "95 % from", "to")
        return (Table(columns, tuple(rows), title=title),)


def trace(loss: Loss, params: Params, args: Args, num_samples: int = 32, seed: int = 0) -> Estimate:
    r"""Return the trace of the Hessian, $\mathrm{tr} H = E[v^\top H v]$ over vectors v of random signs, with its standard error.

    ```python
    found = eomdl.curvature.trace(loss, params, data)
    print(found.value, found.interval)
    ```

    **Arguments:** `num_samples`: how many vectors, at least 2; `seed`: of their random numbers.

    **Returns:** an estimate with `value`, `standard_error`, and `interval`, as in `eomdl.curvature.SpectralDensity`.
    Under `jit` its numbers are traced: return `.value` from there, as in an observable.

    **Cost:** `num_samples` Hessian-vector products, about 1.5 gradients each; memory for 2 copies of the parameters beside those of a
    product. The standard error is at most $\sqrt{2 / \mathtt{num\_samples}}$ times the root of the sum of all squared eigenvalues.

    **Raises:** `ValueError` for a wrong argument. Source: Hutchinson 1990.
    """
    params = _check.params("params", params)
    _check.loss_is_scalar(loss, params, args)
    num_samples = _check.integer("num_samples", num_samples, 2)
    seed = _check.seed("seed", seed)
    forms = _forms(loss, _wide(params), args, _keys(seed, num_samples))
    if _tree.is_traced(forms):
        return Estimate(jnp.mean(forms), jnp.std(forms, ddof=1) / np.sqrt(num_samples))  # type: ignore[arg-type]
    return _estimate(np.asarray(forms, float))


def spectral_density(
    loss: Loss, params: Params, args: Args, num_samples: int = 8, num_matvecs: int = 32, seed: int = 0
) -> SpectralDensity:
    r"""Return the spectral density of the Hessian by stochastic Lanczos quadrature.

    ```python
    spectrum = eomdl.curvature.spectral_density(loss, params, data)
    points = jnp.linspace(-1, 10, 200)
    density, error = spectrum.at(points, width=0.1)
    low, high = spectrum.interval(points, width=0.1)
    mean_square = spectrum.mean(lambda values: values**2)
    ```

    From each random vector of signs Lanczos makes a quadrature of the density that the vector sees; their spread gives the standard
    errors and the intervals. An eigenvalue that occurs once has the weight 1/n: use `eigenpairs` for single ones.

    **Arguments:** `num_samples`: how many vectors, at least 2; `num_matvecs`: products for each, at least 2; `seed`: of the random numbers.

    **Returns:** `eomdl.curvature.SpectralDensity`.

    **Cost:** `num_samples` times `num_matvecs` Hessian-vector products; memory for `num_matvecs` + 1 copies of the parameters.

    **Raises:** `ValueError` for a wrong argument. Source: Ghorbani et al. 2019, arXiv 1901.10159; Golub & Meurant 1994.
    """
    params = _check.params("params", params)
    _check.loss_is_scalar(loss, params, args)
    num_samples = _check.integer("num_samples", num_samples, 2)
    num_matvecs = _check.integer("num_matvecs", num_matvecs, 2)
    seed = _check.seed("seed", seed)
    depth = min(num_matvecs, _tree.size(params))
    nodes, weights = _quadratures(loss, _wide(params), args, _keys(seed, num_samples), depth)
    return SpectralDensity(np.asarray(nodes), np.asarray(weights), _tree.size(params))


def _estimate(values: np.ndarray) -> Estimate:
    values = values[:, None]
    low, high = _interval(values)
    return Estimate(float(values.mean()), float(_standard_error(values)[0]), (float(low[0]), float(high[0])))


def _standard_error(samples: Float[np.ndarray, "s p"]) -> Float[np.ndarray, " p"]:
    """Return that of the mean over samples."""
    return samples.std(axis=0, ddof=1) / np.sqrt(len(samples))


def _interval(
    samples: Float[np.ndarray, "s p"],
) -> tuple[Float[np.ndarray, " p"], Float[np.ndarray, " p"]]:
    """Return Student's 95 % interval of the mean over samples, on a log scale where all of them are positive."""
    from scipy.special import stdtrit  # it takes long to import

    mean, reach = samples.mean(axis=0), stdtrit(len(samples) - 1, 0.975) * _standard_error(samples)
    is_positive = np.all(samples > 0, axis=0)
    factor = np.exp(np.minimum(reach / np.where(is_positive, mean, 1.0), 700.0))
    low, high = (
        np.where(is_positive, mean / factor, mean - reach),
        np.where(is_positive, mean * factor, mean + reach),
    )
    return low, high


def _keys(seed: int, count: int) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


def _wide(params: Params) -> Params:
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), params)


def _signs(key: jax.Array, like: Params) -> Params:
    drawn = _tree.random_normal(key, like)
    return jax.tree.map(lambda x: jnp.where(x < 0, -1, 1).astype(x.dtype), drawn)


@eqx.filter_jit
def _forms(loss: Loss, params: Params, args: Args, keys: jax.Array) -> jax.Array:
    product = hessian_operator(loss, params, args)

    def form(key: jax.Array) -> jax.Array:
        v = _signs(key, params)
        return _tree.vdot(v, product(v))

    return jax.lax.map(form, keys)


@eqx.filter_jit
def _quadratures(
    loss: Loss, params: Params, args: Args, keys: jax.Array, depth: int
) -> tuple[jax.Array, jax.Array]:
    product = hessian_operator(loss, params, args)

    def quadrature(key: jax.Array) -> tuple[Any, Any]:
        return ritz_quadrature(product, _signs(key, params), depth)

    return jax.lax.map(quadrature, keys)
