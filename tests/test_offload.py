"""State in host memory is bit-identical to the same state on the device, in every use."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optimizers import EXACT, INT8, each_layout, seven_bytes
from trees import short_tree, step_of, untyped

import adam_jax

pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),
    pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="offload needs JAX 0.10"),
]

SHAPES = {"a": (40, 128), "b": (40, 128), "empty": (0, 5), "row": (128,), "scalar": ()}
MATRIX = {"w": (40, 128)}


def params_of(dtype="float32", seed=0, shapes=SHAPES):
    return short_tree(shapes, dtype, seed) | {"none": None}


def gradients_of(dtype="float32", seed=1, shapes=SHAPES):
    """Returns multiples of 1/4, whose sums of squares are exact in any order."""
    return jax.tree.map(lambda g: jnp.round(4 * g) / 4, params_of(dtype, seed, shapes))


def in_host(state):
    """Returns which arrays of a state, except scalars, are in host memory."""
    return [x.sharding.memory_kind == "pinned_host" for x in jax.tree.leaves(state) if x.ndim]


def same_bits(tree, desired):
    def bits(tree):
        return [(x.dtype, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]

    return bits(tree) == bits(desired)


def three_steps(optimizer, step, dtype="float32", shapes=SHAPES):
    params = params_of(dtype, 0, shapes)
    state = optimizer.init(params)
    for seed in (1, 2, 3):
        params, state = step(params, state, gradients_of(dtype, seed, shapes))
    return params, state


def eager_step(optimizer):
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def check(optimizer, dtype="float32", shapes=SHAPES):
    """Asserts that jitted steps in place, with state in host memory, are the same."""
    offloaded = adam_jax.offload(optimizer)
    desired = three_steps(optimizer, step_of(optimizer), dtype, shapes)
    step = step_of(offloaded, donate_argnums=(0, 1))
    params, state = three_steps(offloaded, step, dtype, shapes)
    assert same_bits((params, state), desired)
    assert in_host(state)
    assert all(in_host(state))


@each_layout
def test_every_optimizer_makes_the_same_steps(row):
    check(row.make(**EXACT), row.param_dtype)


@pytest.mark.parametrize("optimizer", [adam_jax.adamw(**EXACT), seven_bytes(**EXACT)])
def test_eager_steps_agree(optimizer):
    offloaded = adam_jax.offload(optimizer)
    desired = three_steps(optimizer, eager_step(optimizer), "bfloat16")
    found = three_steps(offloaded, eager_step(offloaded), "bfloat16")
    assert same_bits(found, desired)
    assert all(in_host(found[1]))


def normalized(updates, params):
    """Divides gradients by their norm, rounded to a power of two."""
    scale = jnp.exp2(-jnp.round(jnp.log2(optax.tree.norm(updates))))
    return jax.tree.map(lambda g: g * scale, updates)


def kernels(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


CHAINS = {
    "norm": lambda adam: optax.chain(optax.stateless(normalized), adam),
    "masked": lambda adam: optax.chain(optax.masked(adam, kernels), optax.scale(0.5)),
    "partition": lambda adam: optax.partition(
        {True: adam, False: optax.set_to_zero()}, lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    ),
    "multi steps": lambda adam: untyped(optax.MultiSteps(adam, 2).gradient_transformation()),
    "if finite": lambda adam: optax.apply_if_finite(adam, 3),
    "average": lambda adam: adam_jax.average_params(adam, 0.75),
    "injected": lambda adam: optax.chain(adam, optax.inject_hyperparams(optax.scale)(0.5)),
    "trust ratio": lambda adam: optax.chain(adam, optax.scale_by_trust_ratio()),
    "momentum on top": lambda adam: optax.chain(adam, optax.trace(0.5)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains_make_the_same_steps(name):
    """Two leaves have float32 moments, and one has int8 moments."""
    formats = {"a": "int8", "scalar": None, "row": None, "none": None}
    adam = adam_jax.adamw(**EXACT, mu_dtype=formats, nu_dtype=formats)
    check(CHAINS[name](adam), shapes={name: SHAPES[name] for name in ("a", "row", "scalar")})


def test_extra_arguments_reach_the_optimizer():
    """Arguments may be functions or traced arrays."""

    def scaled(updates, state, params=None, *, by, function):
        return jax.tree.map(lambda u: function(u) * by, updates), state

    scale = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), untyped(scaled)
    )
    adam = optax.chain(adam_jax.adamw(**EXACT), scale)
    results = []
    for optimizer in (adam, adam_jax.offload(adam)):
        update = jax.jit(functools.partial(optimizer.update, function=jnp.negative))
        state = optimizer.init(params_of())
        results.append(update(gradients_of(), state, params_of(), by=jnp.float32(0.5)))
    assert same_bits(*results)


def test_wrappers_outside_keep_their_state_on_the_device():
    """A wrapper outside has its own state on the device."""
    adam = seven_bytes(**EXACT)
    for outside in (
        adam_jax.check_landing,
        lambda x: untyped(optax.MultiSteps(x, 2).gradient_transformation()),
        lambda x: optax.chain(optax.clip_by_global_norm(0.5), x),
    ):
        desired = three_steps(outside(adam), step_of(outside(adam)), "bfloat16")
        optimizer = outside(adam_jax.offload(adam))
        params, state = three_steps(
            optimizer, step_of(optimizer, donate_argnums=(0, 1)), "bfloat16"
        )
        assert same_bits((params, state), desired)
        assert any(in_host(state))


def test_moments_can_be_offloaded_alone():
    """Inside `master_weights`, whose remainders stay on the device."""
    moments = adam_jax.adamw(**EXACT, **INT8)
    optimizer = adam_jax.master_weights(adam_jax.offload(moments), "int8")
    desired = three_steps(seven_bytes(**EXACT), step_of(seven_bytes(**EXACT)), "bfloat16")
    params, state = three_steps(optimizer, step_of(optimizer), "bfloat16")
    assert same_bits((params, state), desired)
    assert not any(in_host(state.remainder))
    assert all(in_host(state.inner_state))


def test_a_scan_carries_the_state_in_host_memory():
    """One program makes many steps and carries the state in host memory."""
    adam = seven_bytes(**EXACT)
    params, gradients = params_of("bfloat16"), gradients_of("bfloat16")

    def run(optimizer):
        def body(carry, _):
            params, state = carry
            return eager_step(optimizer)(params, state, gradients), None

        scan = jax.jit(lambda carry: jax.lax.scan(body, carry, length=5)[0], donate_argnums=0)
        return scan((jax.tree.map(jnp.copy, params), optimizer.init(params)))

    found = run(adam_jax.offload(adam))
    assert same_bits(found, run(adam))
    assert all(in_host(found[1]))


def test_init_in_jit_gives_the_same_state():
    optimizer = adam_jax.offload(seven_bytes())
    state = jax.jit(optimizer.init)(params_of("bfloat16"))
    assert all(in_host(state))
    assert same_bits(state, optimizer.init(params_of("bfloat16")))


def test_state_on_the_device_stays_there():
    """A run can continue without offloading, and with it again."""
    adam = adam_jax.adamw(**EXACT)
    offloaded = adam_jax.offload(adam)
    _, state = three_steps(offloaded, step_of(offloaded))
    fetched = jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), state)
    updates, new = jax.jit(offloaded.update)(gradients_of(), fetched, params_of())
    assert not any(in_host(new))
    desired = jax.jit(offloaded.update)(gradients_of(), state, params_of())
    assert same_bits((updates, new), desired)


def test_gradient_release_fetches_layers_one_by_one():
    """`value_and_update` fetches layers one by one, and also the other leaves."""
    shapes = {"stack": (4, 16, 16), "head": (16, 8), "tail": (8,)}
    layers = {"stack": True, "head": False, "tail": False, "none": None}

    def loss(params, x, scan=jax.lax.scan):
        x, _ = scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])
        return jnp.sum(x @ params["head"] + params["tail"][None]).astype(jnp.float32)

    clip = adam_jax.clip_by_global_norm(0.5)
    for optimizer in (seven_bytes(**EXACT), optax.chain(clip, adam_jax.adamw(**EXACT))):

        def run(optimizer):
            step = jax.jit(
                adam_jax.value_and_update(loss, optimizer, layers=layers), donate_argnums=(0, 1)
            )
            params = params_of("bfloat16", 0, shapes)
            state = optimizer.init(params)
            for seed in (1, 2, 3):
                x = params_of("bfloat16", seed, {"x": (2, 16)})["x"]
                _, params, state = step(params, state, x)
            return params, state

        found = run(adam_jax.offload(optimizer))
        assert same_bits(found, run(optimizer))
        assert all(in_host(found[1]))


def converted(state):
    return adam_jax.convert_state(state, mu_dtype="int8", nu_dtype="bfloat16")


def test_readers_find_a_state_in_host_memory():
    """Functions that read and rewrite a state find it in host memory and leave it there."""
    shapes = {name: SHAPES[name] for name in ("a", "scalar")}
    inner = adam_jax.average_params(seven_bytes(**EXACT), 0.75)
    offloaded = adam_jax.offload(inner)
    gradients = gradients_of("bfloat16", shapes=shapes)
    results = []
    for optimizer in (inner, offloaded):
        params, state = three_steps(optimizer, step_of(optimizer), "bfloat16", shapes)
        updates, new = jax.jit(optimizer.update)(gradients, state, params)
        statistics = jax.jit(adam_jax.step_statistics)(updates, new, params, old_state=state)
        masters = adam_jax.master_params(params, state)
        results.append(
            (
                statistics,
                adam_jax.step_statistics(updates, new, params, old_state=state),
                masters,
                adam_jax.averaged_params(params, state),
                jax.jit(adam_jax.averaged_params)(params, state),
                adam_jax.convert_remainder(params, state, "int16"),
                adam_jax.load_master_params(masters, params, state),
                converted(state),
                jax.jit(converted)(state),
            )
        )
    desired, found = results
    assert same_bits(found, desired)
    for state in (found[5][1], found[6][1], found[7], found[8]):
        assert all(in_host(state))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_mesh_divides_the_state_in_host_memory(kind):
    """On a mesh, the state is divided in host memory as it is on the devices."""
    shapes = {"w": (64, 128), "b": (128,)}
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    replicated = NamedSharding(mesh, PartitionSpec())
    params = jax.device_put(short_tree(shapes, "bfloat16"), replicated)
    adam = seven_bytes(**EXACT)
    offloaded = adam_jax.offload(adam)
    results = []
    for optimizer in (adam, offloaded):
        shardings = adam_jax.state_shardings(optimizer, params, axis="data")
        state = jax.jit(optimizer.init, out_shardings=shardings)(params)
        step = step_of(optimizer, out_shardings=(replicated, shardings))
        new = params
        for seed in (1, 2):
            gradients = jax.device_put(gradients_of("bfloat16", seed, shapes), replicated)
            new, state = step(new, state, {name: gradients[name] for name in shapes})
        results.append((new, state))
    assert same_bits(*results)
    [(_, desired), (_, found)] = results
    assert all(in_host(found))
    specs = [[x.sharding.spec for x in jax.tree.leaves(state)] for state in (desired, found)]
    assert specs[0] == specs[1]
    memory = adam_jax.memory_usage(
        offloaded, params, shardings=adam_jax.state_shardings(offloaded, params, axis="data")
    )
    whole = adam_jax.memory_usage(
        adam, params, shardings=adam_jax.state_shardings(adam, params, axis="data")
    )
    assert sum(memory.host_state.values()) + sum(memory.state.values()) == sum(whole.state.values())
    assert memory.state == {"scales": 8, "other": 8}  # the smallest leaf has scalars as scales


def test_orbax_restores_to_host_memory_and_from_it(tmp_path):
    """Orbax restores a state to host memory, and one from host memory to the devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    shapes = {name: SHAPES[name] for name in ("a", "row", "scalar")}
    params = params_of("bfloat16", shapes=shapes)
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    adam = seven_bytes()
    offloaded = adam_jax.offload(adam)
    shardings = adam_jax.state_shardings(offloaded, params)
    state = jax.jit(offloaded.init, out_shardings=shardings)(params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", state)
    for optimizer in (offloaded, adam):
        target = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            jax.eval_shape(optimizer.init, params),
            adam_jax.state_shardings(optimizer, params),
        )
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(tmp_path / "checkpoint", target)
        assert same_bits(restored, state)
        assert set(in_host(restored)) == {optimizer is offloaded}


