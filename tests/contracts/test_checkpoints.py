"""Checkpoints: every state is restored, on other devices too, and continues bit-identically.

Checkpoints of optax continue here, and ours continue in optax. Orbax notices some damage.
"""

import functools
import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from optimizers import EXACT, INT8, each_layout, seven_bytes
from trees import assert_same_bits, short_tree, untyped

import adam_jax

# A user's steps call optax.apply_updates, which adds float32 to bfloat16.
pytestmark = pytest.mark.usefixtures("standard_promotion")
PARAMS = {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)}
GRADIENTS = {"kernel": jnp.full((2, 3), 0.3), "bias": jnp.array([1.0, -2.0, 0.0])}
SCHEDULE = optax.linear_schedule(0.1, 0.0, 20)


def steps(optimizer, state, params, n):
    for _ in range(n):
        updates, state = optimizer.update(GRADIENTS, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.covering
@pytest.mark.parametrize("name", ["adam", "adamw", "nadam", "nadamw", "adamax", "adamaxw"])
@pytest.mark.parametrize("direction", ["from optax", "to optax"])
def test_checkpoints_move_between_optax_and_adam_jax(name, direction, tmp_path):
    ours, theirs = (getattr(library, name)(SCHEDULE) for library in (adam_jax, optax))
    first, then = (theirs, ours) if direction == "from optax" else (ours, theirs)
    params, state = steps(first, first.init(PARAMS), PARAMS, 5)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", {"params": params, "state": state})
    target = jax.eval_shape(lambda p: {"params": p, "state": then.init(p)}, PARAMS)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), target)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "checkpoint", target)
    continued, _ = steps(then, restored["state"], restored["params"], 5)
    whole, _ = steps(theirs, theirs.init(PARAMS), PARAMS, 10)
    for leaf, desired in zip(jax.tree.leaves(continued), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(leaf, desired, rtol=1e-5, atol=1e-5)


# Two are large enough for int8; of the second only the last dimension can be divided.
SHAPES = {"kernel": (16, 2, 128), "embedding": (25, 256), "bias": (128,), "odd": (7,), "scale": ()}


def random(dtype, seed):
    return {"layer": short_tree(SHAPES, dtype, seed), "nothing": None, "empty": {}}


def training_step_of(optimizer, gradients, **options):
    @functools.partial(jax.jit, donate_argnames="training", **options)
    def step(training):
        params, state = training["params"], training["state"]
        updates, state = optimizer.update(gradients, state, params)
        return {"params": optax.apply_updates(params, updates), "state": state}

    return step


def target_of(optimizer, params, shardings):
    """Returns shapes and shardings to restore onto, without making an array."""
    shapes = jax.eval_shape(lambda p: {"params": p, "state": optimizer.init(p)}, params)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )


# The tree has a name in the checkpoint. Without one, a manager that finds something foreign in the
# latest step reads no other step.
def save(manager, step, tree):
    manager.save(step, args=ocp.args.Composite(training=ocp.args.StandardSave(tree)))


def restore(manager, step, target):
    items = ocp.args.Composite(training=ocp.args.StandardRestore(target))
    return manager.restore(step, args=items)["training"]


@each_layout
def test_every_state_is_restored_and_continues(row, tmp_path):
    """Orbax writes in the background, while further steps donate their buffers."""
    optimizer, params = row.make(**EXACT), random(row.param_dtype, 0)
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    training = {"params": params, "state": jax.jit(optimizer.init)(params)}
    target = target_of(optimizer, params, jax.tree.map(lambda _: one_device, training))
    step = training_step_of(optimizer, random(row.param_dtype, 1))
    for _ in range(3):
        training = step(training)
    saved = jax.tree.map(lambda x: np.array(x, copy=True), training)
    with ocp.CheckpointManager(tmp_path) as manager:
        save(manager, 3, training)
        for _ in range(2):
            training = step(training)
    with ocp.CheckpointManager(tmp_path) as manager:
        restored = restore(manager, manager.latest_step(), target)
    assert_same_bits(restored, saved)
    for _ in range(2):
        restored = step(restored)
    assert_same_bits(restored, training)


