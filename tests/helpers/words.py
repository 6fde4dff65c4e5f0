"""Random words and the bit patterns of float32, in NumPy's 64-bit integers.

Worked out from the definitions, with nothing taken from the package.
"""

import jax.numpy as jnp
import numpy as np

N = 2**16
GOLDEN = 0x9E3779B9  # 2^32 / golden ratio
ONE = 0x3F800000  # the pattern of 1


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
