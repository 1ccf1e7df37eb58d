"""What a continuous-time model of an optimizer is."""

import abc
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeAlias

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from typing_extensions import override

from eomdl import _check, _tree
from eomdl._end import Diagnostic
from eomdl._target import ITERATES, Target
from eomdl._types import Args, Params, State
from eomdl.maps.step_map import StepMap
from eomdl.noise.base import NoiseOperator


Refresh: TypeAlias = Callable[[ArrayLike, State, Args], State]  # (t, state, args) -> state
Noise: TypeAlias = Callable[[ArrayLike, State, Args], NoiseOperator]  # (t, state, args) -> operator
LeadingError: TypeAlias = Callable[[ArrayLike, Params, Params, Args], tuple[Params, Params]]


class SolverOptions(NamedTuple):
    """The arguments of `eomdl.solve` that a flow recommends; a plain tuple in this order does as well."""

    solver: diffrax.AbstractSolver
    stepsize_controller: diffrax.AbstractStepSizeController
    dt0: float


class Differentiated(NamedTuple):
    """A field whose derivatives a flow takes, `(x, args) -> velocity` like x, and where.

    `field` is a Module, so that all flows that differentiate one loss share the program by which `solve` tests its derivative.
    """

    field: Callable[[State, Args], State]
    x: State


class Increments(eqx.Module):
    """The change of the state in a step of a map, as a field."""

    step_map: StepMap

    def __call__(self, x: State, args: Args) -> State:
        """Return the change in the first step."""
        return self.step_map.increment(x, args, jnp.zeros((), jnp.result_type(float)))


class AbstractFlow(eqx.Module):
    r"""A vector field $\dot x = F(t, x)$ that models a discrete optimizer.

    Step k of the optimizer is at time $t = k h$, where $h$ is `step_size`. To write your own flow, subclass and define
    `step_size` (a field or a property) and `__call__`. Where the discrete step is known, define the property `map`. A stochastic
    differential equation has a method `noise`. All else has a default.

    ```python
    class PlainDescent(eomdl.AbstractFlow):
        loss: Callable
        step_size: jax.Array

        @property
        def map(self):
            return eomdl.maps.GradientDescentStep(self.loss, self.step_size)

        def __call__(self, t, state, args):
            return jax.tree.map(lambda g: -g, jax.grad(self.loss)(state, args))
    ```
    """

    # What `eomdl.citation` cites: keys of `eomdl/flows/references.py`, or whole BibTeX entries.
    references: ClassVar[tuple[str, ...]] = ()

    # Whether `__call__` of a flow with noise is the drift in the sense of Ito; else it is that of Stratonovich.
    drift_is_ito: ClassVar[bool] = True

    step_size: eqx.AbstractVar[jax.Array]

    @abc.abstractmethod
    def __call__(self, t: ArrayLike, state: State, args: Args) -> State:
        """Return $F(t, x)$, the velocity of the state per unit of time (not per step)."""

    @property
    def map(self) -> StepMap | None:
        """The discrete step that the flow models, on the flow's own state; None where it is not known.

        `solve` chooses its tolerances by the flow's own error, which it measures against this map. `init`, `begin` and
        `params` are those of the map by default.
        """
        return None

    @property
    def stride(self) -> int:
        """The number m of steps between the iterates that the flow passes through: 1, except for strided flows.

        A flow of stride m sees the data of m steps: `eomdl.flows.step_data(args, n)` is that of the n-th.
        """
        return 1

    @property
    def target(self) -> Target:
        """What the flow predicts of a real run, with which `eomdl.compare` compares it: by default the iterates."""
        return ITERATES

    def init(self, params: Params, args: Args) -> State:
        """Return the state of a new run that starts at `params`."""
        del args
        return params if self.map is None else self.map.init(params)

    def begin(self, t: ArrayLike, params: Params, state: State, args: Args) -> State:
        """Return the state that continues a real run, which ended at time t in `params` and the optimizer's `state`.

        A flow with an `init` of its own needs a `begin` of its own too if it has a `map`.
        """
        del t
        return self.init(params, args) if self.map is None else self.map.restore(state, params)

    def params(self, state: State) -> Params:
        """Return the parameters in a state."""
        return state if self.map is None else self.map.params(state)

    @property
    def noise(self) -> Noise | None:
        r"""None, or a method `(t, state, args) -> eomdl.noise.NoiseOperator`, the noise $\sigma$ of $dX = F\,dt + \sigma\,dW$.

        The flow is then a stochastic differential equation, and models the law of its optimizer.
        """
        return None

    def ito_drift(self, t: ArrayLike, state: State, args: Args) -> State:
        r"""Return the drift in the sense of Ito: the velocity of the mean at this state.

        **Cost:** that of the flow; with `drift_is_ito = False` also a derivative of the noise along each of its Brownian motions.
        """
        drift, noise = self(t, state, args), self.noise
        if noise is None or self.drift_is_ito:
            return drift
        return _tree.add(drift, _half_drift_of_noise(lambda x: noise(t, x, args), state))

    def diffusion(self, t: ArrayLike, state: State, args: Args, v: State) -> State:
        r"""Return $\sigma \sigma^\top v$, the covariance of the noise per unit of time applied to a vector; 0 without noise.

        **Cost:** the noise once, and once backwards. No matrix is made.
        """
        return _tree.zeros_like(v) if self.noise is None else self.noise(t, state, args).covariance_product(v)

    def noisy_velocity(self, t: ArrayLike, state: State, args: Args, normals: Any) -> State:
        r"""Return the drift in the sense of Ito plus $\sigma z$ for given numbers z, which is cheaper where both have work in common."""
        drift = self.ito_drift(t, state, args)
        return drift if self.noise is None else _tree.add(drift, self.noise(t, state, args)(normals))

    @property
    def refresh(self) -> Refresh | None:
        """None, or a method `(t, state, args) -> state` that recomputes what the state holds beside the parameters.

        `solve` calls it at the start of every stride, and then integrates stride by stride. The parameters must stay as they are.
        """
        return None

    def validate(self, params: Params, args: Args) -> None:
        """Raise `ValueError` if the flow cannot start from `params`."""
        del params, args

    @property
    def gradient_cost(self) -> float:
        """The cost of one evaluation, in gradients of the loss; NaN where it is not known."""
        return math.nan

    @property
    def recommended_solver(self) -> SolverOptions | None:
        """The `(solver, stepsize_controller, dt0)` that `solve` takes where the user chooses neither a solver nor tolerances.

        None for the default of `solve`, an adaptive solver.
        """
        return None

    @property
    def warmup(self) -> int:
        """How many real steps `solve` takes first where the optimizer's memory is empty and scales its steps, as Adam's."""
        return 0

    @property
    def next_order(self) -> "AbstractFlow | None":
        """The same model with one term (or point) more, None if there is none: `predict_error` checks itself by it."""
        return None

    @property
    def leading_error(self) -> LeadingError | None:
        r"""None, or a method `(t, params, error, args) -> (velocity, error's velocity)`, where the state is the parameters.

        The second is $\dot e$ of the leading error $e$ against the optimizer, $-H e + \eta^{n+1} \xi_n$ for the equation of
        motion with n counter terms. `eomdl.errors.predict_error` integrates both side by side. A subclass with another
        field has another leading error: it defines its own, or sets None.
        """
        return None

    def differentiated(self, state: State) -> Differentiated | None:
        """Return the field whose derivatives the flow takes, and where; None if it takes none.

        `solve` tests at the start whether the derivative is that of the field: it is not where JAX is told another one
        (`stop_gradient`, a custom rule), and not at a kink.
        """
        del state
        return None

    def diagnostics(self, t: ArrayLike, state: State, args: Args) -> dict[str, Diagnostic]:
        """Return named numbers that tell whether the model is valid here, each with its limit; `solve` records them."""
        del t, state, args
        return {}


