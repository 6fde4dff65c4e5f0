"""A float32 split into a 16-bit number and a remainder, and joined again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from low_precision import (
    LOW,
    all_numbers,
    any_words,
    bits_of,
    each_dtype,
    largest,
    log_uniform,
    many_examples,
    ulp,
)

from adam_jax._rounding import join, random_bits, split


def largest_joined(dtype, width):
    """Returns the largest float32 made of a number of this dtype and a remainder of this width."""
    exact = largest(dtype) + ulp(largest(dtype), dtype) * max(2**width // 2 - 1, 0) / 2**width
    rounded = np.float32(exact)
    return float(rounded if rounded <= exact else np.nextafter(rounded, np.float32(0)))


@each_dtype
@pytest.mark.parametrize("width", [0, 8, 16])
@pytest.mark.parametrize("bits", [None, 2**32 - 1])
def test_a_16_bit_number_splits_into_itself_and_no_remainder(dtype, width, bits):
    low = all_numbers(dtype)
    joined = join(jnp.asarray(low))
    assert joined.dtype == jnp.float32
    np.testing.assert_array_equal(bits_of(joined), bits_of(low.astype(np.float32)))
    words = None if bits is None else jnp.full(low.shape, bits, jnp.uint32)
    again, remainder = split(joined, LOW[dtype], width, words)
    np.testing.assert_array_equal(bits_of(again), bits_of(low))
    assert not remainder.any()


@pytest.mark.slow
def test_every_bfloat16_and_random_lower_bits_join_to_the_same_float32(x64):
    lower = np.random.default_rng(0).integers(0, 2**16, 2**16, dtype=np.uint32)
    words = (np.arange(2**16, dtype=np.uint32) << 16) | lower
    x = words.view(np.float32)
    x = x[np.isfinite(x) & (np.abs(x) <= largest("bfloat16"))]
    x[np.abs(x) < 2.0**-134] *= 0  # their nearest bfloat16 is 0, which has no remainder
    low, remainder = split(jnp.asarray(x), jnp.bfloat16, 16)
    assert remainder.dtype == jnp.int16
    assert remainder.min() < -(2**14)
    assert remainder.max() > 2**14
    np.testing.assert_array_equal(bits_of(join(low, remainder, 16)), bits_of(x))


def test_float16_with_16_bits_equals_float32_from_2_to_the_minus_17():
    x = log_uniform(2**16, -17, 15.99)
    low, remainder = split(jnp.asarray(x), jnp.float16, 16)
    np.testing.assert_array_equal(join(low, remainder, 16), x)
    x = log_uniform(2**16, -60, -17)
    joined = np.asarray(join(*split(jnp.asarray(x), jnp.float16, 16), 16), np.float64)
    assert np.abs(joined - x).max() <= 2.0**-41


@each_dtype
def test_rounding_without_random_bits_is_to_nearest(dtype):
    x = log_uniform(2**16, -30, 15.9)
    low, _ = split(jnp.asarray(x), LOW[dtype], 16)
    desired = x.astype(LOW[dtype])
    # Two roundings, to 2^-40 and to 2^-24, may send a small float16 the other way at a tie.
    slack = 2.0**-41 if dtype == "float16" else 0.0
    error, least = (np.abs(np.asarray(y, np.float64) - x) for y in (low, desired))
    assert np.all(error <= least + slack)


@each_dtype
@pytest.mark.parametrize("width", [0, 8])
def test_rounding_is_unbiased_over_all_random_bits(dtype, width):
    """The mean over all 2^16 values of the bits that decide is x itself, exactly."""
    x = log_uniform(20, -12, 15.9)  # beyond float16's subnormal numbers, which use other bits
    bits = jnp.arange(2**16, dtype=jnp.uint32) << 16
    for value in x:
        low, remainder = split(jnp.full(2**16, value), LOW[dtype], width, bits)
        joined = np.asarray(join(low, remainder, width), np.float64)
        assert joined.mean() == value
        assert len(np.unique(joined)) <= 2


@pytest.mark.parametrize("width", [0, 8, 16])
def test_rounding_of_subnormal_float16_is_unbiased(width):
    n = 2**16
    bits = random_bits((n,), jnp.uint32(3))
    for value in np.array([3.3e-6, -4.4e-8, 1.23e-9, 7e-13], np.float32):
        low, remainder = split(jnp.full(n, value), jnp.float16, width, bits)
        joined = np.asarray(join(low, remainder, width), np.float64)
        grid = 2.0 ** (-24 - width)
        share = np.abs(value / grid) % 1
        deviation = grid * np.sqrt(share * (1 - share) / n)
        assert abs(joined.mean() - value) <= 5 * deviation
        assert np.all(np.abs(joined - value) < grid)


@each_dtype
@pytest.mark.parametrize("width", [0, 8, 16])
@given(any_words, any_words)
@many_examples
def test_any_float32_splits_within_its_bounds(dtype, width, words, bits):
    x = words.view(np.float32)
    x[np.isnan(x)] = np.nan  # a quiet NaN, as arithmetic makes it
    low, remainder = jax.jit(split, static_argnums=(1, 2))(x, LOW[dtype], width, bits)
    joined = np.asarray(join(low, remainder, width), np.float64)
    low, remainder = np.asarray(low), np.asarray(remainder)
    finite = np.isfinite(x)
    np.testing.assert_array_equal(np.isfinite(low), finite)
    np.testing.assert_array_equal(joined[~finite], x[~finite])
    np.testing.assert_array_equal(np.signbit(low), np.signbit(x))
    assert not remainder[~finite].any()
    half = 2**width // 2
    assert np.all((remainder >= -half) & (remainder <= max(half - 1, 0)))
    # Infinity and NaN are checked above, and would make NumPy warn here.
    x, joined = (np.where(finite, y, 0).astype(np.float64) for y in (x, joined))
    error = np.abs(joined - x)
    if dtype == "bfloat16":
        # Remainders next to 0 are not counted.
        next_to_zero = np.abs(x) < 2.0**-133
        assert np.all(error[next_to_zero] <= 2.0**-133)
        finite &= ~next_to_zero
    inside = finite & (np.abs(x) <= largest_joined(dtype, width))
    unit = ulp(x, dtype) * 2.0**-width
    assert np.all(error[inside] <= unit[inside])
    if dtype == "bfloat16" and width == 16:
        assert not error[inside].any()
    beyond = np.abs(x) > largest_joined(dtype, width)
    assert np.all(np.abs(joined[beyond]) == largest(dtype))
    assert not remainder[beyond].any()


@each_dtype
@pytest.mark.parametrize("width", [0, 8, 16])
@pytest.mark.parametrize("bits", [None, 0, 2**32 - 1])
def test_numbers_that_are_too_large_become_the_largest_number(dtype, width, bits):
    """Weights are exact up to the largest number with the largest remainder, and cut off beyond."""
    most = np.float32(largest_joined(dtype, width))
    above = np.nextafter(most, np.float32(np.inf))
    x = np.array([largest(dtype), most, above, np.finfo(np.float32).max, np.inf], np.float32)
    expected = np.array([largest(dtype), most, *[largest(dtype)] * 2, np.inf], np.float32)
    for sign in (1, -1):
        words = None if bits is None else jnp.full(x.shape, bits, jnp.uint32)
        low, remainder = split(jnp.asarray(sign * x), LOW[dtype], width, words)
        np.testing.assert_array_equal(join(low, remainder, width), sign * expected)
        parts = (most - largest(dtype)) / ulp(largest(dtype), dtype) * 2**width
        np.testing.assert_array_equal(remainder, [0, parts, 0, 0, 0])


@pytest.mark.slow
@pytest.mark.parametrize("width", [8, 16])
@each_dtype
def test_a_parameter_set_to_zero_is_zero_with_any_remainder(dtype, width):
    """The weight is then 0 in bfloat16, and below the smallest number in float16."""
    low, remainder = split(jnp.asarray(log_uniform(4096, -10, 10)), LOW[dtype], width)
    assert jnp.any(remainder < 0)
    weights = join(jnp.zeros_like(low), remainder, width)
    assert np.all(np.abs(weights) <= (0 if dtype == "bfloat16" else 2.0**-25))
