"""Gradient release gives the plain step's numbers and refuses what it cannot update."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from covering import first
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optimizers import EXACT, INT8, each_layout, seven_bytes
from trees import assert_close, assert_same_bits, random_tree, short_tree, untyped

import adam_jax

LAYERS = 3
LAYERED = {"blocks": True, "rest": False}
SHAPES = {"w": (LAYERS, 48, 96), "b": (LAYERS, 96)}


def steps_of(loss, optimizer, layers=LAYERED, **options):
    """Returns plain and released steps: (params, state, *args) to (value, params, state)."""

    def plain(params, state, *args):
        value, gradients = jax.value_and_grad(loss, **options)(params, *args)
        updates, state = optimizer.update(gradients, state, params)
        return value, optax.apply_updates(params, updates), state

    return plain, adam_jax.value_and_update(loss, optimizer, layers=layers, **options)


def run(step, optimizer, params, batches):
    """Returns losses, parameters and state after one jitted step for each batch."""

    @jax.jit
    def scanned(params, batches):
        def body(carry, batch):
            value, *carry = step(*carry, batch)
            return tuple(carry), value

        return jax.lax.scan(body, (params, optimizer.init(params)), batches)

    (params, state), values = scanned(params, batches)
    return values, params, state


def product(x, y):
    return jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32))


def linear_loss(params, batch, scan=jax.lax.scan):
    """Returns a loss whose gradient is exactly the batch."""

    def block(total, xs):
        return total + optax.tree.sum(jax.tree.map(product, *xs)), None

    total, _ = scan(block, jnp.float32(0), (params["blocks"], batch["blocks"]))
    return total + product(params["rest"], batch["rest"])


def linear_problem(dtype, steps=4):
    params = {"blocks": short_tree(SHAPES, dtype), "rest": short_tree({"": (5, 7)}, dtype)[""]}
    batches = [
        {
            "blocks": short_tree(SHAPES, dtype, seed),
            "rest": short_tree({"": (5, 7)}, dtype, seed)[""],
        }
        for seed in range(1, 1 + steps)
    ]
    return params, jax.tree.map(lambda *x: jnp.stack(x), *batches)


def assert_released_is_plain(optimizer, params, batches, loss=linear_loss, layers=LAYERED):
    plain, released = steps_of(loss, optimizer, layers)
    expected = run(plain, optimizer, params, batches)
    assert_same_bits(run(released, optimizer, params, batches), expected)
    moved = jax.tree.map(lambda x, y: jnp.any(x != y), expected[1], params)
    assert all(jax.tree.leaves(moved))


@pytest.mark.covering
@each_layout
def test_steps_are_bit_identical_to_plain_steps(row, standard_promotion):
    optimizer = row.make(**{k: v for k, v in EXACT.items() if row.takes(k)})
    assert_released_is_plain(optimizer, *linear_problem(row.param_dtype))


def test_subtrees_may_have_masks_rates_and_schedules(x64):
    rate = {"blocks": {"w": optax.linear_schedule(2**-8, 0, 8), "b": 2**-9}, "rest": 2**-7}
    optimizer = adam_jax.adamw(
        untyped(rate),
        **{k: EXACT[k] for k in ("b1", "b2")},
        weight_decay=untyped({"blocks": 2**-6, "rest": 2**-5}),
        mask=lambda params: jax.tree.map(lambda p: p.ndim > 2, params),
        **INT8,
    )
    assert_released_is_plain(optimizer, *linear_problem("float32"))


BLOCKS = {"blocks": True, "rest": False}
CHAINS = {
    "hyperparameters": lambda: optax.inject_hyperparams(adam_jax.adamw)(2**-10, b1=0.5),
    "optax.adamw": lambda: optax.adamw(2**-10, b1=0.5, b2=1 - 2**-10, weight_decay=2**-7),
    "momentum": lambda: optax.sgd(2**-4, momentum=0.5),
    "adabelief": lambda: optax.adabelief(2**-7),
    "lion": lambda: optax.lion(2**-7),
    "ademamix": lambda: optax.contrib.ademamix(2**-7),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(2**-7),
    "decay": lambda: optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.25)),
    "clip": lambda: optax.chain(optax.clip(0.5), optax.sgd(0.25)),
    "groups": lambda: optax.multi_transform(
        {"w": adam_jax.adam(2**-8, **INT8), "other": optax.sgd(0.5)},
        {"blocks": {"w": "w", "b": "other"}, "rest": "other"},
    ),
    "MultiSteps": lambda: optax.MultiSteps(adam_jax.adamw(2**-9, **INT8), 2),
    "average": lambda: adam_jax.average_params(adam_jax.adamw(2**-9, **INT8), 0.5),
    "norm of a layer": lambda: optax.chain(
        optax.masked(adam_jax.per_layer(optax.clip_by_global_norm(1.0)), BLOCKS), optax.sgd(2**-4)
    ),
    "units of a layer": lambda: optax.chain(
        optax.masked(adam_jax.per_layer(optax.adaptive_grad_clip(0.1)), BLOCKS),
        adam_jax.adam(2**-7),
    ),
    "layers by themselves": lambda: optax.multi_transform(
        {"stack": adam_jax.per_layer(adam_jax.adam(2**-7, **INT8)), "rest": optax.sgd(0.5)},
        {"blocks": "stack", "rest": "rest"},
    ),
    "norm of all": lambda: optax.chain(adam_jax.clip_by_global_norm(1.0), optax.sgd(2**-4)),
    "norm of all in master weights": lambda: adam_jax.master_weights(
        optax.chain(adam_jax.clip_by_global_norm(1.0), adam_jax.adamw(2**-8)), "int16"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_other_optimizers_and_chains_agree_with_plain_steps(name, standard_promotion):
    """Steps agree up to the order of sums of squares, and to products fused with sums."""
    optimizer = untyped(CHAINS[name]())
    params, batches = linear_problem("bfloat16" if "master" in name else "float32")
    plain, released = steps_of(linear_loss, optimizer)
    expected = run(plain, optimizer, params, batches)
    result = run(released, optimizer, params, batches)
    if "master" in name:  # neighbouring numbers may have very different remainders
        weights = [adam_jax.master_params(x[1], x[2]) for x in (result, expected)]
        assert_close(weights[0], weights[1], 1e-6)
        assert_close(result[2].inner_state, expected[2].inner_state, 1e-5)
    else:
        assert_close(result[1], expected[1], 1e-6)
        assert_close(result[2], expected[2], 1e-5)
    moved = jax.tree.map(lambda x, y: jnp.any(x != y), expected[1], params)
    assert all(jax.tree.leaves(moved))


def test_a_frozen_part_does_not_move():
    labels = {"blocks": {"w": "frozen", "b": "trained"}, "rest": "frozen"}
    optimizer = optax.multi_transform(
        {"trained": adam_jax.adam(2**-7), "frozen": optax.set_to_zero()}, labels
    )
    params, batches = linear_problem("float32")
    plain, released = steps_of(linear_loss, optimizer)
    expected = run(plain, optimizer, params, batches)
    result = run(released, optimizer, params, batches)
    assert_same_bits(result, expected)
    assert_same_bits(result[1]["blocks"]["w"], params["blocks"]["w"])


def test_a_run_may_switch_between_the_steps(standard_promotion):
    optimizer = seven_bytes(2**-8)
    params, batches = linear_problem("bfloat16")
    plain, released = map(jax.jit, steps_of(linear_loss, optimizer))
    runs = []
    for steps in ([plain] * 4, [plain, released, released, plain]):
        carry = params, optimizer.init(params)
        for i, step in enumerate(steps):
            _, *carry = step(*carry, jax.tree.map(lambda x, i=i: x[i], batches))
        runs.append(carry)
    assert_same_bits(*runs)


DEPTH, WIDTH, LENGTH = 3, 16, 6


def model_params(dtype="float32"):
    def stack(depth, seed):
        shapes = {
            "query": (depth, WIDTH, WIDTH),
            "mlp": (depth, WIDTH, WIDTH),
            "gain": (depth, WIDTH),
        }
        return jax.tree.map(lambda x: (0.3 * x).astype(dtype), random_tree(shapes, seed=seed))

    embed = 0.3 * random_tree({"": (11, WIDTH)}, seed=5)[""]
    scale = jnp.ones(WIDTH, dtype)
    return {
        "embed": embed.astype(dtype),
        "encoder": stack(DEPTH, 1),
        "decoder": stack(DEPTH + 1, 2),
        "scale": scale,
    }


def model_loss(params, batch, key, scan=jax.lax.scan, unroll=1, remat=False):
    """Has encoder and decoder, dropout, a carried counter, outputs of layers, shared weights."""
    embedded = params["embed"][batch]
    scale = params["scale"]

    def layer(x, p):
        scores = jax.nn.softmax((x @ p["query"]) @ x.T)
        return x + scores @ jnp.tanh((x * p["gain"][None]) @ p["mlp"]) * scale[None]

    def encode(carry, xs):
        x, number = carry
        p, layer_key = xs
        keep = jax.random.bernoulli(layer_key, 0.9, x.shape)
        x = jnp.where(keep, layer(x, p), 0)
        return (x, number + 1), {"mean": jnp.mean(x, axis=0), "number": number}

    def decode(x, p):
        return layer(x, p) + embedded, None

    if remat:
        encode, decode = map(functools.partial(jax.checkpoint, prevent_cse=False), (encode, decode))
    keys = jax.random.split(key, DEPTH)
    start = embedded, jnp.int32(0)
    (x, number), ys = scan(encode, start, (params["encoder"], keys), unroll=unroll)
    x, _ = scan(decode, x, params["decoder"], reverse=True)
    logits = (x @ params["embed"].T).astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch).mean()
    return loss + jnp.mean(ys["mean"].astype(jnp.float32) ** 2), {"number": number, "ys": ys}


MODEL_LAYERS = {"embed": False, "encoder": True, "decoder": True, "scale": False}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "remat", "unroll"),
    first(
        2,
        [("bfloat16", True, 1), ("float16", False, 2), ("float32", False, 1), ("float32", True, 2)],
    ),
)
def test_a_model_trains_as_with_plain_steps(dtype, remat, unroll, standard_promotion):
    loss = functools.partial(model_loss, unroll=unroll, remat=remat)
    optimizer = adam_jax.adamw(1e-2, eps=1e-3)
    if dtype != "float32":
        optimizer = adam_jax.master_weights(optimizer, "int16")
    params = model_params(dtype)
    keys = jax.random.split(jax.random.key(0), 8)
    batches = jax.random.randint(jax.random.key(1), (8, LENGTH), 0, 11)

    def losses_of(step):
        step = jax.jit(step)
        carry, losses = (params, optimizer.init(params)), []
        for batch, key in zip(batches, keys, strict=True):
            (value, aux), *carry = step(*carry, batch, key)
            losses.append(value)
            assert aux["number"] == DEPTH
        return jnp.stack(losses), carry

    plain, released = map(losses_of, steps_of(loss, optimizer, MODEL_LAYERS, has_aux=True))
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}[dtype]
    np.testing.assert_allclose(released[0], plain[0], rtol=tolerance)
    assert_close(released[1][0], plain[1][0], tolerance)
    assert plain[0][-1] < plain[0][0]


def test_eager_steps_agree():
    optimizer = adam_jax.adam(2**-7)
    params, batches = linear_problem("float32", steps=1)
    batch = jax.tree.map(lambda x: x[0], batches)
    plain, released = (
        step(params, optimizer.init(params), batch) for step in steps_of(linear_loss, optimizer)
    )
    assert_close(released, plain, 1e-6)


def test_vmap_and_derivatives_agree_with_plain_steps():
    optimizer = adam_jax.adam(2**-7, eps=1e-3)
    params, batches = linear_problem("float32", steps=1)
    batch = jax.tree.map(lambda x: x[0], batches)

    @functools.partial(jax.jit, static_argnums=0)
    def several(step, factors):
        def next_weights(factor):
            scaled = jax.tree.map(lambda x: factor * x, batch)
            return optax.tree.sum(step(params, optimizer.init(params), scaled)[1])

        return jax.vmap(jax.value_and_grad(next_weights))(factors)

    plain, released = steps_of(linear_loss, optimizer)
    factors = jnp.array([0.01, 0.1])
    for actual, desired in zip(several(released, factors), several(plain, factors), strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-4)
    assert np.all(several(plain, factors)[1] != 0)


@pytest.mark.slow
@pytest.mark.covering
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("placement", ["data parallel", "ZeRO-1", "FSDP"])
def test_meshes_give_the_same_bits_as_one_device(placement, kind, standard_promotion):
    """The state is divided over all chips, except in data-parallel training."""
    mesh = jax.make_mesh((4,), ("data",), (kind,), devices=jax.devices()[:4])
    optimizer = seven_bytes(2**-8)
    params, batches = linear_problem("bfloat16")
    plain, released = steps_of(linear_loss, optimizer)
    expected = run(plain, optimizer, params, batches)
    spec = PartitionSpec(None, "data") if placement == "FSDP" else PartitionSpec()
    placed = {
        "blocks": jax.device_put(params["blocks"], NamedSharding(mesh, spec)),
        "rest": jax.device_put(params["rest"], NamedSharding(mesh, PartitionSpec())),
    }
    axis = "data" if placement == "ZeRO-1" else None
    shardings = adam_jax.state_shardings(optimizer, placed, axis=axis, layers=LAYERED)
    where = jax.tree.map(lambda x: x.sharding, placed), shardings
    step = jax.jit(released, donate_argnums=(0, 1), out_shardings=(None, *where))
    state = jax.jit(optimizer.init, out_shardings=shardings)(placed)
    divided = state.inner_state[0].mu["blocks"]["w"].sharding.shard_shape(SHAPES["w"])
    assert divided == ((3, 48, 96) if placement == "data parallel" else (3, 12, 96))
    carry = placed, state
    for i in range(4):
        batch = jax.tree.map(lambda x, i=i: x[i], batches)
        _, *carry = step(*carry, jax.device_put(batch, NamedSharding(mesh, PartitionSpec())))
    assert_same_bits(tuple(carry), expected[1:])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_steps_work_within_a_mesh(kind):
    """JAX determines the sharding of scales for a stack of one layer, but not of several."""
    mesh = jax.make_mesh((4,), ("data",), (kind,), devices=jax.devices()[:4])
    optimizer = adam_jax.adam(2**-8, mu_dtype="int8", nu_dtype="int8")
    loss = lambda params, scan: scan(lambda x, w: (x + jnp.sum(w), None), 0.0, params["w"])[0]  # noqa: E731
    step = adam_jax.value_and_update(loss, optimizer, layers=True)
    with jax.set_mesh(mesh):
        params = {"w": jnp.ones((3, 64, 64))}
        state = optimizer.init(params)
        _, *released = jax.jit(step)(params, state)
        updates, new = jax.jit(optimizer.update)(params, state, params)  # gradients are 1
        assert_same_bits(tuple(released), (optax.apply_updates(params, updates), new))


def test_state_divided_along_its_layers_is_refused():
    mesh = jax.make_mesh((3,), ("data",), (AxisType.Explicit,), devices=jax.devices()[:3])
    params = jax.device_put({"w": jnp.ones((3, 4))}, NamedSharding(mesh, PartitionSpec()))
    optimizer = adam_jax.adam(0.1)
    shardings = adam_jax.state_shardings(optimizer, params, axis="data")
    state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    loss = lambda params, scan: scan(lambda x, w: (x + jnp.sum(w), None), 0.0, params["w"])[0]  # noqa: E731
    step = adam_jax.value_and_update(loss, optimizer, layers=True)
    with pytest.raises(ValueError, match="Pass layers to"):
        jax.jit(step)(params, state)


def test_steps_work_inside_shard_map():
    """Gradients are of the mean over devices, and the last layers' cotangents are zero."""
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])

    def loss(params, inputs, scan=jax.lax.scan):
        def block(carry, p):
            x, unused = carry
            return (jnp.tanh(x @ p), unused + jnp.sum(x)), jnp.mean(x)

        (x, _), _ = scan(block, (inputs @ params["rest"], inputs[0, 0]), params["blocks"])
        return jax.lax.pmean(jnp.mean(x**2), "data")

    params = {
        "blocks": 0.3 * random_tree({"": (LAYERS, 64, 64)})[""],
        "rest": 0.3 * random_tree({"": (5, 64)})[""],
    }
    inputs = random_tree({"": (8, 5)})[""]
    optimizer = adam_jax.adamw(2**-8, eps=1e-3, **INT8)
    specs = PartitionSpec(), PartitionSpec(), PartitionSpec("data")
    results = []
    for step in steps_of(loss, optimizer):
        mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
        results.append(jax.jit(mapped)(params, optimizer.init(params), inputs))
    assert_close(results[1][:2], results[0][:2], 1e-4)
    assert jnp.all(results[1][1]["blocks"] != params["blocks"])


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_a_single_layer_may_print_and_have_weak_types_and_none(dtype, capfd):
    """A scan's body may do all this, even with one layer; the loss gives each a gradient."""
    params = {"w": short_tree({"": (1, 4, 5)}, dtype)[""], "none": None, "empty": jnp.ones((1, 0))}

    def loss(params, x, scan=jax.lax.scan):
        def block(total, p):
            jax.debug.print("layer {x}", x=x)
            return total + jnp.sum(jnp.abs(p["w"]) ** 2) * x + jnp.sum(p["empty"]), None

        policy = jax.checkpoint_policies.everything_saveable
        return scan(jax.checkpoint(block, policy=policy), 0.0, params)[0]

    optimizer = adam_jax.adam(2**-4, eps=1e-3)
    layers = {"w": True, "none": True, "empty": True}
    plain, released = (
        jax.jit(step)(params, optimizer.init(params), jnp.float32(0.5))
        for step in steps_of(loss, optimizer, layers)
    )
    assert_close(released, plain, 1e-6)
    assert jnp.all(released[1]["w"] != params["w"])
    jax.effects_barrier()
    assert "layer 0.5" in capfd.readouterr().out


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stacks_are_updated_in_place(dtype, remat, standard_promotion):
    """Donated buffers are reused, and XLA for CPU never copies a stack."""

    def block(x, p):
        return x + jax.nn.gelu(x @ p["w"] + p["b"][None]) @ p["w"].T, None

    def loss(params, x, scan=jax.lax.scan):
        x, _ = scan(jax.checkpoint(block) if remat else block, x, params["blocks"])
        return product(x, x) + product(params["rest"], params["rest"])

    optimizer = adam_jax.adamw(1e-3) if dtype == "float32" else seven_bytes(1e-3)
    params, _ = linear_problem(dtype)
    state = optimizer.init(params)
    _, released = steps_of(loss, optimizer)
    jitted = jax.jit(released, donate_argnums=(0, 1))
    compiled = jitted.lower(params, state, jnp.ones((4, 48), dtype)).compile()
    memory = untyped(compiled.memory_analysis())
    assert memory.alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves((params, state)))
    text = untyped(compiled.as_text())
    stack = re.escape(str(list(SHAPES["w"])).replace(" ", ""))
    copies = [x for x in text.splitlines() if re.search(rf"{stack}\S* copy\(", x)]
    assert copies == []
    assert re.search(rf"{stack}\S* dynamic-update-slice\(", text)


