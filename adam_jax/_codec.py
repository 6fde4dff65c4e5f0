"""Encodes and decodes one leaf's moments.

Codes of 8 bits come from the bit pattern of a float32 by a few integer operations. As an integer, a
pattern is a logarithm to base 2 that is linear between powers of two. So a ninth of it is nearly a
ninth root, and its negative nearly a reciprocal:

    pattern(root(z)) = pattern(1) - (pattern(1) - pattern(z)) / 9
    pattern(reciprocal(w)) = 2 pattern(1) - pattern(w)

Both are monotone, can be inverted exactly, and are linear between the numbers that have codes.
Decoding is linear between neighbouring codes, so unbiased rounding of the code is unbiased rounding
of the value. nu counts in its row's scale s, and mu in q:

    root(nu / s) = (c + 1) / n                       c = 0 ... n - 1
    reciprocal(4 |mu| / q + 1) = 1 - c / n           c = 0 ... 31/32 n, and a sign
    q = unit 2^floor(log2(nu / s) / 2)
    unit = 8.4 sqrt((1 - b1) / (1 + b1)) h(t) sqrt(s)          h(t) = (1 - b1^t) / sqrt(1 - b2^t)

Each row stores its scale and its unit, so codes mean the same at any count and with any betas.
n sets how fine the codes are: 504 or 252 for nu, 64 or 128 for mu. Apart from the unit, q is a
power of two, by which division is exact, and q is nearly proportional to sqrt(nu). h(t) is the
factor by which mu runs ahead of sqrt(nu) in the first steps, and sqrt((1 - b1) / (1 + b1)) the
factor by which mu is smaller where gradients are noise.

For n = 504, codes of nu are 1/56 to 1/28 of nu apart down to s / 2^9, twice as far down to
s / 2^18, and so on; the smallest is s / 2^80. Codes of mu are q / 2n apart up to q / 4, four times
as far up to 3/4 q, and so on up to 7.75 q. docs/formats.md proves the bounds.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from adam_jax._moments import Decay, arithmetic_dtype, bias_correction
from adam_jax._rounding import Draw, join, nearest, split
from adam_jax._types import Codes, Leaf, RealLeaf, Scalar, Words

_ONE = np.uint32(0x3F800000)  # the bit pattern of 1
_TWO = np.uint32(0x40000000)
_ROOT = np.uint32(9)
_ROOT_OF_ONE = _ONE - _ONE // _ROOT  # makes the ninth part of a pattern the pattern of a root
# The ninth power of its product with the float32 next to 64/63 is 1 within 1e-7. With 63/64 itself
# it would be further off, and that difference would bias each rounding.
_LEVELS = np.nextafter(np.float32(63 / 64), np.float32(0))
_CHECKSUM = np.uint32(0xFFF)

Moments = tuple[Leaf, RealLeaf, *tuple[RealLeaf, ...]]  # of one leaf: mu, nu and others


class Rows(NamedTuple):
    """The units in which the codes of each row count: float32, shape (..., 1).

    They have shape () where nothing counts in them, and are None in a state without codes.
    """

    scale: Any = None  # of nu
    unit: Any = None  # of mu, with a checksum


class Stored(NamedTuple):
    """One leaf of a state, whose dtypes tell the format. All are None for a parameter None."""

    mu: Any  # Leaf, or int8 codes
    nu: Any  # RealLeaf, or uint8 codes
    others: tuple[Any, ...] = ()  # like nu
    rows: Rows = Rows()


class FloatMu(NamedTuple):
    """mu in a floating dtype: bfloat16, rounded stochastically, or another, rounded to nearest."""

    dtype: np.dtype[Any]

    def read(self, stored: Leaf, root: RealLeaf, unit: RealLeaf | None, dtype: DTypeLike) -> Leaf:
        """Returns mu in the arithmetic's dtype."""
        return _widen(stored, dtype)

    def write(
        self, mu: Leaf, root: RealLeaf, unit: RealLeaf | None, words: Words | None
    ) -> tuple[Leaf, Leaf]:
        """Returns mu as stored, and the result of `read` for it."""
        stored = _rounded(mu, self.dtype, words, signed=True)
        return stored, _widen(stored, mu.dtype)