class AbstractStateStep(StepMap):
    """A step on the state of a flow that is made by `flow.init(params, args)`, not from the parameters only."""

    is_model: ClassVar[bool] = True

    @override
    def init(self, params: Params) -> State:
        raise ValueError(
            f"step_map: expected one that starts at parameters, got {type(self).__name__}, whose state is made by "
            "`flow.init(params, args)`"
        )


def _half_drift_of_noise(noise: Callable[[State], NoiseOperator], x: State) -> State:
    r"""Return $\frac12 \sum_j (\sigma_j \cdot \nabla) \sigma_j$ over the columns of the noise, one after the other."""
    operator = noise(x)

    def along_column(normals: Any) -> State:
        along = jax.jvp(lambda y: noise(y)(normals), (x,), (operator(normals),))[1]
        return _tree.scale(0.5, along)

    return _tree.sum_over_basis(along_column, operator.normals_like)


def as_ode(flow: Any, expected: str = "an eomdl.AbstractFlow") -> AbstractFlow:
    """Return a flow that is a vector field and nothing else. **Raises:** `ValueError` for one with noise, and for another thing."""
    _check.kind("flow", flow, AbstractFlow, expected)
    if flow.noise is not None:
        raise ValueError(
            f"flow: expected one without noise, got {type(flow).__name__}, a stochastic differential equation, whose drift alone is "
            "another model. Paths of it are not computed yet. What it has are `flow.ito_drift(t, state, args)` and "
            "`flow.diffusion(t, state, args, v)`, of which equations for its moments are made (guide Noise); a path of mean losses is "
            "that of eomdl.EquationOfMotion(eomdl.losses.mean_loss(losses), learning_rate)"
        )
    return flow


def map_of(flow: AbstractFlow) -> StepMap:
    """Return the map of a flow. **Raises:** `ValueError` if it has none."""
    if flow.map is None:
        raise ValueError(
            f"flow: expected one that defines `map`, the step that it models, got {type(flow).__name__}"
        )
    return flow.map
