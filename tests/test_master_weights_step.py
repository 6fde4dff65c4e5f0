"""One step of `master_weights`: parameter and remainder together land on the weight."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given
from low_precision import (
    KEPT,
    LOW,
    WIDTH,
    all_numbers,
    any_words,
    bits_of,
    each_dtype,
    each_remainder,
    given_steps,
    largest,
    log_uniform,
    many_examples,
    start,
    ulp,
)
from trees import untyped

import adam_jax
from adam_jax import master_params, master_weights

# optax.apply_updates adds float32 updates to 16-bit parameters.
pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.mark.covering
@each_dtype
@each_remainder
def test_a_zero_step_changes_no_parameter(dtype, remainder, x64):
    """No bit changes, for each of the 65,536 numbers of the dtype.

    The sum of a subnormal float32 and zero may be zero, because JAX lets CPUs flush such numbers.
    The platform's own addition does so, in float32 training as in `optax.apply_updates`, and a
    subnormal bfloat16 is a subnormal float32.
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


@pytest.mark.covering
@each_dtype
@each_remainder
def test_a_zero_step_changes_no_remainder(dtype, remainder):
    optimizer, step = given_steps(remainder)
    # A smaller bfloat16 would have a subnormal remainder in float32.
    params, state = start(optimizer, log_uniform(4096, -100, 15.99), dtype)
    after, new_state, _ = step(params, state, jnp.zeros(4096))
    chex.assert_trees_all_equal(after, params)
    chex.assert_trees_all_equal(new_state.remainder, state.remainder)
    if remainder != "none":
        assert jnp.mean(state.remainder != 0) > 0.1


def no_subnormal(x):
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)


def close_words(words):
    """Gives half of the words exponents near 1, so a sum of two differs from both."""
    return np.where(words & 1, (words & 0x81FFFFFF) | 0x3E000000, words).astype(np.uint32)


