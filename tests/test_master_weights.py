"""`master_weights`: what is kept of a float32 weight, and that nothing else of it is lost."""

import functools

import chex
import flax.linen as nn
import hypothesis.extra.numpy as hnp
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

import adam_jax
from adam_jax import load_master_params, master_params, master_weights
from adam_jax._rounding import join, random_bits, split

# optax.apply_updates adds float32 updates to 16-bit parameters.
pytestmark = pytest.mark.usefixtures("standard_promotion")

LOW = {"bfloat16": np.dtype(jnp.bfloat16), "float16": np.dtype(np.float16)}
FRACTION_BITS = {"bfloat16": 7, "float16": 10}
SMALLEST_EXPONENT = {"bfloat16": -126, "float16": -14}
REMAINDERS = ["none", "int8", "int16", "float32"]
KEPT = {"none": 0, "int8": 8, "int16": 16, "float32": 16}

each_dtype = pytest.mark.parametrize("dtype", LOW)
each_remainder = pytest.mark.parametrize("remainder", REMAINDERS)


def bits_of(x):
    """The patterns of numbers, all NaNs being one."""
    x = np.asarray(x)
    words = x.view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize]).astype(np.int64)
    infinity = int(np.array(np.inf, x.dtype).view(f"u{x.dtype.itemsize}"))
    is_nan = words % 2 ** (8 * x.dtype.itemsize - 1) > infinity
    return np.where(is_nan, infinity + 1, words)


def all_numbers(dtype):
    return np.arange(2**16, dtype=np.uint16).view(LOW[dtype])


def ulp(x, dtype):
    """The distance of `dtype`'s numbers in the binade of x, in double."""
    _, exponent = np.frexp(np.asarray(x, np.float64))
    exponent = np.maximum(exponent - 1, SMALLEST_EXPONENT[dtype])
    return 2.0 ** (exponent - FRACTION_BITS[dtype])


def largest(dtype):
    return float(jnp.finfo(dtype).max)


def log_uniform(n, low, high, seed=0):
    rng = np.random.default_rng(seed)
    x = np.exp2(rng.uniform(low, high, n)) * rng.choice([-1.0, 1.0], n)
    return x.astype(np.float32)


@functools.cache
def given_steps(remainder):
    """An optimizer whose steps are what it is given as gradients, and one step of it."""
    optimizer = master_weights(optax.identity(), remainder)

    @jax.jit
    def step(params, state, steps):
        updates, state = optimizer.update(steps, state, params)
        return optax.apply_updates(params, updates), state, updates

    return optimizer, step


def start(optimizer, master, dtype):
    """Parameters and a state that are as close to `master` as they can be."""
    params = jax.tree.map(lambda w: jnp.zeros_like(w, dtype), master)
    return load_master_params(master, params, optimizer.init(params))


# Splitting and joining


@each_dtype
@pytest.mark.parametrize("kept", [0, 8, 16])
@pytest.mark.parametrize("bits", [None, 2**32 - 1])
def test_every_16_bit_number_is_split_into_itself_and_nothing(dtype, kept, bits):
    low = all_numbers(dtype)
    joined = join(jnp.asarray(low))
    assert joined.dtype == jnp.float32
    np.testing.assert_array_equal(bits_of(joined), bits_of(low.astype(np.float32)))
    words = None if bits is None else jnp.full(low.shape, bits, jnp.uint32)
    again, remainder = split(joined, LOW[dtype], kept, words)
    np.testing.assert_array_equal(bits_of(again), bits_of(low))
    assert not remainder.any()


def test_every_bfloat16_and_random_lower_bits_join_to_the_same_float32(x64):
    lower = np.random.default_rng(0).integers(0, 2**16, 2**16, dtype=np.uint32)
    words = (np.arange(2**16, dtype=np.uint32) << 16) | lower
    x = words.view(np.float32)
    x = x[np.isfinite(x) & (np.abs(x) <= largest("bfloat16"))]
    low, remainder = split(jnp.asarray(x), jnp.bfloat16, 16)
    assert remainder.dtype == jnp.int16
    assert remainder.min() < -(2**14)
    assert remainder.max() > 2**14
    np.testing.assert_array_equal(bits_of(join(low, remainder, 16)), bits_of(x))


def test_float16_and_16_bits_are_float32_from_2_to_the_minus_17():
    x = log_uniform(2**16, -17, 15.99)
    low, remainder = split(jnp.asarray(x), jnp.float16, 16)
    np.testing.assert_array_equal(join(low, remainder, 16), x)
    x = log_uniform(2**16, -60, -17)
    joined = np.asarray(join(*split(jnp.asarray(x), jnp.float16, 16), 16), np.float64)
    assert np.abs(joined - x).max() <= 2.0**-41


@each_dtype
def test_rounding_is_to_nearest_without_bits(dtype):
    x = log_uniform(2**16, -30, 15.9)
    low, _ = split(jnp.asarray(x), LOW[dtype], 16)
    desired = x.astype(LOW[dtype])
    # Rounded in two steps, to 2^-40 and to 2^-24, a small float16 may go the other way at a tie.
    slack = 2.0**-41 if dtype == "float16" else 0.0
    error, least = (np.abs(np.asarray(y, np.float64) - x) for y in (low, desired))
    assert np.all(error <= least + slack)


