"""What `test_fingerprint.py` runs in other processes and other Pythons: `python fingerprint_runs.py FOLDER`.

It prints the fingerprints of `models()` as JSON, and writes a run with checkpoints into the folder.
"""

import json
import sys

import jax
import jax.numpy as jnp
import optax

import eomdl
from eomdl._fingerprint import fingerprint


INDEXED = "cross entropy, indexed"  # JAX 0.9 indexes by int64, later versions by int32


def logits(params, x, activation, is_normalized):
    x = activation(x @ params["hidden"]["w"] + params["hidden"]["b"][None])
    if is_normalized:
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x @ params["last"]["w"]


def network(activation=jnp.tanh, is_normalized=False, cross_entropy=None):
    """A loss of two layers: of squares, or the cross entropy of a softmax."""

    def loss(params, args):
        x, labels = args
        outputs = logits(params, x, activation, is_normalized)
        if cross_entropy is None:
            return jnp.mean((outputs - jax.nn.one_hot(labels, 3)) ** 2)
        return cross_entropy(outputs, labels).mean()

    return loss


def cross_entropy(outputs, labels):
    return optax.softmax_cross_entropy(outputs, jax.nn.one_hot(labels, 3))


def parameters():
    weights = jnp.linspace(-0.5, 0.5, 20).reshape(4, 5), jnp.linspace(-0.5, 0.4, 15).reshape(5, 3)
    return {"hidden": {"w": weights[0], "b": jnp.zeros(5)}, "last": {"w": weights[1]}}


def data():
    return jnp.sin(jnp.arange(28.0)).reshape(7, 4), jnp.arange(7) % 3


def optimizers():
    return {
        "gradient descent": optax.sgd(0.1),
        "heavy ball": optax.sgd(0.1, momentum=0.9),
        "Nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True),
        "Adam": optax.adam(0.1),
        "AdamW, schedule": optax.adamw(optax.cosine_decay_schedule(0.1, 100)),
        "RMSProp": optax.rmsprop(0.1),
        "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    }


def models():
    """Models that all differ, made anew: their functions are other objects each time."""
    tanh, relu = network(), jax.nn.relu
    steps = {name: eomdl.optimizer_step(tanh, optimizer) for name, optimizer in optimizers().items()}
    losses = {
        "cross entropy": network(cross_entropy=cross_entropy),
        INDEXED: network(cross_entropy=optax.softmax_cross_entropy_with_integer_labels),
        "layer norm": network(is_normalized=True),
        "relu, layer norm": network(relu, is_normalized=True),
        "relu, cross entropy": network(relu, cross_entropy=cross_entropy),
        "gelu": network(jax.nn.gelu),
        "decay": eomdl.WeightDecay(tanh, 0.1),
        "penalty": eomdl.losses.GradientPenalty(tanh, 0.1),
        "chunks": eomdl.losses.MeanOverChunks(tanh, 7),
    }
    return {
        **steps,
        **{name: eomdl.GradientFlow(loss, 0.1) for name, loss in losses.items()},
        **{f"order {order}": eomdl.EquationOfMotion(tanh, 0.1, order) for order in range(3)},
        "rate 0.2": eomdl.EquationOfMotion(tanh, 0.2, 0),
        "gradient flow": eomdl.GradientFlow(tanh, 0.1),
        "Adam, 2 points": eomdl.InterpolatingFlow(steps["Adam"], 0.1, 2),
        "Adam, 3 points": eomdl.InterpolatingFlow(steps["Adam"], 0.1, 3),
    }


def valley(params, args):
    return 0.5 * jnp.sum(params**2 * args) + jnp.mean(jnp.tanh(params))


def solve(folder, num_steps, **options):
    """A run of a flow, whose tolerances are measured, with checkpoints in the folder."""
    flow = eomdl.EquationOfMotion(valley, 0.1, 1)
    store = eomdl.Checkpoints(folder, [num_steps])
    return eomdl.solve(
        flow, jnp.ones(3), num_steps, args=jnp.array([1.0, 2.0, 3.0]), checkpoints=store, **options
    )


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    found = {name: fingerprint(model, parameters(), data()) for name, model in models().items()}
    run = solve(sys.argv[1], 4)
    print(
        json.dumps(
            {
                "jax": jax.__version__,
                "fingerprints": found,
                "atol": float(run.stats.atol),
                "flow": run.stats.flow,
            }
        )
    )
