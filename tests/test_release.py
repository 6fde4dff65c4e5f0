"""Gradient release: the plain step's numbers, and everything that is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import EXACT, INT8, each_layout, seven_bytes
from trees import assert_close, assert_same_bits, random_tree, short_tree, untyped

import adam_jax

LAYERS = 3
LAYERED = {"blocks": True, "rest": False}
SHAPES = {"w": (LAYERS, 48, 96), "b": (LAYERS, 96)}


def steps_of(loss, optimizer, layers=LAYERED, **options):
    """The plain step and the released one: (params, state, *args) to (value, params, state)."""

    def plain(params, state, *args):
        value, gradients = jax.value_and_grad(loss, **options)(params, *args)
        updates, state = optimizer.update(gradients, state, params)
        return value, optax.apply_updates(params, updates), state

    return plain, adam_jax.value_and_update(loss, optimizer, layers=layers, **options)


def run(step, optimizer, params, batches):
    """Losses, parameters and state after one jitted step for each batch."""

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
    """A loss whose gradient is the batch, with no rounding."""

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


@each_layout
def test_bit_identical_to_the_plain_step(row, standard_promotion):
    optimizer = row.make(**{k: v for k, v in EXACT.items() if row.takes(k)})
    assert_released_is_plain(optimizer, *linear_problem(row.param_dtype))


def test_masks_rates_and_schedules_of_subtrees(x64):
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


@pytest.mark.parametrize("name", CHAINS)
def test_other_optimizers_and_chains(name, standard_promotion):
    """Equal up to the order in which squares are added up, and to products fused with sums."""
    optimizer = CHAINS[name]()
    params, batches = linear_problem("bfloat16" if "master" in name else "float32")
    plain, released = steps_of(linear_loss, optimizer)
    expected = run(plain, optimizer, params, batches)
    result = run(released, optimizer, params, batches)
    assert_close(result[1], expected[1], 1e-6)
    assert_close(result[2], expected[2], 1e-5)
    moved = jax.tree.map(lambda x, y: jnp.any(x != y), expected[1], params)
    assert all(jax.tree.leaves(moved))


def test_a_frozen_part_stays():
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
    """Encoder and decoder, dropout, a counter in the carry, outputs of layers, shared weights."""
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


@pytest.mark.parametrize(
    ("dtype", "remat", "unroll"),
    [("float32", False, 1), ("float32", True, 2), ("bfloat16", True, 1), ("float16", False, 2)],
)
def test_a_model_trains_alike(dtype, remat, unroll, standard_promotion):
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


def test_eager():
    optimizer = adam_jax.adam(2**-7)
    params, batches = linear_problem("float32", steps=1)
    batch = jax.tree.map(lambda x: x[0], batches)
    plain, released = (
        step(params, optimizer.init(params), batch) for step in steps_of(linear_loss, optimizer)
    )
    assert_close(released, plain, 1e-6)


def test_vmap_and_derivatives():
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


def test_donated_buffers_are_reused():
    optimizer = adam_jax.adamw(0.1, **INT8)
    params, batches = linear_problem("float32", steps=1)
    _, released = steps_of(linear_loss, optimizer)
    state = optimizer.init(params)
    batch = jax.tree.map(lambda x: x[0], batches)
    compiled = jax.jit(released, donate_argnums=(0, 1)).lower(params, state, batch).compile()
    memory = untyped(compiled.memory_analysis())
    assert memory.alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves((params, state)))
