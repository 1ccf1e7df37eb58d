"""Runs on 8 devices, in a process of its own: prints for each the largest difference to one device, and shardings.

`test_sharding.py` starts it, since the number of devices is fixed when JAX starts.
"""

import json
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import eomdl


jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)

ADAM, SGD = optax.adam(0.02), optax.sgd(0.1, momentum=0.9)
STEPS = 12


def loss(params, args):
    x, y = args
    return jnp.mean((jnp.tanh(x @ params["first"]) @ params["second"] - y) ** 2)


def cases():
    """`{name: (params, args)}`: the same numbers on one device and on eight."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    whole, rows, columns = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((), ("d",), (None, "d")))
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


def runs(params, args):
    """`{name: trajectory}`."""
    options = {"args": args, "observe": {"loss": loss}}
    step = eomdl.optimizer_step(loss, SGD)
    batches = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), args)
    with tempfile.TemporaryDirectory() as folder:
        store = eomdl.Checkpoints(folder, [9])
        whole = eomdl.descend(loss, params, ADAM, STEPS, checkpoints=store, **options)
        resumed = eomdl.descend(loss, params, ADAM, STEPS, resume=store.at(9).end, **options)
        flow = eomdl.EquationOfMotion(loss, 0.1, order=1)
        store = eomdl.Checkpoints(f"{folder}/flow", [9])
        path = eomdl.solve(flow, params, STEPS, checkpoints=store, **options)
        branch = eomdl.solve(flow, params, STEPS, resume=store.at(9).end, **options)
    return {
        "descend": whole,
        "descend, resumed": resumed,
        "equation of motion": path,
        "equation of motion, resumed": branch,
        "interpolating flow": eomdl.solve(eomdl.InterpolatingFlow(step, 0.1, 2), params, STEPS, **options),
        "minibatches": eomdl.solve(
            eomdl.GradientFlow(loss, 0.1), params, 4, **{**options, "batches": batches}
        ),
        "only observables": eomdl.descend(loss, params, ADAM, STEPS, save_params=False, **options),
    }


def apart(a, b):
    """The largest difference of two runs in all that they hold."""
    leaves = [jax.tree.leaves((r.params, r.observables, r.end.state, r.end.params)) for r in (a, b)]
    return max(float(np.max(np.abs(np.asarray(x) - np.asarray(y)))) for x, y in zip(*leaves, strict=True))


def shardings(tree, like):
    """Specs of the arrays that have the shape of a parameter, and which the parameters have."""
    specs = {leaf.shape: str(getattr(leaf.sharding, "spec", None)) for leaf in jax.tree.leaves(like)}
    found = [x for x in jax.tree.leaves(tree) if np.shape(x) in specs]
    return [[str(getattr(x.sharding, "spec", None)), specs[x.shape]] for x in found]


def main():
    found = {}
    reference = {}
    for case, (params, args) in cases().items():
        for name, run in runs(params, args).items():
            reference.setdefault(name, run)
            found[f"{case}: {name}"] = {
                "apart": apart(run, reference[name]),
                "shardings": shardings((run.end.state, run.end.params), params),
                "devices": len(jax.devices()),
                "message": run.message,
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