def refused(optimizer, loss=linear_loss, layers=LAYERED, dtype="float32", **options):
    params, batches = linear_problem(dtype, steps=1)
    step = adam_jax.value_and_update(loss, optimizer, layers=layers, **options)
    state = optimizer.init(params)
    jax.eval_shape(step, params, state, jax.tree.map(lambda x: x[0], batches))


COUPLED = {
    "global norm": (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), "depends on"),
    "finite": (optax.apply_if_finite(optax.sgd(0.1), 3), "depends on"),
    "flatten": (optax.flatten(optax.adam(0.1)), "depends on"),
    "landing": (adam_jax.check_landing(seven_bytes()), "depends on"),
    "lamb": (optax.lamb(0.1), r"other layers \(reduce_sum\)"),
    "lars": (optax.lars(0.1), r"other layers \(reduce_sum\)"),
    "block rms": (
        optax.chain(optax.clip_by_block_rms(1.0), optax.sgd(0.1)),
        "other layers|number of layers",
    ),
    "units of a stack": (
        optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(0.1)),
        "other layers|number of layers",
    ),
    "muon": (optax.contrib.muon(0.1), "layers"),
    "adafactor": (optax.adafactor(0.1), r"other layers \(reduce_sum\)"),
    "novograd": (optax.novograd(0.1), "has shape .* and no axis of layers"),
    "prodigy": (optax.contrib.prodigy(0.1), "depends on"),
    "noise": (optax.noisy_sgd(0.1, key=0), "its place in the stack|depends on"),
    "sizes": (
        adam_jax.adamw(0.1, mask=lambda params: jax.tree.map(lambda p: p.size > 10_000, params)),
        "uses the number of layers",
    ),
    "cumulative": (
        optax.chain(
            optax.stateless(lambda g, _: jax.tree.map(lambda x: jnp.cumsum(x, axis=0), g)),
            optax.sgd(0.1),
        ),
        r"may depend on other layers \(cumsum\)",
    ),
    "shuffled": (
        optax.chain(
            optax.stateless(
                lambda g, _: jax.tree.map(lambda x: x.T.reshape(x.shape) if x.ndim == 2 else x, g)
            ),
            optax.sgd(0.1),
        ),
        r"may depend on other layers \(reshape\)",
    ),
    "reversed": (
        optax.chain(
            optax.stateless(lambda g, _: jax.tree.map(lambda x: jnp.flip(x, 0), g)), optax.sgd(0.1)
        ),
        r"other layers \(rev\)",
    ),
    "layers of other leaves": (
        optax.chain(
            optax.masked(
                adam_jax.per_layer(optax.clip_by_global_norm(1.0)),
                {"blocks": {"w": True, "b": True}, "rest": False},
            ),
            optax.sgd(0.1),
        ),
        None,
    ),
}


