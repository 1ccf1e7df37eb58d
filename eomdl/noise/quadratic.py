"""The law of SGD on a quadratic loss, exactly."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from eomdl import _check
from eomdl._types import Numbers


class QuadraticLaw(NamedTuple):
    r"""What `quadratic_law` returns.

    - `drift`: A, of $dX = A (X - x_*)\,dt + D^{1/2} dW$.
    - `noise_covariance`: D, per unit of time.
    - `stationary_covariance`: that of SGD and of the SDE; None where H has an eigenvalue <= 0, and neither has one.
    """

    drift: Float[np.ndarray, "d d"]
    noise_covariance: Float[np.ndarray, "d d"]
    stationary_covariance: Float[np.ndarray, "d d"] | None


def quadratic_law(hessian: Numbers, covariance: Numbers, learning_rate: float) -> QuadraticLaw:
    r"""Return the stochastic differential equation with the law of SGD at every step, on a quadratic loss.

    SGD $x \leftarrow x - \eta (H (x - x_*) + \text{noise})$ with normal noise of constant covariance C has the law, at every
    step, of

    $$dX = \frac1\eta \log(1 - \eta H)\,(X - x_*)\,dt + D^{1/2} dW, \qquad
    D_{ij} = \eta\, C_{ij} \frac{\log(u_i u_j)}{u_i u_j - 1}, \quad u = 1 - \eta \lambda,$$

    in the eigenbasis of H. The stationary covariance S solves $H S + S H - \eta H S H = \eta C$ (Liu, Ziyin & Ueda 2021, arXiv
    2012.03636). It is for a few directions: eigenvectors of the Hessian, and the covariance of the noise along them.

    ```python
    law = eomdl.noise.quadratic_law(hessian, covariance, learning_rate=0.1)
    print(law.stationary_covariance)
    ```

    **Arguments:** `hessian` H and `covariance` C, symmetric matrices (d, d), C positive semidefinite; `learning_rate` $\eta$.

    **Raises:** `ValueError` for a wrong argument; where $\eta \lambda_{max} \ge 1$, as no equation passes through iterates that
    alternate (from 2 on there is no stationary law either); where D is not positive: a kick along one direction that mixes
    curvatures (noise of low rank) is no diffusion. It is positive where C commutes with H.
    """
    eta = float(_check.positive_scalar("learning_rate", learning_rate))
    h, c = _symmetric("hessian", hessian), _symmetric("covariance", covariance)
    if h.shape != c.shape:
        raise ValueError(f"covariance: expected the shape of hessian, {h.shape}, got {c.shape}")
    _require_positive("covariance", c, "a covariance is positive semidefinite")
    values, vectors = np.linalg.eigh(h)
    largest = eta * values[-1]
    if largest >= 1:
        why = (
            "SGD has no stationary law"
            if largest >= 2
            else "its iterates alternate, and no differential equation passes through them"
        )
        raise ValueError(f"learning_rate: expected eta * lambda_max < 1, got {largest:.4g}: {why}; lower it")
    u = 1 - eta * values
    x = np.add.outer(np.log(u), np.log(u))  # log(u_i u_j)
    ratio = np.where(np.abs(x) > 0, x / np.where(np.abs(x) > 0, np.expm1(x), 1), 1.0)
    rotated = vectors.T @ c @ vectors
    noise = eta * rotated * ratio
    _require_positive(
        "covariance",
        noise,
        "no diffusion has the law of SGD: its kicks mix directions of different curvature. Take a covariance that commutes with "
        "the Hessian (in its eigenbasis, the diagonal)",
    )
    stationary = None
    if values[0] > 0:
        stationary = vectors @ (eta**2 * rotated / -np.expm1(x)) @ vectors.T
    return QuadraticLaw((vectors * (np.log(u) / eta)) @ vectors.T, vectors @ noise @ vectors.T, stationary)


def _symmetric(name: str, value: Numbers) -> np.ndarray:
    matrix = np.asarray(_check.numbers(name, value, "a symmetric matrix of finite numbers", ndim=2), float)
    if matrix.shape[0] != matrix.shape[1] or not np.allclose(
        matrix, matrix.T, rtol=1e-6, atol=1e-6 * np.max(np.abs(matrix))
    ):
        raise ValueError(
            f"{name}: expected a symmetric matrix of finite numbers, got shape {matrix.shape}: {_check.show(matrix)}"
        )
    return (matrix + matrix.T) / 2


def _require_positive(name: str, matrix: np.ndarray, why: str) -> None:
    values = np.linalg.eigvalsh(matrix)
    lowest, size = values[0], np.max(np.abs(values))
    if lowest < -1e-12 * size:
        raise ValueError(
            f"{name}: expected a positive noise, got an eigenvalue of {lowest:.3g} beside {size:.3g}: {why}"
        )
