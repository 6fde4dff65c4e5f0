"""Makes random bits from a counter, and rounds without bias.

The bits are a hash of an element's position and of the step. The state holds no key, and the bits
are the same on every backend, under every sharding, in jit and out of it.
"""

# Annotations stay text: cloudpickle then has no types to pickle along with a function.
from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, reshard
from jax.typing import DTypeLike
from jaxtyping import Array, Int, Integer

from adam_jax._types import Leaf, RealLeaf, Word, Words

Positions = Integer[Array, " n"]  # along a leaf's first axis
Remainder = Int[Array, "*leaf"]  # the difference to a 16-bit number, in fractions of its ulp

_TURN = np.uint32(0x9E37278E)  # 2^16 / golden ratio in its upper half, 2^14 / golden ratio below
_BLOCK = 32  # steps that a phase turns before it starts again


class Draw(NamedTuple):
    """The random bits that a leaf draws at a step, as words of shape ()."""

    key: Word  # of the leaf
    turn: Word  # this, factor and offset are the same for all leaves
    factor: Word
    offset: Word
    positions: Positions | None = None  # of a leaf along the first axis of a larger one, if any

    def at(self, positions: Sequence[Positions], leaf: Any) -> Draw:
        """Returns the draw of a leaf that is a part of a larger one: some layers or rows of it.

        `positions` has a vector of the same length as the leaf, with its places along the first
        axis of the larger leaf. Without such a vector the leaf is whole.
        """
        length = np.shape(leaf)[:1]
        return self._replace(positions=next((x for x in positions if x.shape == length), None))

    def in_turn(self, leaf: Leaf) -> Words:
        """Returns random words whose 16-bit halves turn by the golden ratio at each step.

        2^16 is a whole turn. Over a few steps the fractions of a turn fill [0, 1) more evenly than
        independent draws, so the errors of roundings cancel. Turning on without end, they would
        resonate with periodic gradients. So every 32 steps they start again, at a random place and
        in a random direction.
        """
        return self._bits(leaf) + self.turn

    def independent(self, leaf: Leaf) -> Words:
        """Returns random words that are independent of those of other steps."""
        return self._bits(leaf) * self.factor + self.offset

    def _bits(self, leaf: Leaf) -> Words:
        return random_bits(leaf.shape, self.key, self.positions, _explicit_sharding(leaf))


@functools.partial(jax.jit, static_argnums=0)
def draws(leaves: int, step: Word) -> list[Draw]:
    """Returns the draws of this many leaves at a step."""
    keys = list(map(jnp.asarray, key_of_leaf(np.arange(leaves, dtype=np.uint32))))
    one = draw(jnp.zeros((), jnp.uint32), step)

    def on_cpu() -> list[Word]:
        # The condition always holds, since factors are odd, but the compiler does not know that.
        zeros = [jnp.zeros((), jnp.uint32) for _ in keys]
        return jax.lax.cond(one.factor > 0, lambda: keys, lambda: zeros)

    # Leaves of one shape differ in an argument, and not in a constant of their code, so XLA
    # compiles them once. XLA for CPU looks through a barrier, but not through a condition.
    words = jax.lax.platform_dependent(
        cpu=on_cpu, default=lambda: jax.lax.optimization_barrier(keys)
    )
    return [one._replace(key=word) for word in words]


