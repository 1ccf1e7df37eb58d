"""The step map of any optax optimizer."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from typing_extensions import override

from eomdl import _check, _tree
from eomdl._types import Args, Loss, Params, State
from eomdl.maps.counters import discrete_leaves
from eomdl.maps.step_map import StepMap


_NONLINEAR = 0.1  # part of a step by which two steps of twice the gradient differ from twice as long ones
ExtraArgs = Callable[[Params, Args], dict[str, Any]]


class OptimizerStep(StepMap):
    """The step map that `eomdl.optimizer_step` returns; its state is `(params, optimizer state)`."""

    loss: Loss
    optimizer: optax.GradientTransformation
    extra_args: ExtraArgs | None = None

    @override
    def init(self, params: Params) -> State:
        params = _check.params("params", params)
        discrete_leaves(self.optimizer, params)
        floats = eqx.filter(self.optimizer.init(params), eqx.is_inexact_array)
        # A weak type would become another type in the first step.
        strong = jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), floats)
        return params, strong

    @override
    def params(self, state: State) -> Params:
        return state[0]

    @override
    def __call__(self, state: State, args: Args, k: ArrayLike) -> State:
        updates, new = self._update(state, args, k)
        return optax.apply_updates(state[0], updates), new

    @override
    def increment(self, state: State, args: Args, k: ArrayLike) -> State:
        updates, new = self._update(state, args, k)
        return updates, _tree.sub(new, state[1])

    @override
    def starts_cold(self, params: Params, args: Args) -> bool | jax.Array:
        """Whether a memory, empty at first, makes two steps of twice the gradient other than twice as long."""
        if not jax.tree.leaves(self.init(params)[1]):
            return False
        gradient = jax.grad(self.loss)(params, args)
        extra = {} if self.extra_args is None else self.extra_args(params, args)
        update = optax.with_extra_args_support(self.optimizer).update

        def two_steps(factor: jax.Array) -> Params:
            scaled = _tree.scale(factor, gradient)
            first, state = update(scaled, self.optimizer.init(params), params, **extra)
            return _tree.add(
                first, update(scaled, state, params, **extra)[0]
            )  # a schedule may begin at a rate of 0

        none, once, twice = (two_steps(jnp.asarray(factor)) for factor in (0.0, 1.0, 2.0))
        bend = _tree.sub(_tree.sub(twice, once), _tree.sub(once, none))
        return _tree.norm(bend) > _NONLINEAR * _tree.norm(_tree.sub(once, none))

    def _update(self, state: State, args: Args, k: ArrayLike) -> tuple[Params, Any]:
        params, floats = state
        start = self.optimizer.init(params)
        real = jax.tree.map(eqx.is_inexact_array, start)
        time = jnp.asarray(k, jnp.result_type(float))
        structure = jax.tree.structure(eqx.filter(start, real, inverse=True))
        discrete = [leaf.at(time) for leaf in discrete_leaves(self.optimizer, params)]
        update = gradient_update(self.loss, self.optimizer, self.extra_args)
        updates, new = update(params, eqx.combine(floats, structure.unflatten(discrete)), args)
        # A schedule of a real counter may give another dtype than one of an integer.
        same = jax.tree.map(lambda x, old: x.astype(old.dtype), eqx.filter(new, real), floats)
        return updates, same


def optimizer_step(
    loss: Loss, optimizer: optax.GradientTransformation, extra_args: ExtraArgs | None = None
) -> OptimizerStep:
    r"""Return the step map of any optax optimizer on a loss.

    ```python
    step_map = eomdl.optimizer_step(loss, optax.adam(1e-2))
    run = eomdl.iterate(step_map, params, 100, args=data)
    ```

    $(\theta, s)_{k+1} = \Psi((\theta, s)_k, k)$ with the optimizer's floating-point state s
    (momenta, averages of squares, ...). Step counters are not state: Adam's bias
    correction and learning-rate schedules become explicit functions of the real step number k.

    **Arguments:**

    - `loss`: function `(params, args) -> scalar`.
    - `optimizer`: any `optax.GradientTransformation` whose update is smooth in the step number: the integers in
        its state count the steps, and its flags settle after two steps (those steps are taken as they are).
    - `extra_args`: for optimizers whose update needs more than the gradient, a function
        `(params, args) -> dict` of those keyword arguments, such as
        `lambda p, a: {"value": loss(p, a)}`.

    **Returns:** a `StepMap`: `.init(params) -> state`, `(state, args, k) -> state`,
    `.params(state)`, `.increment(state, args, k)`. The state is `(params, optimizer state)`, with
    `None` in place of the counters.

    **Where it makes sense.** Every optimizer can be stepped, but a flow needs a map that
    is near the identity and smooth. Updates by sign (Lion, signSGD) jump by a whole step
    wherever a sign changes; clipping only has kinks. What has no flow is refused, and `eomdl.descend` runs it:
    random keys, counters that go round (`MultiSteps`, `apply_every`, `lookahead`), line searches, updates that
    are another in every n-th step (`galore`). The optimizer is tried for that on numbers of its own.

    **Exactness.** Schedules of an integer count are float32 inside optax, those of the real k are not: under x64 the
    iterates then differ from those of `eomdl.descend` by the rounding of float32 (1e-9 to 1e-8 over 60 steps).

    **Cost** of a step: one gradient. **Raises:** `ValueError` for a wrong argument; from
    `.init` if the optimizer has no flow.
    """
    _check.function("loss", loss)
    _check.optimizer(optimizer)
    if extra_args is not None:
        _check.function("extra_args", extra_args, "a function (params, args) -> dict")
    return OptimizerStep(loss, optimizer, extra_args)


def gradient_update(
    loss: Loss, optimizer: optax.GradientTransformation, extra_args: ExtraArgs | None
) -> Callable[[Params, Any, Args], tuple[Params, Any]]:
    """Return the function `(params, optimizer state, args) -> (updates, new optimizer state)`."""

    def update(params: Params, optimizer_state: Any, args: Args) -> tuple[Params, Any]:
        gradient = jax.grad(loss)(params, args)
        extra = {} if extra_args is None else extra_args(params, args)
        _check.kind("extra_args", extra, Mapping, "a function (params, args) -> dict")
        try:
            return optax.with_extra_args_support(optimizer).update(gradient, optimizer_state, params, **extra)
        except TypeError as error:
            missing = re.search(r"missing \d+ required keyword-only arguments?: (.*)", str(error))
            if missing is None:
                raise
            raise ValueError(
                "extra_args: expected a function (params, args) -> dict that gives this optimizer "
                f"{missing[1]}, got {sorted(extra) if extra else extra_args}"
            ) from error

    return update
