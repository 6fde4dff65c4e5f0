"""State on a mesh of eight devices: where it lies, what is communicated, and the same numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from optimizers import EXACT, INT8, each_layout
from trees import assert_same_bits, short_tree, step_of

import adam_jax

MESH = Mesh(np.array(jax.devices("cpu")).reshape(4, 2), ("data", "model"))

# Two are large enough for int8; of the second only the last dimension can be divided.
SHAPES = {"kernel": (16, 4, 128), "embedding": (25, 256), "bias": (128,), "odd": (7,), "scale": ()}
pytestmark = pytest.mark.usefixtures("standard_promotion")


def on(mesh, *spec):
    return NamedSharding(mesh, PartitionSpec(*spec))


def shardings_of(tree):
    return jax.tree.map(lambda x: x.sharding, tree)


def random(seed, dtype):
    return short_tree(SHAPES, dtype, seed)


def three_steps(step, params, state, gradients):
    for scale in (1.0, -2.0, 0.5):
        params, state = step(params, state, jax.tree.map(lambda g, c=scale: g * c, gradients))
    return params, state


@functools.cache
def on_one_device(row):
    optimizer, dtype = row.make(**EXACT), row.param_dtype
    params = random(0, dtype)
    return three_steps(step_of(optimizer), params, optimizer.init(params), random(1, dtype))


def assert_placed(tree, shardings):
    for x, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim), (x.shape, x.sharding, sharding)


def collectives(compiled):
    lines = compiled.as_text().splitlines()
    kinds = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
    return [(kind, line) for line in lines for kind in kinds if f" {kind}(" in line]


@each_layout
def test_zero_1(row):
    """Replicated parameters, state in parts: a part of the bytes, and the bits of one device.

    Parameters are gathered, and nothing else is communicated. Between steps state may lie in the
    host's memory, from which the device can copy (on a CPU no more than a name).
    """
    optimizer, dtype = row.make(**EXACT), row.param_dtype
    params, gradients = jax.device_put((random(0, dtype), random(1, dtype)), on(MESH))
    shardings = adam_jax.state_shardings(optimizer, params, axis="data")
    state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    parts = MESH.shape["data"]
    for leaf in jax.tree.leaves(state):
        shard = leaf.addressable_shards[0].data
        if leaf.size >= 4096 or leaf.shape == SHAPES["bias"]:
            assert shard.size * parts == leaf.size
        else:
            assert shard.size * parts >= leaf.size  # scales of rows, and what can't be divided
    step = step_of(
        optimizer, donate_argnums=(0, 1), out_shardings=(shardings_of(params), shardings)
    )
    compiled = step.lower(params, state, gradients).compile()
    found = collectives(compiled)
    assert [kind for kind, _ in found].count("all-gather") == 3  # kernel, embedding and bias
    for kind, line in found:
        # One for each row of what only its last dimension divides: a pattern, as an integer.
        row_maximum = kind == "all-reduce" and "reduce_max" in line and "s32[25" in line
        assert kind == "all-gather" or row_maximum, line

    hosted = jax.tree.map(lambda sharding: sharding.with_memory_kind("pinned_host"), shardings)
    hosted_params, hosted_state = jax.tree.map(jnp.copy, (params, jax.device_put(state, hosted)))
    sharded = three_steps(compiled, params, state, gradients)
    assert_same_bits(sharded, on_one_device(row))

    params, state = hosted_params, hosted_state
    for scale in (1.0, -2.0, 0.5):
        state = jax.device_put(state, hosted)
        assert {x.sharding.memory_kind for x in jax.tree.leaves(state)} == {"pinned_host"}
        state = jax.device_put(state, shardings)
        params, state = compiled(params, state, jax.tree.map(lambda g, c=scale: g * c, gradients))
    assert_same_bits((params, state), on_one_device(row))


SPECS = {
    "model": {"kernel": (None, None, "model"), "embedding": (None, "model"), "bias": ("model",)},
    "both": {"kernel": ("model", "data"), "embedding": (None, ("data", "model"))},
}


def placed(tree, specs):
    return {name: jax.device_put(x, on(MESH, *specs.get(name, ()))) for name, x in tree.items()}


@pytest.mark.covering
@each_layout
@pytest.mark.parametrize("specs", SPECS.values(), ids=SPECS)
def test_sharded_parameters_need_nothing(row, specs):
    """Fully-sharded and tensor-parallel: state takes the parameters' shardings by itself."""
    optimizer, dtype = row.make(**EXACT), row.param_dtype
    params, gradients = random(0, dtype), random(1, dtype)

    params, gradients = placed(params, specs), placed(gradients, specs)
    state = optimizer.init(params)
    step = step_of(optimizer)
    step = step.lower(params, state, gradients).compile()
    found = collectives(step)
    assert all(kind == "all-reduce" and "reduce_max" in line for kind, line in found), found
    params, state = three_steps(step, params, state, gradients)
    assert_same_bits((params, state), on_one_device(row))
    assert_placed(params, {name: on(MESH, *specs.get(name, ())) for name in params})
    assert_placed(state, adam_jax.state_shardings(optimizer, params))