@pytest.mark.parametrize("name", COUPLED)
def test_optimizers_that_join_layers_or_leaves_are_refused(name, standard_promotion):
    optimizer, message = COUPLED[name]
    dtype = "bfloat16" if name == "landing" else "float32"
    if message is None:
        refused(optimizer, dtype=dtype)
        return
    with pytest.raises(ValueError, match=message) as caught:
        refused(optimizer, dtype=dtype)
    assert "['" in str(caught.value)
    assert "plain step" in str(caught.value)


def block(x, p):
    return x + jnp.sum(p["w"]) + jnp.sum(p["b"]), None


def cast_before(params, batch, scan):
    return scan(block, 0.0, jax.tree.map(lambda p: 2 * p, params["blocks"]))[0]


def scanned_twice(params, batch, scan):
    return scan(block, scan(block, 0.0, params["blocks"])[0], params["blocks"])[0]


def never_scanned(params, batch, scan):
    return scan(lambda x, w: (x + jnp.sum(w), None), 0.0, params["blocks"]["w"])[0]


def used_outside(params, batch, scan):
    return scan(block, 0.0, params["blocks"])[0] + jnp.sum(params["blocks"]["w"] ** 2)


def used_in_another_body(params, batch, scan):
    w, b = params["blocks"]["w"], params["blocks"]["b"]
    x, _ = scan(lambda x, p: (x + jnp.sum(p) * b[0, 0], None), 0.0, w)
    return scan(lambda x, p: (x + jnp.sum(p), None), x, b)[0]


