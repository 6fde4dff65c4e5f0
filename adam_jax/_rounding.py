"""Random bits by counter, and rounding that is right on average.

The bits are a hash of where an element is and of which draw it is: no key in the state, and the
same bits on every backend, under every sharding, in jit and out of it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from adam_jax._types import RealLeaf, Word, Words

_GOLDEN = np.uint32(0x9E3779B9)  # 2^32 / golden ratio


def random_bits(shape: tuple[int, ...], leaf: int | Word, draw: int | Word = 0) -> Words:
    """32 random bits for every element of a leaf: a hash of (leaf, draw, coordinates).

    Coordinates enter as the element's index in row-major order, modulo 2^32. Leaf and draw key
    the hash in its middle: added to the index, they would only shift the same sequence.
    """
    with jax.numpy_rank_promotion("allow"):
        key = _mix(jnp.uint32(leaf) * _GOLDEN ^ _mix(jnp.uint32(draw) + np.uint32(1)))
        index = jnp.zeros(shape, jnp.uint32)
        for axis, size in enumerate(shape):
            along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
            index = index * np.uint32(size % 2**32) + along
        return _mix(_mix(index) ^ key)


def _mix(x: Words) -> Words:
    """A bijection of 32-bit words in which every bit of x moves every bit of the result."""
    # Shifts and multipliers are those that C. Wellons found by search ("Prospecting for Hash
    # Functions", 2018) to leave the least bias among functions of this form.
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def turned(phase: Words, count: Word) -> Words:
    """A phase, where 2^32 is a whole turn, turned by the golden ratio once for each count.

    For each element the fractions of a turn fill [0, 1) more evenly over time than independent
    draws would; over elements they are as random as the phases.
    """
    return phase + count.astype(jnp.uint32) * _GOLDEN


def uniform(bits: Words) -> RealLeaf:
    """Random bits as float32 numbers in [0, 1), multiples of 2^-24."""
    return (bits >> np.uint32(8)).astype(jnp.float32) * np.float32(2.0**-24)


def to_bfloat16(x: RealLeaf, bits: Words) -> RealLeaf:
    """Rounds float32 to bfloat16, up or down at random, so that the mean over bits is x.

    What is cut off, 16 bits, is the probability of rounding away from zero. Infinity and NaN stay
    what they are; a finite x beyond the largest finite bfloat16 becomes that.
    """
    # Integers, because XLA on GPU takes a cast to bfloat16 and back for nothing at all.
    word = jax.lax.bitcast_convert_type(x, jnp.uint32)
    rounded = word + (bits >> np.uint32(16))
    largest = np.uint32(0x7F7F0000)
    overflowed = (rounded & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F7FFFFF)
    rounded = jnp.where(overflowed, (word & np.uint32(0x80000000)) | largest, rounded)
    rounded = jnp.where(jnp.isfinite(x), rounded, word)
    truncated = (rounded >> np.uint32(16)).astype(jnp.uint16)
    # A NaN whose payload lies in the lower half would turn into infinity.
    truncated = jnp.where(jnp.isnan(x), np.uint16(0x7FC0), truncated)
    return jax.lax.bitcast_convert_type(truncated, jnp.bfloat16)
