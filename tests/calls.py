"""A valid call of every public function, for `test_arguments.py`, and the values that are wrong for most arguments.

Whatever has to be computed is `Lazy`: importing this file runs nothing.
"""

import inspect
import tempfile
from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from helpers import LABEL_ARGS, NORMALIZED, VALLEY, normalized_loss, pulled_loss, valley_loss
from registry import FLOWS, NOISY_FLOWS

import eomdl
from eomdl.choice.candidates import Candidate


class Lazy:
    """A value that is computed when it is first asked for."""

    def __init__(self, compute: Callable[[], Any]):
        self._compute = compute

    @cached_property
    def value(self) -> Any:
        return self._compute()


def evaluate(value: Any) -> Any:
    """Return the value itself, or what a lazy one computes."""
    return value.value if isinstance(value, Lazy) else value


SGD = optax.sgd(0.05)
RUN = Lazy(lambda: eomdl.descend(valley_loss, VALLEY, SGD, 12, step_size=0.05, observe={"loss": valley_loss}))
FLOW = eomdl.GradientFlow(valley_loss, 0.05)
PATH = Lazy(lambda: eomdl.solve(FLOW, VALLEY, 12, observe={"loss": valley_loss}))
STEP = Lazy(lambda: eomdl.optimizer_step(valley_loss, SGD))
PAIR = Lazy(lambda: eomdl.runs.stack([VALLEY, OTHER]))
SCALED = Lazy(lambda: eomdl.descend(normalized_loss, NORMALIZED, SGD, 6, args=LABEL_ARGS))
SCALE = eomdl.symmetry.Scaling([("first.w", 1)])
CLOUD = np.random.default_rng(0).normal(size=(130, 3))
OTHER = {"x": jnp.array(2.2, float), "y": jnp.array(0.3, float)}
TRIANGLE = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
NETWORK = (np.array([[1.0, 2.0], [-1.0, 0.5], [0.3, -0.7]]), np.array([0.1, -0.2, 0.05]))


def preactivations(params, x):
    w, b = params
    return w @ x + b


def draw(result):
    return eomdl.plotting.plot(result)  # which takes it by its place: it goes by its type


def runner(**options):
    return eomdl.descend(valley_loss, VALLEY, SGD, 12, **options)


def examples_loss(params, args):
    return jnp.mean((args - params[None]) ** 2)


WRONG: dict[str, Any] = {
    "None": None,
    "a string": "wrong",
    "minus one": -1,
    "minus a half": -0.5,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "huge": 10**30,
    "True": True,
    "a wrong shape": np.ones((2, 70, 3)),  # whose text would fill pages
    "empty": (),
    "an object": object(),
    "complex": 1j,
    "an array": np.array([1.5, 2.5]),
}

RUN_OPTIONS = dict(
    args=None,
    batches=None,
    observe={"loss": valley_loss},
    save_params=True,
    save_steps=1,
    progress=False,
    resume=None,
    checkpoints=None,
    throw=False,
)

MATRICES, LABELS = np.zeros((3, 2, 2)), np.array([0, 0])
COMPARISON = Lazy(lambda: eomdl.compare(RUN.value, {"flow": PATH.value}))
DENSITY = Lazy(lambda: eomdl.curvature.spectral_density(valley_loss, VALLEY, None, 2, 2))
COMPONENTS = Lazy(lambda: eomdl.geometry.principal_components(RUN.value, 1))
SECANTS = Lazy(lambda: eomdl.geometry.secants(runner, {"loss": valley_loss}, num_random=2)["loss"])


def checkpoints():
    folder = tempfile.TemporaryDirectory()
    store = eomdl.Checkpoints(folder.name, 12)
    runner(checkpoints=store)
    store.temporary = folder  # removed with the store
    return store


def choice():
    candidate = Candidate("gradient flow", "gradient flow", "Tsit5", FLOW, {}, 6, 0.1, 0.2, 0.3, 7.0)
    return eomdl.choice.Choice(candidate, (candidate,), 0.5, 100.0, ())


