"""Compiled for a TPU and a GPU, a step of few rows neither copies the table nor communicates it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hlo import Program
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from optimizers import INT8, seven_bytes
from targets import compile_for, tpu
from trees import untyped

import adam_jax

pytestmark = pytest.mark.usefixtures("standard_promotion")

VOCABULARY, WIDTH, SIZE = 10**6, 128, 4096
SCHEDULE = optax.cosine_decay_schedule(1e-3, 10_000)
KINDS = {
    "float32": (adam_jax.adam(1e-3), False),
    "amsgrad": (adam_jax.amsgrad(1e-3), False),
    "int8": (adam_jax.adamw(SCHEDULE, **INT8), False),
    "five bytes": (seven_bytes(SCHEDULE), False),
    "exact": (adam_jax.adamw(SCHEDULE), True),
}


def problem(kind):
    """Returns the rows' optimizer, table and state, and a batch, as shapes."""
    optimizer, exact = KINDS[kind]
    rows = adam_jax.row_sparse(optimizer, exact)
    dtype = jnp.bfloat16 if kind == "five bytes" else jnp.float32
    table = jax.ShapeDtypeStruct((VOCABULARY, WIDTH), dtype)
    batch = jax.ShapeDtypeStruct((SIZE,), jnp.int32), jax.ShapeDtypeStruct((SIZE, WIDTH), dtype)
    return rows, table, jax.eval_shape(rows.init, table), batch


def bytes_of(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def copies(compiled):
    """Returns copies, conversions and transpositions as large as the table."""
    program = Program(compiled.as_text())
    return [
        x
        for computation in program.computations.values()
        for x in computation.instructions.values()
        if x.operation in ("copy", "copy-start", "convert", "transpose", "slice-start")
        if any(array.size >= VOCABULARY * WIDTH for array in x.arrays)
    ]


@pytest.mark.parametrize(
    ("target", "kind", "tables"),
    [
        ("v5e", "float32", 0.001),
        ("v5e", "five bytes", 0.003),
        ("v5e", "exact", 0.003),
        ("h100", "float32", 0.02),
        ("h100", "amsgrad", 0.021),  # five arrays of the rows, at .0041 tables each
        ("h100", "int8", 0.02),
        ("h100", "five bytes", 0.02),
        ("h100", "exact", 0.025),
    ],
)
def test_a_step_works_in_place_with_temporaries_for_its_rows(target, kind, tables):
    """The unit of temporaries is a float32 table."""
    rows, table, state, batch = problem(kind)
    jitted = jax.jit(rows.update, donate_argnums=(2, 3), keep_unused=True)
    compiled = compile_for(target, jitted, *batch, table, state)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= bytes_of((table, state))
    assert memory.temp_size_in_bytes <= tables * 4 * VOCABULARY * WIDTH
    assert copies(compiled) == []


@pytest.mark.parametrize(
    ("topology", "axes", "spec", "kind"),
    [
        ("v5e:2x2", AxisType.Auto, ("data",), "float32"),
        ("v5e:2x2", AxisType.Auto, (None, "data"), "float32"),
        ("v5e:2x2", AxisType.Explicit, (None, "data"), "exact"),
        ("v5e:4x4", AxisType.Explicit, ("data",), "exact"),
        ("v5e:4x4", AxisType.Explicit, ("data",), "int8"),
    ],
    ids=str,
)
def test_communication_grows_with_the_ids(topology, axes, spec, kind):
    """The batch is divided among the chips; table and state are divided by rows or columns."""
    rows, table, state, batch = problem(kind)
    mesh = Mesh(np.array(tpu(topology)).ravel(), ("data",), axis_types=(axes,))
    on_mesh = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))  # noqa: E731
    put = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    table = put(table, on_mesh(*spec))
    shardings = adam_jax.state_shardings(rows, table)
    state = jax.tree.map(put, state, shardings)
    batch = [put(x, on_mesh("data")) for x in batch]
    jitted = jax.jit(
        rows.update,
        donate_argnums=(2, 3),
        keep_unused=True,
        out_shardings=(table.sharding, shardings),
    )
    traced = jitted.trace(*batch, table, state)
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    kinds = ("all-gather", "all-reduce", "all-to-all", "collective-", "reduce-scatter", "ragged-")
    sizes = [
        array.size
        for computation in Program(compiled.as_text()).computations.values()
        for x in computation.instructions.values()
        if x.operation.startswith(kinds)
        for array in x.arrays
    ]
    assert sizes  # ids and gradients are gathered
    assert max(sizes) <= SIZE * WIDTH
    memory = untyped(compiled.memory_analysis())
    assert memory.temp_size_in_bytes < 0.02 * 4 * VOCABULARY * WIDTH
    assert memory.alias_size_in_bytes >= 0.9 * memory.argument_size_in_bytes
