import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optimizers import INT8, seven_bytes

import adam_jax

MODEL = {"embed": (1024, 256), "blocks": (8, 256, 512), "bias": (8, 256)}
SIZE = sum(int(np.prod(shape)) for shape in MODEL.values())


def shapes(dtype="float32", spec=None, mesh=None):
    """Returns the model's parameters as shapes, without allocating any."""
    place = None if mesh is None else NamedSharding(mesh, PartitionSpec(*spec or ()))
    return {name: jax.ShapeDtypeStruct(x, dtype, sharding=place) for name, x in MODEL.items()}


def allocated(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


OPTIMIZERS = {
    "16 bytes": lambda: adam_jax.adamw(1e-3),
    "7 bytes": seven_bytes,
    "average": lambda: adam_jax.average_params(adam_jax.amsgrad(1e-3)),
    "optax": lambda: optax.MultiSteps(optax.adamw(1e-3), 2),
    "groups": lambda: optax.multi_transform(
        {"a": adam_jax.adam(1e-3, **INT8), "b": optax.sgd(1e-3, momentum=0.9)},
        {"embed": "a", "blocks": "a", "bias": "b"},
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_memory_usage_counts_allocated_bytes(name):
    optimizer = OPTIMIZERS[name]()
    params = {k: jnp.zeros(x.shape, x.dtype) for k, x in shapes("bfloat16").items()}
    usage = adam_jax.memory_usage(optimizer, shapes("bfloat16"))
    assert usage == adam_jax.memory_usage(optimizer, params)
    assert usage.size == SIZE
    assert usage.weights == usage.gradients == allocated(params)
    state = allocated(optimizer.init(params))
    assert sum(usage.state.values()) == state
    assert usage.total == 2 * usage.weights + state
    assert sum(x.state for x in usage.parameters) == state - usage.state["other"]
    assert [x.path for x in usage.parameters] == ["['blocks']", "['embed']", "['bias']"]


def test_each_kind_of_state_has_its_name():
    usage = adam_jax.memory_usage(seven_bytes(), shapes("bfloat16"))
    small = 8 * 256  # elements with float32 moments
    moment = SIZE - small + 4 * small
    rows = 1024 + 8 * 256
    assert usage.state == {
        "remainder": SIZE,
        "mu": moment,
        "nu": moment,
        "scales": 2 * 4 * (rows + 1),  # a float32 leaf has one scalar in their place
        "other": 8,  # two counts
    }
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9), adam_jax.adam(1e-3))
    assert adam_jax.memory_usage(chain, shapes()).state.keys() == {"trace", "mu", "nu", "other"}


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_device_counts_its_own_part(axes):
    mesh = jax.make_mesh((4, 2), ("data", "model"), (axes, axes))
    optimizer = seven_bytes()
    whole = adam_jax.memory_usage(optimizer, shapes("bfloat16"))
    # State is divided like the parameters, and so are the scales of rows.
    divided = adam_jax.memory_usage(optimizer, shapes("bfloat16", ("data",), mesh))
    assert divided.size == SIZE
    assert divided.weights == divided.gradients == whole.weights // 4
    for kind, size in whole.state.items():
        whole_of_each = {"other": 8, "scales": 8}.get(kind, 0)
        assert divided.state[kind] == (size - whole_of_each) // 4 + whole_of_each
    # ZeRO-1: state and gradients are divided, the parameters are not.
    params = shapes("bfloat16", (), mesh)
    shardings = adam_jax.state_shardings(optimizer, params, axis="data")
    zero = adam_jax.memory_usage(optimizer, params, shardings=shardings)
    assert zero.weights == whole.weights
    assert zero.gradients == whole.gradients // 4
    assert zero.state == divided.state
    arrays = jax.tree.map(lambda x: jnp.zeros_like(x, device=x.sharding), params)
    state = jax.jit(optimizer.init, out_shardings=shardings)(arrays)
    on_first = [x.addressable_shards[0].data for x in jax.tree.leaves(state)]
    assert sum(zero.state.values()) == allocated(on_first)


def test_state_in_host_memory_is_counted_separately():
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    params, optimizer = shapes(mesh=mesh), adam_jax.adam(1e-3)
    shardings = adam_jax.state_shardings(optimizer, params)
    moments, *others = shardings
    moments = moments._replace(
        nu=jax.tree.map(lambda x: x.with_memory_kind("pinned_host"), moments.nu)
    )
    usage = adam_jax.memory_usage(optimizer, params, shardings=(moments, *others))
    assert usage.state == {"mu": 4 * SIZE, "other": 4}
    assert usage.host_state == {"nu": 4 * SIZE}
    assert usage.total == 12 * SIZE + 4
    assert re.search("\nnu, in host memory +5.25 MB +4.00\n", str(usage))


def test_gradient_release_counts_one_layer_s_gradients():
    usage = adam_jax.memory_usage(
        seven_bytes(), shapes("bfloat16"), layers={"embed": False, "blocks": True, "bias": True}
    )
    embed = 1024 * 256
    assert usage.gradients == 2 * (embed + (SIZE - embed) // 8)


def test_memory_usage_prints_a_table():
    lines = str(adam_jax.memory_usage(seven_bytes(), shapes("bfloat16"))).splitlines()
    assert re.fullmatch(r"1,312,768 parameters +bytes +per parameter", lines[0])
    assert re.fullmatch(r"weights +2.63 MB +2.00", lines[1])
    assert re.fullmatch(r"on each device +9.23 MB +7.03", lines[8])
    assert re.fullmatch(r"\['blocks'\] +bfloat16 +\(8, 256, 512\) +(\d.\d\d MB *){3}", lines[11])
    assert len({len(line) for line in lines[:9]}) == 1
    huge = {"w": jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32)}
    assert "17.6 TB" in str(adam_jax.memory_usage(adam_jax.adam(1e-3), huge))


def test_nearly_empty_trees_are_accepted():
    nothing = adam_jax.memory_usage(adam_jax.adam(1e-3), {})
    assert (nothing.size, nothing.total, nothing.parameters) == (0, 4, [])
    assert "0 parameters" in str(nothing)
    scalar = adam_jax.memory_usage(adam_jax.adam(1e-3), {"a": jnp.zeros(()), "b": None})
    assert scalar.total == 16 + 4
    alone = adam_jax.memory_usage(optax.sgd(0.1), jnp.zeros((3, 2), jnp.complex64))
    assert alone.total == 2 * 48
    assert [x.path for x in alone.parameters] == ["(the only leaf)"]


def test_row_sparse_tables_are_counted():
    rows = adam_jax.row_sparse(adam_jax.adam(1e-3), exact=True)
    table = jax.ShapeDtypeStruct((10**9, 128), jnp.float32)
    usage = adam_jax.memory_usage(rows, table)
    assert usage.weights == 512 * 10**9
    assert usage.state == {
        "mu": 512 * 10**9, "nu": 512 * 10**9, "last_step": 4 * 10**9, "other": 4
    }  # fmt: skip


def test_boxed_parameters_are_counted():
    model = nnx.eval_shape(lambda: nnx.Linear(512, 256, rngs=nnx.Rngs(0), param_dtype="bfloat16"))
    boxed = nnx.state(model, nnx.Param)
    usages = [
        adam_jax.memory_usage(seven_bytes(), params) for params in (boxed, nnx.to_pure_dict(boxed))
    ]
    assert usages[0].state == usages[1].state
    assert [x.state for x in usages[0].parameters] == [x.state for x in usages[1].parameters]
    assert usages[0].state["scales"] == 2 * 4 * (512 + 1)


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"parameter \['ids'\] has dtype int32"):
        adam_jax.memory_usage(optax.sgd(0.1), {"ids": jnp.zeros(3, jnp.int32)})