def draw(key: Word, step: Word) -> Draw:
    """Returns the draw at a step of the leaf with a key."""
    step = step.astype(jnp.uint32)
    start = mix(step // np.uint32(_BLOCK) + np.uint32(1))
    turn = step % np.uint32(_BLOCK) * _TURN
    turn = start + jnp.where(mix(start) >> np.uint32(31) == 0, turn, -turn)
    word = mix(step + np.uint32(1))
    return Draw(key, turn, factor=word | np.uint32(1), offset=mix(word))


def key_of_leaf(leaf: Any) -> Any:
    """Hashes the position of a leaf in its tree, a word or words of NumPy or JAX."""
    return mix(mix(leaf + np.uint32(1)))


def random_bits(
    shape: tuple[int, ...],
    key: Word,
    positions: Positions | None = None,
    sharding: NamedSharding | None = None,
) -> Words:
    """Hashes a key and coordinates to 32 random bits for each element.

    Coordinates enter as the element's index in row-major order, modulo 2^32. The key is combined by
    xor: adding it would only shift the same sequence. `positions` are the coordinates along the
    first axis; without them, all. `sharding` is that of the leaf on a mesh with explicit axes:
    without it each chip of a TPU makes the bits of the whole leaf.
    """
    with jax.numpy_rank_promotion("allow"):
        index = jnp.zeros(shape, jnp.uint32)
        for axis, size in enumerate(shape):
            if axis == 0 and positions is not None:
                along = jax.lax.broadcast_in_dim(positions.astype(jnp.uint32), shape, (0,))
                along = reshard(along, sharding) if sharding else along
            else:
                along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis, out_sharding=sharding)
            # The first axis counts by positions, not by size: a layer alone gets the same index as
            # in its stack.
            index = index * np.uint32(size % 2**32) + along if axis else along
        return mix(index ^ key)


def _explicit_sharding(x: Any) -> NamedSharding | None:
    """Returns how an array is sharded over explicit axes of a mesh, or None if there are none."""
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def mix(x: Any) -> Any:
    """Maps 32-bit words one to one, such that every bit of x affects every bit of the result."""
    # C. Wellons searched for the shifts and multipliers with the least bias among functions of this
    # form ("Prospecting for Hash Functions", 2018).
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def nearest(x: Leaf, dtype: DTypeLike) -> Leaf:
    """Rounds to nearest, even if a cast back follows."""
    if dtype == jnp.bfloat16:
        # XLA for GPU drops a pair of casts down and up. Here the rounding is no cast.
        x = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return x.astype(dtype)


# A 16-bit float with 16 more bits of fraction is a word of 32 bits. Its upper half is the bit
# pattern of the number truncated to 16 bits, and its lower half counts equal parts of the ulp
# there, through zeros, subnormal numbers and powers of two alike. For bfloat16 such a word is the
# float32 itself. Everything below is integer arithmetic on words; only the conversions to words and
# back depend on the dtype.
_SIGN = np.uint32(0x80000000)
_UPPER = np.uint32(0xFFFF0000)
_REBIAS = np.uint32((127 - 15) << 23)  # between the exponents of float32 and float16
_SUBNORMAL = np.float32(2.0**40)  # the word of a float16 below 2^-14 counts in units of 2^-40


def split(
    x: RealLeaf, dtype: DTypeLike, width: int, bits: Words | None = None
) -> tuple[RealLeaf, Remainder]:
    """Splits a float32 into the nearest bfloat16 or float16 and a remainder of `width` bits.

    The remainder counts 2^-width parts of the ulp, away from zero (next to a float16 zero,
    upwards), in [-2^(width-1), 2^(width-1)), as int8, or int16 for more than 8 bits. With 16 bits
    it keeps a float32 exactly for bfloat16, and from 2^-17 on for float16. The rest of the word is
    rounded stochastically, without bias over `bits`, or to nearest without `bits`. With `width` = 0
    that is the whole rounding, and the remainder is 0.

    Infinity and (quiet) NaN stay the same, with remainder 0. A finite x beyond the largest
    finite number of the dtype and its largest remainder becomes that number.
    """
    infinity = np.uint32(np.array(np.inf, dtype).view(np.uint16)) << np.uint32(16)
    lost = np.uint32(2 ** (16 - width) - 1)
    largest = (infinity - np.uint32(0x8001)) & ~lost
    if dtype != jnp.bfloat16:
        largest = (largest >> np.uint32(3)) + _REBIAS
    if bits is None or width == 16:
        noise = (lost + np.uint32(1)) >> np.uint32(1)
    else:
        noise = bits >> np.uint32(16 + width)
    sign = jax.lax.bitcast_convert_type(x, jnp.uint32) & _SIGN
    word = _magnitude(x, dtype, bits) | sign
    special = word & _UPPER if width else word  # without a remainder, the lower half is dropped
    word = jnp.where(jnp.abs(x) <= largest.view(np.float32), word + noise, special)
    # Halves round up: the lower half counts from there, and its highest bit is the remainder's
    # sign.
    parts = (word >> np.uint32(16 - width)) & np.uint32(2**width - 1)
    remainder = parts.astype(jnp.int8 if width <= 8 else jnp.int16)
    # Both branches compute the same upper half. On a TPU it comes from the stored remainder, which
    # lets XLA fuse the two passes. On a GPU that would cost two more instructions.
    low = jax.lax.platform_dependent(
        word,
        remainder,
        tpu=lambda word, remainder: word - _in_word(remainder, width),
        default=lambda word, _: word + np.uint32(0x8000 if width else 0),
    )
    if dtype != jnp.bfloat16:
        # Adding cannot turn 0 into -0, so next to 0 the remainder carries the sign. (For bfloat16
        # this concerns only numbers below 2^-134, whose sign does not matter.)
        next_to_zero = (word & ~_SIGN) < np.uint32(0x8000)
        remainder = jnp.where(next_to_zero & (sign != 0), -remainder, remainder)
        low = jnp.where(next_to_zero, sign, low)
    low = (low >> np.uint32(16)).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(low, dtype), remainder


