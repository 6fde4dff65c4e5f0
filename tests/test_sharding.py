"""State on a mesh of eight devices: its placement, its communication and its numbers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from optimizers import EXACT, INT8, LAYOUT_ROWS, each_layout
from trees import assert_same_bits, short_tree, step_of, untyped

import adam_jax

MESH = Mesh(np.array(jax.devices("cpu")).reshape(4, 2), ("data", "model"))

# Two are large enough for int8; of the second only the last dimension can be divided.
SHAPES = {"kernel": (16, 4, 128), "embedding": (25, 256), "bias": (128,), "odd": (7,), "scale": ()}
CODED = "adamw-int8", "nadam-int8-float32", "master_weights-int8-int8"
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
def test_zero_1_gathers_only_parameters(row):
    """Parameters are replicated, each device stores part of the state, and results are the same.

    A step gathers parameters and communicates nothing else but maxima of rows. Between steps, state
    may be in host memory, from which the device can copy it (on a CPU the two are the same).
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
            assert (
                shard.size * parts >= leaf.size
            )  # scales of rows, and leaves that cannot be divided
    step = step_of(
        optimizer, donate_argnums=(0, 1), out_shardings=(shardings_of(params), shardings)
    )
    compiled = step.lower(params, state, gradients).compile()
    found = collectives(compiled)
    assert [kind for kind, _ in found].count("all-gather") == 3  # kernel, embedding and bias
    for kind, line in found:
        # One bit pattern, an integer, for each row of a leaf divided along its last axis.
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
def test_state_follows_sharded_parameters(row, specs):
    """The state adopts the parameters' shardings, fully sharded or tensor-parallel."""
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
@pytest.mark.covering
@each_layout
def test_gradients_may_have_other_shardings_than_parameters(row):
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


EXPLICIT = Mesh(MESH.devices, MESH.axis_names, axis_types=(jax.sharding.AxisType.Explicit,) * 2)


@pytest.mark.covering
@each_layout
@pytest.mark.parametrize("gradients_at", [(), (None, "data"), ("data",)], ids=str)
@pytest.mark.parametrize("params_at", [(), ("model",)], ids=str)
def test_explicit_axes_give_the_same_bits_as_one_device(row, params_at, gradients_at):
    """With shardings as part of types, gradients, state and parameters may have different ones.

    Updates have the parameters' shardings.
    """
    optimizer, dtype = row.make(**EXACT), row.param_dtype
    params, gradients = (
        tree | {"kernel": jax.device_put(tree["kernel"], on(EXPLICIT, *spec))}
        for tree, spec in (
            (jax.device_put(random(0, dtype), on(EXPLICIT)), params_at),
            (jax.device_put(random(1, dtype), on(EXPLICIT)), gradients_at),
        )
    )
    placed, shardings = (
        shardings_of(params),
        adam_jax.state_shardings(optimizer, params, axis="data"),
    )
    state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    updates = jax.eval_shape(optimizer.update, gradients, state, params)[0]
    specs = [x.sharding.spec for x in jax.tree.leaves(updates)]
    assert specs == [jax.typeof(x).sharding.spec for x in jax.tree.leaves(params)]
    params, state = three_steps(step_of(optimizer), params, state, gradients)
    assert_same_bits((params, state), on_one_device(row))
    assert_placed(params, placed)
    assert_placed(state, shardings)


@pytest.mark.slow
@pytest.mark.covering
@each_layout
@pytest.mark.parametrize("shape", [(3, 256), (5, 512), (256, 3, 64)], ids=str)
@pytest.mark.parametrize("mesh", [MESH, EXPLICIT], ids=["auto", "explicit"])
def test_default_settings_give_the_same_bits_as_one_device(row, mesh, shape):
    """With these no product is exact: all programs must fuse and rewrite them in the same way."""
    optimizer, dtype = row.make(), row.param_dtype
    params, gradients = ({"w": short_tree({"w": shape}, dtype, seed)["w"]} for seed in (0, 1))
    desired = three_steps(step_of(optimizer), params, optimizer.init(params), gradients)
    params, gradients = jax.device_put((params, gradients), on(mesh))
    shardings = adam_jax.state_shardings(optimizer, params, axis="data")
    state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    step = step_of(optimizer, out_shardings=(shardings_of(params), shardings))
    assert_same_bits(three_steps(step, params, state, gradients), desired)


