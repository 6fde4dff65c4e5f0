"""Computes with one leaf's numbers: decayed averages, bias corrections, the parts of a step.

Everything here is elementwise on arrays of one floating dtype, which is float32 or float64
(complex64 or complex128 for mu). The formulas are those of Kingma and Ba, arXiv:1412.6980, in
forms that keep in float32 what the algebra promises.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from adam_jax._types import Leaf, RealLeaf, Scalar


class Decay(NamedTuple):
    """A decay rate b in the three forms that float32 cannot derive from each other.

    For b = 0.999, float32 gets 1 - b wrong by 1e-5, and b^t by more at every step. So 1 - b
    and log b are computed in double precision on the host whenever b is a Python number.
    """

    b: Scalar
    one_minus_b: Scalar
    log_b: Scalar  # read only where b >= 1/2, see `bias_correction`

    @classmethod
    def of(cls, b: Scalar) -> "Decay":
        """Prepares a decay rate: a Python number in [0, 1), or an array or tracer of one."""
        if not isinstance(b, jax.Array):
            b = float(b)
            return cls(b, 1 - b, math.log(max(b, 0.5)))
        if not jnp.issubdtype(b.dtype, jnp.floating):
            b = b.astype(jnp.result_type(float))
        if jnp.finfo(b.dtype).bits < 32:
            # `optax.inject_hyperparams` rounds hyperparameters to the parameters' dtype. In
            # bfloat16 every decay rate above 1 - 2^-9 becomes 1, and a decay rate of 1 would never
            # learn anything. The middle of the interval that rounds to 1 replaces it: 0.99902.
            below_one = 1 - float(jnp.finfo(b.dtype).epsneg) / 4
            b = b.astype(jnp.float32)
            b = jnp.where(b == 1, below_one, b)
        one_minus_b = 1 - b  # exact for b >= 1/2
        return cls(b, one_minus_b, jnp.log1p(-jnp.minimum(one_minus_b, 0.5)))


class Blend(NamedTuple):
    """A decay rate b as a step from the average or the new number, whichever weighs more."""

    from_new: Scalar  # 1 for b < 1/2 and 0 otherwise
    step: Scalar  # -b or 1 - b

    @classmethod
    def of(cls, decay: Decay) -> "Blend":
        """Prepares a decay rate once for all elements."""
        from_new = jnp.asarray(decay.b) < 0.5
        step = jnp.where(from_new, -decay.b, decay.one_minus_b)
        return cls(from_new.astype(step.dtype), step)


def decayed(average: Leaf, new: Leaf, blend: Blend) -> Leaf:
    """Returns the average b average + (1 - b) new.

    In float32 the two weights of the textbook form do not sum to 1. A step from `average` (or
    from `new`, if b < 1/2) has no such bias, and b = 0 returns `new` exactly.
    """
    return jnp.where(blend.from_new > 0, new, average) + blend.step * (new - average)


def bias_correction(decay: Decay, count: RealLeaf) -> RealLeaf:
    """Returns 1 - b^count for a step count >= 1, within about an ulp for every b in [0, 1)."""
    # Both branches are finite with finite derivatives. So gradients with respect to b are finite
    # even at b = 0, where log b does not exist.
    return jnp.where(
        decay.b < 0.5,
        1 - jnp.asarray(decay.b, count.dtype) ** count,
        -jnp.expm1(count * decay.log_b),
    )


def abs_sq(x: Leaf) -> RealLeaf:
    """Returns |x|^2, real for complex x."""
    return jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)


def saturate(g: Leaf, stored: DTypeLike, *, passing: bool = True) -> Leaf:
    """Limits finite gradients to 2^63 in magnitude, so that their squares stay finite.

    `stored` is the narrowest dtype that moments are stored in; for float64 the limit is 2^511.

    Without the limit a single gradient of 1e20 would make nu infinite for good. Without it on the
    first moment too, the step would exceed its bound. Infinity and NaN pass: they show that a
    computation failed, and an optimizer should not hide that. With `passing=False` infinity is
    limited too; that is for callers that pass it on by other means.
    """
    if jnp.iscomplexobj(g):
        return jax.lax.complex(
            saturate(g.real, stored, passing=passing), saturate(g.imag, stored, passing=passing)
        )
    limit = g.dtype.type(2.0 ** (jnp.finfo(stored).maxexp // 2 - 1))
    clamped = jax.lax.clamp(-limit, g, limit)
    return jax.lax.select(jax.lax.is_finite(g), clamped, g) if passing else clamped


def sqrt(x: RealLeaf) -> RealLeaf:
    """Returns a square root that is never 0, so dividing by it needs no special case.

    x counts as at least the dtype's smallest normal number, 2^-126 in float32. So 0 / sqrt(0) is 0.
    The derivative at 0 is 0 too, where an infinite one, times 0, would be NaN.
    """
    return jnp.sqrt(jnp.maximum(x, jnp.finfo(x.dtype).tiny))


def real_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """Returns the dtype of the real and imaginary parts: float32 for complex64 and for float32."""
    return jnp.finfo(dtype).dtype


def arithmetic_dtype(*dtypes: DTypeLike) -> np.dtype[Any]:
    """Returns the dtype to compute in: wide enough for all of these, and at least float32."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes, np.dtype(np.float32))