@each_dtype
@pytest.mark.parametrize("kept", [0, 8])
def test_rounding_is_right_on_average_over_all_bits(dtype, kept):
    """The mean over all 2^16 values of the bits that decide is x itself, exactly."""
    x = log_uniform(20, -12, 15.9)  # beyond float16's subnormal numbers, which use other bits
    bits = jnp.arange(2**16, dtype=jnp.uint32) << 16
    for value in x:
        low, remainder = split(jnp.full(2**16, value), LOW[dtype], kept, bits)
        joined = np.asarray(join(low, remainder, kept), np.float64)
        assert joined.mean() == value
        assert len(np.unique(joined)) <= 2


@pytest.mark.parametrize("kept", [0, 8, 16])
def test_rounding_of_subnormal_float16_is_right_on_average(kept):
    n = 2**16
    bits = random_bits((n,), 3)
    for value in np.float32([3.3e-6, -4.4e-8, 1.23e-9, 7e-13]):
        low, remainder = split(jnp.full(n, value), jnp.float16, kept, bits)
        joined = np.asarray(join(low, remainder, kept), np.float64)
        grid = 2.0 ** (-24 - kept)
        share = np.abs(value / grid) % 1
        deviation = grid * np.sqrt(share * (1 - share) / n)
        assert abs(joined.mean() - value) <= 5 * deviation
        assert np.all(np.abs(joined - value) < grid)


WIDTH = 32
any_words = hnp.arrays(np.uint32, WIDTH, elements=st.integers(0, 2**32 - 1))
many_examples = settings(max_examples=40, deadline=None, derandomize=True)


@each_dtype
@pytest.mark.parametrize("kept", [0, 8, 16])
@given(any_words, any_words)
@many_examples
def test_split_any_float32(dtype, kept, words, bits):
    x = words.view(np.float32)
    low, remainder = jax.jit(split, static_argnums=(1, 2))(x, LOW[dtype], kept, bits)
    joined = np.asarray(join(low, remainder, kept), np.float64)
    low, remainder = np.asarray(low), np.asarray(remainder)
    finite = np.isfinite(x)
    np.testing.assert_array_equal(np.isfinite(low), finite)
    np.testing.assert_array_equal(joined[~finite], x[~finite])
    np.testing.assert_array_equal(np.signbit(low), np.signbit(x))
    assert not remainder[~finite].any()
    half = 2**kept // 2
    assert np.all((remainder >= -half) & (remainder <= max(half - 1, 0)))
    x = x.astype(np.float64)
    inside = finite & (np.abs(x) <= largest(dtype))
    unit = ulp(x, dtype) * 2.0**-kept
    error = np.abs(joined - x)
    assert np.all(error[inside] <= unit[inside])
    if dtype == "bfloat16" and kept == 16:
        assert not error[inside].any()
    beyond = finite & ~inside
    assert np.all(np.abs(joined[beyond]) >= largest(dtype))
    assert np.all(np.abs(low[beyond].astype(np.float64)) == largest(dtype))


# One step


@each_dtype
@each_remainder
def test_a_zero_step_changes_no_parameter(dtype, remainder, x64):
    """Not one bit, from each of the 65,536 numbers of the dtype.

    The sum of a subnormal float32 and zero may be zero: JAX has CPUs flush such numbers. It is
    the platform's own addition that does it, in float32 training as in `optax.apply_updates`,
    and a subnormal bfloat16 is a subnormal float32.
    """
    params = jnp.asarray(all_numbers(dtype))
    optimizer, step = given_steps(remainder)
    state = optimizer.init(params)
    after, new_state, _ = step(params, state, jnp.full(params.shape, -0.0))
    flushed = np.asarray(jax.jit(jnp.add)(params.astype(jnp.float32), jnp.float32(-0.0)) == 0)
    before = np.asarray(params, np.float32)
    assert np.all(np.abs(before[flushed]) < 2.0**-126)
    desired = np.where(flushed, np.copysign(np.float32(0), before), before)
    after = np.asarray(after).astype(np.float32)
    if remainder == "float32":  # -0 and a remainder of +0 together are +0
        desired, after = (np.where(x == 0, np.float32(0), x) for x in (desired, after))
    np.testing.assert_array_equal(bits_of(after), bits_of(desired))
    chex.assert_trees_all_equal(new_state.remainder, state.remainder)


@each_dtype
@each_remainder
def test_a_zero_step_changes_no_remainder(dtype, remainder):
    optimizer, step = given_steps(remainder)
    # The remainder in float32 of a smaller bfloat16 is subnormal.
    params, state = start(optimizer, log_uniform(4096, -100, 15.99), dtype)
    after, new_state, _ = step(params, state, jnp.zeros(4096))
    chex.assert_trees_all_equal(after, params)
    chex.assert_trees_all_equal(new_state.remainder, state.remainder)
    if remainder != "none":
        assert jnp.mean(state.remainder != 0) > 0.1


def no_subnormal(x):
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)


