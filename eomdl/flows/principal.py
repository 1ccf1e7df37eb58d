"""The principal flow of gradient descent: exact on quadratics, at any learning rate."""

from typing import TYPE_CHECKING, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from typing_extensions import override

from eomdl import _check, _costs, _tree
from eomdl._autodiff import linearize
from eomdl._end import Diagnostic
from eomdl._types import Args, Loss, Params, State
from eomdl.flows.descent import AbstractDescentFlow
from eomdl.linalg.arnoldi import arnoldi
from eomdl.linalg.lanczos import lanczos
from eomdl.maps.step_map import StepMap


MATVECS = 16
_ANALYTIC = "a function analytic in the parameters, whose value is complex where they are"


class PrincipalFlow(AbstractDescentFlow):
    r"""The principal flow, real form: every eigendirection of the Hessian at the rate of gradient descent.

    $$\dot\theta = \varphi(\eta H)\, g, \qquad \varphi(x) = \frac{\log |1 - x|}{x}, \quad \varphi(0) = -1,$$

    with $g = \nabla L$ and $H = \nabla^2 L$, matrix-free: $\varphi(\eta H)\, g$ in the Krylov space of g (Lanczos).

    ```python
    flow = eomdl.flows.PrincipalFlow(loss, learning_rate=0.1)
    path = eomdl.solve(flow, params, 100, args=data)
    ```

    **What it predicts:** the iterates where $\eta\lambda < 1$; of modes with $\eta\lambda > 1$, which alternate in sign, the
    even iterates. On a quadratic loss both are exact. On other losses it leaves out the derivatives of H, from the term
    $\frac{\eta^2}{12} T[g, g]$ of the equation of motion on: off by $O(\eta^3)$ in one step and $O(\eta^2)$ at a fixed time.

    **At** $\eta\lambda = 1$ the rate has a singularity: gradient descent removes such a mode in one step, which no finite rate does.
    Here $|1 - \eta\lambda|$ counts as the rounding unit where it is smaller, so that the mode falls to rounding in one step, at a rate
    of 36 a step in float64. Where an eigenvalue passes there the equation is stiff, and an explicit solver takes shorter steps.

    **Arguments:** `loss`: function `(params, args) -> scalar`; `learning_rate`: $\eta$, a leaf of the pytree; `num_matvecs`: the
    dimension of the Krylov space, at most the number of parameters. The diagnostic "Lanczos remainder" tells whether it is enough.

    **Cost** of one evaluation: one gradient and `num_matvecs` Hessian-vector products, about 1 + 1.7 `num_matvecs` gradients,
    no third derivatives; memory for `num_matvecs` copies of the parameters.

    **Limits:** past the edge of stability it sees that modes with $\eta\lambda > 2$ grow, but not how that growth ends, which takes
    third derivatives: see `eomdl.flows.EdgeFlow`.

    **Raises:** `ValueError` for a wrong argument.

    Source: Rosca et al. 2023 (arXiv 2302.01952), eq. 7.
    """

    references: ClassVar[tuple[str, ...]] = ("rosca2023",)

    loss: Loss = eqx.field(converter=lambda f: _check.function("loss", f))
    learning_rate: jax.Array = eqx.field(converter=lambda x: _check.positive_scalar("learning_rate", x))
    num_matvecs: int = eqx.field(
        default=MATVECS, static=True, converter=lambda n: _check.integer("num_matvecs", n, 1)
    )

    if TYPE_CHECKING:  # a checker knows no converters, and takes an AbstractVar for an argument

        def __init__(self, loss: Loss, learning_rate: ArrayLike, num_matvecs: int = MATVECS) -> None: ...

    @property
    @override
    def gradient_cost(self) -> float:
        return 1 + _costs.HESSIAN_VECTOR_PRODUCT * self.num_matvecs

    @override
    def __call__(self, t: ArrayLike, state: Params, args: Args) -> Params:
        r"""Return $\varphi(\eta H)\, g$."""
        del t
        space = self._velocity(state, args)
        return _tree.combine(space.length * space.rates, space.basis)

    @override
    def diagnostics(self, t: ArrayLike, state: Params, args: Args) -> dict[str, Diagnostic]:
        """Return the part of the velocity that leads out of the Krylov space."""
        del t
        space = self._velocity(state, args)
        outside = self.learning_rate * space.residual * jnp.abs(space.rates[-1])
        return {
            "Lanczos remainder": Diagnostic(
                outside / jnp.linalg.norm(space.rates),
                limit=0.1,
                meaning="The velocity is not resolved by so few Hessian-vector products: raise num_matvecs.",
            )
        }

    def _velocity(self, state: Params, args: Args) -> "_Velocity":
        """Return the velocity in the Krylov space of the gradient."""
        gradient, hessian = linearize(lambda p: jax.grad(self.loss)(p, args), state)
        found, basis = lanczos(hessian, gradient, _depth(self.num_matvecs, state), keep_basis=True)
        values, vectors = jnp.linalg.eigh(found.matrix)
        rates = vectors @ (principal_rate(self.learning_rate * values) * vectors[0])
        return _Velocity(_tree.norm(gradient), basis, rates, found.residual)


