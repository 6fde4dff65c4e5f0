"""Trains a small network data-parallel, on all devices of all processes: see test_processes.py.

Every process runs this script, with its own number. Parameters are replicated, the optimizer's
state is divided (ZeRO-1), and if the directory has checkpoints, the run continues from the latest,
which any number of processes and devices may have written.

Sums over devices round differently on another number of devices, or with other connections. Nothing
else may depend on that, and to show it, this script adds integers.
"""

import argparse
import functools
import os
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import adam_jax

STEPS = 10
SAVE_EVERY = 3
PARTS, ROWS = 16, 8  # a batch: one part or more for each device
FEATURES, HIDDEN, CLASSES = 63, 128, 32  # 63 rows of weights can't be divided, their columns can
UNIT = 2.0**-22  # of losses and gradients, which may average up to 32 before int32 overflows

SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, STEPS)
ADAMW = functools.partial(adam_jax.adamw, SCHEDULE)
OPTIMIZERS = {
    "float32": ADAMW(),
    "int8": adam_jax.master_weights(ADAMW(mu_dtype="int8", nu_dtype="int8"), "int8"),
}
PARAM_DTYPES = {"float32": jnp.float32, "int8": jnp.bfloat16}


def init_params(dtype):
    rng = np.random.default_rng(0)
    return {
        "kernel": rng.normal(0, FEATURES**-0.5, (FEATURES, HIDDEN)).astype(dtype),
        "bias": np.zeros(HIDDEN, dtype),
        "head": rng.normal(0, HIDDEN**-0.5, (HIDDEN, CLASSES)).astype(dtype),
    }


def part_of_batch(step, part):
    """Returns random inputs, and the classes that a linear teacher finds in them."""
    teacher = np.random.default_rng(1).standard_normal((FEATURES, CLASSES), np.float32)
    inputs = np.random.default_rng((step, part)).standard_normal((ROWS, FEATURES), np.float32)
    return inputs, np.argmax(inputs @ teacher, axis=-1).astype(np.int32)


def batch(step, sharding):
    """Returns a batch on all devices; each process makes only its own parts."""
    parts = np.split(np.arange(PARTS), jax.process_count())[jax.process_index()]
    arrays = zip(*(part_of_batch(step, part) for part in parts), strict=True)
    return [jax.make_array_from_process_local_data(sharding, np.stack(x)) for x in arrays]


def loss_of(params, inputs, labels):
    inputs = inputs.astype(params["kernel"].dtype)
    hidden = jax.nn.relu(inputs @ params["kernel"] + params["bias"])
    logits = (hidden @ params["head"]).astype(jnp.float32)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def loss_and_gradients(mesh, params, inputs, labels):
    """Returns means over the parts of a batch, with the same bits wherever the parts are."""

    def of_part(params, inputs, labels):
        outcome = jax.value_and_grad(loss_of)(params, inputs, labels)
        return jax.tree.map(lambda x: jnp.round(x.astype(jnp.float32) / UNIT), outcome)

    # Unchecked: the check would sum gradients of replicated parameters before we round.
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data"), PartitionSpec("data")),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    def sums(params, inputs, labels):
        # A loop, because the product of larger matrices may sum in another order.
        parts = jax.lax.map(lambda part: of_part(params, *part), (inputs, labels))
        local = jax.tree.map(lambda x: jnp.sum(x.astype(jnp.int32), axis=0), parts)
        return jax.lax.psum(local, "data")

    loss, gradients = jax.tree.map(
        lambda x: x.astype(jnp.float32) * (UNIT / PARTS), sums(params, inputs, labels)
    )
    return loss, jax.tree.map(lambda g, p: g.astype(p.dtype), gradients, params)


def train(directory, name, dies_at):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    replicated = NamedSharding(mesh, PartitionSpec())
    divided = NamedSharding(mesh, PartitionSpec("data"))
    optimizer = OPTIMIZERS[name]
    params = jax.jit(lambda: init_params(PARAM_DTYPES[name]), out_shardings=replicated)()
    shardings = adam_jax.state_shardings(optimizer, params, axis="data")
    state = jax.jit(optimizer.init, out_shardings=shardings)(params)

    @functools.partial(
        jax.jit, donate_argnums=(0, 1), out_shardings=(replicated, shardings, replicated)
    )
    def step(params, state, inputs, labels):
        loss, gradients = loss_and_gradients(mesh, params, inputs, labels)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(directory / "checkpoints", options=options) as manager:
        first = manager.latest_step() or 0
        if first:
            like = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
                {"params": params, "state": state},
            )
            restored = manager.restore(first, args=ocp.args.StandardRestore(like))
            params, state = restored["params"], restored["state"]
        losses = []
        for i in range(first, STEPS):
            if i == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            params, state, loss = step(params, state, *batch(i, divided))
            losses.append(float(loss))
            if (i + 1) % SAVE_EVERY == 0:
                tree = {"params": params, "state": state}
                manager.save(i + 1, args=ocp.args.StandardSave(tree))
    write(directory, {"params": params, "state": state}, losses, replicated)


def write(directory, tree, losses, replicated):
    """Writes the bits of all leaves, and how many of their elements each device here has."""
    results: dict[str, Any] = {"losses": np.array(losses, np.float32)}
    whole = jax.jit(lambda tree: tree, out_shardings=replicated)(tree)
    for (path, x), y in zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(whole), strict=True):
        name = jax.tree_util.keystr(path)
        results[name] = np.asarray(y).view(f"u{y.dtype.itemsize}")
        results["held of " + name] = np.array([shard.data.size for shard in x.addressable_shards])
    np.savez(directory / f"process{jax.process_index()}.npz", **results)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, required=True)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--port", type=int)
    parser.add_argument("--dies-at", type=int, metavar="STEP")
    arguments = parser.parse_args()
    if arguments.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        address = f"127.0.0.1:{arguments.port}"
        jax.distributed.initialize(
            address, arguments.processes, arguments.process, coordinator_bind_address=address
        )
    train(arguments.directory.resolve(), arguments.optimizer, arguments.dies_at)


if __name__ == "__main__":
    main()
