"""The int8 codes of both moments: their values, their rounding, their bits."""

import functools

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from words import ONE, N, centred_noise, numbers, patterns, random_words

from adam_jax import _int8

each_levels = pytest.mark.parametrize("levels", [_int8.ALONE, _int8.SHARED], ids=["8+8", "7+9"])
DRAWS = 4096

# Noise that fills [-1/2, 1/2) evenly: what becomes of one number under all that may be drawn.
ALL = (np.arange(DRAWS, dtype=np.float32) + np.float32(0.5)) / np.float32(DRAWS) - np.float32(0.5)


def rough_log2(x):
    """log2, linear between powers of two: what the pattern of a float is, as an integer."""
    fraction, exponent = np.frexp(np.asarray(x, np.float64))
    return exponent - 1 + (2 * fraction - 1)


def rough_exp2(x):
    """The inverse of `rough_log2`."""
    return np.ldexp(1 + (x - np.floor(x)), np.floor(x).astype(int))


def value_of_nu(code, n):
    """What a code stands for, in units of the scale, in float64 from the definition."""
    return rough_exp2(10 * rough_log2((code + 1) / n))


def value_of_mu(code, n):
    """What a code, a sign bit and a magnitude, stands for in units of q, likewise."""
    magnitude = (rough_exp2(-rough_log2(1 - np.asarray(code) % n / n)) - 1) / 4
    return np.where(np.asarray(code) < 0, -magnitude, magnitude)