class _Velocity(NamedTuple):
    """The velocity of the principal flow as `length` times the sum of `rates` times the vectors of `basis`.

    `length` is that of the gradient, along which the first vector is; `residual`: by how much the last product leads out of the space.
    """

    length: jax.Array
    basis: Params
    rates: jax.Array
    residual: jax.Array


def _depth(num_matvecs: int, params: Params) -> int:
    """Return the dimension of the Krylov space."""
    return min(num_matvecs, _tree.size(params))


def principal_rate(x: jax.Array) -> jax.Array:
    r"""Return $\log|1 - x| / x$, with $|1 - x|$ not below the rounding unit."""
    small = x < 0.5
    near = jnp.log1p(jnp.where(small, -x, 0))
    far = jnp.log(jnp.maximum(jnp.abs(1 - x), jnp.finfo(x.dtype).eps))
    return jnp.where(x == 0, -1, jnp.where(small, near, far) / jnp.where(x == 0, 1, x))


class ComplexState(NamedTuple):
    """Parameters in the complex plane."""

    real: Params
    imaginary: Params


class ComplexPrincipalFlow(AbstractDescentFlow):
    r"""The principal flow in the complex plane: through every iterate of a quadratic, the odd ones too.

    $$\dot\theta = \varphi(\eta H)\, g, \qquad \varphi(x) = \frac{\log(1 - x)}{x}$$

    A factor $1 - \eta\lambda < 0$ a step is $e^{\log|1 - \eta\lambda| + i\pi}$: between two iterates the path leaves the real
    parameters, and is real again at each iterate of a quadratic loss, exactly. On other losses it is off in the derivatives of H, and the
    imaginary part that is left at an iterate shows by how much.

    ```python
    flow = eomdl.flows.ComplexPrincipalFlow(loss, learning_rate=1.05)
    path = eomdl.solve(flow, params, 100)  # path.params: the real parts
    ```

    **What the loss must be:** analytic in its parameters, and able to take complex ones: sums, products, powers, exp, tanh, sin, but no
    absolute values, conjugates, maxima, comparisons. Then $L$, $g$ and $H$ are continued from the real parameters, and H is complex
    symmetric. tanh and the softmax have poles in the complex plane, into which a path that goes far from the real
    parameters can run. Networks with relu or max-pooling have no such form: take `eomdl.flows.PrincipalFlow`.

    **The branch:** the argument of $1 - \eta\lambda$ is taken from $(-\pi/2, 3\pi/2]$, so that rounding does not tell $+i\pi$ from
    $-i\pi$ where $\eta\lambda$ is real and above 1. At $\eta\lambda = 1$ as in the real form.

    **Arguments:** as of `eomdl.flows.PrincipalFlow`. **State:** real and imaginary part; `params` is the real part.

    **What it predicts:** iterates. **Cost:** as the real form, but in complex numbers, about 4 times as much; the small
    eigenproblem is not symmetric, and JAX solves it on CPUs (on GPUs in late versions only).

    **Raises:** `ValueError` for a wrong argument, and in `solve` for a loss that is not analytic at the start
    (Cauchy-Riemann equations along a random direction).

    Source: Rosca et al. 2023 (arXiv 2302.01952), eq. 7.
    """

    references: ClassVar[tuple[str, ...]] = ("rosca2023",)

    loss: Loss = eqx.field(converter=lambda f: _check.function("loss", f))
    learning_rate: jax.Array = eqx.field(converter=lambda x: _check.positive_scalar("learning_rate", x))
    num_matvecs: int = eqx.field(
        default=MATVECS, static=True, converter=lambda n: _check.integer("num_matvecs", n, 1)
    )

    if TYPE_CHECKING:  # a checker knows no converters, and takes an AbstractVar for an argument

        def __init__(self, loss: Loss, learning_rate: ArrayLike, num_matvecs: int = MATVECS) -> None: ...

    @property
    @override
    def map(self) -> "_ComplexDescentStep":
        return _ComplexDescentStep(self.loss, self.learning_rate)

    @property
    @override
    def gradient_cost(self) -> float:
        return 4 * (1 + _costs.HESSIAN_VECTOR_PRODUCT * self.num_matvecs)

    @override
    def __call__(self, t: ArrayLike, state: ComplexState, args: Args) -> ComplexState:
        r"""Return $\varphi(\eta H)\, g$ at complex parameters."""
        del t
        gradient = jax.grad(self.loss, holomorphic=True)
        g, hessian = jax.linearize(lambda p: gradient(p, args), _join(state))
        krylov = arnoldi(hessian, g, _depth(self.num_matvecs, g))
        values, vectors = jnp.linalg.eig(krylov.matrix_of_start)
        first = jnp.linalg.solve(vectors, jnp.eye(len(values), 1, dtype=values.dtype))[:, 0]
        rates = vectors @ (_complex_rate(self.learning_rate * values) * first)
        return _split(_tree.combine(_tree.norm(g) * rates, krylov.basis))

    @override
    def validate(self, params: Params, args: Args) -> None:
        """Raise `ValueError` if the loss is not analytic at `params`."""
        _check.loss_is_scalar(self.loss, params, args)
        at = _join(self.init(params, args))
        value = _check.shape_of("loss", _ANALYTIC, self.loss, at, args)
        if not jnp.issubdtype(value.dtype, jnp.complexfloating):
            raise ValueError(f"loss: expected {_ANALYTIC}, got a value of dtype {value.dtype}")
        if _tree.is_traced(self, params, args):
            return
        along, across = (complex(x) for x in _cauchy_riemann(self.loss, at, args))
        if abs(across - 1j * along) > 1e-3 * abs(along):
            raise ValueError(
                f"loss: expected {_ANALYTIC}, got the derivative {along:.3g} along a direction and {across:.3g} along "
                "i times it, which break the Cauchy-Riemann equations (a conjugate or an absolute value?)"
            )