def close_words(words):
    """Half of them with exponents near 1, so that sums of two are not just one of them."""
    return np.where(words & 1, (words & 0x81FFFFFF) | 0x3E000000, words).astype(np.uint32)


@each_dtype
@each_remainder
@given(any_words, any_words)
@example(np.full(WIDTH, 0x3F7FFFFF, np.uint32), np.full(WIDTH, 0xBF800000, np.uint32))
@example(np.full(WIDTH, 0x7F7F0000, np.uint32), np.full(WIDTH, 0xFF7FFFFF, np.uint32))
@example(np.full(WIDTH, 0x7EFF7FFF, np.uint32), np.full(WIDTH, 0xFF7FFFFF, np.uint32))
@example(np.full(WIDTH, 0x477FDFFF, np.uint32), np.full(WIDTH, 0xC77FE000, np.uint32))
@many_examples
def test_any_step_from_any_weight(dtype, remainder, words, step_words):
    """Parameter and remainder after a step together are the float32 sum, up to what is dropped.

    They could not be if the parameter landed anywhere but where the remainder takes it to be.
    """
    master = no_subnormal(close_words(words).view(np.float32))
    step = no_subnormal(close_words(step_words).view(np.float32))
    optimizer, run = given_steps(remainder)
    params, state = start(optimizer, master, dtype)
    old, old_params = np.asarray(master_params(params, state)), np.asarray(params, np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        desired = no_subnormal(old + step)
    params, state, updates = run(params, state, step)
    assert updates.dtype == jnp.float32
    params = np.asarray(params)
    joined = np.asarray(master_params(params, state), np.float64)

    finite = np.isfinite(desired)
    np.testing.assert_array_equal(np.isnan(joined), np.isnan(desired))
    infinite = np.isinf(desired)
    np.testing.assert_array_equal(joined[infinite], desired[infinite])
    assert np.isfinite(params[finite]).all()

    desired = desired.astype(np.float64)
    inside = finite & (np.abs(desired) <= largest(dtype))
    # Steps so long that the update overflows: those across all that a bfloat16 can be.
    inside &= ~(np.abs(step) > 0.99 * largest("bfloat16"))
    if remainder == "float32" or (remainder == "int16" and dtype == "bfloat16"):
        bound = np.zeros(WIDTH)
    elif remainder == "int16":
        bound = np.where(np.abs(desired) < 2.0**-17, 2.0**-40, 0)
    else:
        bound = ulp(desired, dtype) * 2.0 ** -KEPT[remainder]
    # A step that cancels, see `_step_leaf`; and what the remainder in float32 of a number so
    # small, or the update from or to it, loses to a processor without subnormal numbers.
    cancelled = np.abs(desired) < 2.0**-15 * np.abs(old_params)
    bound = np.where(cancelled, np.maximum(bound, 2.0**-24 * np.abs(old_params)), bound)
    bound = bound + 2.0**-126 * (np.abs(desired) < 2.0**-100)
    assert np.all(np.abs(joined[inside] - desired[inside]) <= bound[inside])

    beyond = finite & (np.abs(desired) > largest(dtype)) & (np.abs(step) < 1e38)
    edge = np.sign(desired) * largest(dtype)
    np.testing.assert_array_equal(params[beyond].astype(np.float64), edge[beyond])


@each_dtype
@each_remainder
def test_landing(dtype, remainder):
    """Where `apply_updates` lands is the number nearest to parameter and remainder together."""
    optimizer, run = given_steps(remainder)
    params, state = start(optimizer, log_uniform(2**14, -16, 15, 1), dtype)
    params, state, _ = run(params, state, log_uniform(2**14, -16, 15, 2))
    master = np.asarray(master_params(params, state), np.float64)
    distance = np.abs(np.asarray(params, np.float64) - master)
    nearest = np.asarray(master.astype(np.float32).astype(LOW[dtype]), np.float64)
    np.testing.assert_array_equal(distance, np.abs(nearest - master))


def test_a_step_that_cancels_lands_where_it_can():
    """1 - 2^-24 minus 1 is -2^-24, and no float32 update takes the parameter 1 there."""
    optimizer, run = given_steps("int16")
    params, state = start(optimizer, np.float32([1 - 2.0**-24]), "bfloat16")
    assert params == 1
    params, state, _ = run(params, state, np.float32([-1]))
    assert params.astype(jnp.float32) == master_params(params, state)
    assert abs(float(params[0]) + 2.0**-24) <= 2.0**-24


@each_dtype
@each_remainder
def test_a_step_that_cancels_with_more_bits_than_float32(dtype, remainder):
    """A compiler may leave out the rounding between a product and a sum that it is part of."""
    weights = log_uniform(2**14, -12, 4, 1)
    params = jnp.asarray(weights).astype(LOW[dtype])
    rate = np.float32(0.0123)

    def optimizer(rate):
        return adam_jax.master_weights(optax.scale_by_learning_rate(rate), remainder)

    params, state = adam_jax.load_master_params(weights, params, optimizer(rate).init(params))
    before = np.asarray(master_params(params, state), np.float64)

    @jax.jit
    def step(params, state, gradients, rate):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer(rate).update(gradients, state, params)
            return optax.apply_updates(params, updates), state

    gradients = np.float32(before) / rate  # times the rate: the weight, to a float32's rounding
    after = np.asarray(master_params(*step(params, state, gradients, rate)), np.float64)
    # What float32 leaves, a parameter that may land 2^-24 away, and float16's subnormal numbers.
    smallest = 2.0 ** -(24 + KEPT[remainder]) if dtype == "float16" else 0
    assert np.all(np.abs(after) <= 2.0**-22 * np.abs(before) + smallest)


@each_dtype
@each_remainder
def test_weights_saturate_and_come_back(dtype, remainder):
    top = largest(dtype)
    optimizer, run = given_steps(remainder)
    params = jnp.asarray([top, -top], dtype)
    state = optimizer.init(params)
    params, state, _ = run(params, state, jnp.asarray([top, -top], jnp.float32) * 2.0**-9)
    np.testing.assert_array_equal(np.asarray(params, np.float64), [top, -top])
    params, state, _ = run(params, state, jnp.asarray([-top, top], jnp.float32) / 2)
    assert jnp.all(jnp.isfinite(params))
    assert jnp.all(jnp.abs(params.astype(jnp.float32)) < 0.6 * top)


@each_dtype
@each_remainder
def test_infinity_and_nan_are_passed_on(dtype, remainder):
    optimizer, run = given_steps(remainder)
    inf, nan = np.inf, np.nan
    params = jnp.asarray([1.0, 1.0, inf, inf, nan, 1.0], dtype)
    steps = np.float32([inf, -inf, 1.0, -inf, 1.0, nan])
    after, state, _ = run(params, optimizer.init(params), steps)
    desired = [inf, -inf, inf, nan, nan, nan]
    np.testing.assert_array_equal(np.asarray(after, np.float32), desired)
    np.testing.assert_array_equal(master_params(after, state), desired)
    after, state, _ = run(after, state, np.zeros(6, np.float32))
    np.testing.assert_array_equal(master_params(after, state), desired)


# Many steps


def train(optimizer, params, gradients):
    """A run in one scan, on gradients that are given; the whole state is carried along."""

    @jax.jit
    def scan(params, state, gradients):
        def step(carry, g):
            params, state = carry
            updates, state = optimizer.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), gradients)[0]

    return scan(params, optimizer.init(params), gradients)