class FloatNu(NamedTuple):
    """nu in a floating dtype, like `FloatMu`. mu's codes may count in roots of it."""

    dtype: np.dtype[Any]

    def read(
        self, stored: RealLeaf, scale: RealLeaf | None, dtype: DTypeLike
    ) -> tuple[RealLeaf, RealLeaf]:
        """Returns nu, and the power of two below its root, or NaN if nu is not finite."""
        nu = _not_underflown(_widen(stored, dtype), self.dtype)
        return nu, _finite(nu, _root_of_power(_pattern(nu), nu))

    def write(
        self, nu: RealLeaf, scale: RealLeaf | None, words: Words | None
    ) -> tuple[RealLeaf, RealLeaf, RealLeaf]:
        """Returns nu as stored, and the result of `read` for it."""
        # mu uses the upper half of the words.
        words = None if words is None else words << np.uint32(16)
        stored = _rounded(nu, self.dtype, words, signed=False)
        return stored, *self.read(stored, scale, nu.dtype)


class Int8Nu(NamedTuple):
    """nu in codes of 8 bits, or of 9 whose lowest bit is in mu's byte.

    Only 63/64 of the bit patterns are codes, so that powers of two have codes.
    """

    bits: int

    def read(self, word: Words, scale: RealLeaf, dtype: DTypeLike) -> tuple[RealLeaf, RealLeaf]:
        """Returns nu, and the power of two below the root of nu / s.

        `word` is the bit pattern of a number from 1 to 2, with the code in the upper bits of its
        mantissa.
        """
        root = (_number(word) - np.float32(1 - 2.0**-self.bits)) * np.float32(64 / 63)
        pattern = _pattern(root) * _ROOT - np.uint32((int(_ROOT) - 1) * int(_ONE) % 2**32)
        z = _number(pattern)
        nu = _not_underflown(z.astype(dtype) * scale, np.float32)
        return nu, _root_of_power(pattern, z).astype(dtype)

    def write(
        self, nu: RealLeaf, scale: RealLeaf, words: Words
    ) -> tuple[Words, RealLeaf, RealLeaf]:
        """Returns the word with the code, and the result of `read`. nu is at most the scale."""
        z = nu * (1 / jnp.maximum(scale, jnp.finfo(scale.dtype).tiny))
        root = _number(jax.lax.div(_pattern(z.astype(jnp.float32)), _ROOT) + _ROOT_OF_ONE)
        # A number below that of the smallest code, 0 included, gets the smallest code.
        place = jnp.maximum(root * _LEVELS + np.float32(1 - 2.0**-self.bits), 1)
        noise = words & np.uint32(2**14 - 1)
        if self.bits == 8:
            noise = noise << np.uint32(1) | words >> np.uint32(31)
        word = _rounded_up_or_down(place, self.bits, noise)
        return word, *self.read(word, scale, nu.dtype)


class Int8Mu(NamedTuple):
    """mu in a sign and 7 bits, or 6 where the byte has one of nu's bits."""

    bits: int

    @property
    def mask(self) -> np.uint32:
        """Returns a mask of the bits of a byte that hold the magnitude."""
        return np.uint32(0x80 - 2 ** (7 - self.bits))

    def read(self, byte: Codes, root: RealLeaf, unit: RealLeaf, dtype: DTypeLike) -> RealLeaf:
        """Returns mu, given the root of nu that `read` of nu returns."""
        word = jax.lax.bitcast_convert_type(byte, jnp.uint8).astype(jnp.uint32)
        place = (word << np.uint32(16)) + _TWO & (self.mask << np.uint32(16) | _TWO)
        return _from_reciprocal(_number(place), word << np.uint32(24), root * unit)

    def write(
        self, mu: RealLeaf, root: RealLeaf, unit: RealLeaf, words: Words
    ) -> tuple[Words, RealLeaf]:
        """Returns a word with the byte, and the result of `read` for it.

        |mu| counts as at most 7.75 q.
        """
        inverse = _inverse(root) * (1 / jnp.maximum(unit, jnp.finfo(unit.dtype).tiny))
        w = jnp.minimum((jnp.abs(mu) * inverse).astype(jnp.float32) + 0.25, 8)
        place = 4 - _halved_reciprocal(w)
        noise = words >> np.uint32(9 + self.bits)
        word = _rounded_up_or_down(place, self.bits, noise)
        sign = _pattern(mu.astype(jnp.float32)) & np.uint32(2**31)
        return word + (sign >> np.uint32(8)), _from_reciprocal(_number(word), sign, root * unit)