class _ComplexDescentStep(StepMap):
    """One step of gradient descent, from complex parameters if they are."""

    is_model: ClassVar[bool] = True

    loss: Loss
    learning_rate: jax.Array

    @override
    def __call__(self, state: ComplexState, args: Args, k: ArrayLike) -> ComplexState:
        del k
        at = _join(state)
        gradient = jax.grad(self.loss, holomorphic=True)(at, args)
        return _split(_tree.sub(at, _tree.scale(self.learning_rate, gradient)))

    @override
    def init(self, params: Params) -> ComplexState:
        return ComplexState(params, _tree.zeros_like(params))

    @override
    def params(self, state: ComplexState) -> Params:
        return state.real

    @override
    def restore(self, state: State, params: Params) -> ComplexState:
        del state
        return self.init(params)


def _join(state: ComplexState) -> Params:
    return jax.tree.map(jax.lax.complex, state.real, state.imaginary)


def _split(x: Params) -> ComplexState:
    return ComplexState(jax.tree.map(jnp.real, x), jax.tree.map(jnp.imag, x))


@eqx.filter_jit
def _cauchy_riemann(loss: Loss, at: Params, args: Args) -> tuple[jax.Array, jax.Array]:
    """Return the derivatives along a random direction of real numbers, and along i times it."""
    v = _tree.random_normal(jax.random.key(0), jax.tree.map(jnp.real, at))

    def along(unit: complex) -> jax.Array:
        tangent = jax.tree.map(lambda a, b: jnp.asarray(unit, a.dtype) * b.astype(a.dtype), at, v)
        return jax.jvp(lambda p: loss(p, args), (at,), (tangent,))[1]

    return along(1), along(1j)


def _complex_rate(x: jax.Array) -> jax.Array:
    r"""Return $\log(1 - x) / x$, the cut along the negative imaginary axis of $1 - x$, $|1 - x|$ not below the rounding unit."""
    zero = jnp.abs(x) == 0
    size = jnp.maximum(jnp.abs(1 - x), jnp.finfo(x.real.dtype).eps)
    # log|1 - x| without the rounding of 1 - x where x is small: |1 - x|^2 = 1 + (|x|^2 - 2 Re x).
    small = jnp.abs(x) < 0.5
    near = 0.5 * jnp.log1p(jnp.where(small, jnp.abs(x) ** 2 - 2 * x.real, 0))
    angle = jnp.angle(1j * (x - 1)) + np.pi / 2  # -i(1 - x), turned back: from -pi/2 to 3 pi/2
    log = jax.lax.complex(jnp.where(small, near, jnp.log(size)), angle.astype(size.dtype))
    return jnp.where(zero, -1, log / jnp.where(zero, 1, x))