def tree_of(dtype, time=(), seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (16, 24), "scalar": (), "zero_size": (0, 5)}
    leaves = {k: jnp.asarray(rng.standard_normal((*time, *s)), dtype) for k, s in shapes.items()}
    return leaves | {"nothing": {}}


def wide(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


INNER = {
    "adamw": lambda: adam_jax.adamw(1e-3, weight_decay=0.1),
    "optax.adamw": lambda: optax.adamw(1e-3, weight_decay=0.1),
    "momentum": lambda: optax.sgd(1e-3, momentum=0.9),
}


@pytest.mark.parametrize("name", INNER)
def test_1000_steps_of_bfloat16_with_int16_are_those_of_float32_to_the_bit(name, x64):
    params = tree_of("bfloat16")
    gradients = tree_of("bfloat16", (1000,), 1)
    low, state = train(master_weights(INNER[name](), "int16"), params, gradients)
    desired, desired_state = train(INNER[name](), wide(params), wide(gradients))
    chex.assert_trees_all_equal_dtypes(low, params)
    chex.assert_trees_all_equal(master_params(low, state), desired)
    chex.assert_trees_all_equal(state.inner_state, desired_state)
    assert not np.array_equal(desired["kernel"], wide(params)["kernel"])


@pytest.mark.parametrize("dtype", ["float16"])
def test_1000_steps_with_float32_remainders_are_those_of_float32_to_the_bit(dtype):
    params, gradients = tree_of(dtype), tree_of(dtype, (1000,), 1)
    low, state = train(master_weights(INNER["adamw"](), "float32"), params, gradients)
    desired, _ = train(INNER["adamw"](), wide(params), wide(gradients))
    chex.assert_trees_all_equal(master_params(low, state), desired)


@each_dtype
@pytest.mark.parametrize("direction", [1, -1])
def test_small_steps_add_up(dtype, direction):
    """500 steps of 1e-4 from 1, on 65,536 coordinates: float32 comes to 1.05 or .95."""
    n, steps, step = 2**16, 500, direction * 1e-4
    params = jnp.ones(n, dtype)
    gradients = jnp.full((steps, n), step)
    plain, _ = train(optax.identity(), params, gradients.astype(dtype))
    np.testing.assert_array_equal(plain, params)
    desired, _ = train(optax.identity(), jnp.ones(1), gradients[:, :1])
    for remainder, unit in [("none", 1.0), ("int8", 2.0**-8), ("int16", 2.0**-16)]:
        low, state = train(master_weights(optax.identity(), remainder), params, gradients)
        error = np.asarray(master_params(low, state), np.float64) - np.float64(desired)
        # Numbers are `grid` apart, and a step of a share p between two of them has variance
        # p (1 - p) grid^2. Float32's own 500 roundings come on top.
        grid = ulp(1.0 if direction > 0 else 0.99, dtype) * unit
        share = abs(step) / grid % 1
        deviation = grid * np.sqrt(steps * share * (1 - share))
        rounding = steps * 2.0**-24
        assert np.sqrt(np.mean(error**2)) <= 1.1 * deviation + rounding
        assert abs(error.mean()) <= 5 * deviation / np.sqrt(n) + rounding


def test_random_bits_differ_between_steps_leaves_and_coordinates():
    optimizer, run = given_steps("none")
    params = {"a": jnp.ones(4096, jnp.bfloat16), "b": jnp.ones(4096, jnp.bfloat16)}
    steps = jax.tree.map(lambda p: jnp.full(p.shape, 2.0**-8), params)  # half an ulp
    state = optimizer.init(params)
    went_up = []
    for _ in range(2):
        after, state, _ = run(params, state, steps)
        went_up += [np.asarray(after[k]) > 1 for k in ("a", "b")]
    for i, ups in enumerate(went_up):
        # Of 4096 fair coins, heads or agreements stay within 5 standard deviations of a half.
        assert abs(ups.mean() - 0.5) <= 5 * 0.5 / 64
        assert abs(np.mean(ups[1:] == ups[:-1]) - 0.5) <= 5 * 0.5 / 64
        for other in went_up[:i]:
            assert abs(np.mean(ups == other) - 0.5) <= 5 * 0.5 / 64


def test_loading_float32_weights():
    master = {"w": log_uniform(4096, -17, 15.9), "b": np.float32(0.1), "c": np.zeros(0, np.float32)}
    for dtype in LOW:
        params = jax.tree.map(lambda w, dtype=dtype: jnp.asarray(w, dtype), master)
        for remainder in REMAINDERS:
            optimizer = optax.chain(optax.identity(), master_weights(optax.adam(0.1), remainder))
            low, state = load_master_params(master, params, optimizer.init(params))
            chex.assert_trees_all_equal_shapes_and_dtypes(low, params)
            chex.assert_trees_all_equal_shapes_and_dtypes(state, optimizer.init(params))
            read = master_params(low, state)
            assert {x.dtype for x in jax.tree.leaves(read)} == {np.dtype(np.float32)}
            if remainder in ("int16", "float32"):
                chex.assert_trees_all_equal(read, master)
            else:
                error = np.abs(np.asarray(read["w"], np.float64) - master["w"])
                bound = ulp(master["w"], dtype) * 2.0 ** -KEPT[remainder] / 2
                assert np.all(error <= bound)
    wide_master = np.float32([1e-30, 1e5, 3e38])  # float32 remainders know no bounds
    low, state = start(master_weights(optax.sgd(0.1), "float32"), wide_master, "float16")
    np.testing.assert_array_equal(np.asarray(low, np.float32), [0, 65504, 65504])
    np.testing.assert_array_equal(master_params(low, state), wide_master)


def test_loading_leaves_wide_and_missing_leaves_and_the_rest_of_the_state_alone():
    params = {"low": jnp.ones(3, jnp.bfloat16), "wide": jnp.ones(3), "none": None}
    optimizer = master_weights(adam_jax.adam(0.1), "int8")
    _, state = optimizer.update(params, optimizer.init(params), params)
    master = {"low": np.float32([0.1, 0.2, 0.3]), "wide": np.float32([1, 2, 3]), "none": None}
    target = jax.eval_shape(lambda: params)
    low, new_state = load_master_params(master, target, state)
    np.testing.assert_array_equal(low["wide"], master["wide"])
    assert low["none"] is None
    assert new_state.count == 1
    chex.assert_trees_all_equal(new_state.inner_state, state.inner_state)
    assert new_state.remainder["wide"].shape == ()
    assert new_state.remainder["low"].dtype == jnp.int8


# Around and inside other transformations


def mask(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


SCHEDULE = optax.linear_schedule(1e-2, 0.0, 20)
CHAINS = {
    "clip, decay, schedule": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), adam_jax.adamw(SCHEDULE, weight_decay=0.1, mask=mask)
    ),
    "optax clip, decay, schedule": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(SCHEDULE, weight_decay=0.1, mask=mask)
    ),
    "MultiSteps": lambda: optax.MultiSteps(adam_jax.adamw(1e-2), 3).gradient_transformation(),
    "masked": lambda: optax.chain(
        optax.masked(adam_jax.adamw(1e-2), mask),
        optax.masked(optax.set_to_zero(), lambda p: jax.tree.map(lambda x: not x, mask(p))),
    ),
    "multi_transform": lambda: optax.multi_transform(
        {True: adam_jax.adamw(1e-2), False: optax.sgd(1e-2)}, mask
    ),
    "apply_if_finite": lambda: optax.apply_if_finite(adam_jax.adamw(1e-2), 3),
    "inject_hyperparams": lambda: optax.inject_hyperparams(adam_jax.adamw)(1e-2, b2=0.99),
    "average_params": lambda: adam_jax.average_params(adam_jax.adamw(1e-2), 0.9),
    "extra args": lambda: optax.chain(adam_jax.adamw(1e-2), optax.contrib.reduce_on_plateau()),
}