@pytest.mark.covering
@pytest.mark.parametrize(
    "kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit], ids=str
)
@pytest.mark.parametrize("spec", [("data", None), (None, "data"), ("model", "data")], ids=str)
@pytest.mark.parametrize(
    "row", [row for row in LAYOUT_ROWS if row.name in CODED], ids=lambda r: r.name
)
def test_codes_are_the_same_for_every_division_of_rows(row, spec, kind):
    """A state made eagerly, in jit or through `state_shardings` has the same bits."""
    optimizer, dtype = row.make(**EXACT), row.param_dtype
    mesh = Mesh(MESH.devices, MESH.axis_names, axis_types=(kind,) * 2)
    params, gradients = ({"w": short_tree({"w": (32, 256)}, dtype, seed)["w"]} for seed in (0, 1))
    desired = three_steps(step_of(optimizer), params, optimizer.init(params), gradients)
    params, gradients = jax.device_put((params, gradients), on(mesh, *spec))
    shardings = adam_jax.state_shardings(optimizer, params)
    with jax.set_mesh(mesh):
        state = optimizer.init(params)
        for init in (jax.jit(optimizer.init), jax.jit(optimizer.init, out_shardings=shardings)):
            assert_same_bits(init(params), state)
        shapes = jax.tree.map(
            lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params
        )
        assert_same_bits(of_shapes := optimizer.init(shapes), state)
        for x in jax.tree.leaves((state, of_shapes)):
            if x.shape == (32, 1):
                assert tuple(x.sharding.spec) == (spec[0], None)
            elif x.shape:
                assert x.sharding.is_equivalent_to(on(mesh, *spec), 2)
        found = three_steps(step_of(optimizer), params, state, gradients)
    assert_same_bits(jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, desired))


def test_scales_stay_with_the_rows_of_their_codes():
    """ZeRO-1 divides those arrays that are not yet divided."""
    optimizer = adam_jax.adam(1e-3, **INT8)
    for spec, codes, scales in [
        ((None, "data"), (None, "data"), (None, None)),
        (("model", None), ("model", "data"), ("model", None)),
        ((None, "model"), ("data", "model"), ("data", None)),
    ]:
        params = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=on(MESH, *spec))
        moment = adam_jax.state_shardings(optimizer, params, axis="data")[0].nu
        assert tuple(moment.codes.spec) == codes
        assert tuple(moment.scales.spec) == tuple(moment.units.spec) == scales


def test_scales_agree_where_shard_map_divides_rows():
    optimizer = untyped(adam_jax.scale_by_adam(**INT8))
    params = jnp.zeros((64, 256))
    columns = jnp.exp(jnp.arange(256) / 40)[None]  # the largest gradients are on the last device
    spec = PartitionSpec(None, "data")
    shardings = adam_jax.state_shardings(optimizer, jax.device_put(params, on(MESH, *spec)))
    specs = jax.tree.map(lambda sharding: sharding.spec, shardings)

    def update(**options):
        return jax.jit(
            jax.shard_map(
                optimizer.update,
                mesh=MESH,
                in_specs=(spec, specs),
                out_specs=(spec, specs),
                **options,
            )
        )

    state = whole = optimizer.init(params)
    with pytest.raises(ValueError, match="check_vma=False"):
        update(check_vma=False)(params, state)
    step = update()
    for i in range(10):
        gradient = columns * jax.random.normal(jax.random.key(i), params.shape)
        _, state = step(gradient, state)
        _, whole = optimizer.update(gradient, whole)
    np.testing.assert_array_equal(np.asarray(state.nu.scales), whole.nu.scales)
    state: Any = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), state)
    ratio = adam_jax.convert_state(state).nu / adam_jax.convert_state(whole).nu
    np.testing.assert_allclose(ratio.mean(axis=0), 1, atol=0.15)


