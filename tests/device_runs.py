"""Runs on 8 devices, in a process of its own: prints for each the largest difference to one device, and shardings.

`test_devices.py` starts it, since the number of devices is fixed when JAX starts.
"""

import dataclasses
import json
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import eomdl
from eomdl.errors.error_flows import LeadingErrorFlow, WithError
from eomdl.maps.response import linear_response


jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)

ADAM, SGD = optax.adam(0.02), optax.sgd(0.1, momentum=0.9)
STEPS = 12


def loss(params, args):
    x, y = args
    return jnp.mean((jnp.tanh(x @ params["first"]) @ params["second"] - y) ** 2)


def places(kind):
    """Whole on each of eight devices, split by rows, split by columns."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    return [NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((), ("d", None), (None, "d"))]


def cases():
    """`{name: (params, args)}`: the same numbers on one device and on eight."""
    whole, rows, columns = places(AxisType.Auto)
    rng = np.random.default_rng(0)
    data = rng.normal(size=(32, 6)), rng.normal(size=(32, 8))
    weights = {"first": rng.normal(size=(6, 16)) / 3, "second": rng.normal(size=(16, 8)) / 4}
    split = jax.device_put(weights, {"first": columns, "second": rows})
    return {
        "one device": jax.tree.map(jnp.asarray, (weights, data)),
        "data": (jax.device_put(weights, whole), jax.device_put(data, rows)),
        "parameters": (split, jax.device_put(data, whole)),
        "both": (split, jax.device_put(data, rows)),
    }


def runs(params, args, rest):
    """`{name: trajectory}`; those that share all code of runs with the others only for the `rest`."""
    options = {"args": args, "observe": {"loss": loss}}
    step = eomdl.optimizer_step(loss, SGD)
    batches = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), args)
    with tempfile.TemporaryDirectory() as folder:
        store = eomdl.Checkpoints(folder, [9])
        whole = eomdl.descend(loss, params, ADAM, STEPS, checkpoints=store, **options)
        resumed = eomdl.descend(loss, params, ADAM, STEPS, resume=store.at(9).end, **options)
        flow = eomdl.EquationOfMotion(loss, 0.1, order=1)
        store = eomdl.Checkpoints(f"{folder}/flow", [9], sharded=True)
        path = eomdl.solve(flow, params, STEPS, checkpoints=store, **options)
        branch = eomdl.solve(flow, params, STEPS, resume=store.at(9).end, **options)
    found = {
        "descend": whole,
        "descend, resumed": resumed,
        "equation of motion": path,
        "equation of motion, resumed": branch,
    }
    if rest:
        given = options | {"rtol": 1e-8, "atol": 1e-10, "estimate_error": False, "diagnose": False}
        observe = {"loss": loss, "sharpness": eomdl.sharpness(loss, 4)}
        found |= {
            "minibatches": eomdl.solve(
                eomdl.GradientFlow(loss, 0.1), params, 4, **{**given, "batches": batches}
            ),
            "momentum flow": eomdl.solve(eomdl.flows.MomentumFlow(loss, 0.1, 0.5), params, STEPS, **given),
            "interpolating flow": eomdl.solve(eomdl.InterpolatingFlow(step, 0.1, 2), params, STEPS, **given),
            "only observables": eomdl.descend(
                loss, params, ADAM, STEPS, args=args, observe=observe, save_params=False
            ),
        }
    return found


def apart(a, b):
    """The largest difference of two runs in all that they hold."""
    leaves = [jax.tree.leaves((r.params, r.observables, r.end.state, r.end.params)) for r in (a, b)]
    return max(float(np.max(np.abs(np.asarray(x) - np.asarray(y)))) for x, y in zip(*leaves, strict=True))


def kept(tree, like):
    """For every array that has the shape of a parameter: whether it is spread as that is, and over how many devices."""
    places = {leaf.shape: leaf.sharding for leaf in jax.tree.leaves(like)}
    found = [x for x in jax.tree.leaves(tree) if np.shape(x) in places]
    return [[x.sharding.is_equivalent_to(places[x.shape], x.ndim), spread_over(x)] for x in found]


def spread_over(x):
    """The number of devices that have a part of their own."""
    return len(set(map(str, x.sharding.devices_indices_map(x.shape).values())))


def ensemble(place):
    """16 members, with the axis of members at a place."""
    params, args = cases()["one device"]
    stacked = jax.tree.map(lambda x: jnp.stack([x * (1 + i / 20) for i in range(16)]), params)
    map_of_members = eomdl.Ensemble(eomdl.optimizer_step(loss, SGD))
    observe = {"loss": eomdl.runs.each(loss)}
    return eomdl.iterate(map_of_members, jax.device_put(stacked, place), STEPS, args=args, observe=observe)


def ensembles():
    """Members split over devices, beside all on one."""
    one, split = (
        ensemble(jax.devices()[0]),
        ensemble(places(AxisType.Auto)[1].update(spec=PartitionSpec("d"))),
    )
    return {"apart": apart(one, split), "spread": [spread_over(x) for x in jax.tree.leaves(split.end.state)]}


def from_another_topology():
    """A sharded checkpoint of eight devices from which a run on one continues, and the other way round."""
    found = {}
    every = cases()
    for here, there in (("both", "one device"), ("one device", "parameters")):
        with tempfile.TemporaryDirectory() as folder:
            store = eomdl.Checkpoints(folder, [4], sharded=True)
            run = eomdl.descend(loss, every[here][0], ADAM, STEPS, args=every[here][1], checkpoints=store)
            params, args = every[there]
            resumed = eomdl.descend(loss, params, ADAM, STEPS, args=args, resume=store.at(4).end)
            found[f"{here} to {there}"] = {
                "apart": apart(run.rows(slice(4, None)), resumed),
                "kept": kept(resumed.end.state, params),
                "read": float(
                    np.asarray(store.at(4).end.params["first"])[2, 3] - run.params["first"][4, 2, 3]
                ),
            }
    return found


def bytes_on_a_device():
    """Of a state, and of what the compiled field of order 1 takes, on 1, 2, 4 and 8 devices."""
    found = {}
    flow = eomdl.EquationOfMotion(loss, 0.1, 1)
    for n in (1, 2, 4, 8):
        mesh = jax.make_mesh((n,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])
        columns, rows, whole = (
            NamedSharding(mesh, PartitionSpec(*s)) for s in ((None, "d"), ("d", None), ())
        )
        params = jax.device_put(
            {"first": jnp.ones((64, 512)), "second": jnp.ones((512, 64))}, {"first": columns, "second": rows}
        )
        args = jax.device_put((jnp.ones((8, 64)), jnp.ones((8, 64))), whole)
        run = eomdl.descend(loss, params, ADAM, 2, args=args, save_params=False)
        memory = jax.jit(lambda p, a: flow(0.0, p, a)).lower(params, args).compile().memory_analysis()
        found[n] = {
            "state": sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(run.end.state)),
            "field": memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes,
        }
    return found


def message(function):
    """Of the ValueError that it raises."""
    try:
        function()
    except ValueError as error:
        return str(error)
    return ""


def explicit():
    """On a mesh of Explicit axes: a loss that names the sharding of its products, and one that does not."""
    whole, rows, columns = places(AxisType.Explicit)
    one, data = cases()["one device"]
    params = jax.device_put(one, {"first": columns, "second": rows})
    args = jax.device_put(data, whole)

    def named(params, args):
        x, y = args
        hidden = jnp.tanh(jnp.dot(x, params["first"], out_sharding=columns))
        return jnp.mean((jnp.dot(hidden, params["second"], out_sharding=whole) - y) ** 2)

    with jax.set_mesh(whole.mesh):
        run = eomdl.descend(named, params, ADAM, STEPS, args=args)
        flow = eomdl.GradientFlow(named, 0.1)
        return {
            "apart": apart(run, eomdl.descend(loss, one, ADAM, STEPS, args=data)),
            "kept": kept(run.end.state, params),
            "not named": message(lambda: eomdl.descend(loss, params, ADAM, STEPS, args=args)),
            "solve": message(lambda: eomdl.solve(flow, params, STEPS, args=args)),
        }


def predicted():
    """The error of gradient flow before the run, on one device and on eight; where what is recorded of it is."""
    every = cases()
    vectors = [
        eomdl.errors.predict_error(
            eomdl.GradientFlow(loss, 0.1), p, 4, args=a, check=False, diagnose=False
        ).vector
        for p, a in (every["one device"], every["both"])
    ]
    leaves = zip(*map(jax.tree.leaves, vectors), strict=True)
    params, _ = every["both"]
    flow = LeadingErrorFlow(eomdl.GradientFlow(loss, 0.1))
    found = jax.jit(lambda state: flow.error(0.0, state, None))(WithError(params, params))
    return {"apart": max(float(np.max(np.abs(x - y))) for x, y in leaves), "kept": kept(found, params)}


def watched(params, args):
    """The telemetry of two steps of Adam."""
    telemetry = eomdl.telemetry.EdgeTelemetry(loss, ADAM, along_every=1, edge_every=1, k=2, num_matvecs=16)
    state = ADAM.init(params)
    for step in range(2):
        gradient = jax.grad(loss)(params, args)
        telemetry.measure(step, params, state, args, gradient=gradient)
        updates, state = ADAM.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return telemetry


def telemetries():
    """How far all numbers of a report are from those on one device, where the eigenvectors are, and what the rates gather."""
    every = cases()
    reference = dataclasses.asdict(watched(*every["one device"]).results())
    found = {}
    for case in ("data", "parameters", "both"):
        params, _ = every[case]
        telemetry = watched(*every[case])
        reports = dataclasses.asdict(telemetry.results()), reference
        leaves = ([x for x in jax.tree.leaves(report) if not isinstance(x, str)] for report in reports)
        pairs = zip(*leaves, strict=True)
        vectors = zip(*map(jax.tree.leaves, (telemetry._vectors, params)), strict=True)
        response = jax.jit(lambda s, p: linear_response(ADAM, s, p, p)).lower(ADAM.init(params), params)
        found[case] = {
            "apart": max(float(np.max(np.abs(x - 1.0 * y) / np.maximum(np.abs(y), 1e-3))) for x, y in pairs),
            "kept": [
                [x.sharding.shard_shape(x.shape)[1:] == p.sharding.shard_shape(p.shape), spread_over(x)]
                for x, p in vectors
            ],
            "all-gather": response.compile().as_text().count("all-gather("),
        }
    return found


def collectives_over_chunks():
    """How often the compiled field of order 1 gathers, its data spread: by chunks that divide them evenly, and that do not."""
    params, args = cases()["data"]

    def gathers(size):
        field = eomdl.EquationOfMotion(eomdl.losses.MeanOverChunks(loss, size), 0.1, order=1)
        text = jax.jit(lambda p, args: field(0.0, p, args)).lower(params, args).compile().as_text()
        return {"all-reduce": text.count("all-reduce("), "all-gather": text.count("all-gather(")}

    return {"even": gathers(16), "uneven": gathers(12)}


def main():
    found = {}
    reference = {}
    for case, (params, args) in cases().items():
        for name, run in runs(params, args, case in ("one device", "both")).items():
            reference.setdefault(name, run)
            found[f"{case}: {name}"] = {
                "apart": apart(run, reference[name]),
                "kept": kept((run.end.state, run.end.params), params),
                "devices": len(jax.devices()),
                "message": run.message,
            }
    found["ensembles"] = ensembles()
    found["topology"] = from_another_topology()
    found["bytes"] = bytes_on_a_device()
    found["explicit"] = explicit()
    found["predicted"] = predicted()
    found["telemetry"] = telemetries()
    found["chunks"] = collectives_over_chunks()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