def train_with_value(optimizer, params, gradients):
    optimizer = optax.with_extra_args_support(optimizer)
    with_value = lambda g, s, p: optimizer.update(g, s, p, value=1.0)  # noqa: E731
    return train(optax.GradientTransformation(optimizer.init, with_value), params, gradients)


@pytest.mark.parametrize("name", CHAINS)
def test_outermost_around_other_transformations(name):
    """With 16 bits for bfloat16, any of them does what it does to float32."""
    params, gradients = tree_of("bfloat16"), tree_of("bfloat16", (10,), 1)
    if name == "apply_if_finite":
        gradients["kernel"] = gradients["kernel"].at[4, 0, 0].set(jnp.nan)
    low, state = train_with_value(master_weights(CHAINS[name](), "int16"), params, gradients)
    desired, _ = train_with_value(CHAINS[name](), wide(params), wide(gradients))
    chex.assert_tree_all_finite(desired)
    # A compiler may contract a product and a sum into one rounding, or not.
    chex.assert_trees_all_close(master_params(low, state), desired, rtol=1e-6, atol=1e-7)
    chex.assert_trees_all_equal_dtypes(low, params)
    assert np.any(low["kernel"] != params["kernel"])


@pytest.mark.parametrize("remainder", ["none", "int16"])
def test_inside_transformations_that_leave_its_updates_alone(remainder):
    params, gradients = tree_of("bfloat16"), wide(tree_of("bfloat16", (6,), 1))
    make = lambda rate=1e-2: master_weights(adam_jax.adamw(rate), remainder)  # noqa: E731
    low, state = train(make(), params, gradients)
    everything = jax.tree.map(lambda _: True, params)
    for optimizer in [
        optax.apply_if_finite(optax.masked(make(), everything), 3),
        optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)(1e-2),
        adam_jax.average_params(make(), 0.9),
    ]:
        other, other_state = train(optimizer, params, gradients)
        chex.assert_trees_all_equal_dtypes(other, params)
        ours, theirs = (master_params(*run) for run in ((low, state), (other, other_state)))
        # Random rounding turns a last bit of difference between compilations into a whole one.
        steps = {"none": 2.0**-7, "int8": 2.0**-15}.get(remainder, 1e-6)
        chex.assert_trees_all_close(ours, theirs, rtol=steps, atol=1e-6)


