"""Random words and the bit patterns of float32, in NumPy's 64-bit integers.

Computed from the definitions, without the package's code.
"""

import jax.numpy as jnp
import numpy as np

N = 2**16
ONE = 0x3F800000  # the bit pattern of 1


def patterns(x):
    """Returns the bit patterns of float32 numbers."""
    return np.asarray(x, np.float32).view(np.uint32).astype(np.int64)


def numbers(patterns):
    """Returns the float32 numbers with these bit patterns."""
    return np.asarray(patterns).astype(np.uint32).view(np.float32)


def mixed(x):
    """Returns the hash of a word."""
    for shift, factor in [(16, 0x7FEB352D), (15, 0x846CA68B)]:
        x = (x ^ x >> shift) * factor % 2**32
    return x ^ x >> 16


def random_words(leaf, n=N):
    """Returns the words of a leaf's elements in row-major order."""
    key = mixed(mixed((leaf + 1) % 2**32))
    return mixed(np.arange(n, dtype=np.uint64) ^ np.uint64(key)).astype(np.int64)


def redrawn_words(words, draw):
    """Returns the words, drawn anew."""
    key = mixed((draw + 1) % 2**32)
    return (words * (key | 1) + mixed(key)) % 2**32  # in 64 bits it may wrap, by a multiple of 2^32


def turned_words(words, step):
    """Returns the words, turned to a step."""
    block, turns = divmod(step, 32)
    start = mixed((block + 1) % 2**32)
    golden = round(2**16 * (5**0.5 - 1) / 2) * 2**16 + round(2**14 * (5**0.5 - 1) / 2)
    direction = 1 if mixed(start) < 2**31 else -1
    return (words + start + direction * turns * golden) % 2**32


def centred_noise(words):
    return words // 2**9 / 2**23 - 0.5


def as_words(x):
    return jnp.asarray(x.astype(np.uint32))
