"""The modified equation of discretized Langevin dynamics."""

from typing import TYPE_CHECKING, ClassVar

import equinox as eqx
import jax
from jax.typing import ArrayLike
from typing_extensions import override

from eomdl import _check, _tree
from eomdl._autodiff import directional_derivative, hessian_operator
from eomdl._types import Args, Loss, Params
from eomdl.flows.base import AbstractFlow
from eomdl.flows.penalized import penalized_descent
from eomdl.noise.additive import IsotropicNoise
from eomdl.noise.base import NoiseOperator


class DiscretizedLangevinFlow(AbstractFlow):
    r"""The modified equation of the steps $x \leftarrow x - h \nabla U + \sqrt{2Th}\,z$ of discretized Langevin dynamics (SGLD, ULA).

    $$dX = -\nabla \Big( U + h \big( \tfrac14 |\nabla U|^2 - \tfrac{T}{2} \Delta U \big) \Big) dt
    + \sqrt{2T}\,\big( 1 + \tfrac{h}{2} H \big)\,dW,$$

    in the sense of Ito. Its expectations differ from those of the steps by $O(h^2)$ at a fixed time. The steps do not sample
    $e^{-U/T}$ but, up to $O(h^2)$, $e^{-U_h/T}$ with

    $$U_h = U - \tfrac{h}{4} |\nabla U|^2 + \tfrac{h T}{2} \Delta U,$$

    which is `flow.modified_loss`, a function `(params, args) -> scalar`.

    **Arguments:** `loss`: function `(params, args) -> scalar`, differentiable three times; `temperature` T and `step_size` h, numbers > 0,
    leaves of the pytree.

    `eomdl.solve` does not take it yet: it has the drift and the noise (guide Noise).

    **Cost:** the drift has the gradient of the Laplacian, exactly, from one third derivative along each of the P parameters in turn:
    about 5 P gradients, in the memory of a few. It is for small models.

    **Raises:** `ValueError` for a wrong argument.

    Source: Zygalakis 2011; Debussche & Faou 2012 (arXiv 1105.0489).
    """

    references: ClassVar[tuple[str, ...]] = ("zygalakis2011", "debussche2012")

    loss: Loss = eqx.field(converter=lambda f: _check.function("loss", f))
    temperature: jax.Array = eqx.field(converter=lambda x: _check.positive_scalar("temperature", x))
    step_size: jax.Array = eqx.field(converter=lambda x: _check.positive_scalar("step_size", x))

    if TYPE_CHECKING:  # a checker knows no converters, and takes an AbstractVar for an argument

        def __init__(self, loss: Loss, temperature: ArrayLike, step_size: ArrayLike) -> None: ...

    @property
    def modified_loss(self) -> Loss:
        """Return $U_h$, whose density of Gibbs the steps sample up to $O(h^2)$."""
        return ModifiedEnergy(self)

    @override
    def __call__(self, t: ArrayLike, state: Params, args: Args) -> Params:
        del t
        h, temperature = self.step_size, self.temperature
        descent = penalized_descent(self.loss, h / 2, state, args)
        gradient = jax.grad(self.loss)

        def bend(e: Params) -> Params:
            return directional_derivative(lambda x: gradient(x, args), (e, e))(state)

        return _tree.add(descent, _tree.scale(h * temperature / 2, _tree.sum_over_basis(bend, state)))

    @override
    def noise(self, t: ArrayLike, state: Params, args: Args) -> NoiseOperator:
        del t
        heat = IsotropicNoise(self.temperature)
        product = hessian_operator(self.loss, state, args)

        def kick(normals: Params) -> Params:
            plain = heat.apply(state, normals, args)
            return _tree.add(plain, _tree.scale(self.step_size / 2, product(plain)))

        return NoiseOperator(kick, state)

    @override
    def validate(self, params: Params, args: Args) -> None:
        _check.loss_is_scalar(self.loss, params, args)


class ModifiedEnergy(eqx.Module):
    """The modified loss of `DiscretizedLangevinFlow`."""

    flow: DiscretizedLangevinFlow

    def __call__(self, params: Params, args: Args) -> jax.Array:
        """Return its value. **Cost:** a Hessian-vector product for each parameter."""
        flow, h = self.flow, self.flow.step_size
        energy, gradient = jax.value_and_grad(flow.loss)(params, args)
        product = hessian_operator(flow.loss, params, args)
        laplacian = _tree.sum_over_basis(lambda e: _tree.vdot(e, product(e)), params)
        correction = flow.temperature / 2 * laplacian - _tree.vdot(gradient, gradient) / 4
        return energy + (h * correction).astype(energy.dtype)