class Codec(NamedTuple):
    """The format of one leaf."""

    mu: FloatMu | Int8Mu
    nu: FloatNu | Int8Nu

    @property
    def mu_is_coded(self) -> bool:
        """Returns whether mu is in codes, which count in units."""
        return isinstance(self.mu, Int8Mu)

    @property
    def nu_is_coded(self) -> bool:
        """Returns whether nu is in codes, which count in scales."""
        return isinstance(self.nu, Int8Nu)

    @property
    def coded(self) -> bool:
        """Returns whether a moment is in codes."""
        return self.mu_is_coded or self.nu_is_coded

    @property
    def random(self) -> bool:
        """Returns whether anything is rounded stochastically."""
        return self.coded or self._rounds_floats

    @property
    def float_dtypes(self) -> list[np.dtype[Any]]:
        """Returns the dtypes of the moments and scales that are floating-point numbers."""
        scales = [np.dtype(np.float32)] if self.nu_is_coded else []
        return [x.dtype for x in (self.mu, self.nu) if isinstance(x, FloatMu | FloatNu)] + scales

    @property
    def narrowest(self) -> np.dtype[Any]:
        """Returns the dtype in `float_dtypes` with the smallest range."""
        return min(self.float_dtypes, key=lambda dtype: jnp.finfo(dtype).bits)

    def arithmetic_dtype(self, dtype: DTypeLike) -> np.dtype[Any]:
        """Returns the dtype to compute in for gradients of this dtype."""
        return arithmetic_dtype(dtype, *self.float_dtypes)

    @property
    def _rounds_floats(self) -> bool:
        return np.dtype(jnp.bfloat16) in self.float_dtypes

    @property
    def _joint(self) -> bool:
        return self.mu_is_coded and self.nu_is_coded

    def read(self, stored: Stored, rows: Rows, dtype: DTypeLike) -> Moments:
        """Returns mu, nu and others, in the arithmetic's real dtype. `rows` are opened."""
        nu, root = self.nu.read(self._nu_word(stored), rows.scale, dtype)
        mu = self.mu.read(stored.mu, root, rows.unit, dtype)
        return (mu, nu, *(_widen(x, dtype) for x in stored.others))

    def nu_at_smallest(self, stored: Stored) -> jax.Array:
        """Returns where nu is the smallest number of its format: code 0, or 0."""
        return self._nu_word(stored) == (_ONE if self.nu_is_coded else 0)

    def _nu_word(self, stored: Stored) -> jax.Array:
        """Returns nu, or a word with its code below the exponent of a float32."""
        if not self.nu_is_coded:
            return stored.nu
        code = stored.nu.astype(jnp.uint32) << np.uint32(1)
        if self.mu_is_coded:
            code = code + (stored.mu.astype(jnp.uint32) & np.uint32(1))
        return (code << np.uint32(14)) + _ONE

    def write(
        self, moments: Moments, like: Stored, rows: Rows, draw: Draw | None
    ) -> tuple[Stored, Moments]:
        """Returns one leaf's moments as stored, without rows, and the result of `read` for them.

        `rows` are opened; no row's scale is less than its largest nu. `draw` may be None unless
        `random`. Moments beyond the second are rounded to nearest.
        """
        mu, nu, *others = moments
        turned: Any = draw.in_turn(nu) if draw and self.coded else None
        drawn: Any = draw.independent(nu) if draw and self._rounds_floats else None
        new_nu, nu, root = self.nu.write(nu, rows.scale, turned if self.nu_is_coded else drawn)
        new_mu, mu = self.mu.write(mu, root, rows.unit, turned if self.mu_is_coded else drawn)
        new_others = tuple(nearest(x, y.dtype) for x, y in zip(others, like.others, strict=True))
        if self._joint:
            new_mu = new_mu + ((new_nu & np.uint32(2**14)) << np.uint32(2))
        if self.mu_is_coded:
            # Not a bitcast from uint8, which `read` would undo: XLA for TPU has to see that `read`
            # starts from the stored codes.
            new_mu = (new_mu >> np.uint32(16)).astype(jnp.int8)
        if self.nu_is_coded:
            new_nu = (new_nu >> np.uint32(15)).astype(jnp.uint8)
        values = (mu, nu, *(_widen(x, nu.dtype) for x in new_others))
        return Stored(new_mu, new_nu, new_others), values

    def joined(self, stored: Stored) -> Any:
        """Returns stored moments without rows; codes of both moments share one array."""
        if not self._joint:
            return stored[:3]
        high = jax.lax.bitcast_convert_type(stored.mu, jnp.uint8).astype(jnp.uint16)
        return high << np.uint16(8) | stored.nu.astype(jnp.uint16)

    def parted(self, joined: Any) -> Stored:
        """Returns the stored moments, without rows, from the result of `joined`."""
        if not self._joint:
            return Stored(*joined)
        high = (joined >> np.uint16(8)).astype(jnp.uint8)
        mu = jax.lax.bitcast_convert_type(high, jnp.int8)
        return Stored(mu, joined.astype(jnp.uint8))

    def sealed(self, scale: RealLeaf | None, unit: RealLeaf, like: Rows) -> tuple[Rows, Rows]:
        """Returns rows as stored, in float32, and the result of `opened` for them.

        The lowest 12 bits of the unit are a checksum. Averaging states over replicas, or editing
        scales, changes the meaning of codes, which have no average. Without a checksum nobody would
        notice.
        """
        stored = like.scale if scale is None else scale.astype(jnp.float32)
        upper = _pattern(unit.astype(jnp.float32)) & ~_CHECKSUM
        rows = Rows(stored, _number(upper | self._checksum(upper, stored)))
        return rows, self._widened(stored, _number(upper), unit.dtype)

    def opened(self, rows: Rows, dtype: DTypeLike) -> Rows:
        """Returns scales and units as numbers, NaN where the checksum is wrong.

        A row without a step has a unit of 0, and its codes are 0 in any format.
        """
        if not self.coded or rows.unit is None:
            return rows
        pattern = _pattern(rows.unit)
        upper = pattern & ~_CHECKSUM
        valid = (pattern & _CHECKSUM == self._checksum(upper, rows.scale)) | (pattern == 0)
        unit = jnp.where(valid, _number(upper), np.float32(np.nan))
        scale = rows.scale
        if self.nu_is_coded and scale is not None:
            scale = jnp.where(valid, scale, np.float32(np.nan))
        return self._widened(scale, unit, dtype)

    def _widened(self, scale: RealLeaf | None, unit: RealLeaf, dtype: DTypeLike) -> Rows:
        if self.nu_is_coded and scale is not None:
            scale = _not_underflown(scale.astype(dtype), np.float32)
        return Rows(scale, unit.astype(dtype))

    def _checksum(self, upper: Words, scale: RealLeaf | None) -> Words:
        # It depends on the format: a checkpoint may be restored onto another, with a cast.
        upper = upper | np.uint32(self.mu_is_coded + 2 * self.nu_is_coded)
        if self.nu_is_coded and scale is not None:
            upper = upper ^ _pattern(scale)
        return upper * np.uint32(0x9E3779B1) >> np.uint32(20)  # 2^32 / golden ratio, a prime