def join(low: RealLeaf, remainder: Remainder | int = 0, width: int = 0) -> RealLeaf:
    """Joins the results of `split`, given the same `width`, to the float32 that they represent.

    Next to a bfloat16 zero a remainder counts as 0, which loses less than 2^-134. So a parameter
    that became 0, because a step cancelled it or the user pruned it, is 0 with any remainder.
    """
    upper = jax.lax.bitcast_convert_type(low, jnp.uint16).astype(jnp.uint32) << np.uint32(16)
    lower = _in_word(remainder, width)
    if low.dtype == jnp.bfloat16:
        if width:
            # A word just below that of 0 is a NaN's. (This is a mask, and not a choice between two
            # words, because on explicit meshes remainders and parameters may be sharded
            # differently.)
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


def _in_word(remainder: Remainder | int, width: int) -> Words:
    """Returns the number that a remainder adds to a word, modulo 2^32."""
    parts = jnp.asarray(remainder, jnp.int32) << np.int32(16 - width)
    return jax.lax.bitcast_convert_type(parts, jnp.uint32)


def _magnitude(x: RealLeaf, dtype: DTypeLike, bits: Words | None) -> Words:
    """Returns the word of |x|; for float16 and finite x at most the one below infinity's."""
    pattern = jax.lax.bitcast_convert_type(x, jnp.uint32) & ~_SIGN
    if dtype == jnp.bfloat16:
        return pattern
    infinity = np.uint32((127 + 16) << 23)
    pattern = jnp.where(jnp.isinf(x), infinity, jnp.minimum(pattern, infinity - np.uint32(1)))
    normal = (pattern - _REBIAS) << np.uint32(3)
    scaled = jax.lax.bitcast_convert_type(pattern, jnp.float32) * _SUBNORMAL
    whole = jnp.floor(scaled)
    # These are the lower 16 bits; the upper ones round words.
    noise = np.float32(0) if bits is None else _centred(bits << np.uint32(16))
    subnormal = whole.astype(jnp.uint32) + (scaled - whole - 0.5 > noise).astype(jnp.uint32)
    word = jnp.where(pattern < np.uint32((127 - 14) << 23), subnormal, normal)
    return jnp.where(jnp.isnan(x), np.uint32(0x7E000000), word)


def _centred(bits: Words) -> RealLeaf:
    """Returns random bits as float32 numbers in [-1/2, 1/2), multiples of 2^-23."""
    one_to_two = bits >> np.uint32(9) | np.uint32(0x3F800000)
    return jax.lax.bitcast_convert_type(one_to_two, jnp.float32) - 1.5