def test_masked_leaves_are_not_touched():
    params = {"trained": jnp.ones((3, 4), jnp.bfloat16), "frozen": jnp.ones(5, jnp.bfloat16)}
    gradients = jax.tree.map(lambda p: jnp.full(p.shape, 0.5, p.dtype), params)
    trained = {"trained": True, "frozen": False}
    optimizer = optax.masked(master_weights(adam_jax.adamw(1e-2), "int8"), trained)
    state = optimizer.init(params)
    assert jax.tree.leaves(state.inner_state.remainder)[0].shape == (3, 4)
    updates, state = optimizer.update(gradients, state, params)
    assert updates["trained"].dtype == jnp.float32
    chex.assert_trees_all_equal(updates["frozen"], gradients["frozen"])
    only_leaf = optax.masked(master_weights(adam_jax.adamw(1e-2), "none"), False)
    state = only_leaf.init(params["frozen"])
    updates, after = only_leaf.update(gradients["frozen"], state, params["frozen"])
    chex.assert_trees_all_equal(updates, gradients["frozen"])
    chex.assert_trees_all_equal_structs(state, after)


@each_remainder
def test_wide_leaves_go_through(remainder, x64):
    dtypes = ["float32", "complex64"] + ["float64", "complex128"] * x64
    params = {d: jnp.ones(3, d) for d in dtypes} | {"low": jnp.ones(3, jnp.bfloat16)}
    gradients = jax.tree.map(lambda p: jnp.full(3, 0.3, p.dtype), params)
    inner = adam_jax.adamw(1e-2)
    optimizer = master_weights(inner, remainder)
    state = optimizer.init(params)
    updates, after = jax.jit(optimizer.update)(gradients, state, params)
    alone = params | {"low": wide(params["low"])}
    desired, _ = jax.jit(inner.update)(
        gradients | {"low": wide(gradients["low"])}, inner.init(alone), alone
    )
    for d in dtypes:
        chex.assert_trees_all_equal(updates[d], desired[d])
        assert updates[d].dtype == d
        if remainder != "none":
            assert after.remainder[d].shape == ()
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    read = master_params(params, after)
    assert all(read[d] is params[d] for d in dtypes)


@each_remainder
def test_a_none_gradient_freezes_its_parameter(remainder):
    params, gradients = tree_of("bfloat16") | {"none": None}, tree_of("bfloat16", seed=1)
    gradients |= {"none": None}
    optimizer = master_weights(adam_jax.adamw(1e-2), remainder)
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    whole, _ = optimizer.update(gradients, state, params)
    updates, after = optimizer.update(gradients | {"kernel": None}, state, params)
    assert updates["kernel"] is None
    # The other leaves keep their places in the tree, and with them their random bits.
    chex.assert_trees_all_equal(updates["scalar"], whole["scalar"])
    assert updates["none"] is None
    chex.assert_trees_all_equal_structs(state, after)
    if remainder != "none":
        chex.assert_trees_all_equal(after.remainder["kernel"], state.remainder["kernel"])


