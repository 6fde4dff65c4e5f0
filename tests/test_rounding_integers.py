"""Random words, 16-bit numbers and remainders: the same integers on every backend.

Each is computed again from its definition, in NumPy's 64-bit integers and floats, without the
package's code.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from low_precision import LOW, each_dtype
from words import (
    N,
    as_words,
    numbers,
    patterns,
    random_words,
    redrawn_words,
    turned_words,
)

from adam_jax._rounding import draw, join, key_of_leaf, nearest, random_bits, split

each_width = pytest.mark.parametrize("width", [0, 8, 16])


@pytest.mark.parametrize("shape", [(), (5,), (7, 9), (2, 3, 4), (256, 256)], ids=str)
@pytest.mark.parametrize("leaf", [0, 1, 147, 2**32 - 1])
def test_random_bits_agree_with_numpy(shape, leaf):
    found = jax.jit(random_bits, static_argnums=0)(shape, key_of_leaf(jnp.uint32(leaf)))
    np.testing.assert_array_equal(np.ravel(found), random_words(leaf, found.size))


@pytest.mark.parametrize(
    ("way", "reference"), [("in_turn", turned_words), ("independent", redrawn_words)]
)
def test_words_of_a_draw_agree_with_numpy(way, reference):
    """Checks each step of two blocks and others up to the last, counted in int32 or uint32."""
    words = random_words(0, 2**10)
    steps = [*range(65), 1000, 123456, 2**31 - 1]
    leaf = jnp.zeros(2**10)
    at = jax.jit(lambda step: getattr(draw(key_of_leaf(jnp.uint32(0)), step), way)(leaf))
    found = jax.vmap(at)(np.array(steps, np.int32))
    np.testing.assert_array_equal(found, [reference(words, step) for step in steps])
    np.testing.assert_array_equal(at(np.uint32(2**32 - 1)), reference(words, 2**32 - 1))


# 16 bits and a remainder. A number is a word: its pattern in 16 bits, and 16 bits after the point.


def words_of(x, dtype, noise):
    """Returns the words of |x|. Words of a small float16 have a rounded last bit."""
    if dtype == "bfloat16":
        return patterns(np.abs(x))
    fraction, exponent = np.frexp(np.minimum(np.abs(x.astype(np.float64)), 2.0**16))
    normal = (exponent + 13 + 2 * fraction) * 2**26
    whole, part = np.divmod(np.ldexp(fraction, exponent + 40), 1)
    # Compared with the half of the noise that does not round words.
    subnormal = whole + (part > (0.5 if noise is None else noise % 2**16 / 2**16))
    return np.where(exponent <= -14, subnormal, normal).astype(np.int64)


def split_in_numpy(x, dtype, width, noise):
    """Returns the nearest 16-bit number's bit pattern, and the remainder in parts of its ulp."""
    part = 2 ** (16 - width)
    infinity = int(np.array(np.inf, LOW[dtype]).view(np.uint16))
    added = part // 2 if noise is None else noise // 2 ** (16 + width)
    parts = (words_of(x, dtype, noise) + added) // part
    # Beyond the largest number with the largest remainder: the largest number with none.
    largest = (infinity * 2**16 - 0x8001) // part
    beyond = words_of(x, dtype, None) > largest * part
    parts = np.where(beyond, (infinity - 1) * 2**16 // part, parts)
    low = (parts * part + 0x8000) // 2**16
    remainder = parts - low * 2**16 // part
    if dtype == "float16":
        remainder = np.where((low == 0) & np.signbit(x), -remainder, remainder)
    return np.signbit(x) * 2**15 + low, remainder


@each_dtype
@each_width
@pytest.mark.parametrize("random", [False, True], ids=["to nearest", "stochastic"])
def test_split_agrees_with_numpy(dtype, width, random):
    words, noise = random_words(0), random_words(1) if random else None
    if dtype == "bfloat16":  # every number, and random bits below it
        words = np.arange(N) * 2**16 + words % 2**16
        x = numbers(words)[words % 2**31 < 0x7F800000]
    else:  # 2^-50 to 2^20: beyond float16's range on both sides
        x = numbers(words // 2**31 * 2**31 + (127 - 50) * 2**23 + words % (70 * 2**23))
    noise = noise if noise is None else noise[: len(x)]
    bits = None if noise is None else as_words(noise)
    found = jax.jit(split, static_argnums=(1, 2))(jnp.asarray(x), LOW[dtype], width, bits)
    low, remainder = split_in_numpy(x, dtype, width, noise)
    np.testing.assert_array_equal(np.asarray(found[0]).view(np.uint16), low)
    np.testing.assert_array_equal(found[1], remainder)


@each_dtype
@each_width
def test_join_agrees_with_numpy(dtype, width):
    """Joins every finite number with any remainder."""
    infinity = int(np.array(np.inf, LOW[dtype]).view(np.uint16))
    low = np.arange(N)
    low = low[low % 2**15 < infinity]
    remainder = random_words(0)[: len(low)] % 2**width - 2**width // 2
    found = jax.jit(join, static_argnums=2)(
        jnp.asarray(low.astype(np.uint16).view(LOW[dtype])),
        jnp.asarray(remainder, jnp.int8 if width <= 8 else jnp.int16),
        width,
    )
    sign, magnitude = np.divmod(low, 2**15)
    added = remainder * 2 ** (16 - width)
    word = magnitude * 2**16 + added
    if dtype == "bfloat16":
        pattern = np.where(magnitude == 0, 0, word)
    else:
        sign = np.where((magnitude == 0) & (added != 0), added < 0, sign)
        word = np.abs(word)
        normal = word // 8 + np.where(word < infinity * 2**16, 127 - 15, 2 * (127 - 15)) * 2**23
        pattern = np.where(word < 2**26, patterns(word / 2.0**40), normal)
    np.testing.assert_array_equal(patterns(found), sign * 2**31 + pattern)


def test_nearest_agrees_with_numpy():
    words = random_words(0)
    words = words[words % 2**31 < 0x7F800000]
    found = jax.jit(nearest, static_argnums=1)(jnp.asarray(numbers(words)), jnp.bfloat16)
    to_even = (words + 0x7FFF + (words >> 16 & 1)) >> 16
    np.testing.assert_array_equal(np.asarray(found).view(np.uint16), to_even)
