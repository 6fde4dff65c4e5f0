"""Compiled for a TPU and a GPU, gradient release holds one layer's gradients, copies no stack."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from accumulation import account, ways
from covering import first
from hlo import Program
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from release import MODELS, arguments, both_steps, gpt, mlp, products
from settings import settings, with_optax
from targets import compile_for, tpu
from trees import untyped

import adam_jax

pytestmark = pytest.mark.usefixtures("standard_promotion")

# Bytes of temporaries for each parameter of one layer, activations included.
BARS = {
    ("v5e", "7 bytes"): 3,
    ("h100", "7 bytes"): 8,
    ("v5e", "float32"): 9,
    ("h100", "float32"): 17,
}


def problem(model, layers, kind):
    setting = settings("adamw")[kind]
    return setting.optimizer, *arguments(model, layers, setting)


def copied_stacks(compiled, params):
    """Returns copies and conversions as large as a stack of matrices."""
    sizes = {x.size for x in jax.tree.leaves(params) if x.ndim == 3}
    program = Program(compiled.as_text())
    fused = {
        x.attribute("calls")
        for c in program.computations.values()
        for x in c.instructions.values()
        if x.operation == "fusion"
    }
    return [
        x
        for name, c in program.computations.items()
        for x in c.instructions.values()
        if name not in fused and x.operation in ("copy", "copy-start", "convert", "transpose")
        if any(array.size in sizes for array in x.arrays)
    ]


@pytest.mark.parametrize("target", ["v5e", "h100"])
@pytest.mark.parametrize(
    ("name", "layers", "kind"),
    first(
        2,
        [
            ("mlp", 16, "7 bytes"),
            ("gpt", 16, "7 bytes"),
            ("square", 16, "7 bytes"),
            ("mlp", 32, "7 bytes"),
            ("mlp", 16, "float32"),
        ],
    ),
)
def test_only_one_layer_s_gradients_exist_at_a_time(name, layers, kind, target):
    """Parameters and state are updated in place, with as many products as in the plain step."""
    model = MODELS[name]
    optimizer, params, state, batch = problem(model, layers, kind)
    steps = both_steps(model.loss, optimizer)
    plain, released = (
        compile_for(target, steps[step], params, state, batch) for step in ("plain", "released")
    )
    size = sum(x.size for x in jax.tree.leaves(params))
    memory = released.memory_analysis()
    assert memory.temp_size_in_bytes * layers / size < BARS[target, kind]
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, state)))
    assert memory.alias_size_in_bytes >= kept
    gradients = 2 if kind == "7 bytes" else 4
    assert untyped(plain.memory_analysis()).temp_size_in_bytes / size > gradients
    assert copied_stacks(released, params) == []
    assert products(released) == products(plain) > 0


@pytest.mark.parametrize(
    ("target", "buffer"),
    first(
        2,
        [("v5e", "bfloat16"), ("h100", "float32"), ("v5e", "float32"), ("h100", "bfloat16")],
    ),
)
def test_accumulated_gradients_are_in_one_buffer(target, buffer):
    """The step adds one layer's gradients and activations, and no other tree of gradients."""
    way = ways()[f"accumulated_value_and_grad, layers=True, {buffer}"]
    found = account(target, *way)
    size = jnp.dtype(buffer).itemsize
    assert size <= found.temporaries < size + 8 / 16  # of 16 layers


@pytest.mark.covering
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5e:4x4"])
@pytest.mark.parametrize(
    ("placement", "axes"),
    [
        ("data parallel", AxisType.Auto),
        ("data parallel", AxisType.Explicit),
        ("FSDP", AxisType.Auto),
        ("ZeRO-1", AxisType.Explicit),
    ],
    ids=str,
)
def test_a_chip_of_a_mesh_holds_one_layer_s_gradients(placement, axes, topology):
    """Each collective works on one layer, and so does each sum of gradients over chips."""
    model, layers = mlp(1024, tokens=1024), 16
    optimizer, params, state, batch = problem(model, layers, "7 bytes")
    mesh = Mesh(np.array(tpu(topology)).ravel(), ("data",), axis_types=(axes,))

    def at(tree, shardings):
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings
        )

    spec = PartitionSpec(None, "data") if placement == "FSDP" else PartitionSpec()
    params = at(params, jax.tree.map(lambda _: NamedSharding(mesh, spec), params))
    axis = "data" if placement == "ZeRO-1" else None
    shardings = adam_jax.state_shardings(optimizer, params, axis=axis, layers=True)
    state = at(state, shardings)
    batch = at(batch, NamedSharding(mesh, PartitionSpec("data")))
    out = None, jax.tree.map(lambda x: x.sharding, params), shardings

    def compiled(step):
        jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=out)
        return jitted.trace(params, state, batch).lower(lowering_platforms=("tpu",)).compile()

    released = compiled(adam_jax.value_and_update(model.loss, optimizer, layers=True))
    size = sum(x.size for x in jax.tree.leaves(params))
    per_layer = size / layers
    temporaries = untyped(released.memory_analysis()).temp_size_in_bytes / per_layer
    assert temporaries < 3
    for x in collectives(released):
        assert max(array.size for array in x.arrays) <= per_layer, x
    if placement != "FSDP":  # there the plain step has only its part of the gradients
        plain = compiled(with_optax(optimizer).train_step(model.loss))
        assert untyped(plain.memory_analysis()).temp_size_in_bytes / size > 2


def collectives(compiled):
    kinds = ("all-gather", "all-reduce", "all-to-all", "collective-", "reduce-scatter")
    found = [
        x
        for c in Program(compiled.as_text()).computations.values()
        for x in c.instructions.values()
        if x.operation.startswith(kinds) and not x.operation.endswith("-done")
    ]
    assert found
    return found


@pytest.mark.full
def test_a_model_fits_that_is_too_large_for_the_plain_step():
    """2.5e9 parameters take 17 GB with the gradients of all layers; the chip has 16."""
    model = gpt(2560, 20, tokens=256)
    optimizer, params, state, batch = problem(model, 32, "7 bytes")
    steps = both_steps(model.loss, optimizer)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        compile_for("v5e", steps["plain"], params, state, batch)
    memory = compile_for("v5e", steps["released"], params, state, batch).memory_analysis()
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 13.5 * 2**30


def test_the_norm_of_all_gradients_costs_a_second_pass_and_no_memory():
    model, layers = mlp(1024), 16
    _, params, _, batch = problem(model, layers, "float32")
    clipped = optax.chain(adam_jax.clip_by_global_norm(1.0), adam_jax.adamw(1e-3))
    found = []
    for optimizer in (adam_jax.adamw(1e-3), clipped):
        state = jax.eval_shape(optimizer.init, params)
        step = both_steps(model.loss, optimizer)["released"]
        found.append(compile_for("h100", step, params, state, batch))
    once, twice = found
    assert products(once) < products(twice) <= 2 * products(once)
    per_layer = sum(x.size for x in jax.tree.leaves(params)) / layers
    assert twice.memory_analysis().temp_size_in_bytes / per_layer < BARS["h100", "float32"]
