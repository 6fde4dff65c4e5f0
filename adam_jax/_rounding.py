"""Random bits by counter, and rounding that is right on average.

The bits are a hash of where an element is and of which draw it is: no key in the state, and the
same bits on every backend, under every sharding, in jit and out of it.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from adam_jax._types import Leaf, RealLeaf, Word, Words

Remainder = Int[Array, "*leaf"]  # what a 16-bit number lacks, in fractions of its ulp

_GOLDEN = np.uint32(0x9E3779B9)  # 2^32 / golden ratio


def random_bits(shape: tuple[int, ...], leaf: int | Word, draw: int | Word = 0) -> Words:
    """32 random bits for every element of a leaf: a hash of (leaf, draw, coordinates).

    Coordinates enter as the element's index in row-major order, modulo 2^32. Leaf and draw are
    hashed to a key that is xored to it: added, they would only shift the same sequence.
    """
    with jax.numpy_rank_promotion("allow"):
        # The barrier makes leaves of a shape differ in an argument, and not in a constant of their
        # code: XLA for GPU compiles them once.
        leaf = jax.lax.optimization_barrier(jnp.asarray(leaf, jnp.uint32))
        key = _mix(_mix(jnp.uint32(leaf) + np.uint32(1)) ^ jnp.uint32(draw) * _GOLDEN)
        index = jnp.zeros(shape, jnp.uint32)
        for axis, size in enumerate(shape):
            along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
            index = index * np.uint32(size % 2**32) + along
        return _mix(index ^ key)


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


def centred(bits: Words) -> RealLeaf:
    """Random bits as float32 numbers in [-1/2, 1/2), multiples of 2^-23."""
    one_to_two = bits >> np.uint32(9) | np.uint32(0x3F800000)
    return jax.lax.bitcast_convert_type(one_to_two, jnp.float32) - 1.5


def nearest(x: Leaf, dtype: DTypeLike) -> Leaf:
    """Rounds to nearest, also where a cast back follows."""
    if dtype == jnp.bfloat16:
        # XLA for GPU drops a cast that is undone afterwards, and this way it has nothing to drop.
        x = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return x.astype(dtype)


# A 16-bit float with 16 more bits of fraction is a word of 32: its upper half is the pattern of the
# number cut off to 16 bits, and it counts on in equal parts of the ulp there, through zeros,
# subnormal numbers and powers of two alike. For bfloat16 such a word is the float32 itself. All
# that follows is integer arithmetic on words; only the way to them and back knows the dtype.
_SIGN = np.uint32(0x80000000)
_REBIAS = np.uint32((127 - 15) << 23)  # between the exponents of float32 and float16
_SUBNORMAL = np.float32(2.0**40)  # a float16 below 2^-14 is a word of so many to the unit


def split(
    x: RealLeaf, dtype: DTypeLike, kept: int, bits: Words | None = None
) -> tuple[RealLeaf, Remainder]:
    """A float32 as the nearest bfloat16 or float16, and `kept` bits of what is missing to it.

    The remainder counts 2^-kept parts of the ulp, away from zero (beside a float16 zero, upwards),
    in [-2^(kept-1), 2^(kept-1)), as int8, or int16 for more than 8 bits. 16 bits hold a float32
    exactly beside bfloat16, and from 2^-17 on beside float16. What the word loses is rounded at
    random, right on average over bits, or to nearest without them. With `kept` = 0 that is the
    whole rounding, and the remainder is 0.

    Infinity and (quiet) NaN stay what they are, with remainder 0. A finite x beyond the largest
    finite number of the dtype and its largest remainder becomes that.
    """
    infinity = np.uint32(np.array(np.inf, dtype).view(np.uint16)) << np.uint32(16)
    lost = np.uint32(2 ** (16 - kept) - 1)
    largest = (infinity - np.uint32(0x8001)) & ~lost
    noise = (
        (lost + np.uint32(1)) >> np.uint32(1) if bits is None else (bits >> np.uint32(16)) & lost
    )
    magnitude = _magnitude(x, dtype, bits)
    word = jnp.minimum((magnitude + noise) & ~lost, largest)
    word = jnp.where(jnp.isfinite(x), word, magnitude & np.uint32(0xFFFF0000))
    # Halves go up: what is left in the lower half counts from there, its highest bit the sign.
    parts = (word >> np.uint32(16 - kept)) & np.uint32(2**kept - 1)
    remainder = parts.astype(jnp.int8 if kept <= 8 else jnp.int16)
    sign = jax.lax.bitcast_convert_type(x, jnp.uint32) & _SIGN
    # Beside zero; of bfloat16's, the numbers below 2^-134, nothing is worth telling their signs.
    beside_zero = word < np.uint32(0x8000) if dtype != jnp.bfloat16 else np.bool_(False)
    # Adding cannot turn 0 into -0, so there it is the remainder that has the sign.
    remainder = jnp.where(beside_zero & (sign != 0), -remainder, remainder)
    # Made of the remainder as it is stored, so that XLA for TPU has one pass end in the other.
    nearest = (word - _parts(remainder, kept)) >> np.uint32(16)
    nearest = jnp.where(beside_zero, np.uint32(0), nearest)
    low = ((sign >> np.uint32(16)) | nearest).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(low, dtype), remainder


def join(low: RealLeaf, remainder: Remainder | int = 0, kept: int = 0) -> RealLeaf:
    """The float32 that `split` took apart, given what it returned and the `kept` it was given.

    Beside a bfloat16 zero a remainder counts as 0: less than 2^-134 is lost. So a parameter that
    became 0, because a step cancelled it or somebody cut it off, is 0, whatever its remainder.
    """
    upper = jax.lax.bitcast_convert_type(low, jnp.uint16).astype(jnp.uint32) << np.uint32(16)
    lower = _parts(remainder, kept)
    if low.dtype == jnp.bfloat16:
        if kept:
            # What is less than the pattern of 0 is that of a NaN. (A mask, and no choice between
            # two words: on explicit meshes remainders may be divided otherwise than parameters.)
            lower &= jnp.where(upper & ~_SIGN == 0, np.uint32(0), np.uint32(2**32 - 1))
        return jax.lax.bitcast_convert_type(upper + lower, jnp.float32)
    word = upper + lower
    signed = jnp.where(lower < _SIGN, lower, -lower | _SIGN)
    word = jnp.where((upper & ~_SIGN == 0) & (lower != 0), signed, word)
    magnitude = word & ~_SIGN
    normal = (magnitude >> np.uint32(3)) + _REBIAS
    # The exponent of float16's infinity is an ordinary one in float32.
    normal = jnp.where(magnitude < np.uint32(0x7C000000), normal, normal + _REBIAS)
    subnormal = magnitude.astype(jnp.float32) / _SUBNORMAL
    subnormal = jax.lax.bitcast_convert_type(subnormal, jnp.uint32)
    pattern = jnp.where(magnitude < np.uint32(1 << 26), subnormal, normal)
    return jax.lax.bitcast_convert_type(pattern | (word & _SIGN), jnp.float32)


def _parts(remainder: Remainder | int, kept: int) -> Words:
    """What a remainder adds to a word, modulo 2^32."""
    parts = jnp.asarray(remainder, jnp.int32) << np.int32(16 - kept)
    return jax.lax.bitcast_convert_type(parts, jnp.uint32)


def _magnitude(x: RealLeaf, dtype: DTypeLike, bits: Words | None) -> Words:
    """The word of |x|; for float16 at most that of 2^16, which is infinity's, or NaN's."""
    pattern = jax.lax.bitcast_convert_type(x, jnp.uint32) & ~_SIGN
    if dtype == jnp.bfloat16:
        return pattern
    normal = (jnp.minimum(pattern, np.uint32((127 + 16) << 23)) - _REBIAS) << np.uint32(3)
    scaled = jax.lax.bitcast_convert_type(pattern, jnp.float32) * _SUBNORMAL
    whole = jnp.floor(scaled)
    # The half of the bits that rounds words is the other one.
    noise = np.float32(0) if bits is None else centred(bits << np.uint32(16))
    subnormal = whole.astype(jnp.uint32) + (scaled - whole - 0.5 > noise).astype(jnp.uint32)
    word = jnp.where(pattern < np.uint32((127 - 14) << 23), subnormal, normal)
    return jnp.where(jnp.isnan(x), np.uint32(0x7E000000), word)