def codes_for_mu(levels):
    """All codes that mu has, in order; -n is a zero too."""
    return np.concatenate(
        [np.arange(61 * levels.mu // 64, 0, -1) - levels.mu, np.arange(61 * levels.mu // 64 + 1)]
    )


@functools.partial(jax.jit, static_argnums=1)
def encoded_nu(z, n):
    return _int8.encode_nu(jnp.broadcast_to(z, ALL.shape), jnp.asarray(ALL), n)


@functools.partial(jax.jit, static_argnums=2)
def encoded_mu(mu, q, n):
    return _int8.encode_mu(jnp.broadcast_to(mu, ALL.shape), q, jnp.asarray(ALL), n)


@pytest.mark.slow
@each_levels
@pytest.mark.parametrize("noise", [-0.499, 0, 0.499])
def test_every_code_survives(levels, noise):
    """What is decoded and encoded again is the same code and value, whatever the noise."""
    codes = jnp.arange(levels.nu)
    z = _int8.decode_nu(codes, levels.nu)
    np.testing.assert_allclose(z, value_of_nu(np.arange(levels.nu), levels.nu), rtol=1e-5)
    again, value = _int8.encode_nu(z, jnp.float32(noise), levels.nu)
    np.testing.assert_array_equal(again[1:], codes[1:])
    np.testing.assert_array_equal(value[1:], z[1:])
    assert again[0] <= 1  # the smallest number is also what 0 becomes
    codes, q = codes_for_mu(levels), jnp.float32(0.02)
    mu = _int8.decode_mu(jnp.asarray(codes), q, levels.mu)
    np.testing.assert_allclose(mu, 0.02 * value_of_mu(codes, levels.mu), rtol=1e-6)
    assert np.all(np.diff(mu) > 0)
    again, value = _int8.encode_mu(mu, q, jnp.float32(noise), levels.mu)
    np.testing.assert_array_equal(again, codes)
    np.testing.assert_array_equal(value, mu)


def test_codes_span_what_they_are_said_to():
    for n, exact, reach in ((480, 2.0**-40, 2.0**-89), (240, 2.0**-30, 2.0**-79)):
        values = value_of_nu(np.arange(n), n)
        gaps = (np.diff(values) / values[:-1])[values[:-1] >= 2.0**-10]
        assert gaps.max() * n == pytest.approx(20)
        assert gaps.min() * n > 10
        assert values[0] < 2 * reach
        # Powers of two have codes, so that nothing bends between two neighbours.
        powers = np.exp2(-np.arange(1, 1 - np.log2(exact)))
        np.testing.assert_allclose(powers, values[np.searchsorted(values, powers * 0.999)])
    for levels in (_int8.ALONE, _int8.SHARED):
        values = value_of_mu(codes_for_mu(levels), levels.mu)
        assert values.max() == 5.75
        assert np.diff(values).min() == 1 / (2 * levels.mu)
        assert np.isin([0.25, 0.75, 1.75, 3.75], values).all()


@each_levels
@settings(deadline=None, max_examples=300)
@given(z=st.floats(0, 1, width=32))
def test_nu_is_unbiased_never_clipped_and_never_zero(levels, z):
    n = levels.nu
    codes, values = map(np.asarray, encoded_nu(np.float32(z), n))
    assert np.all((codes >= 0) & (codes < n))
    assert n + 1 < 2 ** (9 if levels == _int8.SHARED else 8)  # room for one more, beyond 1
    np.testing.assert_array_equal(values, _int8.decode_nu(jnp.asarray(codes), n))
    smallest, second = value_of_nu(np.arange(2), n)
    assert values.min() >= smallest * (1 - 1e-6)
    if z < smallest:
        assert values.max() <= second * (1 + 1e-6)
        return
    # The two values around nu, as often as it takes for their mean to be nu.
    assert np.ptp(codes) <= 1
    assert values.min() <= z * (1 + 1e-5)
    assert values.max() >= z * (1 - 1e-5)
    gap = np.diff(value_of_nu(codes.max() + np.arange(2), n)).item()
    if z >= {480: 2.0**-40, 240: 2.0**-30}[n]:
        np.testing.assert_allclose(values.mean(), z, rtol=2e-6, atol=gap / DRAWS)
    else:  # too large, if anything
        assert values.mean() >= z * (1 - 2e-6) - gap / DRAWS


@each_levels
@settings(deadline=None, max_examples=300)
@given(ratio=st.floats(-10, 10, width=32), q=st.floats(2.0**-60, 2.0**60, width=32))
def test_mu_is_unbiased_and_bounded(levels, ratio, q):
    n, q = levels.mu, np.float32(q)
    mu = np.float32(ratio) * q
    codes, values = map(np.asarray, encoded_mu(mu, q, n))
    np.testing.assert_array_equal(values, _int8.decode_mu(jnp.asarray(codes), jnp.asarray(q), n))
    assert np.all(values * np.sign(mu) >= 0)
    assert np.abs(values).max() <= 5.75 * q
    if abs(mu) > 5.75 * q:  # no gradients lead there with the default betas
        assert np.all(np.abs(values) == 5.75 * q)
        return
    magnitudes = codes % n
    assert np.ptp(magnitudes) <= 1
    gap = np.diff(value_of_mu(magnitudes.min() + np.arange(2), n)).item() * q
    np.testing.assert_allclose(values.mean(), mu, rtol=3e-6, atol=gap / DRAWS + 1e-6 * q)


@settings(deadline=None)
@given(z=st.floats(2.0**-100, 1, width=32), unit=st.floats(2.0**-126, 2.0**120, width=32))
def test_the_unit_of_mu_is_nearly_the_root_of_nu(z, unit):
    ratio = _int8.unit_of_mu(jnp.float32(z), jnp.float32(unit), np.int32(10**6))
    ratio = np.float64(ratio) / np.sqrt(np.float64(np.float32(z)) * np.float64(np.float32(unit)))
    assert 1.5 * (1 - 1e-6) <= ratio <= 1.5 * 1.0607


@settings(deadline=None)
@given(
    mu=hnp.arrays(np.int32, (64,), elements=st.integers(-64, 63)),
    nu=hnp.arrays(np.int32, (64,), elements=st.integers(0, 511)),
)
def test_sixteen_bits_hold_both_moments(mu, nu):
    packed = _int8.bytes_of(_int8.join(jnp.asarray(mu), jnp.asarray(nu)))
    assert packed[0].dtype == jnp.int8
    assert packed[1].dtype == jnp.uint8
    np.testing.assert_array_equal(_int8.split(*packed), (mu, nu))


# The same integers on every backend: worked out again in NumPy, from the definitions.


# Codes in int8.


@pytest.mark.parametrize("n", [240, 480])
def test_codes_of_nu(n):
    z, noise = numbers(ONE - random_words(0) % (100 * 2**23)), centred_noise(random_words(1))
    codes, values = jax.jit(_int8.encode_nu, static_argnums=2)(z, np.float32(noise), n)
    shifted = z + np.float32(float(n) ** -10)
    root = numbers(ONE + (patterns(shifted) - ONE) // 10).astype(np.float64)
    place = root * n + noise - 1
    # XLA may round product and sum one by one or together: less than 2^-15 in all.
    clear = np.abs(place % 1 - 0.5) > 2.0**-15
    assert clear.mean() > 0.999
    np.testing.assert_array_equal(codes[clear], np.rint(place)[clear])
    root = (np.asarray(codes, np.float32) + np.float32(1)) * np.float32(1 / n)
    np.testing.assert_array_equal(patterns(values), ONE + (patterns(root) - ONE) * 10)


@pytest.mark.parametrize("n", [64, 128])
@pytest.mark.parametrize("q", [1.0, 2.0**-40, 2.0**60])
def test_codes_of_mu(n, q):
    """In units of a power of two, by which nothing is rounded."""
    words, noise = random_words(0), np.float32(centred_noise(random_words(1)))
    ratio = np.float32(words % 2**31 / 2**28)  # up to 8
    mu = np.copysign(ratio, numbers(words)) * np.float32(q)
    codes, values = jax.jit(_int8.encode_mu, static_argnums=3)(mu, np.float32(q), noise, n)
    w = np.minimum(ratio + np.float32(0.25), np.float32(6))
    place = numbers(2 * ONE - 2 * 2**23 - patterns(w)) * np.float32(n) + noise
    whole = np.rint(place).astype(np.int64)
    np.testing.assert_array_equal(codes, np.where(mu < 0, -whole, n - whole))
    value = numbers(2 * ONE - 2 * 2**23 - patterns(whole / n)) - np.float32(0.25)
    np.testing.assert_array_equal(values, np.copysign(value, mu) * np.float32(q))
    np.testing.assert_array_equal(jax.jit(_int8.decode_mu, static_argnums=2)(codes, q, n), values)


def test_two_codes_in_one_word():
    mu, nu = np.divmod(np.arange(N) - N // 2, 512)
    word = _int8.join(jnp.asarray(mu, jnp.int32), jnp.asarray(nu, jnp.int32))
    np.testing.assert_array_equal(word, 512 * mu + nu)
    high, low = _int8.bytes_of(word)
    np.testing.assert_array_equal(256 * np.asarray(high, int) + np.asarray(low), word)
    np.testing.assert_array_equal(_int8.split(high, low), (mu, nu))