def codec_of(stored: Stored) -> Codec:
    """Returns the format of a leaf from its dtypes, which only this function looks at."""
    mu, nu = stored.mu.dtype == jnp.int8, stored.nu.dtype == jnp.uint8
    # nu forgets slowly: its rounding errors add up over 1 / (1 - b2) steps, those of mu over only
    # 1 / (1 - b1). So the step is more exact with 7 bits for mu and 9 for nu than with 8 and 8.
    return Codec(
        Int8Mu(6 if nu else 7) if mu else FloatMu(stored.mu.dtype),
        Int8Nu(9 if mu else 8) if nu else FloatNu(stored.nu.dtype),
    )


def unit_of_mu(b1: Decay, b2: Decay, t: RealLeaf) -> Scalar:
    """Returns the unit of mu's codes at step t, in units of the root of a row's scale.

    7.75 q is then the largest mu that gradients can produce for b2 up to 0.999.
    """
    one_minus_b1 = jnp.maximum(b1.one_minus_b, 0.01)
    noise = one_minus_b1 / (2 - one_minus_b1)
    # Not a quotient by a root: in some programs, but not in others, XLA replaces it by a product
    # with a reciprocal root, which rounds differently.
    return 8.4 * bias_correction(b1, t) * jnp.sqrt(noise / bias_correction(b2, t))