def test_a_sharded_state_is_converted_in_place():
    params = jax.device_put(jnp.ones((64, 128)), on(MESH, "data"))
    state = adam_jax.adam(1e-3).init(params)
    coded = adam_jax.convert_state(state, mu_dtype="int8", nu_dtype="int8")
    for leaf in jax.tree.leaves(coded[0]):
        if leaf.ndim:
            assert leaf.addressable_shards[0].data.shape[0] == 16


def with_nnx(optimizer):
    def partitioned(init, *names):
        return nnx.with_partitioning(init, names)

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(
                64,
                64,
                rngs=rngs,
                use_bias=False,
                param_dtype=jnp.bfloat16,
                kernel_init=partitioned(nnx.initializers.lecun_normal(), None, "data"),
            )
            self.norm = nnx.LayerNorm(
                64,
                rngs=rngs,
                use_bias=False,
                scale_init=partitioned(nnx.initializers.ones_init(), "data"),
            )

        def __call__(self, x):
            return self.norm(self.dense(x))

    model = Model(nnx.Rngs(0))
    training = nnx.Optimizer(model, optimizer, wrt=nnx.Param)

    @nnx.jit
    def step(model, training):
        loss = lambda model: jnp.mean(model(jnp.eye(64, dtype=jnp.bfloat16)) ** 2)  # noqa: E731
        value, gradients = nnx.value_and_grad(loss)(model)
        training.update(model, gradients)
        return value

    losses = [step(model, training) for _ in range(3)]
    return losses, nnx.state(training)


@pytest.mark.parametrize("remainder", [None, "int8"])
def test_nnx_trains_with_partitioned_parameters(remainder):
    """Among the parameters is a LayerNorm in float32, which has no remainder."""
    optimizer = adam_jax.adamw(1e-3, **INT8)
    if remainder:
        optimizer = adam_jax.master_weights(optimizer, remainder)
    with jax.set_mesh(Mesh(MESH.devices, MESH.axis_names)):
        losses, state = with_nnx(optimizer)
    assert losses[-1] < losses[0]
    codes = [x for x in jax.tree.leaves(state) if x.dtype == jnp.uint8]
    assert [x.shape for x in codes] == [(64, 64)]


def test_linen_trains_with_partitioned_parameters():
    kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "data"))
    model = nn.Dense(64, use_bias=False, kernel_init=kernel_init)
    optimizer = adam_jax.adamw(1e-3, **INT8)

    def init(key):
        params = model.init(key, jnp.ones((1, 64)))["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)

    key = jax.random.key(0)
    shardings = nn.get_sharding(jax.eval_shape(init, key), MESH)
    state = jax.jit(init, out_shardings=shardings)(key)
    codes = nn.unbox(state.opt_state[0].nu.codes)["kernel"]
    assert tuple(codes.sharding.spec) == (None, "data")
    step = jax.jit(lambda state: state.apply_gradients(grads=state.params), out_shardings=shardings)
    assert int(step(state).opt_state[0].count) == 1


def test_states_of_wrappers_and_chains_are_divided():
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


def test_the_first_divisible_dimension_is_divided():
    shapes = {(16, 4): ("data", None), (6, 4): (None, "data"), (6, 3): (None, None), (): ()}
    for shape, spec in shapes.items():
        params = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=on(MESH))
        shardings = adam_jax.state_shardings(adam_jax.adam(1e-3), params, axis="data")
        assert tuple(shardings[0].mu.spec) == spec
        assert tuple(shardings[0].count.spec) == ()
    # A divided array may be divided further, but only once over an axis.
    for size, before, after in [
        (16, "model", ("model", "data")),
        (12, "model", "model"),
        (16, "data", "data"),
        (16, ("data", "model"), ("data", "model")),
    ]:
        params = jax.ShapeDtypeStruct((size, 3), jnp.float32, sharding=on(MESH, before))
        shardings = adam_jax.state_shardings(adam_jax.adam(1e-3), params, axis="data")
        assert tuple(shardings[0].mu.spec) == (after, None)


def test_errors_name_what_is_missing():
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
