"""Moments in 8 bits: how their codes are spaced, and which of two neighbours is stored.

nu counts in powers of a row's scale s, and mu, after step t, in units q of the nu stored with it:

    nu = s (c / n)^12                    c = 1 ... n, and c = 0 for nu = 0 alone
    mu = q 8 c / (16 n - 15 |c|)        c = -n ... n
    q = sqrt(nu) (1 - 0.9^t) / sqrt(1 - 0.999^t)

where n says how fine the codes are. The twelfth power reaches from s down to n^-12 s, which is
2^-96 s for n = 255. Codes of mu lie q / 2n apart around 0, where a step has most of its values,
and ever wider outwards, up to +-8 q: no gradients take |m| beyond
(1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)) sqrt(v), 7.27 with the defaults (by Cauchy-Schwarz), and
where a b2 still closer to 1 allows more, it is cut off. Every number between two neighbouring codes
becomes one of them at random, such that its mean over the thresholds is the number itself.

All arithmetic is elementwise, in the floating dtype of the moments; codes travel as numbers of
that dtype or as int32. The scale has one element for each row: what is taken of it is cheap.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from adam_jax._moments import sqrt
from adam_jax._types import Codes, RealLeaf, Word


class Levels(NamedTuple):
    """How many codes above 0 each moment has."""

    mu: int
    nu: int


ALONE = Levels(mu=2**7 - 1, nu=2**8 - 1)
# nu forgets slowly, and what is rounded adds up over 1 / (1 - b2) steps; mu is soon renewed. When
# both are stored in 8 bits, mu is worth more to the step with 7 of the 16, and nu with 9.
SHARED = Levels(mu=2**6 - 1, nu=2**9 - 1)


def join(mu_code: Codes, nu_code: Codes) -> Codes:
    """Both codes, 7 bits of mu and 9 of nu, as one int16."""
    return (mu_code << 9 | nu_code).astype(jnp.int16)


def bytes_of(word: Codes) -> tuple[Codes, Codes]:
    """The int8 and the uint8 in which a joint word is stored: nu's lowest bit is with mu."""
    mu_byte = word >> 8 & ~1 | word & 1
    return mu_byte.astype(jnp.int8), (word >> 1 & 0xFF).astype(jnp.uint8)


def split(mu_byte: Codes, nu_byte: Codes) -> tuple[Codes, Codes]:
    """The codes of mu and nu, as int32, in the two bytes."""
    mu_byte, nu_byte = mu_byte.astype(jnp.int32), nu_byte.astype(jnp.int32)
    return mu_byte >> 1, 2 * nu_byte + (mu_byte & 1)


def decode_nu(code: RealLeaf, scale: RealLeaf, n: int) -> RealLeaf:
    """The value of nu of a code."""
    return jax.lax.square(_sixth_power(code * (1 / n))) * scale


def nu_root(code: RealLeaf, scale: RealLeaf, n: int) -> RealLeaf:
    """The square root of nu of a code, taken once for each row and not for each element.

    Never 0, like `_moments.sqrt`.
    """
    root = _sixth_power(code * (1 / n)) * jnp.sqrt(scale)
    return jnp.maximum(root, sqrt(jnp.zeros_like(scale)))


def encode_nu(nu: RealLeaf, scale: RealLeaf, threshold: RealLeaf, n: int) -> RealLeaf:
    """The code of nu, which is at most `scale`; `threshold` is uniform in [0, 1)."""
    z = nu * (1 / jnp.maximum(scale, jnp.finfo(scale.dtype).tiny))
    root = jnp.exp2(jnp.log2(z) * (1 / 12))
    # Code 0 is for 0 alone: a divisor that may round to 0 would make steps without bound.
    low = jnp.clip(jnp.floor(n * root), 1, n - 1)
    a, b = (jax.lax.square(_sixth_power(code * (1 / n))) for code in (low, low + 1))
    up = z - a > threshold * (b - a)
    return jnp.where(nu > 0, jnp.where(up, low + 1, low), 0)


def head_start(step: Word, dtype: DTypeLike) -> RealLeaf:
    """How far m runs ahead of sqrt(v) in the first steps: 3.2, 6.5, 1.

    That is q / sqrt(nu), the ratio of their bias corrections with the default betas. Constant
    gradients have mu = q from the first step on, where codes are close. With other betas it is
    not that ratio, but a unit all the same.
    """
    t = jnp.maximum(step, 1).astype(dtype)
    return -jnp.expm1(t * math.log(0.9)) / jnp.sqrt(-jnp.expm1(t * math.log(0.999)))


def decode_mu(code: RealLeaf, q: RealLeaf, n: int) -> RealLeaf:
    """The value of mu of a code that counts in units of q."""
    return 8 * code / (16 * n - 15 * jnp.abs(code)) * q


def encode_mu(mu: RealLeaf, q: RealLeaf, threshold: RealLeaf, n: int) -> RealLeaf:
    """The code of mu in units of q; mu counts as at most 8 q in magnitude."""
    x = jnp.abs(mu)
    low = jnp.clip(jnp.floor(16 * n * (x / (8 * q + 15 * x))), 0, n - 1)
    # (x - a) > threshold (b - a), with a and b the neighbours' values, multiplied by both of
    # their denominators.
    below = 16 * n - 15 * low
    up = (below - 15) * (x * below - 8 * low * q) > threshold * q * (8 * 16 * n)
    return jnp.sign(mu) * jnp.where(up, low + 1, low)


def _sixth_power(x: RealLeaf) -> RealLeaf:
    x2 = jax.lax.square(x)
    return jax.lax.square(x2) * x2
