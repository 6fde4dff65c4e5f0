"""Compiled for several TPU chips: how ZeRO-1 divides the state, and what it communicates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hlo import Program
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from steps import LARGE, SCHEDULE, SHAPES
from targets import tpu

import adam_jax

INT8 = adam_jax.adamw(SCHEDULE, mu_dtype="int8", nu_dtype="int8")
KINDS = {
    "float32": (adam_jax.adamw(SCHEDULE), jnp.float32),
    "int8": (INT8, jnp.float32),
    "7 bytes": (adam_jax.master_weights(INT8, "int8"), jnp.bfloat16),
}

pytestmark = pytest.mark.usefixtures("standard_promotion")
each_kind = pytest.mark.parametrize("kind", KINDS)
each_axis_type = pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit], ids=str)
each_topology = pytest.mark.parametrize("topology", ["v5e:2x2", "v5e:4x4"])


def placed(tree, shardings):
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )


def zero_1(topology, axes, kind, shapes):
    """Returns a mesh of all chips, the optimizer, replicated parameters, their divided state."""
    optimizer, dtype = KINDS[kind]
    mesh = Mesh(np.array(tpu(topology)).ravel(), ("data",), axis_types=(axes,))
    replicated = NamedSharding(mesh, PartitionSpec())
    params = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    params = placed(params, [replicated] * len(params))
    shardings = adam_jax.state_shardings(optimizer, params, axis="data")
    state = placed(jax.eval_shape(optimizer.init, params), shardings)
    return mesh, optimizer, params, state


def compiled_step(step, params, state, *args):
    """Compiles the step; parameters and state stay where they were before it."""
    out_shardings = jax.tree.map(lambda x: x.sharding, (params, state))
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=out_shardings)
    traced = jitted.trace(params, state, *args)
    return traced.lower(lowering_platforms=("tpu",)).compile()


def collectives(compiled):
    """Returns all collective operations, each with the name of its computation."""
    kinds = ("all-gather", "all-reduce", "all-to-all", "collective-", "reduce-scatter", "ragged-")
    return [
        (name, x)
        for name, computation in Program(compiled.as_text()).computations.items()
        for x in computation.instructions.values()
        if x.operation.startswith(kinds) and not x.operation.endswith("-done")
    ]


def bytes_of(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.covering
@each_kind
@each_axis_type
@each_topology
def test_a_chip_holds_its_part_and_gathers_only_parameters(topology, axes, kind):
    """Gradients arrive as a reduce-scatter leaves them, divided like the state.

    16-bit parameters are gathered as they are, not as 32-bit updates.
    """
    mesh, optimizer, params, state = zero_1(topology, axes, kind, SHAPES)

    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    parts = adam_jax.state_shardings(optax.trace(0.9), params, axis="data").trace
    compiled = compiled_step(step, params, state, placed(params, parts))
    memory = compiled.memory_analysis()
    assert memory is not None
    # Scales and units of divided rows are not divided: 8 bytes for each of the embedding's rows.
    rows = 8 * SHAPES[1][0] if kind != "float32" else 0
    expected = bytes_of(params) + (bytes_of(params) + bytes_of(state)) / mesh.size + rows
    # A TPU keeps arrays in tiles: an embedding's part of 48 columns takes as much as 128.
    padding = 1.02 if topology == "v5e:2x2" else 1.25
    assert memory.argument_size_in_bytes < padding * expected
    for _, x in collectives(compiled):
        row_maximum = x.operation.startswith("all-reduce") and x.arrays[0].size < LARGE
        assert row_maximum or x.operation.startswith("all-gather"), x
        assert row_maximum or x.arrays[0].dtype == {2: "bf16", 4: "f32"}[params[0].dtype.itemsize]


@each_axis_type
def test_a_chip_makes_random_bits_for_its_part_only(axes):
    """The bits of a whole leaf, for both roundings, would be 8 bytes per parameter."""
    optimizer, dtype = KINDS["7 bytes"]
    mesh = Mesh(np.array(tpu("v5e:2x2")), ("data",), axis_types=(axes,))
    params = placed(
        [jax.ShapeDtypeStruct((4096, 8192), dtype)],
        [NamedSharding(mesh, PartitionSpec("data", None))],
    )
    state = jax.eval_shape(optimizer.init, params)
    state = placed(state, adam_jax.state_shardings(optimizer, params))

    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    memory = compiled_step(step, params, state, params).memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 0.1 * params[0].size


@pytest.mark.covering
@each_kind
@each_axis_type
@pytest.mark.parametrize("topology", ["v5e:2x2"])
def test_gradients_are_reduced_and_scattered(topology, axes, kind):
    """In a whole data-parallel step, no chip holds the sum of all gradients.

    On 16 v5e chips the compiler sums them on each chip, even where `psum_scatter` asks it not to.
    """
    mesh, optimizer, params, state = zero_1(topology, axes, kind, [(2048, 1024), (1024, 2048)])

    def step(params, state, inputs):
        def loss(params):
            first, second = params
            outputs = jax.nn.relu(inputs @ first) @ second
            return jnp.mean(jnp.square(outputs).astype(jnp.float32))

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    divided = NamedSharding(mesh, PartitionSpec("data"))
    batch = jax.ShapeDtypeStruct((1024, 2048), params[0].dtype, sharding=divided)
    found = collectives(compiled_step(step, params, state, batch))
    large = [(name, x) for name, x in found if x.arrays[0].size >= LARGE]
    scattered = [
        name
        for name, x in large
        # XLA for TPU writes a reduce-scatter as a fusion of an all-reduce and a slice.
        if x.operation == "reduce-scatter" or "all-reduce-scatter" in name
    ]
    gathered = [name for name, x in large if x.operation.startswith("all-gather")]
    assert scattered
    assert gathered
    assert len(large) == len(scattered) + len(gathered), large