@each_remainder
@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_types_and_bytes_of_the_state(remainder, dtype, x64):
    params = tree_of(dtype)
    optimizer = master_weights(optax.sgd(0.1), remainder)
    state = optimizer.init(params)
    assert isinstance(state, adam_jax.MasterWeightsState)
    assert state.count.dtype == jnp.int32
    n = sum(p.size for p in jax.tree.leaves(params))
    size = sum(r.nbytes for r in jax.tree.leaves(state.remainder))
    assert size == {"none": 0, "int8": 1, "int16": 2, "float32": 4}[remainder] * n
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(optimizer.init, params), state)
    _, after = train(optimizer, params, tree_of(dtype, (2,)))  # as a carry: nothing changes
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    assert after.count == 2


@each_remainder
def test_optax_tree_functions_and_checkpoints(remainder, tmp_path):
    params = tree_of("bfloat16") | {"wide": jnp.ones(3)}
    optimizer = master_weights(adam_jax.adamw(1e-2), remainder)
    params, state = train(optimizer, params, tree_of("bfloat16", (3,)) | {"wide": jnp.ones((3, 3))})
    marked = optax.tree.map_params(optimizer, lambda _: "param", state)
    assert jax.tree.leaves(marked.remainder) == ["param"] * (0 if remainder == "none" else 4)
    assert marked.count == 3
    specs = jax.tree.map(lambda p: p.shape, params)
    with_rest = optax.tree.map_params(
        optimizer, lambda r, shape: jnp.broadcast_to(r, shape), state, specs
    )
    chex.assert_trees_all_equal(optax.tree.get(with_rest, "mu"), optax.tree.get(state, "mu"))

    params, state = jax.tree.map(lambda x: x if x.size else None, (params, state))  # Orbax can't
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", {"params": params, "state": state})
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        jax.eval_shape(lambda p: {"params": p, "state": optimizer.init(p)}, params),
    )
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "checkpoint", target)
    chex.assert_trees_all_equal(restored, {"params": params, "state": state})


@each_remainder
@each_dtype
def test_jit_equals_eager(remainder, dtype):
    """To the bit, with steps that no contraction of products and sums can change."""
    optimizer = master_weights(optax.sgd(0.125), remainder)
    params, gradients = tree_of(dtype), tree_of(dtype, seed=1)
    state = optimizer.init(params)
    for _ in range(3):
        updates, new_state = optimizer.update(gradients, state, params)
        jitted = jax.jit(optimizer.update)(gradients, state, params)
        chex.assert_trees_all_equal((updates, new_state), jitted)
        params, state = optax.apply_updates(params, updates), new_state


@each_remainder
def test_vmap(remainder):
    optimizer, _ = given_steps(remainder)
    params = jnp.stack([jnp.ones(8, jnp.bfloat16), jnp.full(8, -3.0, jnp.bfloat16)])
    steps = jnp.asarray(log_uniform(16, -12, 0)).reshape(2, 8)
    state = jax.vmap(optimizer.init)(params)
    together = jax.vmap(optimizer.update)(steps, state, params)
    for i in range(2):
        alone = optimizer.update(steps[i], optimizer.init(params[i]), params[i])
        chex.assert_trees_all_equal(jax.tree.map(lambda x, i=i: x[i], together), alone)


@each_remainder
def test_donation_and_shard_map(remainder):
    optimizer, _ = given_steps(remainder)
    params, steps = tree_of("bfloat16"), wide(tree_of("bfloat16", seed=1))
    state = optimizer.init(params)
    desired = optimizer.update(steps, state, params)
    everywhere = PartitionSpec()
    update = jax.shard_map(
        optimizer.update,
        mesh=Mesh(np.array(jax.devices()[:1]), ("data",)),
        in_specs=(everywhere,) * 3,
        out_specs=everywhere,
    )
    chex.assert_trees_all_equal(jax.jit(update)(steps, state, params), desired)
    donated = jax.tree.map(jnp.copy, (params, state))
    step = jax.jit(
        lambda p, s: (lambda u, s: (optax.apply_updates(p, u), s))(*optimizer.update(steps, s, p)),
        donate_argnums=(0, 1),
    )
    result = step(*donated)
    assert all(x.is_deleted() for x in jax.tree.leaves(donated) if x.size)
    chex.assert_trees_all_equal(result, (optax.apply_updates(params, desired[0]), desired[1]))


# What is compiled


def is_jaxpr(x):
    return hasattr(x, "jaxpr") or hasattr(x, "eqns")


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=is_jaxpr):
            if is_jaxpr(value):
                yield from equations(getattr(value, "jaxpr", value))