@each_dtype
@each_remainder
@given(any_words, any_words)
@example(np.full(WIDTH, 0x3F7FFFFF, np.uint32), np.full(WIDTH, 0xBF800000, np.uint32))
@example(np.full(WIDTH, 0x7F7F0000, np.uint32), np.full(WIDTH, 0xFF7FFFFF, np.uint32))
@example(np.full(WIDTH, 0x7EFF7FFF, np.uint32), np.full(WIDTH, 0xFF7FFFFF, np.uint32))
@example(np.full(WIDTH, 0x477FDFFF, np.uint32), np.full(WIDTH, 0xC77FE000, np.uint32))
@many_examples
def test_any_step_from_any_weight_lands_on_the_float32_sum(dtype, remainder, words, step_words):
    """After a step, parameter and remainder together are the float32 sum, up to the dropped bits.

    This fails if the parameter lands anywhere other than the remainder assumes.
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
    # The update overflows in steps as long as bfloat16's whole range.
    inside &= ~(np.abs(step) > 0.99 * largest("bfloat16"))
    if remainder == "float32" or (remainder == "int16" and dtype == "bfloat16"):
        bound = np.zeros(WIDTH)
    elif remainder == "int16":
        bound = np.where(np.abs(desired) < 2.0**-17, 2.0**-40, 0)
    else:
        bound = ulp(desired, dtype) * 2.0 ** -KEPT[remainder]
    # A step may cancel, see `_step_leaf`. And a processor without subnormal numbers loses some
    # of a float32 remainder of a number as small as this, or of the update from or to it.
    cancelled = np.abs(desired) < 2.0**-15 * np.abs(old_params)
    bound = np.where(cancelled, np.maximum(bound, 2.0**-24 * np.abs(old_params)), bound)
    bound = bound + 2.0**-126 * (np.abs(desired) < 2.0**-100)
    assert np.all(np.abs(joined[inside] - desired[inside]) <= bound[inside])

    beyond = finite & (np.abs(desired) > largest(dtype)) & (np.abs(step) < 1e38)
    edge = np.sign(desired) * largest(dtype)
    np.testing.assert_array_equal(params[beyond].astype(np.float64), edge[beyond])


@pytest.mark.covering
@each_dtype
@each_remainder
def test_updates_land_on_the_nearest_number(dtype, remainder):
    """`apply_updates` lands on the number nearest to parameter and remainder together."""
    optimizer, run = given_steps(remainder)
    params, state = start(optimizer, log_uniform(2**14, -16, 15, 1), dtype)
    params, state, _ = run(params, state, log_uniform(2**14, -16, 15, 2))
    master = np.asarray(master_params(params, state), np.float64)
    distance = np.abs(np.asarray(params, np.float64) - master)
    nearest = np.asarray(master.astype(np.float32).astype(LOW[dtype]), np.float64)
    np.testing.assert_array_equal(distance, np.abs(nearest - master))


def test_a_step_that_cancels_lands_where_it_can():
    """1 - 2^-24 minus 1 is -2^-24, and no float32 update moves the parameter 1 there."""
    optimizer, run = given_steps("int16")
    params, state = start(optimizer, np.array([1 - 2.0**-24], np.float32), "bfloat16")
    assert params == 1
    params, state, _ = run(params, state, np.array([-1], np.float32))
    assert params.astype(jnp.float32) == master_params(params, state)
    assert abs(float(params[0]) + 2.0**-24) <= 2.0**-24


@pytest.mark.covering
@each_dtype
@each_remainder
def test_a_step_that_cancels_in_more_bits_than_float32_lands_near_zero(dtype, remainder):
    """A compiler may omit the rounding between a product and the sum that it enters."""
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

    gradients = np.float32(before) / rate  # gradient times rate is the weight, rounded to float32
    after = np.asarray(master_params(*step(params, state, gradients, rate)), np.float64)
    # float32's rounding, a parameter that may land 2^-24 away, and float16's subnormal numbers.
    smallest = 2.0 ** -(24 + KEPT[remainder]) if dtype == "float16" else 0
    assert np.all(np.abs(after) <= 2.0**-22 * np.abs(before) + smallest)


@pytest.mark.covering
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


@pytest.mark.covering
@each_dtype
@each_remainder
def test_infinity_and_nan_are_passed_on(dtype, remainder):
    optimizer, run = given_steps(remainder)
    inf, nan = np.inf, np.nan
    params = jnp.asarray([1.0, 1.0, inf, inf, nan, 1.0], dtype)
    steps = np.array([inf, -inf, 1.0, -inf, 1.0, nan], np.float32)
    after, state, _ = run(params, optimizer.init(params), steps)
    desired = [inf, -inf, inf, nan, nan, nan]
    np.testing.assert_array_equal(np.asarray(after, np.float32), desired)
    np.testing.assert_array_equal(master_params(after, state), desired)
    after, state, _ = run(after, state, np.zeros(6, np.float32))
    np.testing.assert_array_equal(master_params(after, state), desired)


@each_dtype
def test_a_weight_next_to_zero_keeps_its_sign(dtype):
    """0 + -0 is 0: the parameter cannot show that the weight has become negative."""
    optimizer = untyped(master_weights(optax.scale(1.0), "int16"))
    params = jnp.zeros(2, LOW[dtype])
    state = optimizer.init(params)
    step = jnp.array([-1.0, 1.0]) * jnp.finfo(LOW[dtype]).smallest_normal.astype(jnp.float32)
    step = step * np.float32(2.0**-13) if dtype == "float16" else step
    updates, state = optimizer.update(step, state, params)
    params = (params.astype(jnp.float32) + updates).astype(params.dtype)
    np.testing.assert_array_equal(master_params(params, state), step)


H = 2.0**-10  # step of finite differences


@pytest.mark.covering
@each_dtype
@each_remainder
def test_derivatives_agree_with_float32_weights(remainder, dtype, standard_promotion):
    """Differentiates by hyperparameters, gradients and parameters, over steps and after loading."""
    rng = np.random.default_rng(0)
    weights = jnp.asarray(1 + rng.random(64), dtype).astype(jnp.float32)
    gradients = jnp.asarray(rng.standard_normal((4, 64)), dtype).astype(jnp.float32)
    direction = jnp.asarray(rng.standard_normal(64), jnp.float32)
    settings = {"learning_rate": 0.01, "b1": 0.9, "b2": 0.99, "weight_decay": 0.1}

    def end(settings, gradients, weights, low):
        optimizer = adam_jax.adamw(**settings)
        params = weights
        if low:
            optimizer = adam_jax.master_weights(optimizer, remainder)
            params = weights.astype(dtype)
            state = optimizer.init(jax.lax.stop_gradient(params))
            params, state = adam_jax.load_master_params(weights, params, state)
        else:
            state = optimizer.init(params)

        def step(at, gradient):
            params, state = at
            updates, state = optimizer.update(gradient.astype(params.dtype), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, state), gradients)
        return jnp.sum(direction * untyped(params))

    def derivatives(low):
        return jax.jit(jax.grad(functools.partial(end, low=low), argnums=(0, 1, 2)))(
            settings, gradients, weights
        )

    # Tangents of parameters are rounded like parameters, and without a remainder so are weights.
    found, desired = derivatives(low=True), derivatives(low=False)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(desired), strict=True):
        np.testing.assert_allclose(x, y, atol=4 * jnp.finfo(dtype).eps * np.max(np.abs(y)))
    in_float32 = jax.jit(functools.partial(end, low=False))
    for name, value in settings.items():
        ends = [in_float32(settings | {name: value + h}, gradients, weights) for h in (H, -H)]
        difference = (ends[0] - ends[1]) / (2 * H)
        np.testing.assert_allclose(found[0][name], difference, rtol=0.02, atol=0.02)
