"""Compiled for a TPU, a step has one or two leaves' or layers' state on the device at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from covering import first
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from optimizers import INT8, seven_bytes
from release import mlp
from settings import with_optax
from targets import tpu

import adam_jax

pytestmark = pytest.mark.usefixtures("standard_promotion")

# The optimizer, the dtype of parameters and gradients, and bytes of state per parameter.
OPTIMIZERS = {
    "float32": (adam_jax.adamw(1e-3), jnp.float32, 8),
    "int8": (adam_jax.adamw(1e-3, **INT8), jnp.float32, 2),
    "7 bytes": (seven_bytes(), jnp.bfloat16, 3),
}
LAYERS = 8


def unrolled(params, x):
    """Returns the loss of a network in which each layer has its own leaves."""
    for w in params:
        x = x + jnp.tanh(x @ w)
    return jnp.mean(jnp.square(x.astype(jnp.float32)))


def memory_of(optimizer, params, batch, step, chips=1):
    """Returns the compiler's figures for a step in place, in bytes per parameter."""
    mesh = Mesh(np.array(tpu("v5e:2x2")[:chips]), ("data",))
    replicated = NamedSharding(mesh, PartitionSpec())

    def at(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    params = jax.tree.map(lambda x: at(x, replicated), params)
    shardings = adam_jax.state_shardings(optimizer, params)
    state = jax.tree.map(at, jax.eval_shape(optimizer.init, params), shardings)
    placed = None, jax.tree.map(lambda _: replicated, params), shardings
    step = jax.jit(step, donate_argnums=(0, 1), out_shardings=placed)
    traced = step.trace(params, state, at(batch, replicated))
    memory = traced.lower(lowering_platforms=("tpu",)).compile().memory_analysis()
    size = sum(x.size for x in jax.tree.leaves(params))
    return {
        name: getattr(memory, f"{name}_size_in_bytes") / size
        for name in ("temp", "host_argument", "host_alias", "host_temp")
    }


def check_host(memory, state):
    """Asserts that all state, and nothing else, is in host memory and updated in place there."""
    assert state <= memory["host_argument"] < 1.01 * state
    assert memory["host_alias"] == pytest.approx(memory["host_argument"], rel=1e-3)
    assert memory["host_temp"] == 0


@pytest.mark.parametrize("name", first(2, ["7 bytes", "float32", "int8"]))
def test_leaves_are_fetched_one_by_one(name):
    """Temporaries are at most the gradients and two leaves of state."""
    inner, dtype, state = OPTIMIZERS[name]
    optimizer = adam_jax.offload(inner)
    params = [jax.ShapeDtypeStruct((2048, 2048), dtype)] * LAYERS
    batch = jax.ShapeDtypeStruct((8, 2048), dtype)
    memory = memory_of(optimizer, params, batch, with_optax(optimizer).train_step(unrolled))
    check_host(memory, state)
    assert memory["temp"] < jnp.dtype(dtype).itemsize + 2 * state / LAYERS


@pytest.mark.parametrize("name", first(1, ["float32", "int8"]))
def test_no_leaf_is_fetched_before_the_norm_of_all_gradients(name):
    """All gradients exist before the first leaf of state is fetched."""
    inner, dtype, state = OPTIMIZERS[name]
    optimizer = adam_jax.offload(optax.chain(optax.clip_by_global_norm(1.0), inner))
    params = [jax.ShapeDtypeStruct((2048, 2048), dtype)] * LAYERS
    batch = jax.ShapeDtypeStruct((8, 2048), dtype)
    memory = memory_of(optimizer, params, batch, with_optax(optimizer).train_step(unrolled))
    check_host(memory, state)
    assert memory["temp"] < jnp.dtype(dtype).itemsize + 2 * state / LAYERS


@pytest.mark.parametrize(
    ("name", "chips"), first(2, [("7 bytes", 1), ("float32", 4), ("float32", 1), ("int8", 1)])
)
def test_layers_are_fetched_one_by_one(name, chips):
    """With gradient release, only one layer's gradients exist at a time too."""
    inner, dtype, state = OPTIMIZERS[name]
    optimizer = adam_jax.offload(inner)
    model = mlp(1024, tokens=64)
    step = adam_jax.value_and_update(model.loss, optimizer, layers=True)
    batch = jax.ShapeDtypeStruct(model.batch, dtype)
    memory = memory_of(optimizer, model.params(LAYERS, dtype), batch, step, chips)
    check_host(memory, state)
    assert memory["temp"] < (jnp.dtype(dtype).itemsize + 2 * state) / LAYERS