def test_memory_usage_counts_state_in_host_memory():
    params = {"w": jax.ShapeDtypeStruct((256, 128), jnp.float32)}
    memory = adam_jax.memory_usage(adam_jax.offload(adam_jax.adam(1e-3)), params)
    assert memory.host_state == {"mu": 4 * 256 * 128, "nu": 4 * 256 * 128}
    assert memory.state == {"other": 4}


def test_a_platform_without_host_memory_is_refused(monkeypatch):
    class Device:
        platform = "METAL"

        def addressable_memories(self):
            return []

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    with pytest.raises(ValueError, match="those of platform 'METAL' have none"):
        adam_jax.offload(adam_jax.adam(1e-3)).init(params_of())


def test_side_effects_are_refused():
    optimizer = adam_jax.offload(adam_jax.check_landing(seven_bytes()))
    params = params_of("bfloat16")
    with pytest.raises(
        ValueError, match=r"side effects \(debug_callback\).*check_landing\(offload"
    ):
        optimizer.update(params, optimizer.init(params), params)


def test_row_sparse_is_refused():
    rows = adam_jax.row_sparse(adam_jax.offload(adam_jax.adam(1e-3)))
    with pytest.raises(ValueError, match="out of host memory"):
        rows.init(jnp.ones((10, 4)))


def test_vmap_shard_map_and_grad_give_the_same_results():
    """Steps run in `vmap`, in `shard_map` over several devices, and under `grad`."""
    params = params_of(shapes={"w": (3, 40, 128), "b": (3, 128)})
    gradients = jax.tree.map(jnp.sign, params)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    on_mesh = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    results = []
    for wrap in (lambda x: x, adam_jax.offload):
        optimizer = wrap(adam_jax.adamw(**EXACT))

        def moved(rate, wrap=wrap):
            optimizer = wrap(adam_jax.adamw(rate))
            updates, _ = optimizer.update(gradients, optimizer.init(params), params)
            return untyped(updates)["w"].sum()

        state = jax.vmap(optimizer.init)(params)
        several = jax.jit(jax.vmap(eager_step(optimizer)))(params, state, gradients)
        step, spec = eager_step(optimizer), PartitionSpec()
        everywhere = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec))
        of_all = everywhere(on_mesh, optimizer.init(on_mesh), on_mesh)
        results.append((several, of_all, jax.jit(jax.grad(moved))(0.1)))
    assert same_bits(*results)
