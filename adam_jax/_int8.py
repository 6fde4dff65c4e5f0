"""Moments in 8 bits: how their codes are spaced, and which of two neighbours is stored.

Codes are what a few integer operations make of the pattern of a float32. As an integer, a pattern
is a logarithm to base 2 that is linear between powers of two; so a tenth of it is nearly a tenth
root, and its negative nearly a reciprocal:

    pattern(root(z)) = pattern(1) - (pattern(1) - pattern(z)) / 10
    pattern(reciprocal(w)) = 2 pattern(1) - pattern(w)

Both are monotone, can be inverted exactly, and are linear between the numbers that have codes. So
what becomes one of the two codes around it at random, with the probabilities that are right on
average for codes, is right on average itself. nu counts in its row's scale s, and mu, after step
t, in q, which is made of the nu stored with it:

    root(nu / s) = (c + 1) / n                       c = 0 ... n - 1
    reciprocal(4 |mu| / q + 1) = 1 - c / n           c = 0 ... 61/64 n, and a sign
    q = 3/2 h(t) sqrt(nu), or up to 6% more          h(t) = (1 - 0.9^t) / sqrt(1 - 0.999^t)

where n says how fine the codes are. For n = 480, codes of nu are 1/48 to 1/24 of it apart down to
s / 2^10, twice as far down to s / 2^20, and so on; the smallest is s / 2^89. Those of mu are q / 2n
apart up to q / 4, four times as far up to 3/4 q, and so on up to 5.75 q, or 8.6 h(t) sqrt(nu): no
gradients take |m| beyond (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)) sqrt(v), 7.27 sqrt(v) with the
defaults (by Cauchy-Schwarz), and where a b2 still closer to 1 allows more, it is cut off.

Codes are int32, and arithmetic on them is float32, whatever the moments' dtype.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adam_jax._moments import sqrt
from adam_jax._types import Codes, RealLeaf, Word, Words


class Levels(NamedTuple):
    """How many codes each moment has, mu's sign aside."""

    mu: int  # a power of two
    nu: int  # 15 times one: what is linear between powers of two of nu begins and ends on a code


ALONE = Levels(mu=2**7, nu=15 * 2**4)
# nu forgets slowly, and what is rounded adds up over 1 / (1 - b2) steps; mu is soon renewed. When
# both are stored in 8 bits, mu is worth more to the step with 7 of the 16, and nu with 9.
SHARED = Levels(mu=2**6, nu=15 * 2**5)

_ROOT = 10
_ONE = 0x3F800000  # the pattern of 1
_LOW = 0x3B000000  # of 2^-9, less than any root
_WHOLE = np.float32(1.5 * 2**23)


def join(mu_code: Codes, nu_code: Codes) -> Codes:
    """Both codes, 7 bits of mu and 9 of nu, as one int16."""
    return (mu_code << 9 | nu_code).astype(jnp.int16)


def bytes_of(word: Codes) -> tuple[Codes, Codes]:
    """The int8 and the uint8 in which a joint word is stored: nu's highest bit is with mu."""
    return (word >> 8).astype(jnp.int8), word.astype(jnp.uint8)


def split(mu_byte: Codes, nu_byte: Codes) -> tuple[Codes, Codes]:
    """The codes of mu and nu in the two bytes."""
    word = mu_byte.astype(jnp.int32) << 8 | nu_byte.astype(jnp.int32)
    return word >> 9, word & 0x1FF


def decode_nu(code: Codes, n: int) -> RealLeaf:
    """The nu / s of a code."""
    return _from_root((code.astype(jnp.float32) + 1) * (1 / n))


def encode_nu(z: RealLeaf, noise: RealLeaf, n: int) -> tuple[Codes, RealLeaf]:
    """The code of nu = z s, z in [0, 1], and the z of the code; `noise` is in [-1/2, 1/2)."""
    # What is added gives 0 a code. At the other end there is room for a z that is an ulp above 1.
    z = z.astype(jnp.float32) + np.float32(n**-_ROOT)
    lowest = np.uint32(_ONE - _ROOT * (_ONE - _LOW))
    root = _number(jax.lax.div(_pattern(z) - lowest, np.uint32(_ROOT)) + np.uint32(_LOW))
    code = _rounded(root * n + noise) - 1
    return code, decode_nu(code, n)


def unit_of_mu(z: RealLeaf, unit: RealLeaf, step: Word) -> RealLeaf:
    """The q of a step, in the dtype of `unit`, given the stored nu = z units.

    h is by how much m runs ahead of sqrt(v) in the first steps: 3.2 at the first, then 6.5, in
    the end 1. It is the ratio of their bias corrections with the default betas. With other betas
    it is not, but q is a unit all the same.
    """
    rough_root = _number((_pattern(z) >> 1) + np.uint32(_ONE // 2))  # 1 to 1.061 times sqrt(z)
    t = jnp.maximum(step, 1).astype(unit.dtype)
    h = -jnp.expm1(t * math.log(0.9)) / jnp.sqrt(-jnp.expm1(t * math.log(0.999)))
    return rough_root.astype(unit.dtype) * (1.5 * h * sqrt(unit))


def decode_mu(code: Codes, q: RealLeaf, n: int) -> RealLeaf:
    """The value of mu of a code that counts in units of q."""
    y = 1 - (code & (n - 1)).astype(jnp.float32) * (1 / n)
    return _from_reciprocal(y, code.astype(jnp.uint32), q)


def encode_mu(mu: RealLeaf, q: RealLeaf, noise: RealLeaf, n: int) -> tuple[Codes, RealLeaf]:
    """The code of mu in units of q, and its value; mu counts as at most 5.75 q in magnitude."""
    w = jnp.minimum((jnp.abs(mu) * (1 / q)).astype(jnp.float32) + 0.25, 6)
    whole = _rounded(_quarter_of_reciprocal(w) * n + noise)
    sign = _pattern(mu.astype(jnp.float32))
    value = _from_reciprocal(whole.astype(jnp.float32) * (1 / n), sign, q)
    return jnp.where(mu < 0, -whole, n - whole), value


def _from_root(root: RealLeaf) -> RealLeaf:
    return _number(_pattern(root) * np.uint32(_ROOT) - np.uint32((_ROOT - 1) * _ONE % 2**32))


def _from_reciprocal(y: RealLeaf, sign: Words, q: RealLeaf) -> RealLeaf:
    x = _pattern(_quarter_of_reciprocal(y) - 0.25) | sign & np.uint32(2**31)
    return _number(x).astype(q.dtype) * q


def _rounded(x: RealLeaf) -> Codes:
    """The nearest whole number, for |x| < 2^22."""
    # Near 1.5 2^23, where all numbers are whole, patterns count by ones. A cast costs more: it
    # has to say what becomes of NaN and of large numbers. (If x is a constant of the program plus
    # noise, XLA adds the two constants first, and loses the fraction: the code is off by up to 1.
    # That takes a gradient and a state that are both constants.)
    return jax.lax.bitcast_convert_type(x + _WHOLE, jnp.int32) - _WHOLE.view(np.int32)


def _quarter_of_reciprocal(x: RealLeaf) -> RealLeaf:
    return _number(np.uint32(2 * _ONE - (2 << 23)) - _pattern(x))


def _pattern(x: RealLeaf) -> Words:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _number(pattern: Words) -> RealLeaf:
    return jax.lax.bitcast_convert_type(pattern, jnp.float32)