def in_vain(params, batch, scan):
    return jnp.sum(params["rest"]) + jax.lax.stop_gradient(scan(block, 0.0, params["blocks"])[0])


def in_jit(params, batch, scan):
    return jax.jit(lambda blocks: scan(block, 0.0, params["blocks"])[0])(params["blocks"])


def in_cond(params, batch, scan):
    run = lambda: scan(block, 0.0, params["blocks"])[0]  # noqa: E731
    return jax.lax.cond(jnp.sum(batch["rest"]) > 0, run, lambda: 0.0)


def in_checkpoint(params, batch, scan):
    return jax.checkpoint(lambda: scan(block, 0.0, params["blocks"])[0])()


def nested(params, batch, scan):
    def outer(x, w):
        return x + jnp.sum(w) + scan(
            lambda x, b: (x + jnp.sum(b), None), 0.0, params["blocks"]["b"]
        )[0], None

    return scan(outer, 0.0, params["blocks"]["w"])[0]


def in_other_scan(params, batch, scan):
    return jax.lax.scan(lambda x, _: scan(block, x, params["blocks"]), 0.0, length=2)[0]


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (cast_before, r"\['blocks'\]\['[bw]'\] .*outside of the scan|is not among the xs"),
        (scanned_twice, r"\['blocks'\]\['[bw]'\] is scanned twice"),
        (never_scanned, r"\['blocks'\]\['b'\] is marked in layers but is not among the xs"),
        (used_outside, r"\['blocks'\]\['w'\] .*outside of the scan"),
        (used_in_another_body, r"\['blocks'\]\['b'\] .*outside of the scan"),
        (in_vain, r"does not depend on the results of scan over parameter \['blocks'\]\['[bw]'\]"),
        (in_jit, r"\['blocks'\]\['w'\] is called inside a function|not among the xs"),
        (in_cond, r"is called inside a function"),
        (in_checkpoint, r"is called inside a function"),
        (nested, r"\['blocks'\]\['b'\] is called inside a function"),
        (in_other_scan, r"is called inside a function"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_losses_that_would_leave_a_layer_without_its_update_are_refused(loss, message):
    with pytest.raises(ValueError, match=message):
        refused(optax.sgd(0.1), loss)


def test_reads_that_need_no_gradient_are_allowed():
    def loss(params, batch, scan=jax.lax.scan):
        size = jax.lax.stop_gradient(jnp.max(jnp.abs(params["blocks"]["w"])))
        mean, _ = scan(lambda x, g: (x + jnp.mean(g), None), jnp.float32(0), batch["blocks"]["w"])
        return linear_loss(params, batch, scan) * size + 0 * mean

    params, batches = linear_problem("float32")
    optimizer = adam_jax.adam(2**-7, eps=1e-3)
    plain, released = steps_of(loss, optimizer)
    expected = run(plain, optimizer, params, batches)
    assert_close(run(released, optimizer, params, batches), expected, 1e-5)


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ({"blocks": False, "rest": False}, ValueError, "False for all parameters"),
        ({"blocks": "yes", "rest": False}, TypeError, r"'yes' at \['blocks'\]\['b'\]"),
        ({"blocks": True}, ValueError, "layers must be one value or a tree prefix"),
        (True, ValueError, r"\['rest'\] is marked in layers, but .* outside of the scan"),
    ],
)
def test_wrong_layers_are_refused(layers, error, message):
    with pytest.raises(error, match=message):
        refused(optax.sgd(0.1), layers=layers)


def test_a_scalar_is_refused_as_a_stack():
    params = {"w": jnp.ones(()), "v": jnp.ones((3, 2))}
    optimizer = optax.sgd(0.1)
    step = adam_jax.value_and_update(lambda params, scan: 0.0, optimizer, layers=True)
    with pytest.raises(ValueError, match=r"\['w'\], which is a scalar"):
        step(params, optimizer.init(params))


def test_layers_may_be_a_function():
    params, batches = linear_problem("float32")
    layers = lambda params: {"blocks": True, "rest": False}  # noqa: E731
    assert_released_is_plain(
        adam_jax.adam(2**-7, b1=0.5, b2=1 - 2**-10), params, batches, layers=layers
    )