def _rounded_up_or_down(place: RealLeaf, bits: int, noise: Words) -> Words:
    """Rounds numbers stochastically to `bits` of their mantissa, and returns their bit patterns.

    `noise` is uniform over the bits below these.
    """
    return _pattern(place) + noise & ~np.uint32(2 ** (23 - bits) - 1)


def _from_reciprocal(place: RealLeaf, sign: Words, q: RealLeaf) -> RealLeaf:
    x = _pattern(_halved_reciprocal(4 - place) - 0.25) | sign & np.uint32(2**31)
    return _number(x).astype(q.dtype) * q


def _halved_reciprocal(x: RealLeaf) -> RealLeaf:
    """Returns an approximation of 1 / 2x."""
    return _number(np.uint32(2 * int(_ONE) - (1 << 23)) - _pattern(x))


def _root_of_power(pattern: jax.Array, like: RealLeaf) -> RealLeaf:
    """Returns 2^floor(k/2) for the pattern of a number from 2^k to 2^(k+1)."""
    one = _pattern_of_one(like.dtype)
    exponent = np.array(np.inf, like.dtype).view(one.dtype)
    root = (pattern >> one.dtype.type(1)) + one // one.dtype.type(2)
    return jax.lax.bitcast_convert_type(root & exponent, like.dtype)


def _inverse(power: RealLeaf) -> RealLeaf:
    """Returns 1 / 2^k, exactly, and NaN for NaN."""
    pattern = 2 * int(_pattern_of_one(power.dtype))
    word = _pattern(power)
    return jax.lax.bitcast_convert_type(np.array(pattern, word.dtype) - word, power.dtype)


def _not_underflown(nu: RealLeaf, stored: DTypeLike) -> RealLeaf:
    """Returns nu, raised in float64 to at least the smallest number of the dtype that stores it.

    A smaller nu became 0 there, while mu in float64 did not, and steps would have no bound.
    """
    smallest = jnp.finfo(stored).tiny
    if jnp.finfo(nu.dtype).tiny == smallest:
        return nu
    return jnp.maximum(nu, np.array(smallest, nu.dtype))


def _finite(x: RealLeaf, value: RealLeaf) -> RealLeaf:
    return jnp.where(jnp.isfinite(x), value, np.array(np.nan, value.dtype))


def _pattern_of_one(dtype: DTypeLike) -> Any:
    one = np.ones((), dtype)
    return one.view(f"uint{8 * one.itemsize}")


def _pattern(x: RealLeaf) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")


def _number(pattern: Words) -> RealLeaf:
    return jax.lax.bitcast_convert_type(pattern, jnp.float32)


def _widen(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    return x.astype(arithmetic_dtype(x.dtype, dtype))


def _rounded(x: Leaf, dtype: DTypeLike, words: Words | None, *, signed: bool) -> Leaf:
    """Rounds to bfloat16 stochastically, and to other dtypes to nearest."""
    # Rounded to nearest, a moment that moves by less than half an ulp a step would never move.
    if dtype != jnp.bfloat16 or words is None:
        return nearest(x, dtype)
    x = x.astype(jnp.float32)
    if signed:
        rounded, _ = split(x, dtype, 0, words)
    else:
        # Without a sign, patterns have the order of the numbers. The last of them is a NaN, which
        # must not overflow to zero. A GPU adds and takes the minimum in one instruction.
        word = jnp.minimum(_pattern(x) + (words >> np.uint32(16)), np.uint32(2**31 - 1))
        rounded = jax.lax.bitcast_convert_type((word >> np.uint32(16)).astype(jnp.uint16), dtype)
    # The cast changes nothing, but makes XLA for CPU keep the result. Otherwise it would compute it
    # again for the step, with a copy of the old moment.
    return join(rounded).astype(dtype)