def on_mesh(optimizer, dtype, devices):
    """Returns replicated parameters, and shardings for ZeRO-1, which divide the state."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    replicated = NamedSharding(mesh, PartitionSpec())
    params = jax.device_put(random(dtype, 0), replicated)
    shardings = {
        "params": jax.tree.map(lambda _: replicated, params),
        "state": adam_jax.state_shardings(optimizer, params, axis="data"),
    }
    return params, shardings


@pytest.mark.slow
@pytest.mark.covering
@each_layout
@pytest.mark.parametrize("devices", [4, 2])
def test_a_checkpoint_of_eight_devices_continues_on_four_and_two(row, devices, tmp_path):
    optimizer = row.make(**EXACT)
    params, shardings = on_mesh(optimizer, row.param_dtype, 8)
    init = jax.jit(optimizer.init, out_shardings=shardings["state"])
    step = training_step_of(optimizer, random(row.param_dtype, 1), out_shardings=shardings)
    training = step({"params": params, "state": init(params)})
    with ocp.CheckpointManager(tmp_path) as manager:
        save(manager, 1, training)
    saved = jax.tree.map(lambda x: np.array(x, copy=True), training)
    desired = step(training)
    params, shardings = on_mesh(optimizer, row.param_dtype, devices)
    with ocp.CheckpointManager(tmp_path) as manager:
        restored = restore(manager, 1, target_of(optimizer, params, shardings))
    assert_same_bits(restored, saved)
    for x, sharding in zip(jax.tree.leaves(restored), jax.tree.leaves(shardings), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)
    mu = optax.tree.get(restored["state"], "mu")["layer"]["kernel"]
    assert mu.addressable_shards[0].data.size * devices == mu.size
    step = training_step_of(optimizer, random(row.param_dtype, 1), out_shardings=shardings)
    assert_same_bits(step(restored), desired)


SEVEN_BYTES = seven_bytes(2**-10)


@pytest.fixture
def two_checkpoints(tmp_path):
    """Returns a folder with steps 1 and 2, and the tree that both contain."""
    params = {"kernel": random("bfloat16", 0)["layer"]["kernel"], "bias": jnp.ones(3, jnp.bfloat16)}
    training = {"params": params, "state": SEVEN_BYTES.init(params)}
    training = training_step_of(SEVEN_BYTES, jax.tree.map(jnp.copy, params))(training)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        for step in (1, 2):
            save(manager, step, training)
    return tmp_path / "checkpoints", training


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [halve, empty, remove])
def test_a_truncated_checkpoint_is_an_error_and_the_one_before_loads(damage, two_checkpoints):
    """Damage to any file is an error, unless nothing is read from that file."""
    folder, training = two_checkpoints
    files = [path.relative_to(folder) for path in (folder / "2").rglob("*") if path.is_file()]
    noticed = set()
    for file in files:
        damaged = folder.with_name("damaged")
        shutil.copytree(folder, damaged)
        damage(damaged / file)
        with ocp.CheckpointManager(damaged) as manager:
            assert manager.latest_step() == 2
            try:
                restored = restore(manager, 2, training)
            except Exception:  # of many types
                noticed.add(file.name)
            else:
                assert_same_bits(restored, training)
            assert_same_bits(restore(manager, 1, training), training)
        shutil.rmtree(damaged)
    arrays = max(files, key=lambda file: file.parent.name == "d" and (folder / file).stat().st_size)
    assert {"_METADATA", "manifest.ocdbt", arrays.name} <= noticed


FOREIGN = {
    "smaller": lambda training: jax.tree.map(lambda x: x[:-1] if x.ndim else x, training),
    "larger": lambda training: jax.tree.map(
        lambda x: jnp.concatenate([x, x]) if x.ndim else x, training
    ),
    "another state": lambda training: training | {"state": optax.adam(1).init(training["params"])},
    "no state": lambda training: {"params": training["params"]},
}


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_checkpoint_is_an_error_and_the_one_before_loads(change, two_checkpoints):
    folder, training = two_checkpoints
    with ocp.CheckpointManager(folder) as manager:
        save(manager, 3, change(training))
    (folder / "4").mkdir()
    with ocp.CheckpointManager(folder) as manager:
        for step in (4, 3):
            with pytest.raises((ValueError, KeyError, FileNotFoundError)):
                restore(manager, step, training)
        assert_same_bits(restore(manager, 2, training), training)


def falls_short(reason):
    return pytest.mark.xfail(strict=True, raises=pytest.fail.Exception, reason=reason)


@falls_short("Orbax keeps no checksum of arrays: examples/gpt/checkpoints.py does")
def test_orbax_notices_a_flipped_bit(tmp_path):
    tree = {"noise": np.random.default_rng(0).integers(0, 256, 2**16, np.uint8)}
    with ocp.CheckpointManager(tmp_path) as manager:
        save(manager, 1, tree)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    flip_a_bit(max(files, key=lambda path: path.stat().st_size))
    with ocp.CheckpointManager(tmp_path) as manager, pytest.raises(Exception):  # noqa: B017, PT011
        restore(manager, 1, tree)


INT8_FORMATS = [{}, {"mu_dtype": "int8"}, {"nu_dtype": "int8"}, INT8]


@pytest.mark.parametrize(
    ("saved", "other_formats"),
    list(itertools.permutations(INT8_FORMATS, 2)),
    ids=lambda x: "-".join(x),
)
def test_codes_are_not_restored_in_another_format(saved, other_formats, tmp_path):
    """Orbax casts when it restores. With codes, trees, shapes or checksums differ."""
    params = {"kernel": jnp.ones((64, 128))}
    one, other = (untyped(adam_jax.adam(1e-3, **formats)) for formats in (saved, other_formats))
    _, state = one.update(params, one.init(params))
    with ocp.CheckpointManager(tmp_path) as manager:
        save(manager, 1, state)
        manager.wait_until_finished()
        if saved.get("nu_dtype") == other_formats.get("nu_dtype") == "int8":
            updates, _ = other.update(params, restore(manager, 1, other.init(params)))
            assert jnp.isnan(updates["kernel"]).all()
            return
        with pytest.raises(ValueError, match=r"Target|shape"):
            other.update(params, restore(manager, 1, other.init(params)))