@pytest.mark.slow
@each_layout
def test_a_gradient_may_be_sharded_otherwise_than_its_parameter(row):
    optimizer, dtype = row.make(**EXACT), row.param_dtype
    params, gradients = random(0, dtype), random(1, dtype)
    params, gradients = (
        placed(params, SPECS["model"]),
        placed(gradients, {"kernel": ("data",), "embedding": (None, "data")}),
    )
    shardings = adam_jax.state_shardings(optimizer, params)
    step = step_of(optimizer, out_shardings=(shardings_of(params), shardings))
    assert_same_bits(
        three_steps(step, params, optimizer.init(params), gradients), on_one_device(row)
    )


@each_layout
def test_a_mesh_whose_axes_are_explicit(row):
    """Where shardings are part of types, gradients are brought to the state's by the user."""
    optimizer, dtype = row.make(**EXACT), row.param_dtype
    mesh = Mesh(MESH.devices, MESH.axis_names, axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    params, gradients = random(0, dtype), random(1, dtype)
    params = jax.device_put(params, on(mesh))
    shardings = adam_jax.state_shardings(optimizer, params, axis="data")
    like_params = jax.tree.map(
        lambda p: adam_jax.state_shardings(optax.trace(0.9), p, axis="data").trace, params
    )
    gradients = jax.device_put(gradients, like_params)
    with jax.set_mesh(mesh):
        state = jax.jit(optimizer.init, out_shardings=shardings)(params)
        step = step_of(optimizer, out_shardings=(shardings_of(params), shardings))
        assert_same_bits(three_steps(step, params, state, gradients), on_one_device(row))


def test_states_of_wrappers_and_chains():
    params = jax.device_put(
        {"w": jnp.ones((64, 128)), "frozen": {"v": jnp.ones((64, 128))}, "none": None},
        on(MESH, None, "model"),
    )
    inner = adam_jax.adamw(optax.linear_schedule(1e-3, 0, 100), **INT8)
    labels = {"w": "ours", "frozen": "none", "none": "ours"}
    optimizers = [
        optax.chain(optax.clip_by_global_norm(1.0), inner),
        optax.masked(inner, {"w": True, "frozen": False, "none": True}),
        optax.multi_transform({"ours": inner, "none": optax.set_to_zero()}, labels),
        optax.MultiSteps(inner, 4),
        optax.apply_if_finite(inner, 3),
        optax.inject_hyperparams(adam_jax.adam)(1e-3),
        adam_jax.average_params(inner, 0.99),
    ]
    for optimizer in optimizers:
        shardings = adam_jax.state_shardings(optimizer, params, axis="data")
        state = jax.jit(optimizer.init, out_shardings=shardings)(params)
        specs = {tuple(x.sharding.spec) for x in jax.tree.leaves(state) if x.shape == (64, 128)}
        assert specs == {("data", "model")}
        specs = {tuple(x.sharding.spec) for x in jax.tree.leaves(state) if x.shape == (64, 1)}
        assert specs <= {("data", None)}


def test_the_first_dimension_that_can_be_divided_is():
    shapes = {(16, 4): ("data", None), (6, 4): (None, "data"), (6, 3): (None, None), (): ()}
    for shape, spec in shapes.items():
        params = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=on(MESH))
        shardings = adam_jax.state_shardings(adam_jax.adam(1e-3), params, axis="data")
        assert tuple(shardings[0].mu.spec) == spec
        assert tuple(shardings[0].count.spec) == ()
    # What is divided already may be divided further; and once over an axis is enough.
    for size, before, after in [
        (16, "model", ("model", "data")),
        (12, "model", "model"),
        (16, "data", "data"),
        (16, ("data", "model"), ("data", "model")),
    ]:
        params = jax.ShapeDtypeStruct((size, 3), jnp.float32, sharding=on(MESH, before))
        shardings = adam_jax.state_shardings(adam_jax.adam(1e-3), params, axis="data")
        assert tuple(shardings[0].mu.spec) == (after, None)


def test_errors_say_what_is_missing():
    optimizer = adam_jax.adam(1e-3)
    params = {"w": jax.device_put(jnp.ones(8), on(MESH)), "b": jnp.ones(8)}
    with pytest.raises(
        ValueError, match=r"parameter \['b'\] must have a NamedSharding, got Single"
    ):
        adam_jax.state_shardings(optimizer, params)
    params["b"] = jax.device_put(params["b"], on(Mesh(MESH.devices.T, ("model", "data"))))
    with pytest.raises(ValueError, match="on one mesh, got 2"):
        adam_jax.state_shardings(optimizer, params)
    with pytest.raises(ValueError, match="on one mesh, got 0"):
        adam_jax.state_shardings(optimizer, {})
    del params["b"]
    with pytest.raises(ValueError, match=r"one of the mesh's \('data', 'model'\), got 'batch'"):
        adam_jax.state_shardings(optimizer, params, axis="batch")