@each_dtype
@each_remainder
def test_nothing_is_cast_from_float32_to_16_bits_and_back(dtype, remainder, x64):
    """XLA on GPU takes such a pair for nothing at all, and with it the remainder."""
    optimizer = master_weights(adam_jax.adamw(1e-2), remainder)
    params = jnp.ones((4, 8), dtype)
    gradients = jnp.ones((4, 8), dtype)
    state = optimizer.init(params)
    casts = [
        (equation.invars[0].aval.dtype, equation.outvars[0].aval.dtype)
        for equation in equations(jax.make_jaxpr(optimizer.update)(gradients, state, params).jaxpr)
        if equation.primitive.name == "convert_element_type"
        and equation.invars[0].aval.shape == gradients.shape
    ]
    assert not [pair for pair in casts if pair[1] == dtype]
    assert [pair for pair in casts if pair[0] == dtype] == [(dtype, np.float32)]  # the gradient
    assert not [pair for pair in casts if np.float64 in pair]
    compiled = jax.jit(optimizer.update).lower(gradients, state, params).compile().as_text()
    short = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    assert f"{short}[4,8]" in compiled
    assert f" = {short}[4,8]{{1,0}} convert(" not in compiled


def test_a_new_step_compiles_nothing():
    optimizer = master_weights(adam_jax.adamw(1e-2), "int8")
    params, gradients = tree_of("bfloat16"), tree_of("bfloat16", seed=1)
    state = optimizer.init(params)
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(1)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = step(params, state)
    assert len(traces) == 1


# In Flax


X = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
Y = np.sin(X[:, :2])


@pytest.mark.parametrize("remainder", ["none", "int16"])
def test_nnx(remainder):
    layer = functools.partial(nnx.Linear, param_dtype=jnp.bfloat16)
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(layer(8, 32, rngs=rngs), nnx.tanh, layer(32, 2, rngs=rngs))
    optimizer = nnx.Optimizer(model, master_weights(adam_jax.adamw(3e-3), remainder), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(lambda m: jnp.mean((m(X) - Y) ** 2))(model)
        optimizer.update(model, gradients)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(60)]
    params = nnx.state(model, nnx.Param)
    assert {p.dtype for p in jax.tree.leaves(params)} == {LOW["bfloat16"]}
    assert losses[-1] < 0.5 * losses[0]
    params, state = (
        jax.tree.map(lambda v: v[...], tree, is_leaf=lambda v: isinstance(v, nnx.Variable))
        for tree in (params, optimizer.opt_state)
    )
    master = master_params(params, state)
    nearest = jax.tree.map(lambda w: w.astype(jnp.bfloat16), master)
    chex.assert_trees_all_close(wide(nearest), wide(params), rtol=2.0**-8)


@pytest.mark.parametrize("remainder", ["int8", "float32"])
def test_linen(remainder):
    layer = functools.partial(nn.Dense, param_dtype=jnp.bfloat16)
    model = nn.Sequential([layer(32), nn.tanh, layer(2)])
    tx = master_weights(adam_jax.adamw(3e-3), remainder)
    params = model.init(jax.random.key(0), X)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(state):
        loss = lambda p: jnp.mean((state.apply_fn(p, X) - Y) ** 2)  # noqa: E731
        value, gradients = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradients), value

    losses = []
    for _ in range(60):
        state, loss = step(state)
        losses.append(float(loss))
    chex.assert_trees_all_equal_dtypes(state.params, params)
    assert losses[-1] < 0.5 * losses[0]


# Errors


def test_errors():
    with pytest.raises(ValueError, match=r"remainder must be one of 'none', 'int8', .*'int4'"):
        master_weights(optax.sgd(0.1), "int4")
    optimizer = master_weights(optax.sgd(0.1), "int8")
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    with pytest.raises(ValueError, match="master_weights needs the parameters"):
        optimizer.update(params, optimizer.init(params))
    with pytest.raises(TypeError, match=r"\['w'\] has dtype int32"):
        optimizer.init({"w": jnp.ones(3, jnp.int32)})
    with pytest.raises(ValueError, match=r"\['v'\] is missing in params"):
        optimizer.update({"v": params["w"]}, optimizer.init(params), params)
    with pytest.raises(ValueError, match=r"\['v'\] is missing in state.remainder"):
        optimizer.update({"v": params["w"]}, optimizer.init(params), {"v": params["w"]})
    twice = optax.chain(optimizer, optimizer).init(params)
    for state, found in [(optax.sgd(0.1).init(params), 0), (twice, 2)]:
        with pytest.raises(ValueError, match=f"expected one master_weights state, found {found}"):
            master_params(params, state)
        with pytest.raises(ValueError, match=f"expected one master_weights state, found {found}"):
            load_master_params(params, params, state)


@each_dtype
def test_a_weight_next_to_zero_keeps_its_sign(dtype):
    """0 + -0 is 0: the parameter cannot say that the weight has become negative."""
    optimizer = master_weights(optax.scale(1.0), "int16")
    params = jnp.zeros(2, LOW[dtype])
    state = optimizer.init(params)
    step = jnp.array([-1.0, 1.0]) * jnp.finfo(LOW[dtype]).smallest_normal.astype(jnp.float32)
    step = step * np.float32(2.0**-13) if dtype == "float16" else step
    updates, state = optimizer.update(step, state, params)
    params = (params.astype(jnp.float32) + updates).astype(params.dtype)
    np.testing.assert_array_equal(master_params(params, state), step)
