"""Random words, 16-bit numbers with remainders and int8 codes: the same integers on any backend.

Each is worked out again from its definition, in NumPy's 64-bit integers and floats, with nothing
taken from the package.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from low_precision import LOW, each_dtype

from adam_jax import _int8
from adam_jax._rounding import centred, join, nearest, random_bits, split, turned

N = 2**16
GOLDEN = 0x9E3779B9  # 2^32 / golden ratio
ONE = 0x3F800000  # the pattern of 1

each_kept = pytest.mark.parametrize("kept", [0, 8, 16])


def patterns(x):
    """The patterns of float32 numbers."""
    return np.asarray(x, np.float32).view(np.uint32).astype(np.int64)


def numbers(patterns):
    """The float32 numbers of patterns."""
    return np.asarray(patterns).astype(np.uint32).view(np.float32)


def mixed(x):
    """The hash of a word."""
    for shift, factor in [(16, 0x7FEB352D), (15, 0x846CA68B)]:
        x = (x ^ x >> shift) * factor % 2**32
    return x ^ x >> 16


def random_words(leaf, draw=0, n=N):
    """The words of a leaf's elements in row-major order."""
    key = mixed(mixed((leaf + 1) % 2**32) ^ draw * GOLDEN % 2**32)
    return mixed(np.arange(n, dtype=np.uint64) ^ np.uint64(key)).astype(np.int64)


def centred_noise(words):
    return words // 2**9 / 2**23 - 0.5


def as_words(x):
    return jnp.asarray(x.astype(np.uint32))


@pytest.mark.parametrize("shape", [(), (5,), (7, 9), (2, 3, 4), (256, 256)], ids=str)
@pytest.mark.parametrize(
    ("leaf", "draw"), [(0, 0), (0, 1), (1, 0), (147, 1000), (2**32 - 1, 2**31 - 1)]
)
def test_random_bits(shape, leaf, draw):
    found = jax.jit(random_bits, static_argnums=0)(shape, np.uint32(leaf), np.uint32(draw))
    np.testing.assert_array_equal(np.ravel(found), random_words(leaf, draw, found.size))


@pytest.mark.parametrize("count", [0, 1, 1000, 2**31 - 1])
def test_turned(count):
    words = random_words(0)
    found = jax.jit(turned)(as_words(words), np.int32(count))
    np.testing.assert_array_equal(found, (words + count * GOLDEN) % 2**32)


def test_centred():
    words = random_words(0)
    np.testing.assert_array_equal(jax.jit(centred)(as_words(words)), centred_noise(words))


# 16 bits and a remainder. A number is a word: its pattern in 16 bits, and 16 bits after the point.


def words_of(x, dtype, noise):
    """The words of |x|. Those of small float16 have a last bit that is rounded."""
    if dtype == "bfloat16":
        return patterns(np.abs(x))
    fraction, exponent = np.frexp(np.minimum(np.abs(x.astype(np.float64)), 2.0**16))
    normal = (exponent + 13 + 2 * fraction) * 2**26
    whole, part = np.divmod(np.ldexp(fraction, exponent + 40), 1)
    # Compared with the half of the noise that rounds words no more.
    subnormal = whole + (part > (0.5 if noise is None else noise % 2**16 / 2**16))
    return np.where(exponent <= -14, subnormal, normal).astype(np.int64)


def split_in_numpy(x, dtype, kept, noise):
    """The pattern of the nearest 16-bit number, and the remainder in parts of its ulp."""
    part = 2 ** (16 - kept)
    infinity = int(np.array(np.inf, LOW[dtype]).view(np.uint16))
    added = part // 2 if noise is None else noise // 2**16 % part
    # The largest finite number, and the largest remainder.
    parts = np.minimum(words_of(x, dtype, noise) + added, infinity * 2**16 - 0x8001) // part
    low = (parts * part + 0x8000) // 2**16
    remainder = parts - low * 2**16 // part
    if dtype == "float16":
        remainder = np.where((low == 0) & np.signbit(x), -remainder, remainder)
    return np.signbit(x) * 2**15 + low, remainder


@each_dtype
@each_kept
@pytest.mark.parametrize("random", [False, True], ids=["to nearest", "at random"])
def test_split(dtype, kept, random):
    words, noise = random_words(0), random_words(1) if random else None
    if dtype == "bfloat16":  # every one, and random bits below it
        words = np.arange(N) * 2**16 + words % 2**16
        x = numbers(words)[words % 2**31 < 0x7F800000]
    else:  # 2^-50 to 2^20: on either side of what float16 has
        x = numbers(words // 2**31 * 2**31 + (127 - 50) * 2**23 + words % (70 * 2**23))
    noise = noise if noise is None else noise[: len(x)]
    bits = None if noise is None else as_words(noise)
    found = jax.jit(split, static_argnums=(1, 2))(jnp.asarray(x), LOW[dtype], kept, bits)
    low, remainder = split_in_numpy(x, dtype, kept, noise)
    np.testing.assert_array_equal(np.asarray(found[0]).view(np.uint16), low)
    np.testing.assert_array_equal(found[1], remainder)


@each_dtype
@each_kept
def test_join(dtype, kept):
    """Every finite number, with any remainder."""
    infinity = int(np.array(np.inf, LOW[dtype]).view(np.uint16))
    low = np.arange(N)
    low = low[low % 2**15 < infinity]
    remainder = random_words(0)[: len(low)] % 2**kept - 2**kept // 2
    found = jax.jit(join, static_argnums=2)(
        jnp.asarray(low.astype(np.uint16).view(LOW[dtype])),
        jnp.asarray(remainder, jnp.int8 if kept <= 8 else jnp.int16),
        kept,
    )
    sign, magnitude = np.divmod(low, 2**15)
    added = remainder * 2 ** (16 - kept)
    word = magnitude * 2**16 + added
    if dtype == "bfloat16":
        pattern = np.where(magnitude == 0, 0, word)
    else:
        sign = np.where((magnitude == 0) & (added != 0), added < 0, sign)
        word = np.abs(word)
        normal = word // 8 + np.where(word < infinity * 2**16, 127 - 15, 2 * (127 - 15)) * 2**23
        pattern = np.where(word < 2**26, patterns(word / 2.0**40), normal)
    np.testing.assert_array_equal(patterns(found), sign * 2**31 + pattern)


def test_nearest():
    words = random_words(0)
    words = words[words % 2**31 < 0x7F800000]
    found = jax.jit(nearest, static_argnums=1)(jnp.asarray(numbers(words)), jnp.bfloat16)
    to_even = (words + 0x7FFF + (words >> 16 & 1)) >> 16
    np.testing.assert_array_equal(np.asarray(found).view(np.uint16), to_even)


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