STORE = Lazy(checkpoints)
DIMENSION = Lazy(lambda: eomdl.geometry.intrinsic_dimension(CLOUD))
PLANE = eomdl.geometry.LossPlane(np.linspace(0, 1, 3), np.linspace(0, 1, 3), np.ones((3, 3)))


def flow_calls() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return a call of every class of flows in the registry, with the arguments of its first entry: they are its fields."""
    calls: dict[str, tuple[Any, dict[str, Any]]] = {}
    for entry in [*FLOWS, *NOISY_FLOWS]:
        flow = entry.make(valley_loss, 0.05)
        kind = type(flow)
        name = kind.__name__ if hasattr(eomdl, kind.__name__) else f"flows.{kind.__name__}"
        calls.setdefault(
            name, (kind, {key: getattr(flow, key) for key in inspect.signature(kind).parameters})
        )
    return calls


CALLS: dict[str, tuple[Any, dict[str, Any]]] = flow_calls() | {
    "descend": (
        eomdl.descend,
        dict(
            loss=valley_loss,
            params=VALLEY,
            optimizer=SGD,
            num_steps=12,
            step_size=0.05,
            extra_args=None,
            monitors=[],
            **RUN_OPTIONS,
        ),
    ),
    "iterate": (
        eomdl.iterate,
        dict(step_map=STEP, params=VALLEY, num_steps=12, step_size=0.05, **RUN_OPTIONS),
    ),
    "solve": (
        eomdl.solve,
        dict(
            flow=FLOW,
            params=VALLEY,
            num_steps=12,
            observe_state=None,
            rtol=None,
            atol=None,
            solver=None,
            stepsize_controller=None,
            adjoint=None,
            dt0=1.0,
            max_steps=4096,
            estimate_error=True,
            diagnose=True,
            warmup=None,
            **RUN_OPTIONS,
        ),
    ),
    "compare": (
        eomdl.compare,
        dict(reference=RUN, trajectories=Lazy(lambda: {"flow": PATH.value}), smooth=1),
    ),
    "citation": (eomdl.citation, dict(flow=FLOW)),
    "counterterms": (eomdl.counterterms, dict(loss=valley_loss, params=VALLEY, order=1, args=None)),
    "on_batch": (eomdl.on_batch, dict(function=valley_loss)),
    "optimizer_step": (eomdl.optimizer_step, dict(loss=valley_loss, optimizer=SGD, extra_args=None)),
    "report": (
        eomdl.report,
        dict(
            loss=valley_loss,
            params=VALLEY,
            learning_rate=0.05,
            num_steps=12,
            optimizer=optax.sgd,
            args=None,
            batches=None,
            quick=True,
            progress=False,
        ),
    ),
    "sharpness": (eomdl.sharpness, dict(loss=valley_loss, num_matvecs=4, rtol=0.1)),
    "WeightDecay": (eomdl.WeightDecay, dict(loss=valley_loss, weight_decay=0.1)),
    "Ensemble": (eomdl.Ensemble, dict(member=STEP, args_axis=None)),
    "runs.RowsOnDisk": (eomdl.runs.RowsOnDisk, dict(folder="nowhere")),
    "Checkpoints": (
        eomdl.Checkpoints,
        dict(folder="nowhere", schedule=5, events=None, like=None, sharded=False),
    ),
    "flows.SecondMoment": (eomdl.flows.SecondMoment, dict(decay=0.9, eps=1e-8, scalar=False)),
    "flows.rmsprop_flow": (
        eomdl.flows.rmsprop_flow,
        dict(loss=valley_loss, learning_rate=0.05, decay=0.9, eps=1e-8, order=1),
    ),
    "maps.GradientDescentStep": (
        eomdl.maps.GradientDescentStep,
        dict(loss=valley_loss, learning_rate=0.1),
    ),
    "choice.choose_points": (
        eomdl.choice.choose_points,
        dict(step_map=STEP, params=VALLEY, num_steps=4, args=None, stride=1, max_points=2, start=None),
    ),
    "choice.fitted_weights": (
        eomdl.choice.fitted_weights,
        dict(step_map=STEP, params=VALLEY, points=3, num_steps=4, args=None, stride=1, order=1, start=None),
    ),
    "flows.minimax_weights": (eomdl.flows.minimax_weights, dict(points=3, bound=0.8, order=None)),
    "flows.Target": (eomdl.flows.Target, dict(name="means", weights=((0, 1.0),))),
    "flows.step_data": (eomdl.flows.step_data, dict(args=None, n=0)),
    "observe.angle_per_step": (eomdl.observe.angle_per_step, dict(block=CLOUD)),
    "observe.block_norm": (eomdl.observe.block_norm, dict(where="x")),
    "telemetry.EdgeTelemetry": (
        eomdl.telemetry.EdgeTelemetry,
        dict(loss=valley_loss, optimizer=SGD, along_every=10, edge_every=50, k=1, num_matvecs=6),
    ),
    "observe.shift_component": (eomdl.observe.shift_component, dict(where="x", axis=-1)),
    "observe.decay_rate": (
        eomdl.observe.decay_rate,
        dict(values=np.array([3.0, 2.0, 1.0]), learning_rate=0.05),
    ),
    "observe.lie_derivative": (eomdl.observe.lie_derivative, dict(observable=valley_loss, flow=FLOW)),
    "curvature.eigenpairs": (
        eomdl.curvature.eigenpairs,
        dict(
            loss=valley_loss,
            params=VALLEY,
            args=None,
            k=1,
            start=None,
            preconditioner=None,
            num_matvecs=2,
            rtol=1e-3,
        ),
    ),
    "curvature.eigenpairs_by_block": (
        eomdl.curvature.eigenpairs_by_block,
        dict(loss=valley_loss, params=VALLEY, args=None, k=1, num_matvecs=2, rtol=1e-3),
    ),
    "curvature.eigenvalues_over_batches": (
        eomdl.curvature.eigenvalues_over_batches,
        dict(loss=pulled_loss, params=VALLEY, batches=np.array([0.1, 0.2]), k=1, num_matvecs=2, rtol=1e-3),
    ),
    "curvature.spectral_density": (
        eomdl.curvature.spectral_density,
        dict(loss=valley_loss, params=VALLEY, args=None, num_samples=2, num_matvecs=2, seed=0),
    ),
    "curvature.trace": (
        eomdl.curvature.trace,
        dict(loss=valley_loss, params=VALLEY, args=None, num_samples=2, seed=0),
    ),
    "curvature.eigenvalue_gradient": (
        eomdl.curvature.eigenvalue_gradient,
        dict(loss=valley_loss, params=VALLEY, args=None, vector=OTHER),
    ),
    "curvature.third_derivative": (
        eomdl.curvature.third_derivative,
        dict(loss=valley_loss, params=VALLEY, args=None, u=OTHER, v=VALLEY),
    ),
    "errors.convergence_study": (
        eomdl.errors.convergence_study,
        dict(
            flow=lambda rate: eomdl.GradientFlow(valley_loss, rate),
            loss=valley_loss,
            params=VALLEY,
            learning_rates=[0.1, 0.05],
            time=0.2,
            warmup=0.0,
            optimizer=optax.sgd,
            args=None,
        ),
    ),
    "errors.local_error": (
        eomdl.errors.local_error,
        dict(flow=FLOW, reference=RUN, args=None, batches=None, steps=None),
    ),
    "choice.choose_flow": (
        eomdl.choice.choose_flow,
        dict(
            loss=valley_loss,
            params=VALLEY,
            optimizer=SGD,
            num_steps=12,
            tolerance=0.1,
            learning_rate=0.05,
            args=None,
            start=None,
            probe_steps=4,
            budget=None,
            progress=False,
        ),
    ),
    "errors.largest_learning_rate": (
        eomdl.errors.largest_learning_rate,
        dict(
            loss=valley_loss,
            params=VALLEY,
            time=0.2,
            tolerance=1e-3,
            order=0,
            args=None,
            relative=False,
            points=4,
            progress=False,
        ),
    ),
    "errors.predict_error": (
        eomdl.errors.predict_error,
        dict(flow=FLOW, params=VALLEY, num_steps=4, leading=None, check=False, diagnose=True),
    ),
    "errors.observed_order": (
        eomdl.errors.observed_order,
        dict(learning_rates=[0.1, 0.05], errors=[0.2, 0.1]),
    ),
    "errors.variances_along": (
        eomdl.errors.variances_along,
        dict(reference=RUN, steps=[6], axes=[[[1.0, 0.0]]], window=4),
    ),
    "losses.GradientPenalty": (eomdl.losses.GradientPenalty, dict(loss=valley_loss, coefficient=0.1)),
    "losses.MeanOverChunks": (
        eomdl.losses.MeanOverChunks,
        dict(loss=examples_loss, chunk_size=10, weights=None),
    ),
    "losses.OnHost": (eomdl.losses.OnHost, dict(arrays=CLOUD)),
    "losses.mean_loss": (eomdl.losses.mean_loss, dict(losses=valley_loss)),
    "noise.MinibatchNoise": (
        eomdl.noise.MinibatchNoise,
        dict(losses=valley_loss, batch_size=2, replacement=False),
    ),
    "noise.IsotropicNoise": (eomdl.noise.IsotropicNoise, dict(temperature=0.1)),
    "noise.DiagonalNoise": (eomdl.noise.DiagonalNoise, dict(scale=0.1)),
    "noise.NoiseOperator": (
        eomdl.noise.NoiseOperator,
        dict(function=lambda normals: normals, normals_like=VALLEY),
    ),
    "noise.quadratic_law": (
        eomdl.noise.quadratic_law,
        dict(hessian=np.eye(2), covariance=np.eye(2), learning_rate=0.1),
    ),
    "runs.each": (eomdl.runs.each, dict(observable=valley_loss, args_axis=None)),
    "runs.members": (
        eomdl.runs.members,
        dict(trajectory=Lazy(lambda: eomdl.iterate(eomdl.Ensemble(STEP.value), PAIR.value, 2))),
    ),
    "runs.stack": (eomdl.runs.stack, dict(params=[VALLEY, OTHER])),
    "geometry.barriers": (
        eomdl.geometry.barriers,
        dict(
            loss=valley_loss,
            runs=PAIR,
            args=None,
            num_points=5,
            batch_size=8,
            progress=False,
        ),
    ),
    "geometry.clusters": (
        eomdl.geometry.clusters,
        dict(matrix=np.zeros((3, 3)), threshold=0.1, linkage="complete"),
    ),
    "geometry.count_regions_on_line": (
        eomdl.geometry.count_regions_on_line,
        dict(preactivations=preactivations, params=NETWORK, a=np.zeros(2), b=np.ones(2), max_regions=64),
    ),
    "geometry.region_map": (
        eomdl.geometry.region_map,
        dict(
            preactivations=preactivations,
            params=NETWORK,
            corners=TRIANGLE,
            resolution=8,
            margin=0.2,
            batch_size=64,
        ),
    ),
    "geometry.path_shape": (eomdl.geometry.path_shape, dict(trajectory=RUN)),
    "geometry.path_points": (eomdl.geometry.path_points, dict(trajectory=RUN, num_points=5, seed=0)),
    "geometry.principal_components": (eomdl.geometry.principal_components, dict(trajectory=RUN, k=1)),
    "geometry.flow_curvature": (eomdl.geometry.flow_curvature, dict(flow=FLOW)),
    "geometry.flow_torsion": (eomdl.geometry.flow_torsion, dict(flow=FLOW)),
    "geometry.gradient_points": (
        eomdl.geometry.gradient_points,
        dict(loss=examples_loss, params=jnp.ones(3), args=CLOUD, batch_size=8),
    ),
    "geometry.intrinsic_dimension": (
        eomdl.geometry.intrinsic_dimension,
        dict(points=CLOUD, estimator=None, blocks=3, partitions=1, seed=0),
    ),
    "geometry.participation_ratio": (eomdl.geometry.participation_ratio, dict(points=CLOUD)),
    "geometry.loss_plane": (
        eomdl.geometry.loss_plane,
        dict(
            loss=valley_loss,
            centre=VALLEY,
            u=OTHER,
            v=VALLEY,
            x=np.linspace(0, 1, 3),
            y=np.linspace(0, 1, 3),
            args=None,
            progress=False,
        ),
    ),
    "geometry.secant": (eomdl.geometry.secant, dict(loss=valley_loss, end=OTHER, num_random=2)),
    "choice.Choice.with_runs": (
        Lazy(lambda: choice().with_runs),
        dict(real=RUN, paths=Lazy(lambda: {choice().chosen.name: PATH.value})),
    ),
    "geometry.secants": (
        eomdl.geometry.secants,
        dict(run=runner, losses={"loss": valley_loss}, end=None, num_random=2),
    ),
    "symmetry.Scaling": (eomdl.symmetry.Scaling, dict(incoming=["first.w"], outgoing=())),
    "symmetry.Translation": (eomdl.symmetry.Translation, dict(block="head", axis=-1)),
    "symmetry.Scaling.transform": (SCALE.transform, dict(params=NORMALIZED, amount=np.zeros(4))),
    "symmetry.Translation.transform": (
        eomdl.symmetry.Translation("head").transform,
        dict(params=NORMALIZED, amount=np.zeros(4)),
    ),
    "symmetry.check": (
        eomdl.symmetry.check,
        dict(loss=normalized_loss, params=NORMALIZED, symmetry=SCALE, args=LABEL_ARGS, tolerance=None),
    ),
    "symmetry.propose": (
        eomdl.symmetry.propose,
        dict(loss=normalized_loss, params=NORMALIZED, args=LABEL_ARGS, tolerance=None),
    ),
    "symmetry.conservation": (
        eomdl.symmetry.conservation,
        dict(run=SCALED, symmetry=SCALE, learning_rate=0.05, weight_decay=0.0, momentum=0.0, models=None),
    ),
    "symmetry.effective_learning_rate": (
        eomdl.symmetry.effective_learning_rate,
        dict(norm=1.0, learning_rate=0.05, momentum=0.0),
    ),
    "symmetry.equilibrium_angle": (
        eomdl.symmetry.equilibrium_angle,
        dict(learning_rate=0.05, weight_decay=0.1, momentum=0.0),
    ),
    "symmetry.equilibrium_norm": (
        eomdl.symmetry.equilibrium_norm,
        dict(norm=1.0, gradient_norm=0.5, learning_rate=0.05, weight_decay=0.1, momentum=0.0),
    ),
    "symmetry.scale_norm_after_step": (
        eomdl.symmetry.scale_norm_after_step,
        dict(norm=1.0, gradient_norm=0.5, learning_rate=0.05, weight_decay=0.1),
    ),
    "symmetry.scale_norm_rate": (
        eomdl.symmetry.scale_norm_rate,
        dict(norm=1.0, gradient_norm=0.5, learning_rate=0.05, weight_decay=0.1, order=1),
    ),
    "symmetry.translation_decay_rate": (
        eomdl.symmetry.translation_decay_rate,
        dict(learning_rate=0.05, weight_decay=0.1, order=1),
    ),
    "plotting.plot_barriers": (
        eomdl.plotting.plot_barriers,
        dict(steps=[0, 1, 2], matrices=MATRICES, labels=LABELS),
    ),
    "plotting.plot_development": (
        eomdl.plotting.plot_development,
        dict(
            steps=[0, 1, 2],
            matrices=MATRICES,
            losses=np.ones((3, 2)),
            labels=LABELS,
            threshold=0.5,
            intervention=None,
            linkage="complete",
        ),
    ),
    "plotting.plot": (draw, dict(result=DIMENSION)),
    "plotting.plot of a plane": (
        PLANE.plot,
        dict(paths={"GD": np.zeros((4, 2))}),
    ),
    "plotting.plot of a predicted error": (
        Lazy(lambda: eomdl.errors.predict_error(FLOW, VALLEY, 1, check=False).plot),
        dict(measured=None),
    ),
    "plotting.plot of a spectrum": (
        Lazy(lambda: eomdl.curvature.spectral_density(valley_loss, VALLEY, None, 2, 2).plot),
        dict(width=None),
    ),
    "runs.Crossing": (eomdl.runs.Crossing, dict(observable="loss", level=1.0, rising=True)),
    "runs.logarithmic_steps": (eomdl.runs.logarithmic_steps, dict(num_steps=10, per_decade=3)),
    "runs.Trajectory.rows": (Lazy(lambda: RUN.value.rows), dict(index=slice(2))),
    "runs.Trajectory.at": (Lazy(lambda: RUN.value.at), dict(step=3)),
    "runs.Trajectory.smoothed": (Lazy(lambda: RUN.value.smoothed), dict(window=2)),
    "runs.Trajectory.averaged": (
        Lazy(lambda: RUN.value.averaged),
        dict(target=eomdl.flows.Target("midpoints", ((0, 0.5), (1, 0.5)))),
    ),
    "runs.Trajectory.load": (eomdl.Trajectory.load, dict(path="nowhere", like=None)),
    "runs.Trajectory.save": (Lazy(lambda: RUN.value.save), dict(path="run.npz", events=())),
    "runs.Trajectory.map_columns": (Lazy(lambda: RUN.value.map_columns), dict(function=np.asarray)),
    "runs.Trajectory.table": (Lazy(lambda: RUN.value.table), dict(rows=3)),
    "runs.End": (
        lambda **fields: runner(resume=eomdl.runs.End(**fields)),
        dict(step=3, state=None, params=VALLEY, stats=Lazy(lambda: RUN.value.stats)),
    ),
    "runs.stacked": (lambda batches: runner(batches=eomdl.runs.stacked(batches)), dict(batches=np.ones(12))),
    "runs.stream": (lambda batches: runner(batches=eomdl.runs.stream(batches)), dict(batches=[1.0] * 12)),
    "runs.Crossing.__call__": (eomdl.runs.Crossing("loss", 1.0), dict(values=np.array([3.0, 2.0]))),
    "Checkpoints.at": (Lazy(lambda: STORE.value.at), dict(step=0)),
    "Checkpoints.observe": (
        Lazy(lambda: STORE.value.observe),
        dict(observe={"loss": valley_loss}, args=None, progress=False),
    ),
    "Comparison.load": (eomdl.Comparison.load, dict(path="nowhere")),
    "Comparison.save": (Lazy(lambda: COMPARISON.value.save), dict(path="comparison.npz")),
    "Comparison.table": (Lazy(lambda: COMPARISON.value.table), dict(rows=3)),
    "Comparison.at_multiples_of": (Lazy(lambda: COMPARISON.value.at_multiples_of), dict(stride=2)),
    "curvature.SpectralDensity.at": (
        Lazy(lambda: DENSITY.value.at),
        dict(points=np.linspace(0, 1, 3), width=0.5),
    ),
    "curvature.SpectralDensity.interval": (
        Lazy(lambda: DENSITY.value.interval),
        dict(points=np.linspace(0, 1, 3), width=0.5),
    ),
    "curvature.SpectralDensity.mean": (Lazy(lambda: DENSITY.value.mean), dict(function=np.square)),
    "geometry.PathComponents.direction": (Lazy(lambda: COMPONENTS.value.direction), dict(i=0)),
    "geometry.PathComponents.project": (Lazy(lambda: COMPONENTS.value.project), dict(trajectory=RUN)),
    "geometry.Secants.parts_from": (
        Lazy(lambda: SECANTS.value.parts_from),
        dict(other=SECANTS, tolerance=0.1),
    ),
    "series.ButcherTableau": (eomdl.series.ButcherTableau, dict(a=((),), b=(1,))),
    "series.modified_equation": (eomdl.series.modified_equation, dict(n=3, method=eomdl.series.HEUN)),
}
